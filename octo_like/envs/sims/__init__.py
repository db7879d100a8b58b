"""Third parties' simulated robots (MuJoCo), each in a process of its own: Meta-World and Gymnasium-Robotics' Fetch.

    env = gymnasium.make("octo_like/MetaWorld-heldout-v0")          # after `import octo_like.envs`
    observation, info = env.reset(seed=3, options={"task": "window-close"})

Needs the extra `sim`. Nothing here imports a simulator: `remote` starts `worker` in a process that does, because
rendering through EGL crashes in a process that has imported TensorFlow. Modules `simulation`, `camera`, `metaworld` and
`fetch` belong to that process.
"""

import gymnasium

from octo_like.envs.sims.tasks import FETCH, GROUPS, METAWORLD_HELDOUT, METAWORLD_PRETRAIN, SimTask

__all__ = ["ACTION_KINDS", "ENVIRONMENTS", "FETCH", "GROUPS", "METAWORLD_HELDOUT", "METAWORLD_PRETRAIN", "SimTask"]

# Of the actions of all of them, see `octo_like.common.dimensions.KINDS`: steps of the hand, a command of the fingers.
ACTION_KINDS = ("delta", "delta", "delta", "gripper")
# Group of tasks -> id of the environment that asks for them.
ENVIRONMENTS = {
    "metaworld_pretrain": "octo_like/MetaWorld-pretrain-v0",
    "metaworld_heldout": "octo_like/MetaWorld-heldout-v0",
    "fetch": "octo_like/Fetch-v0",
}

for _group, _id in ENVIRONMENTS.items():
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point="octo_like.envs.sims.remote:RemoteEnv", kwargs={"group": _group})
