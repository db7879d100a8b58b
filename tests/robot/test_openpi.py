"""openpi's dialect: their real client on our server (`make test-openpi`), our rollouts on a server that speaks it."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from octo_like.common.robot import Camera, OpenpiKeys, Robot, RobotError, delta
from octo_like.envs import EMBODIMENTS
from octo_like.robot import openpi
from octo_like.robot.client import PolicyClient
from octo_like.robot.openpi import PRESETS, Keys, OpenpiPolicy, OpenpiServer, as_image
from octo_like.robot.rollout import evaluate
from octo_like.robot.server import PolicyServer
from tests.robot.tiny import tiny_policy
from tests.robot.toy import SIZE, LineEnv, LinePolicy

pytest.importorskip("websockets")

LINE = Keys({"observation/image": "primary"}, ("observation/state",))
# The interpreter of an environment with the published openpi-client.
PYTHON = os.environ.get("OCTO_OPENPI_PYTHON")
needs_client = pytest.mark.skipif(PYTHON is None, reason="openpi-client is not installed; run make test-openpi")


@pytest.fixture
def server():
    with OpenpiServer(LinePolicy(), LINE, unnormalize="line", port=0).running() as running:
        yield running


def message(x: float, prompt: str = "go left", **more) -> dict:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:, int(x)] = 255
    return {"observation/image": image, "observation/state": np.array([x], np.float32), "prompt": prompt, **more}


class Wire:
    """The dialect by hand."""

    def __init__(self, server):
        from websockets.sync.client import connect

        opened = connect(f"ws://127.0.0.1:{server.port}", compression=None, proxy=None)
        self.connection = opened.__enter__()
        self.metadata = openpi.unpack(self.connection.recv(30))

    def infer(self, observation: dict):
        self.connection.send(openpi.pack(observation))
        reply = self.connection.recv(30)
        return reply if isinstance(reply, str) else openpi.unpack(reply)


def test_frames_become_windows_of_a_connection(server):
    first, second = Wire(server), Wire(server)
    assert (first.metadata["action_horizon"], first.metadata["action_dim"]) == (3, 1)
    for x in (5, 6):
        reply = first.infer(message(x))
    assert reply["actions"].shape == (3, 1) and reply["server_timing"]["infer_ms"] > 0
    seen = server.policy.calls[-1]["observations"]
    assert seen["proprio"].ravel().tolist() == [5, 6] and seen["timestep_pad_mask"].all()
    second.infer(message(9))  # a robot of its own
    assert server.policy.calls[-1]["observations"]["timestep_pad_mask"].tolist() == [[False, True]]
    first.infer(message(7))
    assert server.policy.calls[-1]["observations"]["proprio"].ravel().tolist() == [6, 7]
    for new_episode in (message(8, "go right"), message(8, "go right", reset=True)):
        first.infer(new_episode)
        assert server.policy.calls[-1]["observations"]["timestep_pad_mask"].tolist() == [[False, True]]


def line_policy(deviation: float | None) -> LinePolicy:
    """`deviation`: of the state in the data; None: the policy reads no state."""
    policy = LinePolicy()
    if deviation is None:
        del policy.statistics["line"]["proprio"]
    else:
        policy.statistics["line"]["proprio"]["std"] = np.array([deviation])
    return policy


def begun(server) -> bool:
    """Whether the last request began an episode."""
    return server.policy.calls[-1]["observations"]["timestep_pad_mask"].tolist() == [[False, True]]


@pytest.mark.parametrize(
    "deviation, gap, states, first",
    [
        (1.0, np.inf, (5, 6, 7, 8), 12),  # four deviations at once
        (4.0, np.inf, (5, 8, 11), 5.1),  # one and a half, back to where the episode began
        (4.0, 0.3, (5, 6, 7), 7),  # nothing but a silence
        (None, 0.3, (5, 6, 7), 5),
    ],
)
def test_a_jump_of_the_state_or_a_silence_begins_an_episode(deviation, gap, states, first, caplog):
    """Its first answer, which depends on window, noise and step, is that of a fresh connection."""
    caplog.set_level("INFO")
    server = OpenpiServer(line_policy(deviation), LINE, unnormalize="line", port=0, episode_gap=gap)
    with server.running():
        wire = Wire(server)
        for number, x in enumerate(states):
            wire.infer(message(x))
            assert begun(server) == (number == 0)
        time.sleep(0.5 if gap < 1 else 0)
        actions = wire.infer(message(first))["actions"]
        assert begun(server)
        np.testing.assert_array_equal(actions, Wire(server).infer(message(first))["actions"])
        why = "without a request" if gap < 1 else "jumped"
        assert sum(why in record.getMessage() for record in caplog.records) == 1
        again = wire.infer(message(first))["actions"]
        assert not begun(server) and not np.array_equal(again, actions)


def test_bars_are_found_anew_in_each_episode():
    """A dark picture of the episode before bounds no bars of the next one: its answer is a fresh connection's."""
    dark = np.full((224, 224, 3), 90, np.uint8)
    dark[:40] = dark[184:] = 0  # dark rows beside the bars
    bright = np.arange(224 * 224 * 3, dtype=np.uint64).reshape(224, 224, 3).astype(np.uint8) | 1
    bright[:28] = bright[196:] = 0
    frames = [
        {**message(5), "observation/image": image, "prompt": prompt}
        for image, prompt in ((dark, "go left"), (bright, "go left"), (dark, "go right"))
    ]
    policy = tiny_policy("line", 1, 1)
    with OpenpiServer(policy, LINE, unnormalize="line", port=0).running() as server:
        wire = Wire(server)
        for frame in frames:
            actions = wire.infer(frame)["actions"]
        np.testing.assert_array_equal(actions, Wire(server).infer(frames[-1])["actions"])
        assert not np.array_equal(actions, Wire(server).infer({**frames[1], "prompt": "go right"})["actions"])


