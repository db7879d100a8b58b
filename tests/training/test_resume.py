"""What a resumed run may change, which checkpoints are the best, what a run says about its code."""

import copy

import jax
import pytest
from ml_collections import ConfigDict

from octo_like.common.config import ConfigError, ConfigMismatch, check_resume, freeze, load_config, to_dict
from octo_like.training import provenance
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.program import optimizer_from_config
from octo_like.training.ranking import Ranking
from octo_like.training.resume import as_begun, comparable
from tests.training import tiny_config


def config(**changes):
    result = tiny_config.get_config("synthetic")
    result.optimizer.update(schedule="cosine", decay_steps=None, warmup_steps=2)
    result.num_steps = 8
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = result
        for group in groups:
            node = node[group]
        with node.ignore_type():
            node[last] = value
    return result


def compare(old, new):
    return [change.key for change in check_resume(comparable(old.to_dict()), comparable(new.to_dict()))]


def test_more_steps_must_not_stretch_a_schedule_that_is_under_way():
    """decay_steps of a cosine schedule is num_steps unless it is said."""
    with pytest.raises(ConfigMismatch, match="optimizer.decay_steps: 8 -> 16"):
        compare(config(), config(num_steps=16))
    longer = config(num_steps=16, optimizer__decay_steps=8)
    assert compare(config(), longer) == ["num_steps"]
    # What was accepted is the same schedule at every step, beyond its end as well.
    before, after = optimizer_from_config(config())[0], optimizer_from_config(longer)[0]
    assert [float(before(s)) for s in range(20)] == [float(after(s)) for s in range(20)]
    for schedule in ("rsqrt", "constant"):
        changes = dict(optimizer__schedule=schedule)
        assert compare(config(**changes), config(**changes, num_steps=16)) == ["num_steps"]


@pytest.mark.parametrize(
    "change",
    [
        dict(checkpoint__keep_last=7),
        dict(eval__every=3),
        dict(log_every=5),
        dict(max_bad_steps=None),
        dict(watchdog__minutes=3.0),
        dict(profile_steps="1:2"),
        dict(mesh__fsdp=2),
        dict(data__prefetch=9),
    ],
)
def test_what_may_change(change):
    assert compare(config(), config(**change)) == [next(iter(change)).replace("__", ".")]


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(batch_size=32),
        dict(accumulate=2),
        dict(optimizer__peak=2e-3),
        dict(ema_decay=0.5),
        dict(model__token_dim=64),
        dict(data__keep_goal_prob=0.1),
        dict(init_from="runs/other/export"),
    ],
)
def test_what_may_not_change(change):
    key = next(iter(change)).replace("__", ".")
    with pytest.raises(ConfigMismatch, match=f"(?s){key}: .* -> .*A resumed run may change: num_steps"):
        compare(config(), config(**change))


def test_a_checkpoint_older_than_a_key_has_its_default():
    old = config().to_dict()
    for key in ("init_from", "max_bad_steps", "watchdog", "profile_steps"):
        del old[key]
    del old["checkpoint"]["keep_best"]
    assert check_resume(comparable(old), comparable(config().to_dict())) == []
    with pytest.raises(ConfigMismatch, match="init_from"):
        check_resume(comparable(old), comparable(config(init_from="x").to_dict()))


def test_a_model_older_than_the_choice_of_an_attention_has_the_one_that_was(repository):
    new = load_config(str(repository / "configs" / "octo_base.py"), [("model.transformer.attention", "xla")]).to_dict()
    old = copy.deepcopy(new)
    del old["model"]["transformer"]["attention"]
    assert check_resume(comparable(old), comparable(new)) == []
    new["model"]["transformer"]["attention"] = "splash"
    with pytest.raises(ConfigMismatch, match="model.transformer.attention: 'xla' -> 'splash'"):
        check_resume(comparable(old), comparable(new))


def test_ranking():
    ranking = Ranking.from_config(config(checkpoint__keep_best=2, checkpoint__best_metric="val/*/*/loss"))
    scores = {"val/a/action/loss": 1.0, "val/b/action/loss": 3.0, "val/a/mae/x": 9.0}
    assert ranking.metric(scores) == 2.0 and ranking.metric(None) is None
    with pytest.raises(ConfigError, match="matches nothing of what is measured: val/a/mae/x"):
        ranking.metric({"val/a/mae/x": 9.0})
    assert Ranking.from_config(config()).metric(scores) is None


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(checkpoint__keep_best=1, eval__every=None), "eval.every is None"),
        (dict(checkpoint__keep_best=1, eval__every=6), "evaluation every 6 steps and checkpoints every 4"),
        (dict(checkpoint__export="average"), "valid: 'ema', 'raw'"),
    ],
)
def test_settings_that_contradict_each_other(change, message):
    with pytest.raises(ConfigError, match=message):
        Ranking.from_config(config(**change))


def test_code_is_told_apart():
    now = provenance.code_version()
    assert len(now["fingerprint"]) == 64 and now["libraries"]["jax"] and provenance.differences(now, now) == []
    other = {**now, "fingerprint": "0", "commit": "abc", "libraries": {**now["libraries"], "jax": "0.1"}}
    first, second = provenance.differences(other, now)
    assert "sources differ" in first and "abc" in first and second.startswith("jax: 0.1 -> ")
    assert "does not say" in provenance.differences(None, now)[0]


def test_a_run_of_an_earlier_version_counts_its_demonstrations_as_then(tmp_path):
    """`num_demos` were training episodes alone; the same command continues the run."""
    saved = freeze(config().to_dict()).to_dict()
    saved["data"]["num_demos"] = 5
    del saved["data"]["num_demos_of"]
    with Checkpointer(tmp_path, metadata={"config": saved}) as checkpointer:
        checkpointer.save(1, {"x": jax.numpy.zeros(2)})
    now = freeze(config(data__num_demos=5).to_dict())
    continued = as_begun(now, str(tmp_path))
    assert (now.data.num_demos_of, continued.data.num_demos_of) == ("all", "training")
    assert compare(ConfigDict(saved), ConfigDict(continued)) == []
    with pytest.raises(ConfigMismatch, match="data.num_demos_of: 'training' -> 'all'"):
        compare(ConfigDict(saved), ConfigDict(now))
    with Checkpointer(tmp_path, metadata={"config": to_dict(continued)}) as checkpointer:
        checkpointer.save(2, {"x": jax.numpy.zeros(2)})
    again = as_begun(now, str(tmp_path))  # what it has saved since says so itself
    assert again.data.num_demos_of == "training" and compare(ConfigDict(to_dict(continued)), ConfigDict(again)) == []
    with Checkpointer(tmp_path / "new", metadata={"config": now.to_dict()}) as checkpointer:
        checkpointer.save(1, {"x": jax.numpy.zeros(2)})
    assert as_begun(now, str(tmp_path / "new")) is now
