"""After the server says that it is ready nothing compiles; what was not announced is compiled beside the others."""

import concurrent.futures
import contextlib
import functools
import threading
import time

import jax
import numpy as np
import pytest

from octo_like.common.normalization import compute_statistics
from octo_like.common.schema import BatchSpec
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import load_words
from octo_like.model.octo import build_model, init_params
from octo_like.policy.policy import Policy
from octo_like.robot.client import PolicyClient
from octo_like.robot.openpi import Keys, OpenpiServer
from octo_like.robot.server import PolicyServer
from tests.model import tiny
from tests.robot.test_openpi import Wire

pytest.importorskip("websockets")

H = 4
KEYS = Keys({"observation/image": "primary"}, ("observation/state",))


def words(**more):
    return dict(kind="language", encoder="small", max_length=6, num_layers=0, dim=8, vocab_size=192, **more)


@pytest.fixture(scope="module")
def policy():
    """Everything that requests can differ in: goals, sub-tasks, its own words, heads and data sets of other widths."""
    spec = BatchSpec(
        window_size=2,
        action_horizon=H,
        action_dim=4,
        image_sizes={"primary": (16, 16), "wrist": (16, 16)},
        goal_images=("primary",),
        proprio_dim=5,
        language_length=6,
        heads=("action", "other"),
        text_target=4,
        subtask=True,
        extra_observations={"force": (3,)},
    )
    patches = dict(kind="image", stem=dict(kind="patch", patch_size=16, num_features=8))
    chunk = dict(readout="readout_action", action_horizon=H)
    model = dict(
        token_dim=16,
        max_window=2,
        transformer=dict(num_layers=1, num_heads=2, mlp_dim=16),
        task_tokenizers=dict(language=words(), subtask=words(key="subtask")),
        observation_tokenizers=dict(
            primary=dict(patches, obs_keys=("image_primary",), goal_keys=("image_primary",)),
            wrist=dict(patches, obs_keys=("image_wrist",)),
            sensors=dict(kind="lowdim", obs_keys=("proprio", "force")),
        ),
        readouts=dict(action=1, text=1),
        heads=dict(
            action=dict(kind="flow", action_dim=4, hidden_dim=8, sample_steps=2, **chunk),
            other=dict(kind="regression", action_dim=2, **chunk),
        ),
        auxiliaries=dict(
            text=dict(
                kind="text",
                readout="readout_text",
                vocabulary=load_words("builtin"),
                max_length=4,
                width=8,
                num_heads=2,
            )
        ),
    )
    rng = np.random.default_rng(0)

    def numbers(width):
        return compute_statistics(rng.normal(size=(50, width)).astype(np.float32))

    statistics = {
        "plain": {"action": numbers(3), "proprio": numbers(5), "extra": {"force": numbers(3)}, "head": "action"},
        "relative": {
            "action": numbers(4),
            "proprio": numbers(4),
            "extra": {},
            "normalization": "bounds",
            "relative_to": (2, None, 0, None),
            "head": "action",
        },
        "blind": {"action": numbers(2), "extra": {}, "head": "other"},
    }
    tokenizer = TextTokenizer.load("builtin", 6)
    built = build_model(model, vocab_size=tokenizer.vocab_size)
    params = tiny.random_values(jax.eval_shape(lambda: init_params(built, spec, jax.random.key(0))))
    return Policy({"model": model, "batch_spec": spec.to_json()}, params, statistics, tokenizer)


@pytest.fixture(scope="module")
def compilations():
    """Names of what was traced or compiled so far, anywhere in this process."""
    found: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **more: found.append(f"{name} {more}") if name.startswith("/jax/core/compile/") else None
    )
    return found


def at_once(batcher, asks):
    """Runs the asks in threads: the first is computed alone, the others, which wait for it, together."""
    entered, let, compute = threading.Event(), threading.Event(), batcher.compute

    def held(requests):
        entered.set()
        assert let.wait(60)
        return compute(requests)

    batcher.compute = held
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(asks[0])]
        assert entered.wait(60)
        asked += [pool.submit(ask) for ask in asks[1:]]
        deadline = time.monotonic() + 60
        while batcher.queue_length < len(asks) - 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        let.set()
        for each in asked:
            each.result(60)
    batcher.compute = compute


