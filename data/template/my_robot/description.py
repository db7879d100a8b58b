"""Template: the same meaning as transform.py, as data: cameras, actions and state in the words of the registry.

Named in a config as `standardize="description:MY_ROBOT"` (any importable "module:NAME"), it fills in the cameras, the
state and the normalisation mask too; what the config gives itself wins. The words are in
octo_like/data/oxe/vocabulary.py, examples in octo_like/data/oxe/.
"""

from octo_like.data.oxe import vocabulary as s
from octo_like.data.oxe.entry import JOINTS, Entry

STATE, ACTION = s.field("observation/state"), s.field("action")

MY_ROBOT = Entry(
    images={"primary": "image", "wrist": "wrist_image"},
    action=s.concat(s.delta(STATE[0:7]), s.drop_last_step(ACTION[7:])),  # joint changes; the gripper stays absolute
    proprio=STATE,
    shorter=True,  # a change needs two steps: everything loses its last
    action_mask=JOINTS,  # the gripper stays 0/1
    version="1.0.0",
)
