"""Checkpoints with the real Orbax: what comes back is what was saved, or it is said that it is not."""

import json
import logging
import pathlib
import random
import runpy
import sys
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octo_like.common import storage
from octo_like.training import checkpoint, integrity, leaves


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Damage is looked at twice; nobody has to wait for that here."""
    monkeypatch.setattr(storage, "PAUSES", (0.0,) * len(storage.PAUSES))


@flax.struct.dataclass
class State:
    """A training state as it occurs: nested parameters, optax state, PRNG key, several dtypes."""

    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


class Extra(NamedTuple):
    flags: jax.Array
    bits: jax.Array


def make_state(seed: int, *, width: int = 8, dtype=jnp.float32) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "head": {"kernel": jnp.asarray(rng.normal(size=(width, 16)), dtype), "bias": jnp.zeros(16, dtype)},
        "half": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16),
        "other": Extra(jnp.asarray([True, False, True]), jnp.asarray(rng.integers(0, 256, 7), jnp.uint8)),
    }
    tx = optax.masked(optax.adam(1e-3), jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), params))
    return State(jnp.int32(seed), params, tx.init(params), jax.random.key(seed))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(workdir, *steps, **options):
    with checkpoint.Checkpointer(workdir, **options) as saver:
        for step in steps:
            assert saver.save(step, make_state(step), {"position": 32 * step})


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(path: pathlib.Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def without_hashes(step: pathlib.Path) -> None:
    """Makes a step's manifest one of remote storage, where files are not hashed."""
    document = json.loads((step / "manifest.json").read_text())
    document["body"]["files"] = None
    document["sha256"] = integrity._digest(document["body"])
    (step / "manifest.json").write_text(json.dumps(document))