def frame(policy, dataset, rng):
    entry = policy.statistics[dataset]
    found = {"image_primary": rng.integers(0, 256, (20, 30, 3), np.uint8)}
    found["image_wrist"] = rng.integers(0, 256, (16, 16, 3), np.uint8)
    if "proprio" in entry:
        found["proprio"] = rng.normal(size=len(entry["proprio"]["mean"]))  # float64, as robots send it
    return found | {key: rng.normal(size=3) for key in entry["extra"]}


def requests_of_every_kind(server, dataset):
    """Of one data set: alone and two together, windows that are whole, padded, and without a history."""
    entry, rng = server.policy.statistics[dataset], np.random.default_rng(5)
    width = len(entry["action"]["mean"])
    goal = {"image_primary": np.full((16, 16, 3), 7, np.uint8)}

    def act(client, text, **options):
        seen = frame(server.policy, dataset, rng)
        sent = {key: value for key, value in seen.items() if key not in client.allow_missing}
        assert client.act(sent, text, unnormalize=dataset, **options).shape == (H, width)

    def go_on(client, continuing):
        client.predict(client.window, "go", unnormalize=dataset, continuing=continuing)

    with contextlib.ExitStack() as opened:
        options = dict(port=server.port, limits=False)
        clients = [opened.enter_context(PolicyClient(**options)) for _ in range(3)]
        # The first window is padded, the second is whole.
        for number, how in enumerate(({}, {}, dict(goal=goal), dict(subtask="reach it"), dict(plan=True))):
            at_once(server.batcher, [functools.partial(act, client, f"go to {number}", **how) for client in clients])
        act(opened.enter_context(PolicyClient(**options, allow_missing=("image_wrist",))), "go")
        for method in set(clients[0].chunks(dataset)["continues"]) & set(server.continue_by):
            how = dict(executed=1, delay=1, method=method, schedule="linear", max_weight=2.0)
            how["previous"] = np.ones((H, width), np.float32)
            at_once(server.batcher, [functools.partial(go_on, client, how) for client in clients])
        # By hand: one frame without a history, and numbers of other types.
        short = {key: np.asarray(value)[None] for key, value in frame(server.policy, dataset, rng).items()}
        short |= {"image_primary": short["image_primary"][:, :16, :16], "timestep_pad_mask": [True]}
        masked = {"pad_mask_dict": {"image_wrist": np.array([False])}, "timestep": np.array([4], np.int64)}
        for observation in (short, {**short, **masked}):
            message = {"type": "act", "instruction": "go", "unnormalize": dataset, "observation": observation}
            assert clients[0]._request(message)["actions"].shape == (H, width)


def test_after_ready_nothing_compiles(policy, compilations):
    server = PolicyServer(
        policy, unnormalize="plain", port=0, max_batch=2, continue_by=("jacobian_free", "vjp"), rng_seed=3
    )
    with server.running(warm=True):
        compilations.clear()
        for dataset in policy.statistics:
            requests_of_every_kind(server, dataset)
    assert not compilations, compilations[:5]
    assert server.batcher.batches[1] and server.batcher.batches[2] and not server.errors


def test_after_ready_nothing_compiles_for_openpi(policy, compilations):
    server = OpenpiServer(policy, KEYS, unnormalize="relative", port=0, max_batch=2)
    with server.running(warm=True):
        compilations.clear()
        for prompt in ("go", "", "stop there"):
            wire = Wire(server)
            for step in range(3):
                picture = np.full((3, 24, 24), step / 10)
                reply = wire.infer({"observation/image": picture, "observation/state": np.ones(4), "prompt": prompt})
                assert reply["actions"].shape == (H, 4)
    assert not compilations, compilations[:5]


