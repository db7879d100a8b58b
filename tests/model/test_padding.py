"""What a batch marks as not there does not matter, whatever stands there: not even NaN, in loss or gradient."""

import jax
import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.model.octo import build_model, init_params, total_loss

SPEC = BatchSpec(
    window_size=2,
    action_horizon=2,
    action_dim=3,
    image_sizes={"primary": (16, 16)},
    depth_sizes={"primary": (16, 16)},
    proprio_dim=3,
    language_length=6,
)
GARBAGE = {"nan": np.nan, "infinity": np.inf, "huge": 1e30}


def config():
    stem = dict(kind="small", patch_size=8, features=(32,), num_features=8)
    return dict(
        token_dim=16,
        max_window=2,
        repeat_task_tokens=True,
        transformer=dict(num_layers=1, num_heads=2, mlp_dim=32),
        task_tokenizers=dict(language=dict(kind="language", encoder="small", max_length=6, dim=8)),
        observation_tokenizers=dict(
            primary=dict(kind="image", stem=stem, obs_keys=("image_primary",)),
            depth=dict(kind="image", stem=stem, obs_keys=("depth_primary",)),
            proprio=dict(kind="lowdim", obs_keys=("proprio",)),
        ),
        readouts=dict(action=1),
        heads=dict(
            action=dict(kind="diffusion", readout="readout_action", action_horizon=2, action_dim=3, hidden_dim=16)
        ),
    )


@pytest.fixture(scope="module")
def loss_and_gradient():
    """(batch) to the loss of a fixed model and its gradient."""
    model = build_model(config(), vocab_size=100)
    params, keys = init_params(model, SPEC, jax.random.key(0)), jax.random.split(jax.random.key(1), 4)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        terms, _ = model.apply({"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"])
        return total_loss(model, terms, model.apply({}, batch, method="counts"))

    return lambda batch: loss(params, batch)


def padded_batch():
    """Row 0: the first timestep is before the episode. Row 1: no proprioception, no depth. Row 2: no instruction."""
    batch = synthetic_batch(SPEC, 4, seed=2)
    batch["observation"]["timestep_pad_mask"][0, 0] = False
    for key in ("proprio", "depth_primary"):
        batch["observation"]["pad_mask_dict"][key][1] = False
    batch["task"]["pad_mask_dict"]["language_instruction"][2] = False
    batch["action_pad_mask"][3, :, 1] = False
    return batch


@pytest.mark.parametrize("garbage", GARBAGE)
def test_loss_and_gradient_are_bitwise_the_same(loss_and_gradient, garbage):
    clean, spoilt = padded_batch(), padded_batch()
    value = GARBAGE[garbage]
    for key in ("proprio", "depth_primary"):
        spoilt["observation"][key][0, 0] = value
        spoilt["observation"][key][1] = value
    spoilt["task"]["language_instruction"]["input_ids"][2] = 10**6  # no such word
    spoilt["action"][3, :, 1] = value
    want, got = loss_and_gradient(clean), loss_and_gradient(spoilt)
    assert np.isfinite(got[0])
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_missing_embeddings_may_hold_anything():
    spec = BatchSpec(1, 1, 2, {"primary": (16, 16)}, language_embedding=(3, 8))
    text = dict(kind="language", encoder="embedding")
    head = dict(kind="regression", readout="readout_action", action_horizon=1, action_dim=2)
    observed = dict(primary=config()["observation_tokenizers"]["primary"])
    changes = dict(task_tokenizers=dict(language=text), observation_tokenizers=observed, heads=dict(action=head))
    built = build_model(config() | changes)
    params = init_params(built, spec, jax.random.key(0))

    def gradient(fill):
        batch = synthetic_batch(spec, 2)
        batch["task"]["pad_mask_dict"]["language_instruction"][1] = False
        batch["task"]["language_instruction"][1] = fill

        def loss(params):
            keys = jax.random.split(jax.random.key(1), 2)
            terms, _ = built.apply({"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"])
            return terms["action"]["loss"]

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(np.testing.assert_array_equal, gradient(0.0), gradient(np.nan))