@pytest.mark.parametrize(
    "deviation, arguments, states",
    [
        (1.0, {}, (5, 7.5, 6, 8, 5.5)),  # fast, to and fro
        (1.0, {"episode_jump": np.inf}, (1, 14, 1)),
        (1.0, {"episode_jump": 20.0}, (1, 14)),
        (0.0, {}, (1, 14, 1)),  # a dimension that never varies in the data
        (None, {}, (1, 14, 1)),  # nothing is known of the state
    ],
)
def test_motion_begins_no_episode(deviation, arguments, states):
    with OpenpiServer(line_policy(deviation), LINE, unnormalize="line", port=0, **arguments).running() as server:
        wire = Wire(server)
        for number, x in enumerate(states):
            wire.infer(message(x))
            assert begun(server) == (number == 0)


def test_an_angle_that_wraps_around_and_a_gripper_that_closes_are_no_jump():
    policy = tiny_policy("arm", 3, 8)
    server = OpenpiServer(policy, LINE, unnormalize="arm", port=0)
    rng, episode = np.random.default_rng(0), openpi._Episode(None, prompt="go", answered=5.0)
    deviations = policy.statistics["arm"]["proprio"]["std"]
    state = deviations * rng.normal(size=8)
    episode.keep(state - deviations)
    episode.keep(state)
    for change in ({3: 18.0}, {7: 5.0}, {3: -18.0, 7: 5.0}, dict.fromkeys(range(8), 2.5)):
        other = state.copy()
        for d, amount in change.items():
            other[d] += amount * deviations[d]
        assert server._begins(episode, "go", other, 6.0) is None
    assert "jumped by 4.0" in server._begins(episode, "go", state + 4 * deviations, 6.0)
    assert "jumped back" in server._begins(episode, "go", state - 1.05 * deviations, 6.0)
    assert "7.0 s without" in server._begins(episode, "go", state, 12.0)
    assert server._begins(episode, "stop", state, 6.0) == "another prompt"


