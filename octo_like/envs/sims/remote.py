"""Environments whose simulator runs in another process, as ordinary gymnasium environments.

Several environments share a process, and `SimulatorPool` has several processes: `octo_like.robot.rollout.evaluate` with
`threads` steps them side by side. What an episode looks like depends on its seed alone, not on where it runs.
"""

import atexit
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from typing import Any

import gymnasium
import numpy as np

EXTRA = ("mujoco", "metaworld", "gymnasium_robotics")
DEFAULT_PROCESSES = "OCTO_LIKE_SIM_PROCESSES"


class SimulatorError(RuntimeError):
    """A simulator process ended, or failed by no mistake of the caller; the message holds its own words."""


class SimulatorProcess:
    """One process with environments in it. Calls are answered in order; safe to use from several threads.

    Args:
      module: what the process runs; it gets the number of a socket as its argument and speaks as `worker` does.
    """

    def __init__(self, module: str = "octo_like.envs.sims.worker"):
        ours, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.setdefault("MUJOCO_GL", "egl")  # renders without a display; "osmesa" is the other way
        self._words = tempfile.TemporaryFile()  # what it says on stderr, for when it dies
        # Started as a new program, not forked or spawned: neither this process's threads nor its imports go along.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._words,
            stderr=self._words,
        )
        theirs.close()
        self._connection, self._lock = ours, threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """The worker's answer.

        Raises:
          ValueError, RuntimeError: what the environment raised for these arguments.
          SimulatorError: the process has ended, or failed otherwise.
        """
        with self._lock:
            try:
                self._connection.send((method, arguments))
                reply = self._connection.recv()
            except (EOFError, OSError) as error:
                raise SimulatorError(self._obituary(method)) from error
        if reply[0] == "ok":
            return reply[1]
        _, kind, message, trace = reply
        if kind == "ModuleNotFoundError":
            raise SimulatorError(f"{message}: the simulators need the extra, pip install 'octo_like[sim]'")
        if kind in ("ValueError", "RuntimeError"):
            raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind](message)
        raise SimulatorError(f"the simulator failed in {method}: {kind}: {message}\n{trace}")

    def close(self) -> None:
        """Ends the process; harmless when it has ended."""
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._words.close()

    def _obituary(self, method: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._words.closed:
            return f"the simulator process was closed before {method} was called"
        self._words.seek(0)
        words = self._words.read()[-2000:].decode(errors="replace").strip()
        hint = "; if it cannot render, install libegl1, or libosmesa6 and set MUJOCO_GL=osmesa"
        return f"the simulator process ended with status {self._process.poll()} in {method}{hint}. It said:\n{words}"


class SimulatorPool:
    """Processes that environments are dealt to in turn.

    Args:
      processes: how many; None: what the variable OCTO_LIKE_SIM_PROCESSES says, or 1.
    """

    def __init__(self, processes: int | None = None):
        if processes is None:
            processes = int(os.environ.get(DEFAULT_PROCESSES, "1"))
        if processes < 1:
            raise ValueError(f"a pool needs at least one process, got {processes}")
        self.processes: Sequence[SimulatorProcess] = [SimulatorProcess() for _ in range(processes)]
        self._next = itertools.cycle(self.processes)

    def take(self) -> SimulatorProcess:
        return next(self._next)

    def close(self) -> None:
        for process in self.processes:
            process.close()

    def __enter__(self) -> "SimulatorPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


_shared: SimulatorPool | None = None


def shared_pool() -> SimulatorPool:
    """The pool of environments that were given none; started when first asked for, closed at exit."""
    global _shared
    if _shared is None:
        _shared = SimulatorPool()
        atexit.register(_shared.close)
    return _shared


class RemoteEnv(gymnasium.Env):
    """An environment of `octo_like.envs.sims` in another process; see `simulation.Simulation` for what it does.

    Args:
      group: of tasks, a key of `octo_like.envs.sims.GROUPS`.
      image_sizes: camera slot -> pixels, for other than the default sizes.
      pool: where it runs; a shared pool when None.

    Attributes:
      looks: while False, steps return black pictures, which cost nothing: for those that nobody looks at.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    _numbers = itertools.count()

    def __init__(
        self,
        group: str,
        image_sizes: Mapping[str, int] | None = None,
        pool: SimulatorPool | None = None,
        render_mode: str | None = None,
    ):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render_mode {render_mode!r}; valid: rgb_array")
        self.group, self.render_mode = group, render_mode
        self._process = (pool or shared_pool()).take()
        self._number = next(self._numbers)
        constants = self._process.call("make", self._number, group, None if image_sizes is None else dict(image_sizes))
        self.observation_space, self.action_space = constants["observation_space"], constants["action_space"]
        self.action_names, self.proprio_names = constants["action_names"], constants["proprio_names"]
        self.max_steps = constants["max_steps"]
        self.looks = True
        self._open = True

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        return self._process.call("reset", self._number, seed, None if options is None else dict(options))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        return self._process.call("step", self._number, np.asarray(action), self.looks)

    def expert_action(self) -> np.ndarray:
        """What the scripted expert, which sees the true state, would command now."""
        return self._process.call("expert_action", self._number)

    def render(self) -> np.ndarray | None:
        """The whole scene at 256 x 256, for people."""
        return self._process.call("render", self._number, 256) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(SimulatorError):
                self._process.call("close", self._number)
