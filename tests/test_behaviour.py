"""Recorded runs stay what they are: their order, batches, exports and training step.

`tests/golden/behaviour.json` was recorded before the package was rebuilt inside. What is integers, bytes or text is
compared exactly. Of floats there are sums, because statistics and decoded pictures differ in their last bits between
processors; on a processor like the one of the record, their bytes are compared as well.

    python tests/test_behaviour.py --record        # after a change of behaviour that is meant; say why in the commit
"""

import hashlib
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import pytest

from octo_like.common.defaults import default_config
from octo_like.common.schema import flatten, synthetic_batch
from octo_like.data import bench
from octo_like.data.inputs import inputs_from_config
from octo_like.policy.policy import Policy
from octo_like.training import sharding
from octo_like.training.program import build_program, network_from_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "golden" / "behaviour.json"
SHARED = ROOT.parent / "shared"
BATCHES = 200


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.is_file() else []
    return hashlib.sha256(names[0].encode()).hexdigest()[:12] if names else "unknown"


def tiny_model() -> dict:
    from configs import tabletop

    model = tabletop.model()
    del model["observation_tokenizers"]["wrist"]
    model.update(token_dim=32)
    model["transformer"].update(num_layers=1, num_heads=2, mlp_dim=64)
    model["task_tokenizers"]["language"].update(dim=16)
    model["observation_tokenizers"]["primary"]["stem"].update(layers=((8, 8, 16),), num_keypoints=8)
    model["heads"]["action"].update(hidden_dim=16)
    return model


def config_of(name: str, folder: pathlib.Path):
    """The config of a recorded run; its data is made in `folder`."""
    config = default_config()
    config.batch_size, config.num_steps, config.window_size = 8, 1000, 2
    config.model = tiny_model()
    config.model.heads.action.action_dim = 7
    config.image_sizes = dict(primary=(64, 64))
    config.text.max_length = 14
    config.proprio_dim = 8
    config.eval.batches = 2
    config.data.data_dir = str(folder)
    if name == "memory":
        from configs import tabletop

        config.data.update(kind="memory", episodes="tabletop_pusher=12 tabletop_gripper=9 tabletop_arm=9", workers=0)
        config.data.datasets = {key: tabletop.dataset(key, weight=w) for key, w in (("tabletop_arm", 2.0),)}
        config.data.datasets.update({key: tabletop.dataset(key) for key in ("tabletop_gripper",)})
        config.data.datasets.tabletop_pusher = tabletop.dataset("tabletop_pusher", proprio=False, wrist=False)
        config.data.update(episodes_mixed=8, num_lanes=4)
    elif name == "rlds":
        names = bench.make_datasets(str(folder), 3, size=(48, 64), episodes=5, steps=12)
        in_canonical_bytes(folder)
        del config.model["auxiliaries"]
        config.image_sizes = dict(primary=(32, 40), wrist=(24, 24))
        config.goal_images = ("primary",)
        fields = [bench.bench_fields(one) for one in names]
        fields[0].update(normalization="bounds", weight=2.0)
        fields[1].update(val_fraction=0.3, subsample_length=5)
        fields[2].update(
            num_demos=6, num_demos_of="training", relative_to=(0, 1, 2, None, None, None, None), chunk_length=4
        )
        config.data.datasets = dict(zip(names, fields, strict=True))
        config.data.update(balance_weights=True, drop_task_prob=0.1, image_dropout_prob=0.3, max_goal_distance=6)
        config.data.update(max_visits=3, host_memory_gb=0.25)
        rows = {f"put block 0 into bin {n}": ["the block goes into the bin", "bin it"] for n in range(40)}
        (folder / "paraphrases.json").write_text(json.dumps(rows))
        config.data.paraphrases = str(folder / "paraphrases.json")
    elif name == "bridge":
        del config.model["auxiliaries"]
        config.data.update(
            data_dir=str(SHARED / "bridge_debug"), cache_dir=str(folder), decode="fast", octo_compat=True
        )
        image = dict(primary="image_0")
        config.data.datasets = dict(
            bridge_dataset=dict(standardize="bridge_dataset", image_keys=image, val_split=None, val_fraction=0.1)
        )
    return config


def in_canonical_bytes(folder: pathlib.Path) -> None:
    """Writes all records again with their features sorted: protocol buffers order a map anew in every process."""
    import tensorflow as tf

    for path in sorted(map(str, folder.rglob("*.tfrecord*"))):
        records = [record.numpy() for record in tf.data.TFRecordDataset(path)]
        with tf.io.TFRecordWriter(path) as writer:
            for record in records:
                writer.write(tf.train.Example.FromString(record).SerializeToString(deterministic=True))


