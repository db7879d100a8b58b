"""Training batches against reference values: the reference trajectories as RLDS, read by the stream that trains.

The references and what they mean: golden/README.md beside the reference arrays. Each case is written as a dataset of
real records, and one pass of the stream over it is compared, step by step. Where a reference was computed from injected
draws, the stream's keyed draws are replaced by them.
"""

import dataclasses
import functools
import itertools
import pathlib

import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, flatten, unflatten
from octo_like.common.text import TextTokenizer
from octo_like.data.batches import assemble
from octo_like.data.order.keys import uniform
from octo_like.data.oxe import vocabulary as s
from octo_like.data.prepare import prepare_datasets
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf
from tests.data.streams import make_train_stream

EXCERPT = pathlib.Path(__file__).resolve().parent.parent / "golden" / "pipeline_excerpt.npz"
LANGUAGE = 14
ONE = dict(window_size=1, action_horizon=1)

BINARIZED = s.Standardize({"action": s.expand(s.binarize_gripper(s.field("observation/gripper")))})
ABSOLUTE = s.Standardize({"action": s.expand(s.rel_to_abs_gripper(s.field("observation/gripper")))})
MOVED = s.Standardize(
    {
        "action": s.concat(
            s.delta(s.field("observation/state")[0:6]), s.drop_last_step(s.field("observation/command")[-1:])
        )
    },
    passthrough_steps=(("drop_last_steps", 1),),
)


@pytest.fixture(scope="module", params=["excerpt", "all"])
def golden(request):
    """Reference arrays: the excerpt kept with the tests, then all of them where they are."""
    path = EXCERPT if request.param == "excerpt" else request.getfixturevalue("shared") / "golden" / "pipeline.npz"
    return dict(np.load(path))


def tree(golden, prefix):
    """The arrays below a prefix, as a nested dict."""
    found = {key[len(prefix) + 1 :]: value for key, value in golden.items() if key.startswith(prefix + "/")}
    assert found, prefix
    return unflatten(found)


def cases(golden, topic, depth=1):
    """Names of the cases of a topic."""
    return sorted({"/".join(key.split("/")[1 : 1 + depth]) for key in golden if key.startswith(topic + "/")})


# ---------------------------------------------------------------- trajectories to records, records to samples


def picture(number):
    """A 2 x 2 picture that tells its number."""
    return np.full((2, 2, 3), 10 + 20 * number, np.uint8)


def encoded(image):
    return tf.io.encode_png(image).numpy()


