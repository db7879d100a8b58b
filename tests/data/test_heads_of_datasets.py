"""From a config that gives datasets heads of their own, through real records, to losses and gradients."""

import jax
import numpy as np
import pytest

from octo_like.common.defaults import batch_spec
from octo_like.common.schema import check_batch, flatten
from octo_like.common.text import TextTokenizer
from octo_like.data.inputs import inputs_from_config
from octo_like.model.heads import check_datasets
from octo_like.model.octo import build_model, total_loss
from tests.model import light, tiny
from tests.training import tiny_config


@pytest.fixture(scope="module")
def config(make_toy, toy, wide_toy, tmp_path_factory):
    """toy (4 action dimensions) trains "arm", 2 steps; wide_toy (6) trains "bimanual", 5 steps."""
    folder = tmp_path_factory.mktemp("both")
    for source in (toy, wide_toy):
        (folder / source.name).symlink_to(source.path.parent)
    config = tiny_config.get_config()
    config.data.update(data_dir=str(folder), cache_dir=str(tmp_path_factory.mktemp("cache")))
    config.data.datasets = {
        "one": dict(
            tiny_config.dataset(toy.name),
            image_keys={},
            head="arm",
            relative_to=(0, None, None, None),
            chunk_length=5,
        ),
        "two": dict(tiny_config.dataset(wide_toy.name), image_keys={}, proprio_keys=(), head="bimanual"),
    }
    config.image_sizes, config.goal_images = {}, ()
    config.batch_size = 8
    language = tiny_config.model()["task_tokenizers"]
    config.model = light.config(
        task_tokenizers=language,
        readouts=dict(arm=1, bimanual=1),
        heads=dict(
            arm=dict(kind="flow", readout="readout_arm", action_horizon=2, action_dim=4, hidden_dim=8),
            bimanual=dict(kind="regression", readout="readout_bimanual", action_horizon=5, action_dim=6),
        ),
    )
    return config


def test_each_dataset_trains_its_head_alone(config):
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length)
    spec = batch_spec(config)
    assert (spec.action_horizon, spec.action_dim, spec.heads) == (5, 6, ("arm", "bimanual"))
    model = build_model(config.model, vocab_size=tokenizer.vocab_size)
    params = tiny.random_params(model, spec)
    inputs = inputs_from_config(config, spec, tokenizer)
    assert {name: entry["head"] for name, entry in inputs.statistics.items()} == {"one": "arm", "two": "bimanual"}
    # A policy that is made of them knows whose actions are relative to what.
    assert {name: entry.get("relative_to") for name, entry in inputs.statistics.items()} == {
        "one": [0, None, None, None],
        "two": None,
    }
    assert check_datasets(model.heads, inputs.statistics) == []

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            terms = model.apply(
                {"params": params}, batch, jax.random.split(jax.random.key(0), 8), False, method="loss_terms"
            )
            return total_loss(model, terms, model.counts(batch)), terms

        return jax.value_and_grad(loss, has_aux=True)(params)

    with inputs.stream as stream:
        batch = next(stream)
    check_batch(batch, spec)
    ids = batch["dataset_id"]
    assert set(ids.tolist()) == {0, 1}
    np.testing.assert_array_equal(batch["action_head_mask"]["arm"], ids == 0)
    np.testing.assert_array_equal(batch["action_head_mask"]["bimanual"], ids == 1)
    assert not batch["action_pad_mask"][ids == 0][..., 4:].any()
    (_, terms), _ = gradient(params, batch)
    valid = batch["observation"]["timestep_pad_mask"][..., None, None] & batch["action_pad_mask"]
    assert terms["arm"]["count"] == valid[ids == 0][:, :, :2, :4].sum() > 0
    assert terms["bimanual"]["count"] == valid[ids == 1].sum() > 0

    for name, head, other in (("one", "arm", "bimanual"), ("two", "bimanual", "arm")):
        held_out = next(iter(inputs.validation[name]))
        (_, terms), grads = gradient(params, held_out)
        grads = dict(flatten(grads))
        for path, leaf in grads.items():
            if path.startswith(f"heads_{other}/") or path.endswith(f"readout_{other}_pos_embedding"):
                assert not np.any(leaf), path
        assert any(np.any(leaf) for path, leaf in grads.items() if path.startswith(f"heads_{head}/"))
        assert terms[other]["count"] == 0 and terms[head]["count"] > 0
        # wide_toy has no proprio here: that tokenizer learns from the other dataset only.
        assert np.any(grads["octo_transformer/obs_proprio_projection/kernel"]) == (name == "one")


def test_a_dataset_that_is_wider_than_its_head_is_refused(config):
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length)
    model = build_model(config.model, vocab_size=tokenizer.vocab_size)
    config.data.datasets.two.head = "arm"
    inputs = inputs_from_config(config, batch_spec(config), tokenizer)
    inputs.stream.close()
    with pytest.raises(ValueError, match="two: its actions have 6 dimensions, but its head 'arm' has 4"):
        check_datasets(model.heads, inputs.statistics)
