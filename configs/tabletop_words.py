r"""Pictures with words beside robots' demonstrations: a policy that answers, says what it does next, and acts on it.

    python data/tabletop/build.py --data_dir runs/data --episodes tabletop_gripper=3000 tabletop_arm=3000
    python data/tabletop_long/build.py --data_dir runs/data --episodes tabletop_long_gripper=700 tabletop_long_arm=700
    python data/tabletop_words/build.py --data_dir runs/data --rows 20000
    python train.py --config configs/tabletop_words.py --workdir runs/words --config.data.data_dir=runs/data

The argument is a list of words: "no_pictures" leaves the pictures with words out and keeps the robots' samples as they
are (the batch shrinks by the pictures' share, the number of steps stays), "no_subtasks" neither learns nor reads
sub-tasks, "no_long" has no long tasks, and so no sub-tasks either.

Topology: 2 CPU cores, no accelerator. What comes of it: docs/language.md.
"""

from configs import tabletop

PICTURES = 0.2  # share of the samples
LONGEST = 24  # ids of a question; an instruction of a long task has 19 at most
SAID = 28  # ids of an answer with its end


def dataset(name: str) -> dict:
    """DatasetSpec fields of a robot's dataset, with its sub-tasks where it has them."""
    robot = name.removeprefix("tabletop_").removeprefix("long_")
    fields = tabletop.dataset(f"tabletop_{robot}", wrist=robot == "arm")
    if "long" in name:
        # The places that long tasks record are those of the present sub-task, and would give it away to a policy that
        # is to find it out, or to do without.
        fields |= dict(point_keys={}, text_keys=dict(subtask="subtask"))
        fields |= dict(env=f"octo_like.envs:octo_like/TabletopLong-{robot}-v0")
    return fields


def get_config(words: str = ""):
    chosen = set(filter(None, words.split(",")))
    if unknown := chosen - {"no_pictures", "no_subtasks", "no_long"}:
        raise ValueError(
            f"no variant {sorted(unknown)[0]!r} of configs/tabletop_words.py; valid: no_pictures, no_subtasks, no_long"
        )
    chosen |= {"no_subtasks"} if "no_long" in chosen else set()
    config = tabletop.get_config()
    config.text.update(model="words", max_length=LONGEST)
    robots = ["tabletop_gripper", "tabletop_arm"]
    robots += [] if "no_long" in chosen else ["tabletop_long_gripper", "tabletop_long_arm"]
    datasets = {name: dataset(name) | dict(weight=(1 - PICTURES) / len(robots)) for name in robots}
    datasets["tabletop_words"] = dict(
        weight=PICTURES,
        image_keys=dict(primary="image"),
        action_key=None,
        text_keys=dict(answer="answer"),
        val_split="val",
    )
    model = config.model
    language = model.task_tokenizers.language.to_dict() | dict(max_length=LONGEST)
    model.task_tokenizers = dict(language=language, subtask=language | dict(key="subtask"))
    model.readouts.text = 4
    model.auxiliaries.text = dict(
        kind="text", readout="readout_text", vocabulary="words", max_length=SAID, width=96, weight=0.1
    )
    if "no_pictures" in chosen:
        del datasets["tabletop_words"]
        config.batch_size = round(config.batch_size * (1 - PICTURES))
        model.auxiliaries.text.learns = ("subtask",)
    if "no_subtasks" in chosen:
        del model.task_tokenizers.subtask
        for name in robots:
            datasets[name].pop("text_keys", None)
        model.auxiliaries.text.learns = ("answer",)
    if {"no_pictures", "no_subtasks"} <= chosen:
        del model.auxiliaries.text, model.readouts.text
    config.data.datasets = datasets
    return config