class Reference:
    """Trajectories of different lengths as one RLDS dataset, nothing of which is normalised or held out.

    Args:
      trajectories: nested dicts of arrays whose first axis is the step; images are (T,) bytes or (T, h, w, 3) uint8.
      fields: of the DatasetSpec.
    """

    def __init__(self, folder, trajectories, **fields):
        import tensorflow_datasets as tfds
        from etils import epath

        def feature(x):
            if isinstance(x, dict):
                return {key: feature(value) for key, value in x.items()}
            kind = x.dtype.kind in "SO"
            return tfds.features.Text() if kind else tfds.features.Tensor(shape=x.shape[1:], dtype=x.dtype)

        def step(x, t):
            return {key: step(value, t) if isinstance(value, dict) else value[t] for key, value in x.items()}

        features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(feature(trajectories[0]))})

        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            code_path = epath.Path(__file__)
            VERSION = tfds.core.Version("1.0.0")
            name = "reference"

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for number, x in enumerate(trajectories):
                    T = len(next(value for _, value in flatten(x)))
                    yield number, {"steps": [step(x, t) for t in range(T)]}

        config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        Builder(data_dir=str(folder)).download_and_prepare(download_config=config)
        fields = dict(image_keys={}, val_fraction=0, language_key=None) | fields
        spec = DatasetSpec.from_dict(fields, "reference")
        prepared = prepare_datasets({"reference": spec}, str(folder), str(folder), progress=False)["reference"]
        plain = {key: unscaled(x) for key, x in prepared.statistics.items() if isinstance(x, dict) and key != "extra"}
        extra = {name: unscaled(x) for name, x in prepared.statistics.get("extra", {}).items()}
        self.prepared = dataclasses.replace(prepared, statistics={**prepared.statistics, **plain, "extra": extra})

    def samples(self, monkeypatch, draws=None, normalization=None, statistics=None, task=(), **spec):
        """{T: (T, ...) batch entries of the trajectory of T steps, in the order of its steps}.

        Args:
          draws: purpose -> {T: (T,) values} in place of the keyed draws.
          normalization, statistics: in place of the dataset's.
          task: arguments of the stream. spec: fields of its BatchSpec.
        """
        prepared = self.prepared
        if statistics is not None:
            changed = dataclasses.replace(prepared.spec, normalization=normalization)
            prepared = dataclasses.replace(prepared, spec=changed, statistics={**prepared.statistics, **statistics})
        function, frames = prepared.function, int(prepared.train.frames.sum())
        fields = dict(image_sizes={}, action_dim=function.action_dim) | spec
        tokenizer = TextTokenizer.load("builtin", LANGUAGE) if fields.get("language_length") else None
        stream = make_train_stream(
            {"reference": prepared},
            BatchSpec(**fields),
            tokenizer,
            seed=0,
            batch_size=frames,
            num_lanes=1,
            episodes_mixed=len(prepared.train),
            **dict(task),
        )
        found = {}  # (T, t) -> the first sample of that step
        with stream, monkeypatch.context() as patch:
            for number in itertools.count():
                samples = stream.order.samples(stream.order.batch_rows(number))
                t = prepared.train.step_of(samples.episode, samples.frame)
                place = list(zip(prepared.train.steps[samples.episode].tolist(), t.tolist(), strict=True))
                if draws:
                    of_key = dict(zip(samples.key.tolist(), place, strict=True))
                    patch.setattr(assemble, "uniform", functools.partial(_drawn, draws, of_key))
                batch = dict(flatten(stream.batch(number)))
                for row, key in enumerate(place):
                    found.setdefault(key, {path: values[row] for path, values in batch.items()})
                if len(found) == frames:
                    break
        by_length = {T: [found[T, t] for t in range(T)] for T in {T for T, _ in found}}
        return {
            T: unflatten({path: np.stack([x[path] for x in rows]) for path in rows[0]}) for T, rows in by_length.items()
        }


def _drawn(draws, of_key, keys, purpose):
    if purpose not in draws:
        return uniform(keys, purpose)
    return np.array([draws[purpose][T][t] for T, t in (of_key[key] for key in keys.tolist())], np.float64)


def unscaled(statistics):
    """Statistics by which normalising changes nothing."""
    zeros = np.zeros_like(statistics["mean"])
    return {**statistics, "mean": zeros, "std": zeros + 1}


def goal_draw(goal, T):
    """Draws (T,) at which the goals are these steps."""
    t = np.arange(T)
    return (goal + 0.5 - t) / (T - t)


# ---------------------------------------------------------------- windows, chunks, goals


@pytest.fixture(scope="module")
def chunked(golden, tmp_path_factory):
    """The trajectories of `chunk`, with a picture and an instruction, so that either may be the task."""
    trajectories = []
    for T in {name.split("/")[0] for name in cases(golden, "chunk")}:
        given = tree(golden, f"chunk/{T}/in")
        steps = len(given["action"])
        observation = {
            "x": given["observation"]["x"],
            "image": np.array([encoded(picture(t)) for t in range(steps)], object),
        }
        text = np.array([b"go"] * steps, object)
        trajectories.append({"observation": observation, "action": given["action"], "language_instruction": text})
    fields = dict(image_keys={"primary": "image"}, extra_keys={"x": "x"}, language_key="language_instruction")
    return Reference(tmp_path_factory.mktemp("chunk"), trajectories, **fields)


