"""Many robots on one server: batches, HTTP, tokens, limits, clients that vanish, an orderly end."""

import contextlib
import logging
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from octo_like.common.schema import synthetic_batch
from octo_like.robot.batching import Batcher, Request
from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.messages import pack
from octo_like.robot.server import PolicyServer
from tests.model import test_text_head
from tests.robot.tiny import tiny_policy
from tests.robot.toy import SIZE, LinePolicy

pytest.importorskip("websockets")


def frame(x: float = 5.0) -> dict:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:, int(x) % SIZE] = 255
    return {"image_primary": image, "proprio": np.array([x], np.float32)}


class Gated(LinePolicy):
    """Computes a batch only when it is let; its actions say what each row saw."""

    def __init__(self):
        super().__init__()
        self.let, self.sizes = threading.Semaphore(0), []
        two = {"action": {"names": ["seen", "direction"], "kinds": ["delta"] * 2}}
        self.statistics["line"] |= {"action": {"mean": np.zeros(2), "std": np.ones(2)}, "dimensions": two}

    def sample_actions(self, observations, tasks, *, rng, unnormalize):
        assert self.let.acquire(timeout=60)
        seen = np.asarray(observations["proprio"])[:, -1, 0]
        self.sizes.append(len(seen))
        direction = np.asarray(tasks["direction"])
        return np.stack([seen, direction], axis=-1)[:, None].repeat(3, axis=1)


def request(policy, x, text, step=0) -> Request:
    window = {key: np.stack([value] * 2)[None] for key, value in frame(x).items()}
    window["timestep_pad_mask"] = np.array([[True, True]])
    return Request(window, policy.create_tasks(texts=[text]), "line", 0, step)


def test_what_waits_together_is_computed_together_and_rows_go_to_their_askers():
    policy = Gated()
    batcher = Batcher(policy, max_batch=4)
    assert batcher.sizes == [1, 2, 4]
    batcher.start()
    first = batcher.submit(request(policy, 1, "go left"))
    deadline = time.monotonic() + 60
    while batcher.queue_length and time.monotonic() < deadline:
        time.sleep(0.01)  # it is taken: the rest waits for the next batch
    asked = [(x, "go right" if x % 2 else "go left") for x in range(2, 9)]
    others = [batcher.submit(request(policy, x, text)) for x, text in asked]
    short = request(policy, 9, "go left")
    short.observation = {key: value[:, -1:] for key, value in short.observation.items()}
    other_kind = batcher.submit(short)  # another window: a batch of its own
    for _ in range(5):
        policy.let.release()
    assert first.result(60)[0].tolist() == [1.0, -1.0]
    for future, (x, text) in zip(others, asked, strict=True):
        assert future.result(60)[0].tolist() == [x, 1.0 if "right" in text else -1.0]
    assert other_kind.result(60)[0, 0] == 9
    assert policy.sizes == [1, 4, 4, 1]  # seven as four and three filled up
    assert dict(batcher.batches) == {1: 2, 4: 1, 3: 1}
    batcher.close()
    with pytest.raises(RuntimeError, match="shutting down"):
        batcher.submit(short)


