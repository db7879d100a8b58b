"""Precision and memory options change what they should and nothing else: bfloat16 compute, rematerialisation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch
from octo_like.model.octo import build_model, total_loss
from tests.model import light, tiny
from tests.model.light import FLOW, HeadAlone

SIZES = dict(readout="readout_action", action_horizon=3, action_dim=4)
HEADS = dict(
    diffusion=tiny.diffusion(num_samples=4),
    flow=FLOW | dict(num_samples=4),
    mse=SIZES | dict(kind="regression"),
    l1=SIZES | dict(kind="regression", loss="l1"),
    discrete=SIZES | dict(kind="discrete", token_per="", num_bins=16),
    bins=SIZES | dict(kind="bins", num_bins=16, width=16, num_heads=2),
)
TRANSFORMER = dict(num_layers=2, num_heads=2, mlp_dim=32)


def losses(dtype):
    model = build_model(light.config(heads=HEADS, dtype=dtype, transformer=TRANSFORMER))
    params = tiny.random_params(model, light.SPEC)
    batch = synthetic_batch(light.SPEC, 4, language_vocab=tiny.VOCAB)
    keys = jax.random.split(jax.random.key(0), 4)
    run = jax.jit(lambda params: model.apply({"params": params}, batch, keys, False, method="loss_terms"))
    return run(params), params


def test_bfloat16_computes_the_same_losses_roughly():
    """Parameters stay float32, so do losses and noise; an operation rounds by up to 0.4%, a loss by under 3%."""
    (exact, params), (rough, _) = losses("float32"), losses("bfloat16")
    assert {leaf.dtype for _, leaf in flatten(params)} == {np.dtype(np.float32)}
    for head in HEADS:
        for name, value in rough[head].items():
            assert value.dtype == jnp.float32
            if name != "accuracy":
                np.testing.assert_allclose(value, exact[head][name], rtol=0.03, err_msg=f"{head}/{name}")
        assert rough[head]["loss"] != exact[head]["loss"], "bfloat16 was not used"


@pytest.mark.parametrize("name", HEADS)
def test_softmax_losses_and_draws_are_float32_in_bfloat16(name):
    """The trace of a bfloat16 head: nothing is drawn, exponentiated or summed to a loss in bfloat16."""
    head = HeadAlone(HEADS[name] | dict(dtype=jnp.bfloat16))
    batch = light.batch(HEADS[name])
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    text = str(jax.make_jaxpr(head.terms)(batch, keys))
    for line in text.splitlines():
        for operation in (" random_bits", " erf_inv", " exp ", " log ", " reduce_max", " reduce_sum["):
            assert operation not in line or "bf16" not in line.split("=")[0], line
    assert ("dot_general" in text) and "bf16" in text
    out = jax.eval_shape(lambda keys: head.apply(head.groups, keys, method="sample"), keys)
    assert out.dtype == jnp.float32


def count_products(program: str) -> int:
    """Matrix products that StableHLO text computes; a function counts as often as it is called."""
    bodies = {re.match(r"[^@]*@(\w+)", part)[1]: part for part in program.split("func.func")[1:]}

    def count(name):
        calls = re.findall(r"call @(\w+)", bodies[name])
        return bodies[name].count("stablehlo.dot_general") + sum(map(count, calls))

    return count("main")


def test_remat_changes_memory_and_not_numbers():
    """The gradient is the same; by XLA's count "full" computes every block twice, "dots" no product with parameters."""
    batch = synthetic_batch(light.SPEC, 2, language_vocab=tiny.VOCAB)
    keys = jax.random.split(jax.random.key(0), 2)
    grads, flops, products = {}, {}, {}
    for remat in ("none", "dots", "full"):
        transformer = TRANSFORMER | dict(remat=remat, dropout_rate=0.1, attention_dropout_rate=0.1)
        model = build_model(light.config(transformer=transformer, heads=dict(action=HEADS["mse"])))
        params = tiny.random_params(model, light.SPEC)

        def loss(params, model=model):
            terms = model.apply({"params": params}, batch, keys, True, method="loss_terms")
            return total_loss(model, terms, model.counts(batch))

        lowered = jax.jit(jax.grad(loss)).lower(params)
        flops[remat] = lowered.cost_analysis()["flops"]
        products[remat] = count_products(lowered.as_text())
        grads[remat] = lowered.compile()(params)
    for remat in ("dots", "full"):
        for (path, want), (_, got) in zip(flatten(grads["none"]), flatten(grads[remat]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=path)
    assert flops["none"] < flops["dots"] < flops["full"]
    # Per block: query, key, value, out and two of the MLP have parameters; logits and values have none. A block's
    # closing product is needed by nobody's backward pass.
    assert products["dots"] - products["none"] == 2 * 2
    assert products["full"] - products["dots"] in (2 * 6, 2 * 5)


def test_unknown_remat_is_named():
    model = build_model(light.config(transformer=TRANSFORMER | dict(remat="all")))
    with pytest.raises(ValueError, match="'all'; valid: 'none', 'full', 'dots'"):
        tiny.random_params(model, light.SPEC)