def test_the_silence_that_begins_an_episode_is_longer_than_a_chunk_takes():
    policy = LinePolicy(horizon=50)
    assert OpenpiServer(policy, LINE, unnormalize="line", port=0).episode_gap == 10.0  # at 10 Hz
    assert OpenpiServer(LinePolicy(), LINE, unnormalize="line", port=0).episode_gap == 3.0
    for wrong in (dict(episode_gap=0.0), dict(episode_jump=-1.0), dict(episode_jump=np.nan)):
        with pytest.raises(ValueError, match="must be positive"):
            OpenpiServer(policy, LINE, unnormalize="line", port=0, **wrong)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"prompt": 5}, "'prompt' must be a text, got int"),
        ({"reset": np.zeros(2)}, "'reset' must be true or false, got ndarray"),
        ({"seed": "x"}, "'seed' must be a whole number"),
        ({"observation/state": "left"}, "observation/state: expected numbers"),
        ({"observation/state": np.zeros((2, 2), np.float32)}, "observation/state: expected numbers"),
        ({"observation/image": np.zeros((0, 0, 3), np.uint8)}, "observation/image: expected a picture"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(server, change, error):
    assert error in Wire(server).infer({**message(5), **change})
    assert Wire(server).infer(message(5))["actions"].shape == (3, 1)


def test_the_actions_are_those_of_our_own_client(server):
    wire = Wire(server)
    theirs = [wire.infer(message(x, seed=4))["actions"] for x in (5, 6, 7)]
    with (
        PolicyServer(LinePolicy(), unnormalize="line", port=0).running() as ours,
        PolicyClient(port=ours.port) as client,
    ):
        client.reset(seed=4)
        for x, actions in zip((5, 6, 7), theirs, strict=True):
            sent = message(x)
            observation = {"image_primary": sent["observation/image"], "proprio": sent["observation/state"]}
            np.testing.assert_array_equal(client.act(observation, "go left"), actions)


def test_pictures_in_any_layout():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (6, 8, 3), np.uint8)
    for given in (picture, np.moveaxis(picture, -1, 0), picture / 255.0, np.moveaxis(picture / 255.0, -1, 0)):
        np.testing.assert_array_equal(as_image(given, "x"), picture)
    for wrong in (picture[..., :2], picture.astype(np.int32), picture / 100.0, picture[0]):
        with pytest.raises(ValueError, match="x: "):
            as_image(wrong, "x")


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda m: m.pop("observation/image"), "lacks 'observation/image'"),
        (lambda m: m.pop("observation/state"), "lacks 'observation/state'"),
        (lambda m: m.update({"observation/state": np.array([np.nan], np.float32)}), "not finite"),
        (lambda m: m.update({"observation/image": np.zeros((4, 4), np.uint8)}), "expected a picture"),
    ],
)
def test_an_error_is_a_text_after_which_the_connection_is_closed(server, change, error):
    from websockets.exceptions import ConnectionClosed

    wire, wrong = Wire(server), message(5)
    change(wrong)
    assert error in wire.infer(wrong)
    with pytest.raises(ConnectionClosed) as closed:
        wire.connection.recv(30)
    assert closed.value.rcvd.code == openpi.INTERNAL_ERROR
    assert Wire(server).infer(message(5))["actions"].shape == (3, 1)


def test_an_error_is_logged_and_counted_for_its_client(server, caplog):
    wrong = message(5)
    del wrong["observation/image"]
    Wire(server).infer(message(5))
    for _ in range(2):
        assert "lacks 'observation/image'" in Wire(server).infer(wrong)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("a request of 127.0.0.1 failed: ValueError: the observation lacks" in line for line in lines) == 2
    metrics = server.metrics()
    assert 'octo_like_requests_total{client="127.0.0.1"} 3' in metrics
    assert 'octo_like_errors_total{client="127.0.0.1"} 2' in metrics