class TestRoundTrip:
    def test_every_dtype_and_container_comes_back(self, tmp_path):
        state = make_state(7)
        extra = {"position": 5, "statistics": {"a": {"mean": [0.1, 1 / 3]}}, "none": None}
        with checkpoint.Checkpointer(tmp_path, metadata={"config": {"seed": 1}}) as saver:
            assert saver.latest_step() is None
            saver.save(3, state, extra)
            restored, back = saver.restore(None, abstract(make_state(0)))
            assert saver.read().metadata == {"config": {"seed": 1}}
        assert_same(restored, state)
        assert back == extra

    def test_shapes_without_shardings_are_enough_on_one_process(self, tmp_path):
        save(tmp_path, 1)
        with checkpoint.Checkpointer(tmp_path) as saver:
            restored, _ = saver.restore(1, jax.eval_shape(lambda: make_state(0)))
        assert_same(restored, make_state(1))

    def test_arrays_may_be_donated_at_once(self, tmp_path):
        double = jax.jit(lambda x: 2 * x, donate_argnums=0)
        x = jnp.arange(100_000, dtype=jnp.float32)
        expected = np.asarray(x)
        with checkpoint.Checkpointer(tmp_path) as saver:
            saver.save(1, {"x": x})
            for _ in range(10):
                x = double(x)
            restored, _ = saver.restore(1, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
        np.testing.assert_array_equal(restored["x"], expected)

    def test_retention(self, tmp_path):
        save(tmp_path, 5, 10, 15, 20, 25, keep_last=2, keep_every=10)
        with checkpoint.Checkpointer(tmp_path) as saver:
            assert saver.all_steps() == [10, 20, 25]
            assert saver.restore(10, abstract(make_state(0)))[1] == {"position": 320}

    @pytest.mark.parametrize("mode,best", [("min", [10, 15]), ("max", [5, 20])])
    def test_the_best_steps_are_kept_over_restarts(self, tmp_path, mode, best):
        metrics = {5: 0.9, 10: 0.1, 15: 0.2, 20: 0.8, 25: None, 30: float("nan"), 35: 0.5}
        for steps in ((5, 10, 15), (20, 25, 30, 35)):
            with checkpoint.Checkpointer(tmp_path, keep_last=1, keep_best=2, best_mode=mode) as saver:
                for step in steps:
                    saver.save(step, make_state(step), metric=metrics[step])
        with checkpoint.Checkpointer(tmp_path, best_mode=mode) as saver:
            assert saver.all_steps() == sorted({*best, 35})
            assert saver.best_step() == (10 if mode == "min" else 5)
            assert saver.read(10 if mode == "min" else 5).metric == metrics[saver.best_step()]
        with pytest.raises(ValueError, match="unknown best_mode 'least'; valid: 'min', 'max'"):
            checkpoint.Checkpointer(tmp_path, best_mode="least")

    def test_some_arrays_of_a_step_on_the_host(self, tmp_path):
        save(tmp_path, 1)
        reader = checkpoint.Checkpointer(tmp_path, read_only=True)
        head = reader.load_arrays(1, "params/head/")
        assert set(head) == {"kernel", "bias"}
        np.testing.assert_array_equal(head["kernel"], make_state(1).params["head"]["kernel"])
        with pytest.raises(checkpoint.CheckpointNotFound, match="no array under 'ema/'; it holds .*params"):
            reader.load_arrays(1, "ema/")
        assert reader.best_step() is None
        assert checkpoint.has_checkpoint(tmp_path) and not checkpoint.has_checkpoint(tmp_path / "no")

    def test_another_dtype_only_on_request(self, tmp_path):
        save(tmp_path, 1)
        wanted = abstract(make_state(0, dtype=jnp.bfloat16))
        reader = checkpoint.Checkpointer(tmp_path, read_only=True)
        with pytest.raises(leaves.StateMismatch, match="kernel is float32.*expected bfloat16"):
            reader.restore(1, wanted)
        restored, _ = reader.restore(1, wanted, cast=True)
        kernel = restored.params["head"]["kernel"]
        assert kernel.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kernel, make_state(1).params["head"]["kernel"].astype(jnp.bfloat16))
        # An integer is no float: there is nothing to convert.
        counts = wanted.replace(step=jax.ShapeDtypeStruct((), jnp.float32, sharding=wanted.step.sharding))
        with pytest.raises(leaves.StateMismatch, match="step is int32"):
            reader.restore(1, counts, cast=True)

    def test_the_same_step_twice_is_saved_once(self, tmp_path):
        with checkpoint.Checkpointer(tmp_path) as saver:
            assert saver.save(1, make_state(1))
            assert not saver.save(1, make_state(2))
            assert_same(saver.restore(1, abstract(make_state(0)))[0], make_state(1))

    def test_works_under_the_transfer_guard(self, tmp_path):
        state = make_state(1)
        with checkpoint.Checkpointer(tmp_path) as saver, jax.transfer_guard("disallow"):
            saver.save(1, state)
            restored, _ = saver.restore(1, abstract(state))
        assert_same(restored, state)


