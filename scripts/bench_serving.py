"""Serves a policy and finds out whether robots can rely on it.

    python scripts/bench_serving.py soak --checkpoint runs/demo/pretrain/export --seconds 300
    python scripts/bench_serving.py openpi --checkpoint runs/demo/pretrain/export --python .venv-openpi/bin/python

`soak`: 20 clients of two robots ask without a pause, while others send damaged messages, vanish in the middle of a
request, or neither send nor read in time. Every client compares its actions with those that the policy gives in this
process; the server's memory, its log and its end are watched. `openpi`: openpi's published client (in an environment
of its own, `make test-openpi` makes one) drives the tabletop world, and the policy in this process drives the same
scenes with the same noise. Both end with an error when something is not as it should be.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from octo_like import Policy
from octo_like.common.schema import synthetic_batch
from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv
from octo_like.robot import openpi
from octo_like.robot.client import PolicyClient
from octo_like.robot.messages import pack
from octo_like.robot.rollout import sampling_keys

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8  # of an episode of the soak
WORDS = ("put", "push", "reach", "the", "red", "green", "blue", "block", "plate", "left", "right", "on", "to")
# How far batched arithmetic may be from a batch of one: actions are of order 1 before they get their units.
RELATIVE = 1e-4


@contextlib.contextmanager
def served(checkpoint: str, *arguments: str) -> Iterator[tuple[int, subprocess.Popen, Path]]:
    """A server in a process of its own: its port, the process and its log. It has to end well when it is told to.

    Raises:
      RuntimeError: it does not start, does not end with 0, or its log has a traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        script = str(ROOT / "scripts" / "serve.py")
        command = [sys.executable, script, "--checkpoint", checkpoint, "--port", "0", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as output:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, text=True, env=environment)
        try:
            assert process.stdout is not None
            ports = (re.search(r"ws://[0-9.]+:([0-9]+)", line) for line in process.stdout)
            found = next((match for match in ports if match), None)
            if found is None:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
            yield int(found[1]), process, log
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                raise RuntimeError("the server does not end when it is told to") from None
            if status or "Traceback" in log.read_text():
                raise RuntimeError(f"the server ended with {status}:\n{log.read_text()[-3000:]}")
        finally:
            process.kill()
            process.wait()


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- soak


@dataclasses.dataclass
class Robot:
    """One client: what it sees and asks for in every episode, and the actions that belong to it.

    Attributes:
      expected: (STEPS, H, A), computed in this process, one row at a time.
      seconds: of every answer so far. wrong: what came back that was not its own.
    """

    dataset: str
    instruction: str
    seed: int
    frames: list[dict[str, np.ndarray]]
    expected: np.ndarray
    seconds: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def tolerance(self) -> float:
        return RELATIVE * max(1.0, float(np.abs(self.expected).max()))


def make_robots(policy: Policy, datasets: Sequence[str], count: int) -> list[Robot]:
    """Robots that differ in everything; those of one dataset after those of the other."""
    from octo_like.robot.history import History

    spec, robots = policy.batch_spec, []
    for number in range(count):
        rng = np.random.default_rng([number, 0x50A4])
        dataset = datasets[number % len(datasets)]
        entry = policy.statistics[dataset]
        frames = []
        for step in range(STEPS):
            example = synthetic_batch(spec, 1, seed=100 * number + step)["observation"]
            frame = {key: example[key][0, -1] for key in example if key.startswith(("image_", "depth_"))}
            if spec.proprio_dim is not None and "proprio" in entry:
                frame["proprio"] = rng.normal(entry["proprio"]["mean"], entry["proprio"]["std"]).astype(np.float32)
            frames.append(frame)
        instruction = " ".join(rng.choice(WORDS, 6)) if spec.language_length is not None else ""
        task, history, chunks = policy.create_tasks(texts=[instruction]), History(spec.window_size), []
        for step, frame in enumerate(frames):
            window = {key: value[None] for key, value in history.append(frame).items()}
            rng_key = sampling_keys(0, [number], [step])
            chunks.append(np.asarray(policy.sample_actions(window, task, rng=rng_key, unnormalize=dataset))[0])
        robots.append(Robot(dataset, instruction, number, frames, np.stack(chunks)))
    return robots


def drive(robot: Robot, port: int, until: threading.Event, failures: list[str]) -> None:
    """Asks for its actions, episode after episode."""
    try:
        with PolicyClient(port=port, limits=False, timeout=120) as client:
            while not until.is_set():
                client.reset(seed=robot.seed)
                for step, frame in enumerate(robot.frames):
                    begun = time.monotonic()
                    actions = client.act(frame, robot.instruction, unnormalize=robot.dataset)
                    robot.seconds.append(time.monotonic() - begun)
                    error = float(np.abs(actions - robot.expected[step]).max())
                    if not error <= robot.tolerance():
                        robot.wrong.append(f"robot {robot.seed}, step {step}: off by {error:.3g}")
                    if until.is_set():
                        return
    except Exception as error:  # whatever it is, it must not happen
        failures.append(f"robot {robot.seed}: {type(error).__name__}: {error}")


