"""Server and client over a real websocket."""

import subprocess
import sys

import numpy as np
import pytest

from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.messages import pack, unpack
from octo_like.robot.server import PolicyServer
from tests.robot.toy import SIZE, LineEnv, LinePolicy

pytest.importorskip("websockets")


@pytest.fixture
def server():
    with PolicyServer(LinePolicy(), unnormalize="line", action_names=["dx"], port=0).running() as running:
        yield running


def frame(x: float = 5.0) -> dict:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:, int(x)] = 255
    return {"image_primary": image, "proprio": np.array([x], np.float32)}


def test_the_server_introduces_its_policy(server):
    with PolicyClient(port=server.port) as client:
        assert client.metadata["statistics"] == ["line"]
        assert client.metadata["action_names"] == ["dx"]
        assert client.metadata["spec"] == server.policy.get_pretty_spec()
        spec = client.metadata["batch_spec"]
        assert (spec["window_size"], spec["action_horizon"], spec["image_sizes"]) == (2, 3, {"primary": [SIZE, SIZE]})


def test_a_robot_solves_its_task_over_the_wire(server):
    env = LineEnv()
    with PolicyClient(port=server.port) as client:
        for task in ("left", "right"):
            observation, info = env.reset(seed=3, options={"task": task})
            client.reset(seed=3)
            ended = False
            while not ended:
                actions = client.act(observation, info["instruction"])
                assert actions.shape == (3, 1)
                for i, action in enumerate(actions):
                    observation, _, terminated, truncated, info = env.step(action)
                    client.executed(action)
                    ended = terminated or truncated
                    if ended:
                        break
                    if i < len(actions) - 1:
                        client.observe(observation)
            assert info["success"]
    assert all(call["unnormalize"] == "line" for call in server.policy.calls)


def test_the_window_is_complete_and_the_answer_reproducible(server):
    with PolicyClient(port=server.port) as client:
        first = client.act(frame(5), "go left")
        client.executed(first[0])
        client.observe(frame(6))
        client.executed(first[1])
        client.act(frame(7), "go left")
        seen = server.policy.calls[-1]["observations"]
        assert seen["proprio"].tolist() == [[[6.0], [7.0]]]
        assert seen["timestep"].tolist() == [[1, 2]] and seen["timestep_pad_mask"].all()
        client.reset()
        np.testing.assert_array_equal(client.act(frame(5), "go left"), first)
        assert server.policy.calls[-1]["observations"]["timestep_pad_mask"].tolist() == [[False, True]]
        client.reset(seed=1)
        assert not np.array_equal(client.act(frame(5), "go left"), first)


def test_images_are_resized_before_they_travel(server):
    large = np.full((40, 60, 3), 200, np.uint8)
    with PolicyClient(port=server.port, allow_missing=("proprio",)) as client:
        client.act({"image_primary": large}, "go left")
    assert server.policy.calls[-1]["observations"]["image_primary"].shape == (1, 2, SIZE, SIZE, 3)


def broken(*_, **__):
    raise KeyError("a mistake of the policy")


