"""The vocabulary by hand. test_oxe.py checks it against the reference trajectories of Open X-Embodiment."""

import numpy as np
import pytest

from octo_like.data.oxe import vocabulary as s
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf


def value(built, **leaves):
    leaves = {key: tf.constant(leaf) for key, leaf in leaves.items()}
    return s.evaluate(built, leaves).numpy()


def test_binarize_gripper():
    f = s.binarize_gripper(s.field("g"))
    cases = {
        (0.0, 0.5, 0.96, 0.5, 0.04, 0.5): (0, 1, 1, 0, 0, 0.5),  # an open question at the end keeps its raw value
        (0.95, 0.05, 1.0): (1, 1, 1),  # both thresholds are undecided
        (0.3, 0.4): (0.4, 0.4),
        (1.0,): (1,),
    }
    for given, want in cases.items():
        np.testing.assert_allclose(value(f, g=np.float32(given)), np.float32(want))
    assert value(f, g=np.zeros(0, np.float32)).shape == (0,)


def test_rel_to_abs_gripper():
    f = s.rel_to_abs_gripper(s.field("g"))
    cases = {
        (0.0, 1.0, 0.0, -1.0, 0.0): (1, 0, 0, 1, 1),  # closes first, so it was open
        (0.0, -1.0, 0.0): (0, 1, 1),
        (0.0, 0.1, -0.1): (1, 1, 1),  # no event: open throughout
    }
    for given, want in cases.items():
        np.testing.assert_array_equal(value(f, g=np.float32(given)), np.float32(want))
    assert value(f, g=np.zeros(0, np.float32)).shape == (0,)


def test_euler_from_quat():
    from math import cos, sin

    rng = np.random.default_rng(0)
    angles = rng.uniform([-3, -1.5, -3], [3, 1.5, 3], (50, 3))
    quats = []
    for x, y, z in angles / 2:  # q = qz qy qx
        quats.append(
            [
                sin(x) * cos(y) * cos(z) - cos(x) * sin(y) * sin(z),
                cos(x) * sin(y) * cos(z) + sin(x) * cos(y) * sin(z),
                cos(x) * cos(y) * sin(z) - sin(x) * sin(y) * cos(z),
                cos(x) * cos(y) * cos(z) + sin(x) * sin(y) * sin(z),
            ]
        )
    quats = np.array(quats)
    np.testing.assert_allclose(value(s.euler_from_quat(s.field("q")), q=quats), angles, atol=1e-9)
    np.testing.assert_allclose(
        value(s.euler_from_quat(s.field("q"), "wxyz"), q=quats[:, [3, 0, 1, 2]]), angles, atol=1e-9
    )
    half = np.sqrt(0.5)
    locked = value(s.euler_from_quat(s.field("q")), q=np.array([[0, half, 0, half], [0, -half, 0, half]]))
    np.testing.assert_allclose(locked, [[0, np.pi / 2, 0], [0, -np.pi / 2, 0]], atol=1e-6)


def test_arithmetic():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    f = s.field("x")
    np.testing.assert_array_equal(value(f[1:], x=x), x[:, 1:])
    np.testing.assert_array_equal(value(f[-1], x=x), x[:, -1])
    np.testing.assert_array_equal(value(s.delta(f), x=x), np.full((3, 3), 3))
    np.testing.assert_array_equal(value(s.drop_last_step(f), x=x), x[:-1])
    np.testing.assert_array_equal(value(s.concat(f, s.expand(f[0])), x=x), np.concatenate([x, x[:, :1]], 1))
    np.testing.assert_array_equal(value(s.invert_gripper(f[0]), x=x), 1 - x[:, 0])
    np.testing.assert_array_equal(value(s.clip(f, 2, 5), x=x), x.clip(2, 5))
    np.testing.assert_array_equal(value(s.divide(f, f), x=x + 1), np.ones((4, 3)))
    np.testing.assert_array_equal(value(s.divide(f, 2.0), x=x), x / 2)
    np.testing.assert_array_equal(value(s.concat(s.zeros(2), s.ones(1)), x=x), np.tile([[0, 0, 1]], (4, 1)))
    assert value(s.cast(f[0], "int32"), x=x).dtype == np.int32
    assert value(s.blank_text(), x=x).tolist() == [b""] * 4
    ratio = value(s.first_step_norm_ratio(f[0:2], f[2:3]), x=x)
    np.testing.assert_allclose(ratio, 0.5)
    np.testing.assert_array_equal(value(s.multiply(f, s.first_step_norm_ratio(f[0:2], f[2:3])), x=x), x / 2)
    turned = value(s.rotate_by_heading(f[0:2], s.field("yaw")), x=np.float32([[1, 0]]), yaw=np.float32([[np.pi / 2]]))
    np.testing.assert_allclose(turned, [[0, -1]], atol=1e-6)