class Nuisance:
    """Clients that do what no client should: damaged messages, sudden silence, slowness. They get what they ask for."""

    def __init__(self, robot: Robot, port: int, until: threading.Event):
        self.port, self.until, self.rng = port, until, random.Random(robot.seed)
        window = {key: np.stack([value]) for key, value in robot.frames[0].items()}
        window |= {"timestep": np.zeros(1, np.int32), "timestep_pad_mask": np.ones(1, bool)}
        self.valid: dict[str, Any] = {"type": "act", "id": 1, "observation": window, "instruction": robot.instruction}
        self.valid |= {"unnormalize": robot.dataset, "seed": 1, "step": 0}
        self.mutated = self.vanished = self.slow = self.answered = 0

    def connect(self):
        from websockets.sync.client import connect

        wire: dict[str, Any] = dict(compression=None, max_size=None, open_timeout=60, close_timeout=1, proxy=None)
        connection = connect(f"ws://127.0.0.1:{self.port}", **wire).__enter__()
        connection.recv(60)
        return connection

    def damaged(self) -> bytes | str:
        """A valid message with something wrong in it: bytes, keys, types, shapes."""
        kind, message = self.rng.randrange(6), dict(self.valid)
        if kind == 0:
            data = bytearray(pack(message))
            for _ in range(self.rng.randrange(1, 9)):
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
            return bytes(data)
        if kind == 1:
            data = pack(message)
            return data[: self.rng.randrange(len(data))]
        if kind == 2:
            return self.rng.randbytes(self.rng.randrange(200))
        if kind == 3:
            return "text " * self.rng.randrange(9)
        part = message if kind == 4 else dict(message["observation"])
        key = self.rng.choice(sorted(part))
        odd: list[Any] = [None, -1, "x", [1], {}, np.zeros((3, 0, 2), np.float32), np.full(3, np.nan), 1 << 62]
        part[key] = self.rng.choice(odd)
        return pack(message if kind == 4 else {**message, "observation": part})

    def mutate(self) -> None:
        from websockets.exceptions import ConnectionClosed

        while not self.until.is_set():
            connection = self.connect()
            with contextlib.suppress(ConnectionClosed):
                for _ in range(self.rng.randrange(1, 20)):
                    connection.send(self.damaged())
                    self.mutated += 1
                    connection.recv(60)
                    self.answered += 1
            connection.close()
            self.until.wait(0.02)

    def vanish(self) -> None:
        while not self.until.is_set():
            connection = self.connect()
            data = pack(self.valid)
            if self.rng.random() < 0.5:
                connection.send(data)
            else:  # a frame that was announced and does not come to its end
                frame = struct.pack("!BBQ", 0x82, 0xFF, len(data)) + b"\0\0\0\0" + data[: self.rng.randrange(len(data))]
                connection.socket.sendall(frame)
            linger = struct.pack("ii", 1, 0)
            if self.rng.random() < 0.5:
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset, not a goodbye
            connection.socket.shutdown(socket.SHUT_RDWR)
            connection.close()
            self.vanished += 1
            self.until.wait(0.2)

    def dawdle(self) -> None:
        """Asks and does not read what comes, or sends a byte at a time."""
        from websockets.exceptions import ConnectionClosed

        data = pack(self.valid)
        while not self.until.is_set():
            connection = self.connect()
            with contextlib.suppress(ConnectionClosed, OSError):
                if self.rng.random() < 0.5:
                    for _ in range(20):
                        connection.send(data)
                    self.until.wait(5)
                else:
                    frame = struct.pack("!BBQ", 0x82, 0xFF, len(data)) + b"\0\0\0\0" + data
                    for i in range(50):
                        connection.socket.sendall(frame[i : i + 1])
                        if self.until.wait(0.1):
                            break
            connection.socket.close()
            self.slow += 1


