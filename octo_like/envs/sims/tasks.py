"""What the simulated robots may be asked to do: names, words, which environment judges. Plain data, no simulator."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class SimTask:
    """One task.

    Attributes:
      name: short; `info["task"]`.
      env: name of the environment in its own package.
      instructions: phrasings; an episode's seed chooses one.
      expert: name of Meta-World's scripted policy for it; "" where the expert is ours.
    """

    name: str
    env: str
    instructions: tuple[str, ...]
    expert: str = ""


def _metaworld(name: str, *instructions: str, expert: str | None = None) -> SimTask:
    camel = "".join(word.capitalize() for word in name.split("-")) if expert is None else expert
    return SimTask(name, f"{name}-v3", instructions, f"Sawyer{camel}V3Policy")


def _by_name(*tasks: SimTask) -> dict[str, SimTask]:
    return {task.name: task for task in tasks}


# The goal of every task is in the picture: an object's own place, or the coloured marker that the environment draws.
METAWORLD_PRETRAIN: Mapping[str, SimTask] = _by_name(
    _metaworld("reach", "reach the red ball", "move the hand to the red ball"),
    _metaworld("push", "push the puck to the green ball", "slide the puck to the green ball"),
    _metaworld("pick-place", "lift the puck to the blue ball", "pick up the puck for the blue ball"),
    _metaworld("push-back", "pull the cube back to the green ball", "slide the cube back to the green ball"),
    _metaworld("sweep", "sweep the cube off the table", "push the cube to the right"),
    _metaworld("soccer", "kick the ball into the goal", "push the ball into the net"),
    _metaworld("door-open", "open the door", "pull the door open"),
    _metaworld("drawer-open", "open the drawer", "pull the drawer out"),
    _metaworld("button-press-topdown", "press the button from above", "push the button down"),
    _metaworld("window-open", "open the window", "slide the window open"),
    _metaworld("faucet-open", "open the faucet", "turn the faucet on"),
    _metaworld("plate-slide", "slide the plate into the goal", "push the plate into the net"),
    _metaworld("door-lock", "lock the door", "turn the lock of the door down"),
    _metaworld("coffee-button", "press the coffee button", "start the coffee machine"),
)
METAWORLD_HELDOUT: Mapping[str, SimTask] = _by_name(
    _metaworld("faucet-close", "close the faucet", "turn the faucet off"),
    _metaworld("coffee-push", "push the mug to the machine", "slide the mug under the machine"),
    _metaworld("sweep-into", "sweep the cube into the hole", "push the cube into the hole"),
)
FETCH: Mapping[str, SimTask] = _by_name(
    SimTask("reach", "FetchReach", ("reach the red ball", "move the gripper to the red ball")),
    SimTask("push", "FetchPush", ("push the block to the red ball", "slide the block to the red ball")),
    SimTask("pick-and-place", "FetchPickAndPlace", ("lift the block to the ball", "pick up the block for the ball")),
)
# What a registered environment or a dataset holds: name of the group -> (simulator, tasks).
GROUPS: Mapping[str, tuple[str, Mapping[str, SimTask]]] = {
    "metaworld_pretrain": ("metaworld", METAWORLD_PRETRAIN),
    "metaworld_heldout": ("metaworld", METAWORLD_HELDOUT),
    "fetch": ("fetch", FETCH),
}


def find_task(tasks: Mapping[str, SimTask], name: str) -> SimTask:
    """Raises ValueError, naming what is valid, when there is no such task."""
    if name not in tasks:
        raise ValueError(f"unknown task {name!r}; valid: {', '.join(tasks)}")
    return tasks[name]
