"""What a model is made of: token layout, attention rule, parameters and FLOPs, as text and as numbers.

Everything here is derived from the model by abstract evaluation; nothing is computed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from octo_like.common.dimensions import PARTS, of_statistics
from octo_like.common.robot import Description
from octo_like.common.schema import TEXT_LENGTH, BatchSpec, flatten, synthetic_batch
from octo_like.common.vocabularies import size_of
from octo_like.model import parts
from octo_like.model.attention import GroupLayout, may_attend
from octo_like.model.backbone import layout
from octo_like.model.octo import OctoModel, init_params
from octo_like.policy.pretrained import module_of


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """The token sequence of a model for one window length."""

    layouts: tuple[GroupLayout, ...]

    @property
    def total(self) -> int:
        return sum(group.size for group in self.layouts)

    def sizes(self) -> dict[str, int]:
        """Tokens by group (one timestep's, for groups that every timestep has)."""
        return {group.name: group.size for group in self.layouts}


def token_report(model: OctoModel, spec: BatchSpec) -> TokenReport:
    """The layout of the sequence that a batch of `spec` becomes."""
    found: list[tuple] = []

    def watch(next_fun, args, kwargs, context):
        # The one place where the groups are whole and in order: what the block transformer is given.
        if type(context.module).__name__ == "BlockTransformer" and context.method_name == "__call__":
            found.append((dict(args[0]), dict(args[1])))
        return next_fun(*args, **kwargs)

    batch = synthetic_batch(spec, 1)
    params = abstract_params(model, spec)
    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda p: model.apply({"params": p}, batch["observation"], batch["task"], method="groups"), params
        )
    task, steps = found[0]
    return TokenReport(tuple(layout(task, steps, spec.window_size)))


def rule_table(report: TokenReport) -> tuple[list[str], np.ndarray]:
    """(labels, (n, n) bool): which group attends to which; row = query. Timesteps are told apart as name@t."""
    labels = [g.name if g.timestep < 0 else f"{g.name}@{g.timestep}" for g in report.layouts]
    return labels, np.array([[may_attend(q, k) for k in report.layouts] for q in report.layouts])


def abstract_params(model: OctoModel, spec: BatchSpec) -> Any:
    """Shapes and dtypes of the parameters; allocates nothing."""
    return jax.eval_shape(lambda: init_params(model, spec, jax.random.key(0)))


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by part of the model; a pretrained language encoder is a part of its own."""
    sizes: dict[str, int] = {}
    for path, leaf in flatten(params):
        part = f"{module_of(path)}/hf_model" if "/hf_model/" in path else module_of(path)
        sizes[part] = sizes.get(part, 0) + math.prod(leaf.shape)
    return dict(sorted(sizes.items()))


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def matmul_flops(function: Callable, *args: Any) -> int:
    """FLOPs of all matrix products and convolutions that `function(*args)` computes, 2 per multiply-add.

    Read off the traced program, loops counted as often as they run; element-wise work is left out, and so is what only
    rematerialisation would compute again in a program that is not differentiated. `args` may be shapes.

    Raises:
      ValueError: a loop whose length is not known beforehand holds a product.
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contract)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            dims = params["dimension_numbers"]
            per_output = math.prod(kernel) // kernel[dims.rhs_spec[0]]
            # A gradient is a convolution of an image that is spread out by zeros; nobody has to multiply those.
            total += 2 * math.prod(equation.outvars[0].aval.shape) * per_output // math.prod(params["lhs_dilation"])
        elif name == "scan":
            total += params["length"] * _flops(params["jaxpr"].jaxpr)
        elif name == "while":
            inner = _flops(params["body_jaxpr"].jaxpr) + _flops(params["cond_jaxpr"].jaxpr)
            if inner:
                raise ValueError("a while loop of unknown length holds matrix products: its FLOPs cannot be counted")
        elif name == "cond":
            # Variants of the same thing for different devices, or branches of which one runs: the dearest counts.
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        else:
            for value in params.values():
                if hasattr(value, "jaxpr"):
                    total += _flops(value.jaxpr)
                elif hasattr(value, "eqns"):
                    total += _flops(value)
    return total


def sample_flops(model: OctoModel, spec: BatchSpec, *, batch_size: int = 1, head: str | None = None) -> int:
    """Matrix FLOPs of one `sample_actions` call. A frozen language encoder runs once per task and not here, see
    `encoding_flops`."""
    batch = synthetic_batch(spec, batch_size)
    keys = jax.random.split(jax.random.key(0), batch_size)
    head = next(iter(model.heads)) if head is None else head
    params, task = abstract_params(model, spec), batch["task"]
    if spec.language_length is not None:
        encoded = jax.eval_shape(lambda p: model.apply({"params": p}, task, method="encode_language"), params)
        task = task | {"language_instruction": task["language_instruction"] | {"encoded": encoded}}
    return matmul_flops(
        lambda p, task: model.apply({"params": p}, batch["observation"], task, keys, head=head, method="sample"),
        params,
        task,
    )