@pytest.mark.parametrize("max_batch, sizes", [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_batch_sizes_are_few(max_batch, sizes):
    assert Batcher(LinePolicy(), max_batch=max_batch).sizes == sizes


def test_a_batch_has_the_actions_of_its_rows_alone():
    """A real network: the rounding of the batched arithmetic is all that may differ."""
    policy = tiny_policy("arm", 3, 4)
    batcher = Batcher(policy, max_batch=4)
    rng = np.random.default_rng(0)
    requests = []
    for seed in range(3):
        spec = policy.batch_spec
        window = {
            f"image_{slot}": rng.integers(0, 255, (1, spec.window_size, *size, 3), np.uint8)
            for slot, size in spec.image_sizes.items()
        }
        window["proprio"] = rng.normal(size=(1, spec.window_size, 4)).astype(np.float32)
        window["timestep_pad_mask"] = np.ones((1, spec.window_size), bool)
        requests.append(Request(window, policy.create_tasks(texts=[f"reach {seed}"]), "arm", seed, 3 * seed))
    together = batcher.compute(requests)
    for row, one in zip(together, requests, strict=True):
        np.testing.assert_allclose(row, batcher.compute([one])[0], rtol=1e-4, atol=1e-6)
    assert not np.allclose(together[0], together[1], rtol=1e-4, atol=1e-6)


def test_words_of_several_robots_are_one_batch():
    policy = test_text_head.policy()
    calls = []
    program = policy.text_program
    policy.text_program = lambda *args, **options: (
        calls.append(len(args[2]["pad_mask_dict"]["subtask"])) or program(*args, **options)
    )
    batcher = Batcher(policy, max_batch=4)
    batch = synthetic_batch(policy.batch_spec, 3, seed=2)["observation"]
    asked = []
    for row, text in enumerate(("go", "go", "stop")):
        window = {key: leaf[row : row + 1] for key, leaf in batch.items() if not isinstance(leaf, dict)}
        asked.append(Request(window, policy.create_tasks(texts=[text]), None, 0, 0, words=True))
    acting = Request(asked[0].observation, asked[0].task, None, 0, 0)
    futures = [batcher.submit(one) for one in (*asked, acting)]  # before the start: one batch of words, one of actions
    batcher.start()
    said = [future.result(60) for future in futures]
    assert said[:3] == [batcher.compute([one])[0] for one in asked] and len(set(said[:3])) > 1
    assert np.shape(said[3]) == (2, 3)
    assert calls[0] == 4 and dict(batcher.batches) == {3: 1, 1: 1}
    batcher.close()


def test_an_error_of_a_batch_reaches_all_its_askers_and_the_next_one_works():
    policy = Gated()
    policy.let = threading.Semaphore(100)
    works, policy.sample_actions = policy.sample_actions, lambda *_, **__: 1 / 0
    batcher = Batcher(policy)
    batcher.start()
    with pytest.raises(ZeroDivisionError):
        batcher.submit(request(policy, 1, "go left")).result(60)
    policy.sample_actions = works
    assert batcher.submit(request(policy, 2, "go left")).result(60)[0, 0] == 2
    batcher.close()


def test_a_request_that_cannot_be_computed_costs_its_company_nothing():
    policy = Gated()
    works = policy.sample_actions

    def fails_on_thirteen(observations, tasks, **arguments):
        actions = works(observations, tasks, **arguments)
        if (actions[:, 0, 0] == 13).any():
            raise OverflowError("thirteen")
        return actions

    policy.sample_actions = fails_on_thirteen
    batcher = Batcher(policy, max_batch=4)
    futures = [batcher.submit(request(policy, x, "go left")) for x in (1, 13, 3)]  # before the start: one batch
    for _ in range(4):
        policy.let.release()
    batcher.start()
    assert [futures[i].result(60)[0, 0] for i in (0, 2)] == [1, 3]
    with pytest.raises(OverflowError, match="thirteen"):
        futures[1].result(60)
    assert policy.sizes == [4, 1, 1, 1]
    batcher.close()


def test_numbers_of_the_noise_have_limits():
    """A step that does not fit would fail where the batch is computed."""
    policy = tiny_policy("arm", 3, 4)
    with (
        PolicyServer(policy, unnormalize="arm", port=0, max_batch=1).running() as server,
        PolicyClient(port=server.port) as client,
    ):
        example = {"image_primary": np.zeros((32, 32, 3), np.uint8), "proprio": np.zeros(4, np.float32)}
        client.observe(example)
        asked = {"type": "act", "observation": dict(client.window), "instruction": "go", "seed": 2**63 - 1}
        for wrong in ({"step": 2**32}, {"step": -1}, {"step": True}, {"seed": 2**63}):
            with pytest.raises(PolicyServerError, match="must be a whole number from 0 to"):
                client._request({**asked, **wrong})
        assert client._request({**asked, "step": 2**32 - 1})["actions"].shape == (4, 3)


# ---------------------------------------------------------------- robots at once


def test_robots_at_once_get_their_own_answers():
    policy = Gated()
    policy.let = threading.Semaphore(10_000)
    wrong: list = []

    def drive(number: int, port: int) -> None:
        with PolicyClient(port=port, limits=False) as client:
            for step in range(15):
                x = 100 * number + step
                actions = client.act(frame(x), "go left" if number % 2 else "go right")
                if actions[0].tolist() != [x, -1.0 if number % 2 else 1.0]:
                    wrong.append((number, step, actions))

    with PolicyServer(policy, unnormalize="line", port=0, max_batch=4).running() as server:
        robots = [threading.Thread(target=drive, args=(n, server.port)) for n in range(8)]
        for robot in robots:
            robot.start()
        for robot in robots:
            robot.join(120)
        assert not wrong and server.requests.total() == 8 * 15 and not server.errors
        assert sum(size * count for size, count in server.batcher.batches.items()) == 8 * 15


# ---------------------------------------------------------------- HTTP, tokens, limits


def http(server, path: str, token: str | None = None) -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    asked = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_port_says_how_it_is(caplog):
    with PolicyServer(LinePolicy(), unnormalize="line", port=0).running() as server:
        assert http(server, "/healthz") == (200, "OK\n")
        status, text = http(server, "/metadata")
        assert status == 200 and '"statistics": ["line"]' in text
        with PolicyClient(port=server.port) as client:
            client.act(frame(), "go left")
            with pytest.raises(PolicyServerError):
                client._request({"type": "sing"})
            status, text = http(server, "/metrics")
        assert status == 200 and "octo_like_connections 1" in text
        assert 'octo_like_requests_total{client="127.0.0.1"} 2' in text
        assert 'octo_like_errors_total{client="127.0.0.1"} 1' in text
        assert 'octo_like_batches_total{size="1"} 1' in text
        seconds = [float(line.split()[1]) for line in text.splitlines() if line.startswith("octo_like_latency")]
        assert len(seconds) == 2 and 0 < seconds[0] <= seconds[1] < 60


def test_a_token_keeps_others_out():
    with PolicyServer(LinePolicy(), unnormalize="line", port=0, token="sesame").running() as server:
        for token in (None, "open"):
            with pytest.raises(PermissionError, match="a token is needed"):
                PolicyClient(port=server.port, token=token)
            assert http(server, "/metadata", token)[0] == 401 and http(server, "/metrics", token)[0] == 401
        assert http(server, "/healthz")[0] == 200
        assert http(server, "/metadata", "sesame")[0] == 200
        with PolicyClient(port=server.port, token="sesame") as client:
            assert client.act(frame(), "go left").shape == (3, 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.0.7", "gpu-box", "::ffff:10.0.0.1"])
def test_others_are_let_in_with_a_token_or_on_request_only(host):
    with pytest.raises(ValueError, match="OCTO_LIKE_TOKEN.*without_token"):
        PolicyServer(LinePolicy(), unnormalize="line", host=host, port=0)
    with pytest.raises(ValueError, match="token must not be empty"):
        PolicyServer(LinePolicy(), unnormalize="line", host=host, port=0, token="")
    with pytest.raises(ValueError, match="leave out one"):
        PolicyServer(LinePolicy(), unnormalize="line", host=host, port=0, token="sesame", without_token=True)
    assert PolicyServer(LinePolicy(), unnormalize="line", host=host, port=0, token="sesame").token == "sesame"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", "::ffff:127.0.0.1"])
def test_this_machine_alone_needs_no_token(host):
    assert PolicyServer(LinePolicy(), unnormalize="line", host=host, port=0).token is None


def test_a_server_without_a_token_on_request_warns(caplog):
    with PolicyServer(LinePolicy(), unnormalize="line", port=0, host="0.0.0.0", without_token=True).running() as server:
        assert "without a token" in caplog.text
        with PolicyClient(port=server.port) as client:
            assert client.act(frame(), "go left").shape == (3, 1)


def test_too_many_clients_and_too_large_messages_are_refused():
    with PolicyServer(LinePolicy(), unnormalize="line", port=0, max_connections=1).running() as server:
        with PolicyClient(port=server.port) as client:
            with pytest.raises(ConnectionError, match="1 clients are here"):
                PolicyClient(port=server.port)
            assert client.act(frame(), "go left").shape == (3, 1)
            with pytest.raises(ConnectionError, match="1009"):
                client._request({"type": "act", "observation": {"image_primary": np.zeros((4000, 4000), np.uint8)}})
    with PolicyServer(LinePolicy(), unnormalize="line", port=0).running() as server:
        with PolicyClient(port=server.port) as client:
            assert client.act(frame(), "go left").shape == (3, 1)


@contextlib.contextmanager
def compiling(server):
    """The server runs in a thread, with its port taken and its policy held; leaving, it is let and has to be ready."""
    ready, over = threading.Event(), threading.Event()

    def serve():
        with server.running(warm=True):
            ready.set()
            over.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while server.port == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
        for _ in range(100):
            server.policy.let.release()
        assert ready.wait(60)
    finally:
        over.set()
        thread.join(60)


def test_the_port_refuses_connections_until_the_policy_is_compiled():
    """As if nobody were there: clients that wait for a server, openpi's for one, wait for exactly that."""
    server = PolicyServer(Gated(), unnormalize="line", port=0, max_batch=2)
    with compiling(server):
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", server.port), timeout=10).close()
        with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1:{server.port} cannot be reached"):
            PolicyClient(port=server.port, timeout=0.25)
        # Another server finds out that the port is taken, although nobody listens on it, before it compiles anything.
        second = PolicyServer(LinePolicy(), unnormalize="line", port=server.port)
        with pytest.raises(OSError), second.running(warm=True):
            pass
        assert not second.policy.calls
    assert server.policy.sizes == [1, 2]


def test_a_client_that_is_started_before_its_server_waits_for_it(caplog):
    """A refused connection is tried again, as openpi's client does."""
    caplog.set_level("INFO", "octo_like.robot.client")
    server, found = PolicyServer(Gated(), unnormalize="line", port=0, max_batch=1), []

    def wait_for_server():
        try:
            with PolicyClient(port=server.port, limits=False, timeout=60) as client:
                found.append((client.act(frame(3), "go left")[0, 0], http(server, "/healthz")))
        except Exception as error:
            found.append(error)

    with compiling(server):
        client = threading.Thread(target=wait_for_server)
        client.start()
        while "waiting up to 60 s" not in caplog.text and not found:
            time.sleep(0.01)
        assert not found
        for _ in range(100):
            server.policy.let.release()
        client.join(60)
        assert found == [(3, (200, "OK\n"))]


@pytest.mark.parametrize(
    ("host", "port", "error", "message"),
    [
        ("127.0.0.1", 1, ConnectionRefusedError, "the server at 127.0.0.1:1 cannot be reached"),
        ("no-such-host.invalid", 8000, ConnectionError, "the server at no-such-host.invalid:8000 cannot be reached"),
        ("", 8000, ValueError, ":8000 is no address of a server"),
        ("127.0.0.1", "many", ValueError, "127.0.0.1:many is no address of a server"),
    ],
)
def test_a_server_that_cannot_be_reached_is_named(host, port, error, message):
    with pytest.raises(error, match=message):
        PolicyClient(host, port, timeout=0.2)


@pytest.mark.parametrize("timeout", [None, 0, -1, float("inf"), float("nan"), "30", True])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(ValueError, match="timeout must be seconds, above 0"):
        PolicyClient(port=1, timeout=timeout)


def test_a_port_that_is_taken_is_an_error_before_anything_is_compiled():
    policy = LinePolicy()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError):
            with PolicyServer(policy, unnormalize="line", port=taken.getsockname()[1]).running(warm=True):
                pass
    assert not policy.calls


def test_a_server_is_started_again_on_its_port():
    """Connections that the server closed stay on the port for a minute."""
    port = 0
    for _ in range(3):
        with PolicyServer(LinePolicy(), unnormalize="line", port=port).running() as server:
            port, client = server.port, PolicyClient(port=server.port)
            assert client.act(frame(), "go left").shape == (3, 1)
        client.close()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(port=99999),
        dict(port=-1),
        dict(port="8000"),
        dict(max_connections=0),
        dict(max_batch=0),
        dict(max_batch=2.5),
        dict(rng_seed=-1),
        dict(rng_seed=2**70),
    ],
)
def test_numbers_out_of_their_range_are_refused_at_the_start(wrong):
    (key, value) = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"'{key.removeprefix('rng_')}' must be a whole number from .* got {value!r}"):
        PolicyServer(LinePolicy(), unnormalize="line", **wrong)