def test_windows_and_chunks(golden, chunked, monkeypatch):
    names = [name for name in cases(golden, "chunk", 2) if not name.endswith("/in")]
    assert len(names) >= 24
    lengths = sorted({int(name.split("/")[0][1:]) for name in names})
    goals = {T: golden[f"chunk/T{T}/in/task_timestep"] for T in lengths}
    draws = {"goal": {T: goal_draw(goals[T], T) for T in lengths}}
    spec = dict(image_sizes={"primary": (2, 2)}, goal_images=("primary",), language_length=LANGUAGE)
    for case in sorted({name.split("/")[1] for name in names}):
        W, H = (int(part[1:]) for part in case.split("_")[:2])
        with_goal = case.endswith("_goal")
        spec |= dict(window_size=W, action_horizon=H, extra_observations={"x": (2,)})
        for compat in (True, False):
            task = dict(keep_goal_prob=float(with_goal), octo_compat=compat)
            got = chunked.samples(monkeypatch, draws, task=task, **spec)
            for T in lengths:
                want, sample = tree(golden, f"chunk/T{T}/{case}/upstream"), got[T]
                for key in ("x", "timestep", "timestep_pad_mask"):
                    np.testing.assert_array_equal(sample["observation"][key], want["observation"][key], err_msg=key)
                np.testing.assert_array_equal(sample["action"], want["action"])
                goal = goals[T] if with_goal else np.full(T, T - 1)
                np.testing.assert_array_equal(sample["task"]["timestep"], goal)
                index = golden[f"chunk/T{T}/{case}/corrected/action_index_unclamped"]
                # By default: past the end iff the unclamped index is greater than the goal (or the last) step.
                completed = want["observation"]["task_completed"] if compat else index > goal[:, None, None]
                np.testing.assert_array_equal(sample["action_pad_mask"], np.repeat(~completed[..., None], 2, -1))
                # The two rules differ exactly where the action is at the goal.
                corrected = golden[f"chunk/T{T}/{case}/corrected/observation/task_completed"]
                assert compat or ((corrected & ~completed) == (index == goal[:, None, None])).all()


def test_chunks_that_come_chunked(golden, tmp_path, monkeypatch):
    given = tree(golden, "chunk_prechunked/in")
    trajectory = {"observation": given["observation"], "action": given["action"]}
    reference = Reference(tmp_path, [trajectory], extra_keys={"x": "x"})
    for H, name in ((4, "chunk_prechunked"), (3, "chunk_prechunked_cut")):
        want = tree(golden, f"{name}/upstream")
        spec = dict(window_size=2, action_horizon=H, extra_observations={"x": (1,)})
        (got,) = reference.samples(monkeypatch, task=dict(octo_compat=True), **spec).values()
        for key in ("x", "timestep_pad_mask"):
            np.testing.assert_array_equal(got["observation"][key], want["observation"][key])
        np.testing.assert_array_equal(got["action"], want["action"])
        completed = want["observation"]["task_completed"][..., None]
        np.testing.assert_array_equal(got["action_pad_mask"], np.repeat(~completed, 2, -1))
    with pytest.raises(DataError, match="chunks of 4, shorter than action_horizon=5"):
        reference.samples(monkeypatch, window_size=2, action_horizon=5, extra_observations={"x": (1,)})


@pytest.mark.parametrize("limit", [None, 3])
def test_goals(golden, tmp_path, monkeypatch, limit):
    names = [name for name in cases(golden, "goal_relabel") if name.endswith(f"max{limit}")]
    assert len(names) >= 2
    trajectories, draws = [], {}
    for name in names:
        given = tree(golden, f"goal_relabel/{name}/in")
        there = given["observation"]["pad_mask_dict"]["image_primary"]
        images = [encoded(picture(t)) if seen else b"" for t, seen in enumerate(there)]
        trajectories.append(
            {"observation": {"image": np.array(images, object)}, "action": np.zeros((len(there), 1), np.float32)}
        )
        draws[len(there)] = given["uniform_draws"]
    reference = Reference(tmp_path, trajectories, image_keys={"primary": "image"})
    got = reference.samples(
        monkeypatch,
        {"goal": draws},
        task=dict(max_goal_distance=limit),
        image_sizes={"primary": (2, 2)},
        goal_images=("primary",),
        **ONE,
    )
    for name in names:
        want = tree(golden, f"goal_relabel/{name}/upstream")
        goal, task = want["goal_index"], got[len(want["goal_index"])]["task"]
        np.testing.assert_array_equal(task["timestep"], goal)
        seen = want["task"]["pad_mask_dict"]["image_primary"]
        np.testing.assert_array_equal(task["pad_mask_dict"]["image_primary"], seen)
        pictures = [picture(int(word[2:])) for word in want["task"]["image_primary"].tolist()]
        np.testing.assert_array_equal(task["image_primary"], np.stack(pictures) * seen[:, None, None, None])


