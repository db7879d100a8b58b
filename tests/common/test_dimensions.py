"""Names and units of dimensions: what is refused, what is shown, what old statistics become."""

import re

import numpy as np
import pytest

from octo_like.common import dimensions
from octo_like.common.dimensions import DimensionError, Dimensions
from octo_like.common.normalization import compute_statistics, from_json, to_json
from octo_like.common.robot import Description, RobotError, absolute, gripper


@pytest.mark.parametrize(
    "names,units,message",
    [
        (("x", "y", "x"), (), "'x' is given to more than one dimension: x, y, x"),
        (("x", ""), (), "'' is no name of a dimension"),
        (("x", 3), (), "3 is no name of a dimension"),
        (("x", "y"), ("m",), r"1 units for 2 dimensions \(x, y\)"),
        (("x", "y"), ("m", "rat"), "dimension 'y': unknown unit 'rat'; did you mean 'rad'. valid: 1, N, Nm, deg"),
    ],
)
def test_mistakes_are_named(names, units, message):
    with pytest.raises(DimensionError, match=message):
        Dimensions(names, units)


def test_what_is_shown():
    named = Dimensions(("x", "roll", "gripper", "effort", "q"), ("m", "rad", "open fraction", "1", ""))
    assert named.labels == ("x [m]", "roll [rad]", "gripper [open fraction]", "effort", "q")
    assert named.tags == ("x_m", "roll_rad", "gripper_open_fraction", "effort", "q")
    assert named.numbered("action")[:2] == ("action[0] x [m]", "action[1] roll [rad]")
    assert Dimensions.from_json(named.to_json()) == named and len(named) == 5
    unnamed = Dimensions.unnamed(2), Dimensions.unnamed(2, "proprio")
    assert [one.names for one in unnamed] == [("a0", "a1"), ("p0", "p1")]
    assert unnamed[1].numbered("proprio") == ("proprio[0]", "proprio[1]")


def test_tags_are_safe_and_different():
    names = ("a/b", "a b", "a_b", "..", "größe", "\u0394", "x", "x_m", "v")
    tags = Dimensions(names, ("", "", "", "", "", "", "m", "", "m/s")).tags
    assert len(set(tags)) == len(names) and tags[-1] == "v_m_per_s" and tags[0] == "a_per_b" or tags[0] == "a_b"
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", tag) for tag in tags), tags


def statistics(width=2, **more):
    return {"action": compute_statistics(np.random.default_rng(0).normal(size=(9, width)).astype(np.float32)), **more}


def test_statistics_of_before_are_read():
    """Without names: a0, a1, ...; with a robot's description: its names. Names survive the way through JSON."""
    assert dimensions.of_statistics(statistics()).names == ("a0", "a1")
    assert dimensions.of_statistics(statistics(), "proprio").names == ()
    assert dimensions.grippers(statistics()) == {}
    robot = Description(5.0, (absolute("q", "rad"), gripper(open=0.0, closed=0.08)), ("q", "width"), ("rad", "m"))
    old = statistics(robot=robot.to_json())
    assert dimensions.of_statistics(old).labels == ("q [rad]", "gripper")
    assert dimensions.of_statistics(old, "proprio", 2).labels == ("q [rad]", "width [m]")
    assert dimensions.grippers(old) == {1: (0.08, 0.0)}
    assert Description.from_json(old["robot"]) == robot
    del old["robot"]["proprio_units"]  # of an older description
    assert dimensions.of_statistics(old, "proprio", 2).labels == ("q", "width")
    named = statistics(dimensions={"action": Dimensions(("x", "g"), ("m", "open fraction")).to_json()})
    again = from_json(to_json(named))
    assert dimensions.of_statistics(again).labels == ("x [m]", "g [open fraction]")
    assert dimensions.grippers(again) == {1: (0.0, 1.0)}
    with pytest.raises(DimensionError, match="2 names for 3 action dimensions: x, g"):
        dimensions.of_statistics(again, width=3)
    with pytest.raises(DimensionError, match="dimensions are {'names'"):
        dimensions.of_statistics(statistics(dimensions={"action": ["x", "y"]}))


def test_a_robots_proprioception_has_units_too():
    with pytest.raises(RobotError, match="proprioception: 1 units for 2 dimensions"):
        Description(5.0, (absolute("q", "rad"),), ("a", "b"), ("rad",))
    with pytest.raises(RobotError, match="proprioception: dimension 'b': unknown unit 'furlong'"):
        Description(5.0, (absolute("q", "rad"),), ("a", "b"), ("rad", "furlong"))
    plain = Description(5.0, (absolute("q", "rad"),), ("a", "b"))
    assert "proprio_units" not in plain.to_json(), "a config that a run was started with stays what it was"
    described = Description(5.0, (absolute("q", "rad"),), ("a", "b"), ("rad", "m")).describe()
    assert "proprio[1] b [m]" in described