def guarded(function, failures: list[str]):
    def run(*arguments):
        try:
            function(*arguments)
        except Exception as error:
            failures.append(f"{function.__name__}: {type(error).__name__}: {error}")

    return run


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a soak; "problems" lists what was wrong."""
    policy = Policy.load_pretrained(args.checkpoint)
    datasets = args.unnormalize or sorted(policy.statistics)[:2]
    robots = make_robots(policy, datasets, args.clients)
    failures: list[str] = []
    over = threading.Event()
    with served(args.checkpoint, "--max_batch", str(args.max_batch), "--unnormalize", datasets[0]) as (
        port,
        process,
        log,
    ):
        nuisances = [Nuisance(robot, port, over) for robot in robots[:3]]
        evil = [each for n in nuisances for each in (n.mutate, n.vanish, n.dawdle)][: 3 * len(nuisances)]
        threads = [threading.Thread(target=drive, args=(robot, port, over, failures), daemon=True) for robot in robots]
        threads += [threading.Thread(target=guarded(each, failures), daemon=True) for each in evil]
        for thread in threads:
            thread.start()
        begun, memory = time.monotonic(), []
        while time.monotonic() - begun < args.seconds and process.poll() is None:
            time.sleep(min(1.0, args.seconds / 50))
            memory.append(resident(process.pid))
        while sum(n.mutated for n in nuisances) < args.mutated and process.poll() is None and not failures:
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=60) as answer:
            metrics = answer.read().decode()
        over.set()
        for thread in threads:
            thread.join(120)
        failures += ["a client hangs"] * sum(thread.is_alive() for thread in threads)
        lines = len(log.read_text().splitlines())
    seconds = np.concatenate([robot.seconds for robot in robots])
    # After a fifth of the time everything was used once; a median, because a moment's batch is not a leak.
    warm, end = (float(np.median(part)) for part in (memory[len(memory) // 5 :][:10], memory[-10:]))
    wrong = [one for robot in robots for one in robot.wrong]
    problems = failures + wrong[:5]
    if end > 1.1 * warm:
        problems.append(f"the server grew from {warm / 2**20:.0f} to {end / 2**20:.0f} MB")
    if min(len(robot.seconds) for robot in robots) < STEPS:
        problems.append("a robot got fewer answers than an episode has steps")
    sizes = dict(re.findall(r'octo_like_batches_total\{size="(\d+)"\} (\d+)', metrics))
    computed = sum(map(int, sizes.values()))
    return {
        "seconds": args.seconds,
        "clients": args.clients,
        "datasets": datasets,
        "answers": len(seconds),
        "answers_per_second": round(len(seconds) / args.seconds, 1),
        "wrong": len(wrong),
        "p50_ms": round(1e3 * float(np.quantile(seconds, 0.5)), 1),
        "p99_ms": round(1e3 * float(np.quantile(seconds, 0.99)), 1),
        "rows_per_batch": round(sum(int(n) * int(c) for n, c in sizes.items()) / max(computed, 1), 2),
        "mutated": sum(n.mutated for n in nuisances),
        "vanished": sum(n.vanished for n in nuisances),
        "slow": sum(n.slow for n in nuisances),
        "memory_mb": [round(warm / 2**20, 1), round(end / 2**20, 1)],
        "log_lines": lines,
        "problems": problems,
    }


# ---------------------------------------------------------------- openpi

# Runs in the environment of openpi-client: the published client and its chunk broker, one robot.
WORKER = """
import struct, sys
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
broker = ActionChunkBroker(policy, action_horizon=int(sys.argv[2]))
pack = msgpack_numpy.Packer().pack
read, write = sys.stdin.buffer, sys.stdout.buffer
while header := read.read(4):
    observation = msgpack_numpy.unpackb(read.read(struct.unpack("<I", header)[0]))
    if observation.get("reset"):
        broker.reset()
    data = pack(broker.infer(observation)["actions"])
    write.write(struct.pack("<I", len(data)) + data)
    write.flush()
