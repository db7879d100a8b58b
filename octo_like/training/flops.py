"""Analytic FLOPs of a training step, for MFU."""

from collections.abc import Mapping
from typing import Any

import jax

from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.model.octo import OctoModel, total_loss
from octo_like.policy.describe import matmul_flops
from octo_like.training.optimizer import join_params, split_params


def step_flops(
    model: OctoModel, spec: BatchSpec, params: Mapping[str, Any], frozen: frozenset[str], batch_size: int
) -> int:
    """Model FLOPs of one update: batch_size x (the loss of one sample and its gradient by the trained parameters).

    Matrix products and convolutions, 2 FLOPs per multiply-add, read off the traced program. What a program does besides
    is not counted, so that a faster program is never a worse one: rematerialisation, the optimizer, augmentation,
    element-wise work. Attention counts every pair of tokens, as the reference implementation computes it, whichever
    kernel runs. Where nothing is frozen and no product is shared this is three times `describe.forward_flops`, less the
    gradient by the inputs of the first layers.

    Args:
      params: the parameter tree; shapes suffice.
      frozen: paths without gradient.
    """
    plain = _reference(model)
    batch = synthetic_batch(spec, 1)
    keys = jax.random.split(jax.random.key(0), 1)
    trained, rest = split_params(params, frozen)

    def program(trained, rest):
        def loss(trained):
            terms: Any = plain.apply({"params": join_params(trained, rest)}, batch, keys, False, method="loss_terms")
            return total_loss(plain, terms, plain.counts(batch, keys))

        return jax.value_and_grad(loss)(trained)

    return batch_size * matmul_flops(program, trained, rest)


def _reference(model: OctoModel) -> OctoModel:
    """The same network without rematerialisation and special attention kernels: what it has to compute, not how."""
    transformer = model.octo_transformer
    options = {**dict(transformer.transformer), "remat": "none", "attention": "xla"}
    return model.clone(octo_transformer=transformer.clone(transformer=options))
