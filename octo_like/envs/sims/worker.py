"""The process that simulates: `python -m octo_like.envs.sims.worker FD`. Started and spoken to by `remote`.

It reads (method, arguments) from the socket FD and answers ("ok", value) or ("error", kind, message, traceback), one
for one, until the socket closes. No TensorFlow and no JAX is imported here.
"""

import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from octo_like.envs.sims.tasks import GROUPS, find_task


class Worker:
    """Any number of environments, by number. Methods are what `remote` may call."""

    def __init__(self):
        self._environments: dict[int, Any] = {}
        self._demonstrators: dict[str, Any] = {}

    def make(self, number: int, group: str, image_sizes: Mapping[str, int] | None) -> dict[str, Any]:
        """Makes an environment; returns its spaces and constants."""
        env = _simulation(group, image_sizes)
        self._environments[number] = env
        return {
            "observation_space": env.observation_space,
            "action_space": env.action_space,
            "action_names": env.ACTION,
            "proprio_names": env.PROPRIO,
            "max_steps": env.MAX_STEPS,
        }

    def reset(
        self, number: int, seed: int | None, options: Mapping[str, Any] | None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return self._environments[number].reset(seed=seed, options=options)

    def step(
        self, number: int, action: np.ndarray, looks: bool
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        env = self._environments[number]
        env.looks = looks
        try:
            return env.step(action)
        finally:
            env.looks = True

    def expert_action(self, number: int) -> np.ndarray:
        return self._environments[number].expert_action()

    def render(self, number: int, size: int) -> np.ndarray:
        return self._environments[number].render_scene(size)

    def close(self, number: int) -> None:
        self._environments.pop(number).close()

    def demonstrate(self, group: str, task: str, seed: int, noise: float, spread: float = 0.0) -> dict[str, Any]:
        """See `simulation.demonstrate`."""
        from octo_like.envs.sims.simulation import demonstrate

        if group not in self._demonstrators:
            self._demonstrators[group] = _simulation(group, None)
        find_task(GROUPS[group][1], task)
        return demonstrate(self._demonstrators[group], task, seed, noise, spread)


def _simulation(group: str, image_sizes: Mapping[str, int] | None):
    if group not in GROUPS:
        raise ValueError(f"unknown group of tasks {group!r}; valid: {', '.join(GROUPS)}")
    import mujoco  # noqa: F401  (an extra that is missing is told of now, not at the first reset)

    simulator, tasks = GROUPS[group]
    if simulator == "fetch":
        from octo_like.envs.sims.fetch import Fetch

        return Fetch(tasks, image_sizes)
    from octo_like.envs.sims.metaworld import MetaWorld

    return MetaWorld(tasks, image_sizes)


def serve(connection: Connection, worker: Any) -> None:
    """Answers calls until the other side is gone."""
    while True:
        try:
            method, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            reply: tuple[Any, ...] = ("ok", getattr(worker, method)(*arguments))
        except Exception as error:  # whatever it is, the caller must hear of it
            reply = ("error", type(error).__name__, str(error), traceback.format_exc())
        try:
            connection.send(reply)
        except ConnectionError:
            return


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches it as well as its parent, which says so
    with Connection(int(sys.argv[1])) as connection:
        serve(connection, Worker())


if __name__ == "__main__":
    main()