def test_one_way_of_saying_what_to_do(golden, tmp_path, monkeypatch):
    given = tree(golden, "delete_task_conditioning/in")
    want = tree(golden, "delete_task_conditioning/upstream/task")
    texts = given["task"]["language_instruction"].astype(object)
    T = len(texts)
    images = np.array([encoded(picture(t)) for t in range(T)], object)
    trajectory = {"observation": {"image": images}, "action": np.zeros((T, 1), np.float32), "text": texts}
    reference = Reference(tmp_path, [trajectory], image_keys={"primary": "image"}, language_key="text")
    # Some of the reference's goals lie behind: below 0 a draw means that.
    draws = {"goal": {T: goal_draw(given["task"]["timestep"], T)}, "task": {T: given["uniform_draws"]}}
    task = reference.samples(
        monkeypatch,
        draws,
        task=dict(keep_goal_prob=float(given["keep_image_prob"])),
        image_sizes={"primary": (2, 2)},
        goal_images=("primary",),
        language_length=LANGUAGE,
        **ONE,
    )[T]["task"]
    for key in ("image_primary", "language_instruction"):
        np.testing.assert_array_equal(task["pad_mask_dict"][key], want["pad_mask_dict"][key], err_msg=key)
    np.testing.assert_array_equal(task["timestep"], want["timestep"])
    words = TextTokenizer.load("builtin", LANGUAGE).encode([text.decode() for text in want["language_instruction"]])
    for key, ids in words.items():
        np.testing.assert_array_equal(task["language_instruction"][key], ids)
    # What is left of the images is that of the goal step.
    left = np.array([picture(t) for t in want["timestep"]]) * (want["image_primary"] != b"")[:, None, None, None]
    np.testing.assert_array_equal(task["image_primary"], left)


# ---------------------------------------------------------------- masks, padding, normalisation


def test_what_is_missing(golden, tmp_path, monkeypatch):
    given, want = tree(golden, "add_pad_mask_dict/in"), tree(golden, "add_pad_mask_dict/upstream")
    observation = dict(given["observation"])
    del observation["timestep"]
    for key in ("image_primary", "image_wrist", "depth_primary"):
        content = encoded(picture(0)[..., :1] if key.startswith("depth") else picture(0))
        observation[key] = np.array([content if word else b"" for word in observation[key].tolist()], object)
    T = len(observation["proprio"])
    text = given["task"]["language_instruction"].astype(object)
    reference = Reference(
        tmp_path,
        [{"observation": observation, "action": np.zeros((T, 1), np.float32), "text": text}],
        image_keys={"primary": "image_primary", "wrist": "image_wrist"},
        depth_keys={"primary": "depth_primary"},
        proprio_keys=("proprio",),
        language_key="text",
    )
    sizes = dict(image_sizes={"primary": (2, 2), "wrist": (2, 2)}, depth_sizes={"primary": (2, 2)})
    got = reference.samples(monkeypatch, **sizes, proprio_dim=3, language_length=LANGUAGE, **ONE)[T]
    for key in ("image_primary", "image_wrist", "depth_primary", "proprio"):
        np.testing.assert_array_equal(got["observation"]["pad_mask_dict"][key][:, 0], want["observation"][key])
    text = got["task"]["pad_mask_dict"]["language_instruction"]
    np.testing.assert_array_equal(text, want["task"]["language_instruction"])