def test_errors_reach_the_client_and_the_server_lives_on(server):
    with PolicyClient(port=server.port) as client, PolicyClient(port=server.port) as other:
        with pytest.raises(ValueError, match="unknown statistics 'bridge'; valid: line"):
            client.act(frame(), "go left", unnormalize="bridge")
        server.policy.sample_actions, works = broken, server.policy.sample_actions
        with pytest.raises(PolicyServerError, match="KeyError.*of the policy"):
            client.act(frame(), "go left")
        server.policy.sample_actions = works
        client.reset()
        assert client.act(frame(), "go left").shape == (3, 1)
        assert other.act(frame(), "go right").shape == (3, 1)
    with PolicyClient(port=server.port) as late:
        assert late.act(frame(), "go left").shape == (3, 1)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\xc1 garbage", "not a valid message"),
        ("text", "binary msgpack"),
        (pack({"type": "sing"}), "unknown request type 'sing'; valid: act"),
        (pack([1, 2]), "unknown request type None"),
        (pack({"type": "act"}), "needs 'observation'"),
    ],
)
def test_nonsense_is_answered_with_an_error(server, data, message):
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{server.port}", proxy=None) as connection:
        connection.recv(10)
        connection.send(data)
        reply = unpack(connection.recv(10))
        assert reply["type"] == "error" and message in reply["message"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(observation=[1]), "'observation' must be a map from key to array, got list"),
        (dict(instruction=5), "'instruction' must be a text, got int"),
        (dict(instruction=b"go"), "'instruction' must be a text, got bytes"),
        (dict(unnormalize=["line"]), "'unnormalize' must be the name of a data set, got list"),
        (dict(goal=np.zeros((4, 4, 3), np.uint8)), "'goal' must be a map from key to picture, got ndarray"),
        (dict(allow_missing="proprio"), "'allow_missing' must be a list of observation keys, got str"),
        (dict(allow_missing=[3]), "'allow_missing' must be a list of observation keys"),
        (dict(continuing="yes"), "'continuing' must be a map"),
        (dict(plan=1), "'plan' true or false"),
        (dict(subtask=["reach"]), "'subtask' must be a text or nothing"),
        (dict(seed="1"), "'seed' must be a whole number from 0 to"),
        (dict(step=1.0), "'step' must be a whole number from 0 to"),
        (dict(id=[1]), "'id' must be a whole number, got list"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(server, change, message):
    with PolicyClient(port=server.port) as client:
        client.observe(frame())
        asked = {"type": "act", "id": 1, "observation": dict(client.window), "instruction": "go", **change}
        client._connection.send(pack(asked))
        reply = unpack(client._connection.recv(10))
        assert reply["type"] == "error" and reply["error"] == "ValueError" and message in reply["message"], reply


@pytest.mark.parametrize(
    "change, message",
    [
        ({"proprio": "left"}, "observation/proprio: expected an array of numbers, got str"),
        ({"proprio": None}, "observation/proprio: expected an array of numbers, got NoneType"),
        ({"proprio": [[1.0], [1.0, 2.0]]}, "observation/proprio: "),
        ({"proprio": {"x": 1}}, "observation/proprio: expected an array of numbers, got dict"),
        ({"proprio": 3.0}, "observation/proprio: expected 2 frames"),
        ({"pad_mask_dict": [True]}, "pad_mask_dict must be a map from key to mask, got list"),
        ({"pad_mask_dict": {"proprio": "yes"}}, "observation/pad_mask_dict/proprio: expected an array of numbers"),
        ({"pad_mask_dict": {"proprio": [True]}}, "observation/pad_mask_dict/proprio: expected 2 frames"),
        ({"timestep_pad_mask": None}, "observation/timestep_pad_mask: expected an array of numbers"),
        ({"timestep_pad_mask": [[True, True]]}, r"expected (W,), W from 1 to 2, got (1, 2)"),
        ({"timestep_pad_mask": [True] * 3}, r"expected (W,), W from 1 to 2, got (3,)"),
        ({"timestep": ["a", "b"]}, "observation/timestep: expected an array of numbers"),
        ({"timestep": [0.0, np.nan]}, "observation/timestep: expected (2,) whole numbers from 0 on, got [ 0. nan]"),
        ({"timestep": [2, 2.5]}, "observation/timestep: expected (2,) whole numbers"),
        ({"timestep": [-3, 0]}, "observation/timestep: expected (2,) whole numbers"),
        ({"timestep": [0, 2**40]}, "observation/timestep: expected (2,) whole numbers"),
        ({"timestep": [[0], [1]]}, "observation/timestep: expected (2,) whole numbers"),
        ({5: [1.0, 2.0]}, "not a valid message: int is not allowed"),
        ({"image_wrst": np.zeros((2, 4, 4, 3), np.uint8)}, "the policy reads no 'image_wrst'"),
    ],
)
def test_a_wrong_observation_is_refused_by_its_key(server, change, message):
    with PolicyClient(port=server.port) as client:
        client.observe(frame())
        asked = {"type": "act", "instruction": "go", "observation": {**client.window, **change}}
        client._connection.send(pack({**asked, "id": 1}))
        reply = unpack(client._connection.recv(10))
        assert reply["type"] == "error" and reply["error"] == "ValueError" and message in reply["message"], reply
        assert client.act(frame(), "go left").shape == (3, 1)


@pytest.mark.parametrize("text", ["\ud800", "go \udcff left"])
def test_a_text_that_is_no_unicode_is_refused_where_it_is_sent(server, text):
    with PolicyClient(port=server.port) as client:
        with pytest.raises(ValueError, match="cannot send the text .*surrogates not allowed"):
            client.act(frame(), text)
        client.reset()
        assert client.act(frame(), "go left").shape == (3, 1)
        # By hand, as other languages may encode it.
        raw = pack({"type": "act", "id": 1, "instruction": "XXX"}).replace(b"XXX", b"\xed\xa0\x80")
        client._connection.send(raw)
        assert "not a valid message: 'utf-8'" in unpack(client._connection.recv(10))["message"]


def test_numbers_beyond_64_bits_are_refused_where_they_are_sent():
    with pytest.raises(ValueError, match="beyond 64 bits"):
        pack({"seed": 2**70})


def test_unknown_statistics_are_refused_at_the_start():
    with pytest.raises(ValueError, match="unknown statistics 'bridge'; valid: line"):
        PolicyServer(LinePolicy(), unnormalize="bridge", port=0)


def test_a_server_without_units_is_refused():
    policy = LinePolicy()
    with pytest.raises(ValueError, match="--unnormalize.*valid: line.*--normalized"):
        PolicyServer(policy, port=0)
    assert PolicyServer(policy, normalized=True, port=0).metadata["unnormalize"] is None
    with pytest.raises(ValueError, match="leave out either"):
        PolicyServer(policy, normalized=True, unnormalize="line", port=0)
    policy.statistics["arc"] = policy.statistics["line"]
    with pytest.raises(ValueError, match="valid: arc, line"):
        PolicyServer(policy, port=0)
    assert PolicyServer(policy, unnormalize="arc", port=0).metadata["unnormalize"] == "arc"
    policy.statistics = {}
    assert PolicyServer(policy, port=0).metadata["unnormalize"] is None  # nothing to choose from
    with pytest.raises(ValueError, match=r"valid: \(none\)"):
        PolicyServer(policy, unnormalize="line", port=0)


def test_warming_up_runs_the_policy_once_for_every_batch_size():
    policy = LinePolicy()
    assert PolicyServer(policy, unnormalize="line", port=0).warm_up() >= 0
    assert [call["batch"] for call in policy.calls] == [1, 2, 4, 8]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float32, ">f8"])