def fingerprint(arrays: dict[str, np.ndarray]) -> dict:
    """{"exact": hash of all that is not float, "float": sums of what is, "bytes": hash of everything}."""
    exact, everything, sums = hashlib.sha256(), hashlib.sha256(), {}
    for key, value in sorted(arrays.items()):
        value = np.ascontiguousarray(value)
        head = f"{key} {value.dtype} {value.shape}".encode()
        everything.update(head + value.tobytes())
        if value.dtype.kind == "f":
            exact.update(head)
            wide = value.astype(np.float64)
            sums[key] = [float(wide.sum()), float(np.abs(wide).sum()), float((wide.ravel() * _ramp(wide.size)).sum())]
        elif key.rsplit("/")[-1].startswith("image_") and value.dtype == np.uint8:
            exact.update(head)  # decoders round as the processor lets them
            sums[key] = [float(value.sum(dtype=np.float64)), 0.0, 0.0]
        else:
            exact.update(head + value.tobytes())
    return {"exact": exact.hexdigest(), "float": sums, "bytes": everything.hexdigest()}


def _ramp(size: int) -> np.ndarray:
    return np.cos(np.arange(size))


def batches_of(name: str) -> dict:
    """Order spec, training batches of two processes, a sought one, and validation of a recorded run."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, pathlib.Path(folder))
        network = network_from_config(config)
        found = {}
        for index in range(2):
            inputs = inputs_from_config(config, network.spec, network.tokenizer, process_index=index, process_count=2)
            with inputs.stream as stream:
                spec = json.dumps(stream.order_spec, sort_keys=True, default=str).replace(folder, "FOLDER")
                found[f"order spec of process {index}"] = {"text": hashlib.sha256(spec.encode()).hexdigest()}
                total: dict[str, np.ndarray] = {}
                for number in range(BATCHES):
                    if number == BATCHES // 2:
                        stream.seek(8 * 5000)
                    for key, leaf in flatten(next(stream)):
                        total.setdefault(key, []).append(leaf)
                found[f"batches of process {index}"] = fingerprint({k: np.stack(v) for k, v in total.items()})
            for dataset, iterator in inputs.validation.items():
                leaves = {f"{i}/{key}": leaf for i, batch in enumerate(iterator) for key, leaf in flatten(batch)}
                found[f"validation of {dataset}, process {index}"] = fingerprint(leaves)
        return found


def export_and_step() -> dict:
    """The files of an exported policy, and the program of a training step."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of("memory", pathlib.Path(folder))
        config.augmentation = dict(primary=dict(brightness=0.1, crop_scale=(0.9, 1.0)))
        config.data.kind = "synthetic"
        network = network_from_config(config)
        inputs = inputs_from_config(config, network.spec, network.tokenizer)
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(network.init_params, jax.random.key(0))
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
        described = {"model": config.model.to_dict(), "batch_spec": network.spec.to_json()}
        Policy(described, params, inputs.statistics, network.tokenizer).save_pretrained(f"{folder}/export")
        files = sorted(path for path in pathlib.Path(folder, "export").rglob("*") if path.is_file())
        mesh = sharding.make_mesh(-1, 1)
        made = dict(init_params=network.init_params, init_from=jax.random.key(0), frozen=network.frozen)
        program = build_program(config, network.model, mesh, **made)
        batch = synthetic_batch(network.spec, config.batch_size)
        text = program.step.lower(program.state, batch).as_text()
        return {
            # README.md is for people, SHA256SUMS follows from the others.
            "export": {
                p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                for p in files
                if p.name not in ("README.md", "SHA256SUMS")
            },
            "step": {"text": hashlib.sha256(text.encode()).hexdigest(), "lines": text.count("\n")},
        }


def record_of(name: str) -> dict:
    return export_and_step() if name == "export" else batches_of(name)


@pytest.mark.parametrize("name", ["memory", "rlds", "bridge", "export"])
def test_behaves_as_recorded(name):
    if name == "bridge" and not (SHARED / "bridge_debug").is_dir():
        pytest.skip("../shared/bridge_debug is not here")
    recorded = json.loads(RECORD.read_text())
    found = record_of(name)
    if recorded["processor"] != processor():
        found, wanted = comparable(found), comparable(recorded[name])
    else:
        wanted = recorded[name]
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        sums, of_record = found[key].pop("float", {}), value.pop("float", {})
        assert found[key] == value, f"{name}: {key} is not what it was"
        assert set(sums) == set(of_record)
        for leaf, numbers in of_record.items():
            scale = max(1.0, abs(numbers[1]), abs(numbers[0]))
            np.testing.assert_allclose(sums[leaf], numbers, rtol=0, atol=2e-4 * scale, err_msg=f"{name}: {key}: {leaf}")


def comparable(record: dict) -> dict:
    """What must be the same on any processor: not the last bits of floats, nor what is hashed with them."""
    return {
        key: {k: v for k, v in value.items() if k != "bytes"}
        for key, value in record.items()
        if not key.startswith("order spec")
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    names = ("memory", "rlds", "bridge", "export")
    RECORD.write_text(
        json.dumps({"processor": processor(), **{name: record_of(name) for name in names}}, indent=1) + "\n"
    )