class TestRefusals:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_non_finite_state_is_never_saved(self, tmp_path, value):
        state = make_state(1)
        state.params["head"]["kernel"] = state.params["head"]["kernel"].at[2, 3].set(value)
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(
                checkpoint.NonFiniteState, match="step 4 was not saved: not finite in params/head/kernel"
            ):
                saver.save(4, state)
            assert saver.all_steps() == []
            assert saver.save(5, make_state(5))
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["5"]

    def test_what_would_not_come_back_is_refused(self, tmp_path):
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(checkpoint.CheckpointError, match="extra/a/1 is a ndarray, expected JSON"):
                saver.save(1, make_state(1), {"a": [0, np.zeros(3)]})
            with pytest.raises(checkpoint.CheckpointError, match="n is a int; the state must consist of jax.Arrays"):
                saver.save(1, {"n": 3})
            with pytest.raises(checkpoint.CheckpointError, match=r"z has shape \(0, 3\)"):
                saver.save(1, {"z": jnp.zeros((0, 3))})
            with pytest.raises(checkpoint.CheckpointError, match="two leaves of the state have the same name: a/b"):
                saver.save(1, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})

    def test_another_state_is_named_leaf_by_leaf(self, tmp_path):
        save(tmp_path, 1)
        wanted = make_state(0, width=9)
        wanted.params["new"] = jnp.zeros(2)
        del wanted.params["half"]
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(leaves.StateMismatch) as error:
                saver.restore(None, abstract(wanted))
            # A sound checkpoint is not set aside because of a config.
            assert saver.all_steps() == [1]
        message = str(error.value)
        assert "not in the checkpoint: params/new" in message
        assert "only in the checkpoint: params/half" in message
        assert "params/head/kernel is float32[8, 16], expected float32[9, 16]" in message

    def test_read_only(self, tmp_path):
        save(tmp_path, 1, 2)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        for path in (tmp_path, tmp_path / "checkpoints"):
            reader = checkpoint.Checkpointer(path, read_only=True)
            assert reader.all_steps() == [1, 2]
            assert_same(reader.restore(None, abstract(make_state(0)))[0], make_state(2))
        one = checkpoint.Checkpointer(tmp_path / "checkpoints" / "1", read_only=True)
        assert one.all_steps() == [1] and one.read().extra == {"position": 32}
        with pytest.raises(checkpoint.CheckpointError, match="opened read-only"):
            one.save(3, make_state(3))
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before

    def test_directories_that_are_no_checkpoints(self, tmp_path):
        def message(path):
            with pytest.raises(checkpoint.CheckpointNotFound) as error:
                checkpoint.Checkpointer(path, read_only=True)
            return str(error.value)

        assert "does not exist; expected a run's directory with checkpoints/<step>/manifest.json" in message(
            tmp_path / "no"
        )
        assert "an empty directory" in message(tmp_path)
        (tmp_path / "photo.png").write_bytes(b"x")
        (tmp_path / "sub").mkdir()
        assert "is not a checkpoint: it holds photo.png, sub/" in message(tmp_path)
        assert "photo.png is a file" in message(tmp_path / "photo.png")
        with pytest.raises(checkpoint.CheckpointError, match="photo.png is a file, expected a directory"):
            checkpoint.Checkpointer(tmp_path / "photo.png")
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(
                checkpoint.CheckpointNotFound, match="a checkpoint was expected in .* found an empty dir"
            ):
                saver.restore(None, abstract(make_state(0)))
            saver.save(1, make_state(1))
            with pytest.raises(checkpoint.CheckpointNotFound, match="step 9 was expected in .* found 1/"):
                saver.restore(9, abstract(make_state(0)))