def test_arrays_survive_the_journey(dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    back = unpack(pack({"a": [array, array[:0], array.T], "n": np.float32(2), "s": "é", "none": None}))
    for got, want in zip(back["a"], (array, array[:0], array.T), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.shape == want.shape and got.dtype == np.dtype(dtype).newbyteorder("<")
    assert (back["n"], back["s"], back["none"]) == (2.0, "é", None)


def test_what_is_not_data_does_not_travel():
    for bad in (object(), np.array([object()]), np.array(["text"])):
        with pytest.raises(TypeError, match="cannot send"):
            pack({"x": bad})
    import msgpack

    for wrong in (
        [None, [1], b"\0" * 8],
        ["<f4", 1, b"\0" * 4],
        ["<f4", [1], "text"],
        ["<f4", [2**62, 4], b""],
        ["<f4"],
    ):
        with pytest.raises(ValueError):
            unpack(msgpack.packb(msgpack.ExtType(0x4E, msgpack.packb(wrong))))
    short = msgpack.ExtType(0x4E, msgpack.packb(["<f4", [3], b"\0\0\0\0"]))
    with pytest.raises(ValueError, match="does not have 4 bytes"):
        unpack(msgpack.packb(short))
    objects = msgpack.ExtType(0x4E, msgpack.packb(["|O", [1], b"\0" * 8]))
    with pytest.raises(ValueError, match="not accepted"):
        unpack(msgpack.packb(objects))


def test_without_websockets_the_message_says_what_to_install_and_the_client_needs_no_jax():
    code = """
import sys
sys.modules["websockets"] = None
import octo_like.robot.client as client
assert "jax" not in sys.modules and "gymnasium" not in sys.modules, "the client must be light"
try:
    client.PolicyClient()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "octo_like[serve]" in done.stdout