"""
KEYS = openpi.Keys({"observation/image": "primary"}, ("observation/state",))


class Published:
    """openpi's client in its own process."""

    def __init__(self, python: str, port: int, executed: int):
        command = [python, "-c", WORKER, str(port), str(executed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, observation: dict[str, Any], prompt: str, seed: int, begin: bool) -> np.ndarray:
        message = {"observation/image": observation["image_primary"], "prompt": prompt}
        if "proprio" in observation:
            message["observation/state"] = observation["proprio"]
        if begin:
            message |= {"reset": True, "seed": seed}
        data = openpi.pack(message)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(struct.pack("<I", len(data)) + data)
        self.process.stdin.flush()
        header = self.process.stdout.read(4)
        if len(header) < 4:
            raise RuntimeError("openpi's client died; see above")
        return openpi.unpack(self.process.stdout.read(struct.unpack("<I", header)[0]))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


class InProcess:
    """The policy itself, one row at a time, with the noise that the server keys by seed and request."""

    def __init__(self, policy: Policy, dataset: str, executed: int):
        self.policy, self.dataset, self.executed = policy, dataset, executed
        self.requests, self.chunk = 0, np.zeros((0, 0))

    def __call__(self, observation: dict[str, Any], prompt: str, seed: int, begin: bool) -> np.ndarray:
        if begin:
            self.requests, self.used, self.task = 0, self.executed, self.policy.create_tasks(texts=[prompt])
        if self.used == self.executed:
            window: dict[str, Any] = {key: value[None, None] for key, value in observation.items()}
            window["timestep"] = np.full((1, 1), self.requests, np.int32)
            window["timestep_pad_mask"] = np.ones((1, 1), bool)
            rng = sampling_keys(0, [seed], [self.requests])
            actions = self.policy.sample_actions(window, self.task, rng=rng, unnormalize=self.dataset)
            self.chunk, self.used, self.requests = np.asarray(actions)[0], 0, self.requests + 1
        self.used += 1
        return self.chunk[self.used - 1]

    def close(self) -> None:
        pass


def episode(env: TabletopEnv, actor, seed: int, task: str) -> tuple[bool, np.ndarray]:
    """Whether the scene was solved, and the actions (steps, A)."""
    observation, info = env.reset(seed=seed, options={"task": task})
    prompt, actions, over = info["instruction"], [], False
    while not over:
        actions.append(np.asarray(actor(observation, prompt, seed, not actions)))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        over = terminated or truncated
    return bool(info["success"]), np.stack(actions)


def with_openpi(args: argparse.Namespace) -> dict[str, Any]:
    """Rates of both and how they differ, by robot; "problems" lists what was wrong."""
    policy = Policy.load_pretrained(args.checkpoint)
    if policy.batch_spec.window_size != 1:
        raise ValueError("their clients send no frames between two requests: this comparison needs a window of 1")
    size = policy.batch_spec.image_sizes["primary"][0]
    results: dict[str, Any] = {"problems": []}
    for robot in args.robots:
        dataset, tasks = f"tabletop_{robot}", EMBODIMENTS[robot].tasks
        cells = [(EVALUATION_SEEDS + i, task) for i in range(args.per_task) for task in tasks]
        state = ["observation/state"] if EMBODIMENTS[robot].proprio_names else []
        with tempfile.NamedTemporaryFile("w", suffix=".json") as keys:
            json.dump({"images": dict(KEYS.images), "state": state}, keys)
            keys.flush()
            serving = served(args.checkpoint, "--unnormalize", dataset, "--openpi", keys.name, "--max_batch", "1")
            with serving as (port, _, _):
                outcomes = {}
                for name, actor in (
                    ("openpi", Published(args.python, port, args.executed)),
                    ("here", InProcess(policy, dataset, args.executed)),
                ):
                    env = TabletopEnv(robot, image_size=size)
                    outcomes[name] = [episode(env, actor, seed, task) for seed, task in cells]
                    actor.close()
        pairs = list(zip(outcomes["here"], outcomes["openpi"], strict=True))
        same = sum(a[0] == b[0] for a, b in pairs)
        apart = [float(np.abs(a[1] - b[1]).max()) if a[1].shape == b[1].shape else np.inf for a, b in pairs]
        results[robot] = {
            "episodes": len(cells),
            "here": float(np.mean([a[0] for a, _ in pairs])),
            "openpi": float(np.mean([b[0] for _, b in pairs])),
            "same_outcome": same,
            "largest_difference": max(apart),
        }
        if same < len(cells) or max(apart) > args.tolerance:
            results["problems"].append(f"{robot}: {same} of {len(cells)} outcomes agree, actions by {max(apart):.3g}")
        print(json.dumps({robot: results[robot]}), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("soak", "openpi"))
    parser.add_argument("--checkpoint", required=True, help="exported policy, a local folder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--seconds", type=float, default=300.0, help="soak: how long")
    parser.add_argument("--clients", type=int, default=20, help="soak: that ask without a pause")
    parser.add_argument("--mutated", type=int, default=1000, help="soak: damaged messages, at least")
    parser.add_argument("--max_batch", type=int, default=8, help="soak: of the server")
    parser.add_argument("--unnormalize", nargs="+", help="soak: datasets of the robots; default: the first two")
    parser.add_argument("--python", default=".venv-openpi/bin/python", help="openpi: with openpi-client")
    parser.add_argument("--robots", nargs="+", default=["pusher", "gripper", "arm"], choices=sorted(EMBODIMENTS))
    parser.add_argument("--per_task", type=int, default=50, help="openpi: scenes of each task of each robot")
    parser.add_argument("--executed", type=int, default=2, help="openpi: actions of a chunk that are executed")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="openpi: by which actions may differ")
    args = parser.parse_args()
    found = soak(args) if args.what == "soak" else with_openpi(args)
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    for problem in found["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