@pytest.mark.parametrize("dataset", ["relative", "blind"])
def test_the_next_episode_of_an_openpi_connection_is_answered_as_on_a_fresh_one(policy, dataset):
    """A real network that draws from noise, or does not: bitwise, with and without proprioception."""
    keys = KEYS if "proprio" in policy.statistics[dataset] else Keys(KEYS.images, ())
    gap = np.inf if keys.state else 0.2

    def sent(value):
        picture = np.full((16, 16, 3), value, np.uint8)
        return {"observation/image": picture, "observation/state": np.full(4, value / 50), "prompt": "go"}

    server = OpenpiServer(policy, keys, unnormalize=dataset, port=0, max_batch=1, episode_gap=gap, episode_jump=2.0)
    with server.running():
        fresh, wire = Wire(server).infer(sent(200))["actions"], Wire(server)
        for value in (20, 30, 40):
            before = wire.infer(sent(value))["actions"]
        time.sleep(0 if keys.state else 0.4)
        np.testing.assert_array_equal(wire.infer(sent(200))["actions"], fresh)
        assert not np.array_equal(before, fresh)


def test_a_window_without_a_history_is_that_of_an_episodes_beginning(policy):
    rng = np.random.default_rng(1)
    with PolicyServer(policy, unnormalize="plain", port=0, max_batch=1).running() as server:
        with PolicyClient(port=server.port, limits=False) as client:
            wanted = client.act(seen := frame(policy, "plain", rng), "go")
            one = {key: value[-1:] for key, value in client.window.items()}
            message = {"type": "act", "instruction": "go", "seed": 0, "step": 0, "observation": one}
            np.testing.assert_array_equal(client._request(message)["actions"], wanted)
            assert seen["proprio"].dtype == np.float64


def test_what_was_not_announced_is_compiled_beside_the_others(policy, compilations, caplog):
    """The thread that answers never computes it before it is compiled, and others are answered meanwhile."""
    server = PolicyServer(policy, unnormalize="plain", port=0, max_batch=2)
    compute, threads = server.batcher.compute, []
    compiling, let = threading.Event(), threading.Event()

    def watched(requests):
        if requests[0].continuing is not None:
            threads.append((threading.current_thread().name, len(requests)))
            compiling.set()
            assert let.wait(60)
        return compute(requests)

    with server.running(warm=True):
        server.batcher.compute = watched
        rng = np.random.default_rng(2)
        with PolicyClient(port=server.port, limits=False) as new, PolicyClient(port=server.port, limits=False) as other:
            new.act(frame(policy, "plain", rng), "go")
            more = dict(previous=np.ones((H, 3), np.float32), executed=1, delay=1, method="jacobian_free")
            answers = []
            asking = threading.Thread(target=lambda: answers.append(new.predict(new.window, "go", continuing=more)))
            asking.start()
            assert compiling.wait(60)
            for _ in range(3):
                assert other.act(frame(policy, "plain", rng), "go").shape == (H, 3)
            assert not answers
            let.set()
            asking.join(60)
            assert answers[0].shape == (H, 3)
            deadline = time.monotonic() + 60
            while "not compiled at the start" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.01)
            compilations.clear()
            new.predict(new.window, "go", continuing=more)
            assert not compilations
    assert threads[0] == ("policy-compilation", 1) and ("policy-compilation", 2) in threads
    assert ("policy-batches", 1) in threads and "--continue_by" in caplog.text


def test_a_program_that_cannot_be_compiled_reaches_its_asker_alone(policy):
    server = PolicyServer(policy, unnormalize="plain", port=0, max_batch=2)
    compute = server.batcher.compute

    def broken(requests):
        if requests[0].continuing is not None:
            raise MemoryError("the accelerator is full")
        return compute(requests)

    with server.running(warm=True):
        server.batcher.compute = broken
        with PolicyClient(port=server.port, limits=False) as client:
            client.act(frame(policy, "plain", np.random.default_rng(3)), "go")
            more = dict(previous=np.ones((H, 3), np.float32), executed=1, delay=1, method="jacobian_free")
            with pytest.raises(RuntimeError, match="MemoryError: the accelerator is full"):
                client.predict(client.window, "go", continuing=more)
            client.predict(client.window, "go")
    assert server.errors.total() == 1