class TestIntegrity:
    @pytest.mark.parametrize("hashed", [True, False], ids=["hashed files", "checksums only"])
    def test_random_damage_is_detected_or_harmless(self, tmp_path, hashed):
        """60 times one flipped byte, one truncation, one missing file or two files in each other's place.

        Without hashes, as on remote storage, the checksums of the arrays are all there is.
        """
        save(tmp_path, 1)
        folder = tmp_path / "checkpoints" / "1"
        if not hashed:
            without_hashes(folder)
        draw = random.Random(int(hashed))
        detected, by_kind = 0, {}
        for trial in range(60):
            kind = ("flip", "flip", "truncate", "swap", "flip", "remove")[trial % 6]
            files = [path for path in data_files(folder) if path.stat().st_size]
            path, other = draw.sample(files, 2)
            content, other_content = path.read_bytes(), other.read_bytes()
            if kind == "flip":
                flip(path, draw.randrange(len(content)), draw.randrange(1, 256))
            elif kind == "truncate":
                path.write_bytes(content[: draw.randrange(len(content))])
            elif kind == "remove":
                path.unlink()
            else:
                path.write_bytes(other_content)
                other.write_bytes(content)
            try:
                reader = checkpoint.Checkpointer(tmp_path, read_only=True)
                restored, extra = reader.restore(1, abstract(make_state(0)))
            except checkpoint.CheckpointDamaged:
                detected += 1
                by_kind[kind] = by_kind.get(kind, 0) + 1
            else:
                assert_same(restored, make_state(1))
                assert extra == {"position": 32}
                hit = [path, other] if kind == "swap" and content != other_content else [path] if kind != "swap" else []
                assert not hashed or all(p.name in integrity._NOT_HASHED for p in hit), f"{kind} of {hit} not noticed"
            path.write_bytes(content)
            other.write_bytes(other_content)
        # Harmless is only what nobody reads: Orbax's notes about the directory, and without hashes much of the rest.
        # Which files are hit is another draw in every run (their names are random): little is promised of how many.
        if hashed:
            assert detected >= 40 and set(by_kind) == {"flip", "truncate", "swap", "remove"}
        else:
            assert detected >= 5 and by_kind
        assert_same(
            checkpoint.Checkpointer(tmp_path, read_only=True).restore(1, abstract(make_state(0)))[0], make_state(1)
        )

    def test_leaves_of_equal_shape_in_each_others_place(self, tmp_path):
        """The two moments of Adam swapped in the storage itself, by Orbax: every byte on disk is valid."""
        state = make_state(1)
        mu, nu = (jax.tree.map(lambda x, k=k: x + k, state.opt_state) for k in (1, 2))
        left, right = {"mu": mu, "nu": nu}, {"mu": nu, "nu": mu}
        for name, content in (("left", left), ("right", right)):
            with checkpoint.Checkpointer(tmp_path / name) as saver:
                saver.save(1, content)
        step, other = (tmp_path / name / "checkpoints" / "1" for name in ("left", "right"))
        without_hashes(step)
        (step / "state").rename(tmp_path / "old")
        (other / "state").rename(step / "state")
        with pytest.raises(checkpoint.CheckpointDamaged, match="mu/.* are not those that were saved"):
            checkpoint.Checkpointer(tmp_path / "left", read_only=True).restore(1, abstract(left))

    def test_checksums_alone_notice_other_values(self, tmp_path):
        """Where files are not hashed (remote storage), the arrays are still compared."""
        save(tmp_path, 1)
        save(tmp_path / "other", 2)
        step, other = tmp_path / "checkpoints" / "1", tmp_path / "other" / "checkpoints" / "2"
        without_hashes(step)
        reader = checkpoint.Checkpointer(tmp_path, read_only=True)
        assert_same(reader.restore(1, abstract(make_state(0)))[0], make_state(1))
        (step / "state").rename(tmp_path / "old")
        (other / "state").rename(step / "state")
        with pytest.raises(checkpoint.CheckpointDamaged, match="params/head/kernel.* are not those that were saved"):
            reader.restore(1, abstract(make_state(0)))

    @pytest.mark.parametrize("damage", ["truncated", "emptied", "manifest altered", "manifest missing"])
    def test_falls_back_loudly_and_can_write_the_step_again(self, tmp_path, caplog, damage):
        save(tmp_path, 1, 2)
        newest = tmp_path / "checkpoints" / "2"
        if damage == "truncated":
            largest = max(data_files(newest / "state"), key=lambda p: p.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:-9])
        elif damage == "emptied":
            for path in data_files(newest):
                path.unlink()
        elif damage == "manifest altered":
            text = (newest / "manifest.json").read_text()
            (newest / "manifest.json").write_text(text.replace('"position": 64', '"position": 65'))
        else:
            (newest / "manifest.json").unlink()
        with checkpoint.Checkpointer(tmp_path) as saver:
            assert saver.latest_step() == 2
            with caplog.at_level(logging.WARNING):
                restored, extra = saver.restore(None, abstract(make_state(0)))
            assert_same(restored, make_state(1))
            assert extra == {"position": 32}
            reason = {"truncated": "bytes instead of", "emptied": "missing", "manifest altered": "altered"}
            assert (
                f"{newest} is damaged" in caplog.text and reason.get(damage, "manifest.json is missing") in caplog.text
            )
            assert saver.all_steps() == [1]
            assert (tmp_path / "checkpoints" / "damaged" / "2").is_dir()
            assert saver.save(2, make_state(2))
            assert_same(saver.restore(None, abstract(make_state(0)))[0], make_state(2))

    def test_a_step_asked_for_by_number_does_not_fall_back(self, tmp_path):
        save(tmp_path, 1, 2)
        flip(tmp_path / "checkpoints" / "2" / "state" / "manifest.ocdbt", 40)
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(checkpoint.CheckpointDamaged, match="step 2: state/manifest.ocdbt was altered"):
                saver.restore(2, abstract(make_state(0)))
            assert saver.all_steps() == [1, 2]

    def test_no_good_step_at_all(self, tmp_path):
        save(tmp_path, 1, 2)
        for step in ("1", "2"):
            (tmp_path / "checkpoints" / step / "manifest.json").write_text("{}")
        with checkpoint.Checkpointer(tmp_path) as saver:
            with pytest.raises(checkpoint.CheckpointDamaged, match="(?s)no good checkpoint.*step 2: .*step 1: "):
                saver.restore(None, abstract(make_state(0)))
            with pytest.raises(checkpoint.CheckpointDamaged, match="manifest.json is not readable"):
                saver.read()

    def test_checksum_sees_single_bits_swaps_and_signs(self):
        x = jax.random.normal(jax.random.key(0), (17, 5))
        seen = {tuple(integrity.checksums({"x": x})[0]["x"])}
        rows_swapped = x.at[0].set(x[1]).at[1].set(x[0])
        two_signs = x.at[0, 0].set(-x[0, 0]).at[1, 1].set(-x[1, 1])
        changed = [x.at[3, 2].set(-x[3, 2]), x.T.reshape(x.shape), x.reshape(-1)[::-1], rows_swapped, two_signs]
        words = np.asarray(x).view(np.uint32)
        for bit in range(32):
            flipped = words.copy()
            flipped[16, 4] ^= np.uint32(1 << bit)
            changed.append(jnp.asarray(flipped.view(np.float32)))
        for other in changed:
            sums, _ = integrity.checksums({"x": other})
            seen.add(sums["x"])
        assert len(seen) == len(changed) + 1
        # Each of the two sums alone sees every one of these changes.
        assert len({first for first, _ in seen}) == len({second for _, second in seen}) == len(seen)

    @pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, np.bool_, jnp.bfloat16])
    def test_checksum_is_the_sum_over_hashed_words(self, dtype):
        """The formula, word by word: checkpoints that are there are verified by it."""

        def mixed(h):
            h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
            h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
            return h ^ h >> 16

        x = jax.random.normal(jax.random.key(1), (3, 4, 5)).astype(dtype)
        words = np.asarray(x).reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
        expected = tuple(
            sum(mixed(int(word) ^ mixed((position + seed) % 2**32)) for position, word in enumerate(words)) % 2**32
            for seed in (0x9E3779B9, 0x7F4A7C15)
        )
        assert integrity.checksums({"x": x})[0]["x"] == expected

    def test_checksum_names_non_finite_arrays_of_every_float_type(self):
        arrays = {str(t): jnp.asarray([1, np.nan], t) for t in (jnp.float32, jnp.bfloat16, jnp.float16)}
        _, bad = integrity.checksums({**arrays, "good": jnp.ones(3), "whole": jnp.arange(3)})
        assert sorted(bad) == sorted(arrays)

    def test_verify_script(self, tmp_path, repository, monkeypatch, capsys):
        def verify(*arguments):
            monkeypatch.setattr(sys, "argv", ["verify_checkpoint.py", *map(str, arguments)])
            status = runpy.run_path(str(repository / "scripts" / "verify_checkpoint.py"))["main"]()
            return status, *capsys.readouterr()

        save(tmp_path, 1, 2)
        flip(tmp_path / "checkpoints" / "1" / "state" / "manifest.ocdbt", 40)
        status, output, _ = verify(tmp_path)
        assert status == 0 and output.startswith("step 2: good (")
        status, output, _ = verify(tmp_path, "--all")
        bad, reason, *_, good = output.splitlines()
        assert (status, bad, good.split(" (")[0]) == (1, "step 1: DAMAGED", "step 2: good")
        assert "state/manifest.ocdbt was altered" in reason
        status, _, error = verify(tmp_path, "--step", 7)
        assert status == 1 and "there is no step 7" in error and "steps: [1, 2]" in error
        status, _, error = verify(repository)
        assert status == 1 and "is not a checkpoint" in error