def test_tables_of_keys(tmp_path):
    (tmp_path / "keys.json").write_text('{"images": {"cam": "primary"}, "state": ["q"], "prompt": "task"}')
    assert Keys.load(str(tmp_path / "keys.json")) == Keys({"cam": "primary"}, ["q"], "task")
    assert Keys.load("droid") is PRESETS["droid"]
    (tmp_path / "wrong.json").write_text('{"camera": 1}')
    for name in ("nothing", str(tmp_path / "wrong.json")):
        with pytest.raises(ValueError, match="valid: droid, libero, aloha, or a JSON file"):
            Keys.load(name)
    with pytest.raises(ValueError, match="name none: wrist"):
        OpenpiServer(LinePolicy(), Keys({"cam": "wrist"}, ()), unnormalize="line", port=0)


def preset_policy(preset: str, *, horizon: int = 50, action: int | None = None, proprio: int | None = None, **robot):
    """A policy whose actions are those of a preset's client, but for what is said."""
    policy, client = LinePolicy(horizon), openpi.CLIENTS[preset]
    part = lambda width: {"mean": np.zeros(width), "std": np.ones(width)}  # noqa: E731
    policy.statistics["line"] = {
        "action": part(len(client.kinds) if action is None else action),
        "proprio": part(client.state if proprio is None else proprio),
    }
    if robot:
        policy.statistics["line"]["robot"] = robot
    return policy


