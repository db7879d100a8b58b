"""What is not trained has weights: nothing is kept as it was initialised, at random."""

import logging
import shutil

import jax
import pytest

from octo_like.common.config import ConfigError, freeze, load_config
from octo_like.common.schema import flatten
from octo_like.common.text import BUILTIN_MODELS
from octo_like.training.program import check_frozen, network_from_config
from tests.training import tiny_config

TINY_T5 = dict(vocab_size=32128, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)


def config(*, t5=True, weights=None, model="builtin", freeze_patterns=("hf_model",), kind="rlds", **language):
    result = tiny_config.get_config()
    if t5:
        result.model.task_tokenizers.language = dict(kind="language", encoder="t5", t5=TINY_T5, **language)
    result.text.update(model=model, t5_weights=weights)
    result.optimizer.freeze = freeze_patterns
    result.data.kind = kind
    return freeze(result)


def network(settings):
    return network_from_config(settings, load_weights=False)


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(), "language is a T5 that is not trained, and text.t5_weights is None.*hf download.*learned_text"),
        (dict(model="words"), "t5_weights is None"),
        (dict(weights="t5-base"), "text.model='builtin' is not the vocabulary.*hf download"),
        (dict(weights="t5-base", model="words"), "text.model='words' is not the vocabulary"),
        (dict(t5=False, freeze_patterns=("obs_proprio",)), "optimizer.freeze=.*obs_proprio.*at random.*init_from"),
        (dict(finetune_encoder=True), "T5 that is not trained"),  # frozen by the pattern
    ],
)
def test_what_is_frozen_has_weights(settings, message, caplog):
    made = config(**settings)
    with pytest.raises(ConfigError, match=message):
        check_frozen(made, network(made))
    with caplog.at_level(logging.WARNING):  # a run that was begun by an earlier version goes on
        check_frozen(made, network(made), resumes=True)
    assert len(caplog.messages) == 1
    caplog.clear()
    random = config(**settings, kind="synthetic")
    with caplog.at_level(logging.WARNING):
        check_frozen(random, network(random))
    assert len(caplog.messages) == 1


@pytest.fixture
def vocabulary(tmp_path):
    """A file as T5's spiece.model, that no built-in name stands for."""
    shutil.copy(BUILTIN_MODELS["words"], tmp_path / "spiece.model")
    return str(tmp_path / "spiece.model")


def test_weights_of_another_run_count(vocabulary):
    made = config(freeze_patterns=("hf_model", "obs_proprio"), model=vocabulary)
    frozen = network(made).frozen
    check_frozen(made, network(made), loaded=frozen)
    with pytest.raises(ConfigError, match="keeps .*obs_proprio.*at random"):
        check_frozen(made, network(made), loaded={path for path in frozen if "hf_model" in path})
    with pytest.raises(ConfigError, match="t5_weights is None"):
        check_frozen(made, network(made), loaded={path for path in frozen if "obs_proprio" in path})


def test_what_no_gradient_reaches_is_frozen(vocabulary):
    """Weight decay alone would shrink it."""
    made = config(freeze_patterns=(), weights="t5-base", model=vocabulary)
    with pytest.raises(ConfigError, match="no gradient reaches .*hf_model.* add 'hf_model' to optimizer.freeze"):
        check_frozen(made, network(made))
    trained = config(freeze_patterns=(), weights="t5-base", model=vocabulary, finetune_encoder=True)
    check_frozen(trained, network(trained))


def test_a_vocabulary_is_not_larger_than_the_encoder_s(vocabulary):
    settings = config(weights="t5-base", model=vocabulary).to_dict()
    settings["model"]["task_tokenizers"]["language"]["t5"]["vocab_size"] = 100
    with pytest.raises(ConfigError, match="512 pieces.*100 rows"):
        check_frozen(freeze(settings), network(freeze(settings)))


@pytest.mark.parametrize("words", ["octo_small.py:small,learned_text", "octo_base.py:base,listen,learned_text"])
def test_one_word_chooses_a_text_encoder_that_is_trained(repository, words):
    settings = load_config(str(repository / "configs" / words))
    assert "t5" not in str(settings.model) and settings.optimizer.freeze == ()
    small = settings.model.to_dict()
    small["transformer"] |= dict(num_layers=1)
    made = network(freeze(settings.to_dict() | {"model": small}))
    check_frozen(settings, made)
    paths = [path for path, _ in flatten(jax.eval_shape(made.init_params, jax.random.key(0)))]
    assert not made.frozen and any("task_tokenizers_language/embedding" in path for path in paths)
    assert made.tokenizer.max_length == settings.model.task_tokenizers.language.max_length == settings.text.max_length


@pytest.mark.parametrize("config_file", ["octo_small.py", "octo_base.py", "octo_base.py:300m"])
def test_the_flagship_is_not_trained_on_a_random_t5(repository, config_file):
    settings = load_config(str(repository / "configs" / config_file))
    with pytest.raises(ConfigError, match="t5_weights is None"):
        check_frozen(settings, network(settings))


def test_every_shipped_config_trains_what_is_random(repository):
    """The others need no file."""
    for name in ("tabletop.py", "tabletop_octo.py", "tabletop_words.py", "tabletop_heads.py", "bridge_debug.py"):
        settings = load_config(str(repository / "configs" / name))
        check_frozen(settings, network(settings))