# ---------------------------------------------------------------- clients that vanish, and the end


def test_clients_that_vanish_or_talk_nonsense_cost_one_line_each(caplog):
    caplog.set_level(logging.INFO)
    policy = Gated()
    with PolicyServer(policy, unnormalize="line", port=0).running() as server:
        client = PolicyClient(port=server.port)
        client.observe(frame())
        client._connection.send(pack({"type": "act", "id": 1, "observation": dict(client.window), "instruction": "go"}))
        client._connection.socket.shutdown(socket.SHUT_RDWR)  # as when the cable is pulled
        policy.let.release()
        with socket.create_connection(("127.0.0.1", server.port)) as scanner:
            scanner.sendall(b"\x16\x03\x01 not HTTP at all\r\n\r\n")
            scanner.recv(1000)
        for _ in range(3):
            policy.let.release()
        with PolicyClient(port=server.port, limits=False) as other:
            assert other.act(frame(7), "go left")[0, 0] == 7
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_what_was_asked_before_the_end_is_answered():
    policy = Gated()
    answers: list = []
    server = PolicyServer(policy, unnormalize="line", port=0)

    def ask(port: int) -> None:
        with PolicyClient(port=port, limits=False) as client:
            answers.append(client.act(frame(3), "go left"))

    with server.running():
        asking = threading.Thread(target=ask, args=(server.port,))
        asking.start()
        deadline = time.monotonic() + 60
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        while not server.batcher._busy and time.monotonic() < deadline:
            time.sleep(0.01)
        threading.Timer(0.2, policy.let.release).start()
    asking.join(60)
    assert answers and answers[0][0, 0] == 3
