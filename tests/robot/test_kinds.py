"""What stands still means: declared in configs and registry, carried by exports, needed by whoever may have to hold."""

import pathlib
import runpy

import numpy as np
import pytest

from octo_like.common.config import load_config
from octo_like.common.dimensions import KINDS, DimensionError, Dimensions, action_kinds, unknown_kinds
from octo_like.common.robot import Description, absolute, velocity
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.envs import EMBODIMENTS, TabletopEnv
from octo_like.policy.policy import Policy
from octo_like.robot.chunking import Plan
from octo_like.robot.client import PolicyClient
from octo_like.robot.executor import AsyncExecutor
from octo_like.robot.local import LocalPolicy
from octo_like.robot.safety import HOLDS, ActionFilter, UnknownKind, action_limits
from octo_like.robot.server import PolicyServer, with_kinds
from octo_like.robot.wrappers import ActionFilterWrapper
from tests.robot.tiny import tiny_policy
from tests.robot.toy import LineEnv

ROOT = pathlib.Path(__file__).resolve().parents[2]
GRIPPER = EMBODIMENTS["gripper"]
# Words of the configs that choose datasets.
CONFIGS = {
    "adapt_sim": ["fetch", "metaworld_heldout"],
    "finetune": [f"full,robot={ROOT / 'configs' / 'robots' / 'my_robot.py'}", "full,tabletop"],
    "tabletop_delay": ["", "trained"],
}


def spec(**changes):
    return DatasetSpec.from_dict({"name": "toy", "proprio_keys": ("state",), **changes})


def unknown_policy():
    policy = tiny_policy("tabletop_gripper", GRIPPER.action_dim, GRIPPER.proprio_dim)
    del policy.statistics["tabletop_gripper"]["dimensions"]
    return policy


# ---------------------------------------------------------------- where they are declared


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_shipped_configs_say_what_stands_still(name):
    datasets = {}
    for words in CONFIGS.get(name, [""]):
        config = load_config(str(ROOT / "configs" / f"{name}.py") + (f":{words}" if words else ""))
        datasets |= config.data.datasets.to_dict()
    for key, fields in datasets.items():
        if fields.get("action_key", "action") is None:
            continue  # pictures with words
        one = DatasetSpec.from_dict(fields, key)
        width = len(one.action_names or (one.robot or {}).get("action_name") or one.action_normalization_mask)
        statistics = {"action": {"mean": np.zeros(width)}, "robot": one.robot, "relative_to": one.relative_to}
        statistics["dimensions"] = {"action": one.dimensions("action", width).to_json()}
        kinds = action_kinds(statistics)
        assert len(kinds) == width and set(kinds) <= set(HOLDS), (key, kinds)


@pytest.mark.parametrize("name", sorted(EMBODIMENTS))
def test_the_worlds_own_robots_stand_still_when_they_hold(name):
    """Twelve held steps after three that move: they stay, and repeating the last action would not."""
    robot = EMBODIMENTS[name]
    env = TabletopEnv(name, render_images=False)
    ways = {}
    for repeats in (False, True):
        env.reset(seed=1)
        rng = np.random.default_rng(0)
        low, high = np.array(robot.action_low), np.array(robot.action_high)
        safe = ActionFilter(low, high, kinds=robot.action_kinds)
        for _ in range(3):
            env.effector.apply(safe(low + 0.6 * (high - low)), env.world, rng)
        for _ in range(30 if name == "arm3" else 0):  # a servo goes on to its target
            env.effector.apply(safe(safe.hold()), env.world, rng)
        before = env.effector.tip.copy()
        for _ in range(12):
            env.effector.apply(safe.last if repeats else safe(safe.hold()), env.world, rng)
        ways[repeats] = float(np.linalg.norm(env.effector.tip - before))
    assert ways[False] < 0.02  # their motion is noisy
    assert name == "arm3" or ways[True] > 5 * ways[False]