@pytest.mark.parametrize("case,limits", [("a", (7, 8)), ("b", (7, None)), ("c", (None, 6)), ("prechunked", (6, 8))])
def test_padding(golden, tmp_path, monkeypatch, case, limits):
    given, want = (tree(golden, f"pad_actions_and_proprio/{case}/{part}") for part in ("in", "upstream"))
    trajectory = {"observation": {"state": given["proprio"]}, "action": given["action"]}
    reference = Reference(tmp_path, [trajectory], proprio_keys=("state",))
    width, proprio_width = limits[0] or given["action"].shape[-1], limits[1] or given["proprio"].shape[-1]
    H = given["action"].shape[1] if given["action"].ndim == 3 else 1
    spec = dict(window_size=1, action_horizon=H, proprio_dim=proprio_width)
    (got,) = reference.samples(monkeypatch, **spec, action_dim=width).values()
    np.testing.assert_array_equal(got["action"][:, 0].reshape(want["action"].shape), want["action"])
    np.testing.assert_array_equal(got["observation"]["proprio"][:, 0], want["proprio"])
    known = np.broadcast_to(np.arange(proprio_width) < given["proprio"].shape[-1], want["proprio"].shape)
    np.testing.assert_array_equal(got["observation"]["proprio_pad_mask"][:, 0], known)
    T = len(given["action"])
    past = np.arange(T)[:, None] + np.arange(H) > T - 1
    mask = want["action_pad_mask"].reshape(T, H, width)
    np.testing.assert_array_equal(got["action_pad_mask"][:, 0], mask & ~past[..., None])
    with pytest.raises(DataError, match=rf"action has {given['action'].shape[-1]} dimensions, but batches hold 3"):
        reference.samples(monkeypatch, **spec, action_dim=3)


def test_normalisation(golden, tmp_path, monkeypatch):
    given = tree(golden, "normalize/in")
    T = len(given["action"])
    trajectory = {"observation": {"state": given["proprio"]}, "action": given["action"]}
    reference = Reference(tmp_path, [trajectory], proprio_keys=("state",))
    for kind in ("normal", "bounds"):
        for masked in (True, False):
            statistics = {key: {**reference.prepared.statistics[key], **given["stats"][key]} for key in given["stats"]}
            for key, dims in (("action", 4), ("proprio", 3)):
                statistics[key]["mask"] = given["mask"][:dims] if masked else np.ones(dims, bool)
            got = reference.samples(monkeypatch, None, kind, statistics, proprio_dim=3, **ONE)[T]
            want = tree(golden, f"normalize/{kind}_{'masked' if masked else 'unmasked'}/upstream")
            for key, value in (("action", got["action"][:, 0, 0]), ("proprio", got["observation"]["proprio"][:, 0])):
                stats = statistics[key]
                varies = (stats["std"] if kind == "normal" else stats["p99"] - stats["p01"]) > 0
                assert key == "proprio" or (~varies).sum() == 1
                np.testing.assert_allclose(value[:, varies], want[key][:, varies], rtol=1e-5, atol=1e-5)
                # A dimension without spread: 0, where Octo's bounds give -1.
                np.testing.assert_array_equal(value[:, ~varies & stats["mask"]], 0)


# ---------------------------------------------------------------- cameras


@pytest.mark.parametrize("case", range(4))
def test_image_dropout(shared, tmp_path, monkeypatch, case):
    golden = dict(np.load(shared / "golden" / "pipeline.npz"))
    given, want = (tree(golden, f"image_dropout/{case}/{part}") for part in ("in", "upstream"))
    slots, present = "abc", given["pad_mask"]
    observation = {slot: given[f"image_{slot}"][None] for slot in slots}
    keys = {slot: slot for slot, there in zip(slots, present, strict=True) if there}
    reference = Reference(
        tmp_path, [{"observation": observation, "action": np.zeros((1, 1), np.float32)}], image_keys=keys
    )
    kept = (present[: int(given["keep_index"])].sum() + 0.5) / present.sum()  # which of those that are there
    draws = {f"drop camera {slot}": {1: [u]} for slot, u in zip(slots, given["uniform_draws"], strict=True)}
    got = reference.samples(
        monkeypatch,
        draws | {"camera that is kept": {1: [kept]}},
        task=dict(image_dropout_prob=float(given["dropout_prob"])),
        image_sizes=dict.fromkeys(slots, (2, 2)),
        **ONE,
    )[1]["observation"]
    masks = [got["pad_mask_dict"][f"image_{slot}"][0, 0] for slot in slots]
    np.testing.assert_array_equal(masks, want["pad_mask"])
    for slot in slots:
        np.testing.assert_array_equal(got[f"image_{slot}"][0, 0], want[f"image_{slot}"])


