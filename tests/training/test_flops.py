"""Analytic FLOPs against closed forms and against what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from octo_like.common.schema import flatten, synthetic_batch
from octo_like.model.octo import build_model, total_loss
from octo_like.policy.describe import abstract_params, forward_flops
from octo_like.training.flops import step_flops
from octo_like.training.optimizer import frozen_paths
from tests.model import tiny

WIDE = dict(token_dim=128, transformer=dict(num_layers=2, num_heads=4, mlp_dim=512))


@pytest.fixture(scope="module")
def wide():
    model = build_model(tiny.config(**WIDE))
    return model, abstract_params(model, tiny.SPEC)


def test_against_the_cost_analysis_of_the_compiled_program(wide):
    """XLA also counts element-wise work, so it lies above; at this width by less than 15%."""
    model, params = wide
    batch = synthetic_batch(tiny.SPEC, 2, language_vocab=tiny.VOCAB)
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(params):
        terms = model.apply({"params": params}, batch, keys, False, method="loss_terms")
        return total_loss(model, terms, model.counts(batch))

    counted = jax.jit(jax.value_and_grad(loss)).lower(params).compile().cost_analysis()["flops"]
    ours = step_flops(model, tiny.SPEC, params, frozenset(), 2)
    assert 0.87 * counted < ours < 1.01 * counted


def test_ratio_to_the_forward_pass(wide):
    """Everything trained: two products backward for each one forward, less the gradient by the images."""
    model, params = wide
    forward = forward_flops(model, tiny.SPEC)
    assert 2.6 * forward < step_flops(model, tiny.SPEC, params, frozenset(), 1) <= 3 * forward
    # Only the head learns: one pass through everything, and little more.
    frozen = frozen_paths(params, ("^octo_transformer",))
    assert forward <= step_flops(model, tiny.SPEC, params, frozen, 1) < 1.5 * forward


def test_linear_in_the_batch_and_blind_to_how_it_is_computed(wide):
    model, params = wide
    one = step_flops(model, tiny.SPEC, params, frozenset(), 1)
    assert step_flops(model, tiny.SPEC, params, frozenset(), 7) == 7 * one
    saving = build_model(tiny.config(**{**WIDE, "transformer": {**WIDE["transformer"], "remat": "full"}}))
    assert step_flops(saving, tiny.SPEC, params, frozenset(), 1) == one
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    assert step_flops(model, tiny.SPEC, arrays, frozenset(), 1) == one
    assert len(list(flatten(params))) > 0