def test_kinds_of_a_spec():
    kinds = ("delta", "absolute", "gripper")
    assert spec(action_kinds=list(kinds)).dimensions("action", 3).kinds == kinds
    named = spec(action_kinds=kinds, action_names=("x", "y", "hand"))
    assert named.dimensions("action", 3) == Dimensions(("x", "y", "hand"), kinds=kinds)
    assert spec().dimensions("action", 3).to_json() == {"names": ["a0", "a1", "a2"], "units": [""] * 3}
    for changes, message in (
        (dict(action_kinds="delta"), "toy: action_kinds is a list, got 'delta'"),
        (dict(action_kinds=["detla"]), "toy: action_kinds: dimension 'a0': unknown kind 'detla'; did you mean 'delta'"),
        (
            dict(action_kinds=kinds, relative_to=(0, None, None), chunk_length=4),
            "calls action 0 a delta, and relative_to makes it relative to proprioception 0",
        ),
        (
            dict(action_kinds=["absolute"], robot=Description(5.0, (absolute("q", "rad"),)).to_json()),
            "action_kinds beside a robot's description",
        ),
    ):
        with pytest.raises(DataError, match=message):
            spec(**changes)
    with pytest.raises(DataError, match="action_kinds gives 3 action dimensions, the data has 4"):
        spec(action_kinds=kinds).dimensions("action", 4)
    with pytest.raises(DimensionError, match="2 kinds for 1 dimensions"):
        Dimensions(("x",), kinds=("delta", "delta"))


def test_what_statistics_say_without_kinds():
    def found(width=2, **entry):
        return action_kinds({"action": {"mean": np.zeros(width)}, **entry})

    units = {"action": {"names": ["v", "hand"], "units": ["rad/s", "open fraction"]}}
    robot = Description(5.0, (velocity("v", "rad/s"), absolute("q", "rad"))).to_json()
    assert found() == ("", "")  # an export of before
    assert found(dimensions=units) == ("velocity", "gripper")
    assert found(robot=robot) == ("velocity", "absolute")
    assert found(relative_to=[0, None]) == ("absolute", "")
    other = {"action": {"names": ["v", "w"], "kinds": ["other", "delta"]}}
    assert found(dimensions=other) == ("", "delta") and "other" in KINDS
    assert action_limits({"action": {"mean": [0.0]}})["kinds"] == ["other"]


def test_what_the_registry_knows():
    pytest.importorskip("tensorflow")
    bridge = DatasetSpec.from_dict(dict(name="bridge_dataset", standardize="bridge_dataset")).dimensions("action", 7)
    assert action_kinds({"action": {"mean": np.zeros(7)}, "dimensions": {"action": bridge.to_json()}}) == (
        *("delta",) * 6,
        "gripper",
    )
    poses = "iamlab_cmu_pickup_insert_converted_externally_to_rlds"  # absolute, under the names of changes
    kinds = DatasetSpec.from_dict(dict(name=poses, standardize=poses)).dimensions("action", 7).kinds
    assert "delta" not in kinds
    aloha = DatasetSpec.from_dict(dict(name="aloha", standardize="aloha_static_dataset")).dimensions("action", 14)
    assert aloha.kinds == (("absolute",) * 6 + ("gripper",)) * 2


# ---------------------------------------------------------------- who needs them


class Source:
    """A source of chunks that says nothing of its actions."""

    window, subtask = {"timestep": np.zeros(1, int)}, None

    def chunks(self, unnormalize=None):
        return {"horizon": 4, "continues": {}}

    def filter_of(self, unnormalize=None):
        return ActionFilter([None], [None])


