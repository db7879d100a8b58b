"""A part that no sample teaches is refused before training, or kept as it is: weight decay alone would change it."""

import pytest

from configs import tabletop
from octo_like.common.checks import check_run
from octo_like.common.config import ConfigError, freeze
from octo_like.common.defaults import batch_spec
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import resolve, targets_of
from octo_like.data.inputs import inputs_from_config
from octo_like.model.octo import build_model
from octo_like.training.run import check_taught
from tests.training import tiny_config
from tests.training.test_scripts import run

POINTS = tiny_config.POINTS


TEXT = dict(kind="text", readout="readout_action", vocabulary="builtin", max_length=8, width=8, num_heads=2)
HEAD = tiny_config.head(7)
WITHOUT = dict(image_keys={}, point_keys={})
LABELS = dict(point_keys=dict(target="target_point"))


def config_of(*, auxiliaries=None, heads=None, **datasets):
    """A run on the built-in world, without pictures; a dataset's fields beside its name."""
    config = tiny_config.get_config("tabletop")
    config.batch_size = 8
    config.model.auxiliaries = auxiliaries or {}
    config.model.heads = dict(action=HEAD) | (heads or {})
    config.proprio_dim = 8
    datasets = datasets or {"tabletop_arm": {}}
    config.data.datasets = {name: tabletop.dataset(name) | WITHOUT | fields for name, fields in datasets.items()}
    config.data.episodes = " ".join(f"{name}=2+1" for name in datasets)
    resolve(config.model)
    return config


def made(**options):
    """(model, inputs) as train.py has them."""
    config = config_of(**options)
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length)
    inputs = inputs_from_config(config, batch_spec(config), tokenizer, targets=targets_of(config.model))
    return build_model(config.model, vocab_size=tokenizer.vocab_size), inputs


def test_parts_that_some_sample_teaches():
    model, inputs = made(auxiliaries=dict(points=POINTS), tabletop_arm=LABELS)
    assert check_taught(model, inputs, new=lambda part: True) == ()
    known = next(inputs.stream)["points_pad_mask"]
    assert known[..., 0].any() and not known[..., 1].any()  # one name of two is enough


@pytest.mark.parametrize(
    "options,part,message",
    [
        (dict(auxiliaries=dict(points=POINTS)), "auxiliaries_points", "points learns where .*target, plate.*: none"),
        (
            dict(auxiliaries=dict(points=POINTS), tabletop_arm=dict(LABELS, language_key=None)),
            "auxiliaries_points",
            "no dataset with a weight above 0 says so beside an instruction .*tabletop_arm: target",
        ),
        (
            dict(
                auxiliaries=dict(points=POINTS),
                tabletop_arm={},
                tabletop_gripper=dict(LABELS, weight=0.0),
            ),
            "auxiliaries_points",
            "point_keys.*tabletop_arm: none",
        ),
        (dict(auxiliaries=dict(text=TEXT)), "auxiliaries_text", "learns texts .* no dataset has any"),
        (dict(heads=dict(nav=HEAD)), "heads_nav", "heads.nav: no dataset .* tabletop_arm: 'action'"),
        (
            dict(heads=dict(nav=HEAD), tabletop_arm={}, tabletop_gripper=dict(head="nav", weight=0.0)),
            "heads_nav",
            "no dataset with a weight above 0 trains this action head",
        ),
        (dict(heads=dict(action=HEAD | dict(weight=0.0))), "heads_action", "heads.action.weight is 0"),
    ],
)
def test_a_part_that_no_sample_teaches(caplog, options, part, message):
    model, inputs = made(**options)
    with pytest.raises(ConfigError, match=f"{message}(.|\n)*optimizer.freeze=\"\\('\\^{part}/',\\)\""):
        check_taught(model, inputs, new=lambda part: True)
    # What is loaded and stays as it is may be untaught, and so may a part of a run that has begun.
    for others in (dict(new=lambda one: one != part), dict(new=lambda one: True, resumes=True)):
        assert check_taught(model, inputs, **others) == (part,)
    assert "nothing of this run's data teaches it" in caplog.text
    counts = model.counts(next(inputs.stream))
    assert counts[part.partition("_")[2]] == 0 or options["heads"]["action"]["weight"] == 0


def test_places_need_instructions():
    model, inputs = made(auxiliaries=dict(points=POINTS), tabletop_arm=LABELS)
    with pytest.raises(ConfigError, match="beside an instruction"):
        check_taught(model, inputs, new=lambda part: True, words=False)


def test_places_that_are_measured_only_are_logged(caplog):
    model, inputs = made(auxiliaries=dict(points=POINTS | dict(weight=0.0)), tabletop_arm=LABELS)
    assert check_taught(model, inputs, new=lambda part: True) == ()
    assert "model.auxiliaries.points.weight is 0: its error is measured, and it learns nothing" in caplog.text


@pytest.mark.parametrize("weight", [-1.0, float("nan"), "much"])
@pytest.mark.parametrize("group", ["heads", "auxiliaries"])
def test_weights_that_are_none(group, weight):
    part = HEAD if group == "heads" else POINTS
    tree = config_of().to_dict()
    tree["model"][group]["other"] = part | dict(weight=weight)
    with pytest.raises(ConfigError, match=f"model.{group}.other.weight must be a number of at least 0"):
        check_run(freeze(tree))


def test_train_refuses_it_before_the_first_step(tmp_path):
    config = "tests/training/tiny_config.py:tabletop,points"
    done = run("train.py", "--config", config, "--workdir", tmp_path, check=False)
    assert done.returncode == 2 and "model.auxiliaries.points learns where things are" in done.stderr, done.stderr
    assert not (tmp_path / "checkpoints").exists()