def test_resizing(golden, tmp_path, monkeypatch):
    """A camera for each of the sizes, all of which read the same pictures."""
    names = {int(name): name for name in cases(golden, "resize")}
    sizes = {
        key.rsplit("_", 1)[1]: tuple(map(int, key.rsplit("_", 1)[1].split("x")))
        for key in golden
        if key.startswith("resize/0/upstream/lanczos3_") and "float" not in key
    }
    assert len(sizes) >= 2
    trajectories = []
    for number, name in names.items():
        images = np.array([encoded(golden[f"resize/{name}/in/image"])] * (number + 1), object)
        trajectories.append({"observation": {"image": images}, "action": np.zeros((number + 1, 1), np.float32)})
    reference = Reference(tmp_path, trajectories, image_keys=dict.fromkeys(sizes, "image"))
    got = reference.samples(monkeypatch, image_sizes=sizes, **ONE)
    for number, name in names.items():
        for slot in sizes:
            want = golden[f"resize/{name}/upstream/lanczos3_{slot}"].astype(int)
            assert np.abs(got[number + 1]["observation"][f"image_{slot}"][:, 0] - want).max() <= 1, slot


def test_decoding(shared, tmp_path, monkeypatch):
    golden = dict(np.load(shared / "golden" / "pipeline.npz"))
    records = [name for name in cases(golden, "bridge", 2) if name.startswith("train/record")]
    trajectories = []
    for number, name in enumerate(records, 1):
        content = golden[f"bridge/{name}/image_0_step0_jpeg"].tobytes()
        trajectories.append(
            {
                "observation": {"image": np.array([content] * number, object)},
                "action": np.zeros((number, 1), np.float32),
            }
        )
    reference = Reference(tmp_path, trajectories, image_keys=dict.fromkeys(("whole", "small"), "image"))
    got = reference.samples(monkeypatch, image_sizes={"whole": (64, 64), "small": (48, 40)}, **ONE)
    for number, name in enumerate(records, 1):
        images = got[number]["observation"]
        want = golden[f"bridge/{name}/image_0_step0_decoded/upstream"]
        np.testing.assert_array_equal(images["image_whole"][:, 0], np.stack([want] * number))
        want = golden[f"bridge/{name}/image_0_step0_resized_48x40/upstream"].astype(int)
        assert np.abs(images["image_small"][:, 0] - want).max() <= 1


# ---------------------------------------------------------------- grippers, actions from states


@pytest.mark.parametrize("name,function", [("binarize", "BINARIZED"), ("rel2abs", "ABSOLUTE")])
def test_grippers(golden, tmp_path, monkeypatch, name, function):
    found = [golden[f"gripper/{name}/{case}/in"] for case in range(4)]
    trajectories = [{"observation": {"gripper": x}, "action": x[:, None]} for x in found]
    reference = Reference(tmp_path, trajectories, standardize=f"{__name__}:{function}")
    got = reference.samples(monkeypatch, **ONE)
    for case, x in enumerate(found):
        want = golden[f"gripper/{name}/{case}/upstream"]
        np.testing.assert_allclose(got[len(x)]["action"][:, 0, 0, 0], want, atol=1e-6)


def test_actions_from_states(golden, tmp_path, monkeypatch):
    given, want = tree(golden, "relabel_actions/in"), tree(golden, "relabel_actions/upstream")
    observation = {"state": given["observation"]["state"], "command": given["action"]}
    trajectory = {"observation": observation, "action": given["action"]}
    reference = Reference(tmp_path, [trajectory], standardize=f"{__name__}:MOVED", proprio_keys=("state",))
    got = reference.samples(monkeypatch, proprio_dim=7, **ONE)[len(want["action"])]
    np.testing.assert_allclose(got["action"][:, 0, 0], want["action"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["observation"]["proprio"][:, 0], want["observation"]["state"])