def test_nothing_that_may_hold_starts_without_them():
    pytest.importorskip("websockets")
    policy = unknown_policy()
    message = r"nobody has said what keeps a0, .*, a6 where they are.*kinds=\(\.\.\., .*\).*action_kinds in the dataset"
    with pytest.raises(UnknownKind, match=message):
        LocalPolicy(policy, "tabletop_gripper")
    with pytest.raises(UnknownKind, match=message):
        ActionFilter([None] * 7, [None] * 7)
    with pytest.raises(UnknownKind, match=message):
        ActionFilter.of(action_limits(policy.statistics["tabletop_gripper"]))
    with pytest.raises(UnknownKind, match="keeps a0 where"):
        AsyncExecutor(Source(), Plan("wait"))
    with pytest.raises(UnknownKind, match="keeps a0 where"):
        ActionFilterWrapper(LineEnv(), ActionFilter([-1.0], [1.0]))
    with pytest.raises(UnknownKind, match=r"keeps b where they are.*kinds=\('delta', \.\.\.,\)"):
        ActionFilter([0, 0], [1, 1], kinds=["delta", "other"], names=["a", "b"])
    with PolicyServer(policy, unnormalize="tabletop_gripper", port=0).running() as server:
        with pytest.raises(UnknownKind, match="tabletop_gripper: " + message):
            PolicyClient(port=server.port)
        with PolicyClient(port=server.port, kinds=GRIPPER.action_kinds) as client:
            client.executed(np.full(7, 0.02))
            assert client.hold().tolist() == pytest.approx([0] * 6 + [0.02])
        with PolicyClient(port=server.port, limits=False) as client:
            with pytest.raises(ValueError, match="limits=False: what holds this robot is not known"):
                AsyncExecutor(client, Plan("wait"))
    unnamed = PolicyServer(policy, normalized=True, port=0)
    with unnamed.running() as server, PolicyClient(port=server.port) as client:
        with pytest.raises(ValueError, match="normalised numbers.*give unnormalize, one of tabletop_gripper"):
            client.act({})
    assert LocalPolicy(policy, "tabletop_gripper", kinds=["delta"] * 7).hold().tolist() == [0.0] * 7


def test_an_export_carries_them_and_one_of_before_is_read(tmp_path):
    policy = unknown_policy()
    policy.save_pretrained(tmp_path / "before")
    old = Policy.load_pretrained(tmp_path / "before")
    assert action_kinds(old.statistics["tabletop_gripper"]) == ("",) * 7
    named = spec(action_kinds=GRIPPER.action_kinds).dimensions("action", 7)
    policy.statistics["tabletop_gripper"]["dimensions"] = {"action": named.to_json()}
    policy.save_pretrained(tmp_path / "export")
    loaded = Policy.load_pretrained(tmp_path / "export")
    assert LocalPolicy(loaded, "tabletop_gripper").filter.kinds == list(GRIPPER.action_kinds)


def test_dimensions_without_kinds_are_listed_with_the_tuple_to_write():
    policy = unknown_policy()
    text = unknown_kinds({**policy.statistics, "pictures": {"action": {"mean": np.zeros(0)}}})
    assert text.endswith("\n  tabletop_gripper: kinds=(" + "'...', " * 6 + "'...',) for a0, a1, a2, a3, a4, a5, a6")
    known = with_kinds(policy.statistics, ["tabletop_gripper=" + ",".join(GRIPPER.action_kinds)])
    assert unknown_kinds(known) == "" and "dimensions" not in policy.statistics["tabletop_gripper"]


@pytest.mark.parametrize(
    "given, message",
    [
        ("tabletop_griper=delta", "unknown statistics 'tabletop_griper'; did you mean 'tabletop_gripper'"),
        ("delta,delta", "unknown statistics ''"),
        ("tabletop_gripper=delta,delta", "2 kinds for 7 action dimensions"),
        ("tabletop_gripper=" + ",".join(["detla"] * 7), "unknown kind 'detla'; did you mean 'delta'"),
        ("tabletop_gripper=" + ",".join(["delta"] * 6 + [""]), "keeps a6 where"),
    ],
)
def test_kinds_for_a_server_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        with_kinds(unknown_policy().statistics, [given])


def test_the_server_command_takes_kinds_and_warns_without(tmp_path, monkeypatch, caplog):
    pytest.importorskip("websockets")
    unknown_policy().save_pretrained(tmp_path / "export")
    words = ["serve.py", "--checkpoint", str(tmp_path / "export"), "--unnormalize", "tabletop_gripper", "--port", "0"]
    kinds = ["--kinds", "tabletop_gripper=" + ",".join(GRIPPER.action_kinds)]
    served = []

    def serves(server):  # in the place of waiting for the end
        with PolicyClient(port=server.port) as client:
            served.append(client.filter.kinds)
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyServer, "wait", serves)
    monkeypatch.setattr(PolicyServer, "warm_up", lambda server: 0.0)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    main = runpy.run_path(str(ROOT / "scripts" / "serve.py"))["main"]
    monkeypatch.setattr("sys.argv", [*words, *kinds])
    assert main() == 0 and served == [list(GRIPPER.action_kinds)] and "are not known" not in caplog.text
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(UnknownKind):
        main()
    assert caplog.text.count("the kinds of some action dimensions are not known") == 1