def encoding_flops(model: OctoModel, spec: BatchSpec) -> int:
    """Matrix FLOPs of what `create_tasks` computes once per task: the frozen language encoders."""
    if spec.language_length is None:
        return 0
    task = synthetic_batch(spec, 1)["task"]
    return matmul_flops(
        lambda p: model.apply({"params": p}, task, method="encode_language"), abstract_params(model, spec)
    )


def forward_flops(model: OctoModel, spec: BatchSpec) -> int:
    """Matrix FLOPs of the training loss of one sample, without its gradient."""
    batch = synthetic_batch(spec, 1)
    keys = jax.random.split(jax.random.key(0), 1)
    return matmul_flops(
        lambda p: model.apply({"params": p}, batch, keys, False, method="loss_terms"), abstract_params(model, spec)
    )


# -- text --------------------------------------------------------------------------------------------------------------


def pretty_spec(policy: Any) -> str:
    """What a policy takes, gives and holds, as a readable table."""
    spec = policy.batch_spec
    lines = ["observation"]
    lines += [f"  {name:<42}{leaf.describe()}" for name, leaf in flatten(spec.observation())]
    if spec.resize != "stretch":
        lines += [f"  pictures of other sizes: {spec.resize} (octo_like.common.geometry)"]
    lines += ["task"] + [f"  {name:<42}{leaf.describe()}" for name, leaf in flatten(spec.task())]
    lines += ["actions (normalised, or in physical units with unnormalize=...)"]
    for name, head in policy.model.heads.items():
        lines.append(f"  {name:<42}(B, {head.action_horizon}, {head.action_dim}) float32, {type(head).__name__}")
    for name, entry in (policy.config["model"].get("auxiliaries") or {}).items():
        if entry.get("kind") == "text":
            longest, words = entry.get("max_length", TEXT_LENGTH), size_of(entry["vocabulary"])
            lines.append(f"  {name:<42}words: {longest} ids at most, of {words}")
    lines += [f"statistics: {', '.join(sorted(policy.statistics)) or 'none'}"]
    for name, entry in sorted(policy.statistics.items()):
        for part in (part for part in PARTS if entry.get(part) is not None):
            lines.append(f"  {name + ' ' + part:<42}{', '.join(of_statistics(entry, part).labels)}")
    report = token_report(policy.model, spec)
    lines += [f"tokens: {report.total} for a window of {spec.window_size}"]
    for name, size in report.sizes().items():
        group = next(g for g in report.layouts if g.name == name)
        seen = {"task": "task", "obs": "task, observations", "readout": "task, observations, itself"}[group.role]
        every = "" if group.timestep < 0 else " per timestep"
        lines.append(f"  {name:<42}{size:>5}{every:<13} attends to {seen}{'' if group.timestep < 0 else ' up to now'}")
    counts = parameter_counts(policy.params)
    lines += ["parameters"] + [f"  {name:<42}{size:>12,}" for name, size in counts.items()]
    return "\n".join([*lines, f"  {'total':<42}{sum(counts.values()):>12,}"])


def model_card(policy: Any) -> str:
    """The model card of an exported policy: Markdown with the header that the Hugging Face Hub reads."""
    datasets = "".join(
        f"| {name} | {entry.get('num_trajectories', '?')} | {entry.get('num_transitions', '?')} | "
        f"{len(entry['action']['mean'])} | {entry.get('normalization', 'normal')} |\n"
        for name, entry in sorted(policy.statistics.items())
    )
    robots = "".join(
        f"\n## Robot of {name}\n\n```\n{Description.from_json(entry['robot']).describe()}\n```\n"
        for name, entry in sorted(policy.statistics.items())
        if entry.get("robot")
    )
    own = parts.hashes(policy.config["model"])
    named = f", modules={sorted(own)}" if own else ""
    sources = "".join(f"| {module} | {digest} |\n" for module, digest in own.items())
    needed = (
        f"""
## Own parts

Parts of this policy are made by modules that do not come with it. They are imported only when they are named, as above.

| module | hash of its source |
|---|---|
{sources}"""
        if own
        else ""
    )
    language = policy.batch_spec.language_length is not None and policy.text_tokenizer is not None
    task = 'texts=["..."]' if language else 'goals={"image_...": image}'
    compat = policy.config["model"].get("octo_compat", False)
    semantics = "of the Octo releases (`octo_compat`)" if compat else "that honour every padding mask"
    return f"""---
library_name: octo_like
pipeline_tag: robotics
tags: [robotics, jax, imitation-learning]
---

# Policy

Images, proprioception and a task go in, chunks of {policy.batch_spec.action_horizon} actions come out. The model has
{sum(parameter_counts(policy.params).values()):,} parameters and masks {semantics}.

```python
import jax
from octo_like import Policy

policy = Policy.load_pretrained("this directory, gs://bucket/path or hf://owner/name"{named})
task = policy.create_tasks({task})
actions = policy.sample_actions(observation, task, rng=jax.random.key(0), unnormalize=dataset)
```
{needed}
## Data

| dataset (name for `unnormalize`) | trajectories | transitions | action dimensions | normalisation |
|---|---|---|---|---|
{datasets}{robots}
## Inputs, outputs and parts

```
{pretty_spec(policy)}
```
"""
