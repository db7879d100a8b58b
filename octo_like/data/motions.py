"""Language motions: what a robot's hand does next, in words, from its own recorded places.

Belkhale et al. 2024 (RT-H, arXiv 2403.01823) call such a text a language motion: a policy that says it before it acts,
and listens to it, can be corrected in words like "move left". Nothing has to be annotated: the text of a step is which
entries of the proprioception (or of the summed actions) change, within the next steps, by more than a threshold.
"""

from collections.abc import Sequence
from typing import NamedTuple

from octo_like.data.errors import DataError
from octo_like.data.tf import tf

STAY = "stay"


class Motion(NamedTuple):
    """Words of one entry.

    Attributes:
      entry: of the vector that is looked at.
      threshold: change that is worth a word, in the vector's units.
      more, less: what is said when it grows, and when it shrinks, by at least that.
    """

    entry: int
    threshold: float
    more: str
    less: str


def language_motions(places_td: "tf.Tensor", motions: Sequence[Motion], *, steps: int = 8) -> "tf.Tensor":
    """(T,) texts, such as "move left and close the gripper": what changes between a step and `steps` later.

    For a `standardize` function, which puts them beside the trajectory's other leaves:

        def with_motions(trajectory):
            motions = language_motions(trajectory["observation"]["state"], MOTIONS)
            return {**trajectory, "motion": motions}

    and `text_keys=dict(subtask="motion")` in the dataset's spec.

    Args:
      places_td: (T, D) floats: where things are at every step. At the end of an episode the last step stands for those
        that would come after it. Of actions that are displacements, `tf.cumsum(actions, exclusive=True)` are.
      motions: in the order in which they are said, joined by "and". Where nothing moves enough: "stay".
      steps: how far ahead to look, at least 1.

    Raises:
      DataError: no motions, an entry that is not there, a threshold that is not positive, an empty text.
    """
    width = places_td.shape[-1]
    if steps < 1 or not motions:
        raise DataError(f"language motions need at least one motion and steps of at least 1, got {steps} steps")
    for motion in motions:
        if width is not None and not 0 <= motion.entry < width:
            raise DataError(f"language motions: no entry {motion.entry} of a vector of {width}")
        if not motion.threshold > 0 or not motion.more or not motion.less:
            raise DataError(f"language motions: a positive threshold and two texts are needed, got {tuple(motion)}")
    last = tf.shape(places_td)[0] - 1
    later = tf.gather(places_td, tf.minimum(tf.range(last + 1) + steps, last))
    change = later - places_td
    said = tf.fill([last + 1], "")
    for motion in motions:
        of_entry = change[:, motion.entry]
        shrinks = tf.where(of_entry <= -motion.threshold, motion.less, "")
        word = tf.where(of_entry >= motion.threshold, motion.more, shrinks)
        between = tf.where((said != "") & (word != ""), " and ", "")
        said = said + between + word
    return tf.where(said == "", STAY, said)