def test_text_and_compressed_floats():
    import zlib

    rows = np.array([[104, 105, 0, 33], [233, 0, 0, 0], [0, 65, 65, 65]], np.int32)
    assert value(s.codepoints_to_text(s.field("x")), x=rows).tolist() == [b"hi", "é".encode(), b""]
    floats = np.float32([[1, 2, 3], [4, 5, 6]])
    packed = np.array([zlib.compress(row.tobytes()) for row in floats], object)
    np.testing.assert_array_equal(value(s.zlib_floats(s.field("x"), 3), x=packed), floats)


def test_steps_outputs_and_removals():
    raw = {"observation": {"x": tf.range(10), "old": tf.range(10)}, "action": tf.range(10)}
    function = s.Standardize(
        outputs={"observation/first": s.field("observation/x"), "action": s.drop_last_step(s.field("action"))},
        pre_steps=(("drop_first_steps", 1), ("subsample", 2)),
        passthrough_steps=(("drop_last_steps", 1),),
        removes=("observation/old",),
    )
    got = function(raw)
    assert got["observation"]["first"].numpy().tolist() == [1, 3, 5, 7, 9]
    assert got["action"].numpy().tolist() == got["observation"]["x"].numpy().tolist() == [1, 3, 5, 7]
    assert set(got["observation"]) == {"x", "first"}
    assert set(raw["observation"]) == {"x", "old"}  # the input is left alone
    few = s.Standardize(pre_steps=(("empty_if_fewer_than", 11),))(raw)
    assert few["action"].shape == (0,) and s.Standardize(pre_steps=(("empty_if_fewer_than", 10),))(raw)[
        "action"
    ].shape == (10,)
    before = s.Standardize(
        outputs={"y": s.field("action", before_pre_steps=True)}, pre_steps=(("drop_first_steps", 4),)
    )
    assert before(raw)["y"].shape == (10,)


def test_swap_is_keyed_and_follows_its_probability():
    def swapped(number, probability):
        raw = {"observation": {"a": tf.constant([f"a{number}"] * 3), "b": tf.constant([f"b{number}"] * 3)}}
        got = s.Standardize(swap=("observation/a", "observation/b", probability))(raw)["observation"]
        pair = (got["a"].numpy()[0][:1], got["b"].numpy()[0][:1])
        assert set(pair) == {b"a", b"b"}
        return pair[0] == b"b"

    coins = [swapped(n, 0.5) for n in range(100)]
    assert coins == [swapped(n, 0.5) for n in range(100)]
    assert 30 < sum(coins) < 70
    assert not any(swapped(n, 0.0) for n in range(10)) and all(swapped(n, 1.0) for n in range(10))


def test_errors_name_what_is_valid():
    raw = {"observation": {"state": tf.zeros([3, 2])}, "action": tf.zeros([3, 2])}
    with pytest.raises(DataError, match="no leaf 'observation/stat'.*did you mean 'observation/state'"):
        s.evaluate(s.field("observation/stat"), raw)
    with pytest.raises(DataError, match="unknown operation 'binarise'"):
        s.evaluate(s.Expression("binarise", (s.field("action"),)), raw)
    with pytest.raises(DataError, match="unknown step operation 'skip'"):
        s.Standardize(pre_steps=(("skip", 1),))(raw)
    with pytest.raises(TypeError):
        list(s.field("action"))
    with pytest.raises(ValueError, match="no step"):
        s.field("action")[::2]


def test_a_config_wins_over_the_registry():
    spec = DatasetSpec.from_dict(
        {"standardize": "bridge_dataset", "image_keys": {"primary": "image_2"}}, "bridge_dataset"
    )
    assert spec.image_keys == {"primary": "image_2"} and spec.proprio_keys == ("proprio",)
    assert spec.action_normalization_mask == (True,) * 6 + (False,)