@pytest.mark.parametrize("preset", PRESETS)
def test_a_policy_that_a_presets_client_cannot_execute_is_refused(preset, tmp_path, caplog):
    client, keys = openpi.CLIENTS[preset], PRESETS[preset]
    width, least = len(client.kinds), min(client.executes)
    for wrong, message in (
        (dict(horizon=least - 1), f"executes {least} actions of each chunk, the policy's chunks have {least - 1}"),
        (dict(action=width - 1), f"executes actions of {width} numbers, the policy's have {width - 1}"),
        (dict(proprio=client.state + 1), f"sends a proprioception of {client.state} numbers, the policy reads"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenpiServer(preset_policy(preset, **wrong), keys, unnormalize="line", port=0)
        # The same keys in a file are those of another client.
        table = {"images": dict(keys.images), "state": list(keys.state)}
        (tmp_path / "own.json").write_text(json.dumps(table))
        OpenpiServer(preset_policy(preset, **wrong), Keys.load(str(tmp_path / "own.json")), unnormalize="line", port=0)
    chunk = client.chunk or max(client.executes)
    assert not caplog.records
    server = OpenpiServer(preset_policy(preset, horizon=chunk), keys, unnormalize="line", port=0)
    assert not caplog.records
    assert (server.hello["action_horizon"], server.hello["action_dim"]) == (chunk, width)


def test_what_may_not_fit_a_presets_client_is_a_warning(caplog):
    OpenpiServer(preset_policy("droid", horizon=16), PRESETS["droid"], unnormalize="line", port=0)
    assert "insists on 10" in caplog.text
    OpenpiServer(preset_policy("aloha", horizon=12), PRESETS["aloha"], unnormalize="line", port=0)
    assert "executes 25" in caplog.text
    caplog.clear()
    registry = preset_policy("libero")  # its grippers are 1 for open and 0 for closed
    for least in (-1.0, 0.0):
        assert not caplog.records
        registry.statistics["line"]["action"] |= {"min": np.full(7, least), "max": np.ones(7)}
        OpenpiServer(registry, PRESETS["libero"], unnormalize="line", port=0)
    assert "gripper's commands from -1 to 1" in caplog.text
    robot = {"control_hz": 5, "action_kind": ["delta"] * 7 + ["gripper"], "action_name": list("abcdefgh")}
    OpenpiServer(preset_policy("droid", horizon=10, **robot), PRESETS["droid"], unnormalize="line", port=0)
    assert "action 0 is delta to the policy and velocity to the client of droid" in caplog.text
    assert "trained at 5 Hz, the client of droid acts at 15" in caplog.text


def test_what_the_clients_do_not_send_is_an_error_at_the_start():
    with pytest.raises(ValueError, match="reads proprio, which clients with these openpi keys do not send"):
        OpenpiServer(LinePolicy(), Keys({"cam": "primary"}, ()), unnormalize="line", port=0)


def test_the_table_of_a_robots_description():
    """A policy keeps it with its statistics: the server needs no file."""
    robot = Robot(
        name="line",
        cameras={"primary": Camera("front", (SIZE, SIZE))},
        proprio=("state",),
        proprio_names=("x",),
        actions=(delta("dx", "1", proprio=0),),
        control_hz=5,
        action_horizon=3,
        openpi=OpenpiKeys({"cams/front": "primary"}, ("q",), "task"),
    )
    policy = LinePolicy()
    policy.statistics["line"]["robot"] = json.loads(json.dumps(robot.dataset_fields()["robot"]))
    keys = Keys.of(policy.statistics, "line")
    with OpenpiServer(policy, keys, unnormalize="line", port=0).running() as running:
        sent = message(7)
        theirs = {"cams": {"front": sent["observation/image"]}, "q": sent["observation/state"], "task": "go left"}
        assert Wire(running).infer(theirs)["actions"].shape == (3, 1)
    for statistics, dataset in ((policy.statistics, None), (LinePolicy().statistics, "line")):
        with pytest.raises(ValueError, match="valid: droid, libero, aloha, or a JSON file"):
            Keys.of(statistics, dataset)
    with pytest.raises(RobotError, match="openpi names a camera 'wrst'; "):
        dataclasses.replace(robot, openpi=OpenpiKeys({"cam": "wrst"}))
    with pytest.raises(RobotError, match="image_keys"):
        OpenpiKeys.from_json({"images": {}})


def test_our_rollouts_drive_a_server_of_that_dialect(server):
    """The world is solved over their wire as in this process: the toy policy decides by what it sees."""
    address = f"127.0.0.1:{server.port}"
    policy = OpenpiPolicy(address, LINE, action_horizon=3, action_dim=1, image_size=(SIZE, SIZE), proprio_dim=1)
    episodes = evaluate(policy, LineEnv, range(6), batch_size=3)
    assert all(episode.success for episode in episodes)
    policy.close()
    wrong = OpenpiPolicy(address, Keys({"cam": "primary"}, ()), action_horizon=3, action_dim=1)
    with pytest.raises(RuntimeError, match="lacks 'observation/image'"):
        wrong.infer({"image_primary": np.zeros((SIZE, SIZE, 3), np.uint8)}, "go left")


@needs_client
@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_the_published_client_drives_the_world_to_its_end(server, layout, tmp_path):
    """Same success and, for the same seed, the same actions as our client in this process."""
    program = textwrap.dedent(
        f"""
        import sys, numpy as np
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
        from openpi_client.action_chunk_broker import ActionChunkBroker
        policy = WebsocketClientPolicy("127.0.0.1", {server.port})
        broker = ActionChunkBroker(policy, action_horizon=3)
        done = []
        for goal in ("left", "right"):
            x, first = 7.0, True
            broker.reset()
            for step in range(12):
                image = np.zeros(({SIZE}, {SIZE}, 3), np.uint8)
                image[:, int(np.clip(round(x), 0, {SIZE} - 1))] = 255
                if {layout!r} == "chw":
                    image = np.ascontiguousarray(image.transpose(2, 0, 1))
                sent = {{"observation/image": image, "observation/state": np.array([x], np.float32),
                        "prompt": "go " + goal, "seed": 3}}
                if first:
                    np.save({str(tmp_path)!r} + "/" + goal + ".npy", policy.infer(dict(sent, reset=True))["actions"])
                    broker.reset()
                    first = False
                x += float(broker.infer(sent)["actions"][0])
                if x <= 0 or x >= {SIZE} - 1:
                    break
            done.append("left" if x <= 0 else "right" if x >= {SIZE} - 1 else "nowhere")
        assert done == ["left", "right"], done
        try:
            policy.infer({{"prompt": "go left"}})
        except RuntimeError as error:
            assert "lacks 'observation/image'" in str(error), error
        else:
            raise AssertionError("an error must reach the client")
        """
    )
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (
        PolicyServer(LinePolicy(), unnormalize="line", port=0).running() as ours,
        PolicyClient(port=ours.port) as client,
    ):
        for goal in ("left", "right"):
            client.reset(seed=3)
            sent = message(7)
            observation = {"image_primary": sent["observation/image"], "proprio": sent["observation/state"]}
            actions = client.act(observation, f"go {goal}")
            np.testing.assert_array_equal(np.load(tmp_path / f"{goal}.npy"), actions)


@needs_client
def test_the_published_client_may_be_started_before_its_server():
    """With the rule of openpi's repository: try again while the connection is refused. A 503 would end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = textwrap.dedent(
        f"""
        import time, numpy as np
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
        policy = None
        while policy is None:
            try:
                policy = WebsocketClientPolicy("127.0.0.1", {port})
            except ConnectionRefusedError:
                print("refused", flush=True)
                time.sleep(0.1)
        sent = {{"observation/image": np.zeros((32, 32, 3), np.uint8), "observation/state": np.zeros(4, np.float32),
                 "prompt": "go left"}}
        print(policy.infer(sent)["actions"].shape)
        """
    )
    client = subprocess.Popen([PYTHON, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert client.stdout.readline() == "refused\n"
        policy = tiny_policy("line", 3, None)
        server = OpenpiServer(policy, dataclasses.replace(LINE, state=()), unnormalize="line", port=port, max_batch=1)
        with server.running(warm=True):
            printed, said = client.communicate(timeout=120)
            assert client.returncode == 0 and printed.split("\n")[-2] == "(4, 3)", said
    finally:
        client.kill()
        client.communicate()


@needs_client
def test_two_published_clients_at_once(server):
    program = textwrap.dedent(
        f"""
        import sys, numpy as np
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
        policy, sign = WebsocketClientPolicy("127.0.0.1", {server.port}), float(sys.argv[1])
        image = np.full(({SIZE}, {SIZE}, 3), 255, np.uint8)
        for step in range(50):
            actions = policy.infer({{"observation/image": image, "observation/state": np.array([5.0], np.float32),
                                    "prompt": "go right" if sign > 0 else "go left"}})["actions"]
            assert (np.sign(actions) == sign).all(), actions
        """
    )
    start = lambda sign: subprocess.Popen([PYTHON, "-c", program, sign], stderr=subprocess.PIPE, text=True)  # noqa: E731
    robots = [start(sign) for sign in ("1", "-1")]
    for robot in robots:
        assert robot.wait(120) == 0, robot.stderr.read()


def test_nothing_but_plain_arrays_travels():
    for bad in (np.array([object()]), np.array(["x"]), np.array([1j])):
        with pytest.raises((ValueError, TypeError)):
            openpi.pack({"x": bad})
    import msgpack

    objects = msgpack.packb({b"__ndarray__": True, b"data": b"0" * 8, b"dtype": "|O", b"shape": [1]})
    with pytest.raises(ValueError, match="not accepted"):
        openpi.unpack(objects)
    with pytest.raises(ValueError, match="not a message of openpi"):
        openpi.unpack(b"\xc1")
    back = openpi.unpack(openpi.pack({"a": np.arange(6.0).reshape(2, 3), "n": np.float32(2), "s": "x"}))
    assert back["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and back["n"] == 2 and back["s"] == "x"


@needs_client
def test_the_published_client_drives_the_tabletop_as_this_process_does(tmp_path, repository):
    """A real network: the same actions, bit by bit, for the same seeds. (docs/deployment.md: with a trained one.)"""
    robot = EMBODIMENTS["gripper"]
    tiny_policy("tabletop_gripper", robot.action_dim, robot.proprio_dim).save_pretrained(tmp_path / "export")
    command = [sys.executable, str(repository / "scripts" / "bench_serving.py"), "openpi", "--python", PYTHON]
    command += ["--checkpoint", str(tmp_path / "export"), "--robots", "gripper", "--per_task", "1"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["gripper"]
    assert found["episodes"] == found["same_outcome"] == 2 and found["largest_difference"] <= 1e-6
