r"""Pictures with words beside robots' demonstrations: a policy that answers, says what it does next, and acts on it.

    python data/tabletop/build.py --data_dir runs/data --episodes tabletop_gripper=3000 tabletop_arm=3000
    python data/tabletop_long/build.py --data_dir runs/data --episodes tabletop_long_gripper=2000 tabletop_long_arm=2000
    python data/tabletop_words/build.py --data_dir runs/data --rows 20000
    python train.py --config configs/tabletop_words.py --workdir runs/words --config.data.data_dir=runs/data

The argument is a list of words: "no_pictures" leaves the pictures with words out and keeps the robots' samples as they
are (the batch shrinks by the pictures' share, the number of steps stays), "no_points" leaves out where in the pictures
the things are that are asked about, so that they teach by words alone, "no_subtasks" neither learns nor reads
sub-tasks, "no_long" has no long tasks, and so no sub-tasks either. With "memory" the policy says what to do next given
what it said last, so that its words are a memory of what has been done. With "paths" the sub-tasks are ways of the hand
through the image (`octo_like.common.hand_paths`) instead of sentences.

Topology: 2 CPU cores, no accelerator. What comes of it, and why it is so: docs/language.md.
"""

from configs import tabletop
from octo_like.envs.language import BLOCK_COLORS
from octo_like.envs.long_language import LONG_PLATE_COLORS

VARIANTS = ("no_pictures", "no_points", "no_subtasks", "no_long", "memory", "paths")
PICTURES = 0.2  # share of the samples
# Ids with their end: of a question, of an instruction of a long task, of an answer, of a sub-task, of a path. What is
# longer than it has to be costs most of a step: every id is embedded with its neighbours, and decoded, for every row.
QUESTION, INSTRUCTION, ANSWER, SUBTASK, PATH = 24, 19, 28, 7, 19
NAMED = ("target", "plate")  # what an instruction or a question names
THINGS = (*(f"{color}_block" for color in BLOCK_COLORS), *(f"{color}_plate" for color in LONG_PLATE_COLORS))


def dataset(name: str, subtask: str = "subtask") -> dict:
    """DatasetSpec fields of a robot's dataset, with its sub-tasks, the text of this name, where it has them."""
    robot = name.removeprefix("tabletop_").removeprefix("long_")
    fields = tabletop.dataset(f"tabletop_{robot}", wrist=robot == "arm")
    if "long" in name:
        # Where everything is, and not what the present sub-task is about: that would give it away to a policy that is
        # to find it out, or to do without.
        fields |= dict(point_keys={thing: f"{thing}_point" for thing in THINGS}, text_keys=dict(subtask=subtask))
        fields |= dict(env=f"octo_like.envs:octo_like/TabletopLong-{robot}-v0")
    return fields


def pictures(points: bool) -> dict:
    """DatasetSpec fields of the pictures with words."""
    return dict(
        weight=PICTURES,
        image_keys=dict(primary="image"),
        action_key=None,
        point_keys={name: f"{name}_point" for name in NAMED} if points else {},
        text_keys=dict(answer="answer"),
        val_split="val",
    )


def get_config(words: str = ""):
    chosen = set(filter(None, words.split(",")))
    if unknown := chosen - set(VARIANTS):
        raise ValueError(
            f"no variant {sorted(unknown)[0]!r} of configs/tabletop_words.py; valid: {', '.join(VARIANTS)}"
        )
    for without in ("no_subtasks", "no_long"):  # which leaves no sub-tasks either
        if without in chosen and (about := sorted(chosen & {"memory", "paths"})):
            raise ValueError(f"{about[0]!r} of configs/tabletop_words.py is about sub-tasks, {without!r} has none")
    with_pictures, long = "no_pictures" not in chosen, "no_long" not in chosen
    subtasks = long and "no_subtasks" not in chosen
    config = tabletop.get_config()
    longest = QUESTION if with_pictures else INSTRUCTION
    config.text.update(model="words", max_length=longest)
    short = 0.3 if long else 1.0  # what is next is learned from long tasks alone
    robots = {"tabletop_gripper": short / 2, "tabletop_arm": short / 2}
    robots |= {"tabletop_long_gripper": (1 - short) / 2, "tabletop_long_arm": (1 - short) / 2} if long else {}
    kind = "path" if "paths" in chosen else "subtask"
    datasets = {name: dataset(name, kind) | dict(weight=(1 - PICTURES) * share) for name, share in robots.items()}
    if with_pictures:
        datasets["tabletop_words"] = pictures("no_points" not in chosen)
    else:
        config.batch_size = round(config.batch_size * (1 - PICTURES))
    model = config.model
    language = model.task_tokenizers.language.to_dict() | dict(max_length=longest, dim=128)
    model.task_tokenizers = dict(language=language)
    if long:
        # What is to be done next depends on where everything is: also learned by those who do not say it.
        model.auxiliaries.points.update(names=(*NAMED, *THINGS), weight=6.0)
        model.auxiliaries.next = dict(model.auxiliaries.points, readout="readout_text", weight=2.0)
    if with_pictures or long:
        model.readouts.text = 4
    if with_pictures or subtasks:
        said = dict(kind="text", readout="readout_text", reads="all", vocabulary="words")
        model.auxiliaries.text = said | dict(max_length=ANSWER, width=64, weight=1.0)
    if with_pictures and not subtasks:
        model.auxiliaries.text.learns = ("answer",)
    if subtasks:
        model.task_tokenizers.subtask = language | dict(key="subtask")
        config.data.drop_subtask_prob = 0.6  # who is told is not asked
        if "memory" in chosen:
            config.data.last_subtask_prob, model.auxiliaries.text.remembers = 0.5, True
    else:
        for name in robots:
            datasets[name].pop("text_keys", None)
    if subtasks and not with_pictures:
        length = PATH if "paths" in chosen else SUBTASK
        model.auxiliaries.text.update(max_length=length, learns=("subtask",), width=96, weight=3.0)
    config.data.datasets = datasets
    return config
