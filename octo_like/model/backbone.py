"""Task, observation and readout groups through one block-causal transformer, back to groups.

Sequence: task groups, then for every timestep of the window: observation groups, repeated task groups, readouts.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from octo_like.model.attention import BlockMask, GroupLayout, StaticRule, block_mask
from octo_like.model.parts import check_tokens
from octo_like.model.tokens import TokenGroup, masked_mean, present, valid_mask
from octo_like.model.transformer import Transformer


class BlockTransformer(nn.Module):
    """Lays groups out as one sequence, runs the transformer with the block mask, and splits the result again."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    remat: bool | str = False
    compat: bool = False
    legacy_attention: bool = False
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        task: Mapping[str, TokenGroup],
        steps: Mapping[str, TokenGroup],
        dropout_keys: jax.Array | None = None,
        *,
        only_last: str | None = None,
    ) -> dict[str, TokenGroup]:
        """
        Args:
          task: prefix groups, tokens (B, n, D).
          steps: timestep groups, tokens (B, W, n, D), in sequence order.
          dropout_keys: (B,) keys, or None for deterministic outputs.
          only_last: name of a timestep group, or "obs" for all of them that are no readouts: return these alone, and
            only their last timestep (W = 1).
        """
        b, window, _, dim = next(iter(steps.values())).tokens.shape
        prefix = TokenGroup.concatenate(list(task.values())) if task else None
        per_step = TokenGroup.concatenate(list(steps.values()))
        tokens = per_step.tokens.reshape(b, -1, dim)
        key_mask = per_step.mask.reshape(b, -1)
        if prefix is not None:
            tokens = jnp.concatenate([prefix.tokens, tokens], axis=1)
            key_mask = jnp.concatenate([prefix.mask, key_mask], axis=1)
        rule = block_mask(layout(task, steps, window), legacy=self.legacy_attention)
        sizes = {name: group.tokens.shape[-2] for name, group in steps.items()}
        asked = [name for name in steps if only_last in (None, name) or only_last == "obs" and name.startswith("obs_")]
        if not asked:
            raise ValueError(f"no group {only_last!r} in the sequence; valid: {['obs', *steps]}")
        rows = None
        if only_last is not None:
            last_step = tokens.shape[1] - sum(sizes.values())
            before = sum(sizes[name] for name in list(steps)[: list(steps).index(asked[0])])
            rows = last_step + before, sum(sizes[name] for name in asked)  # "obs_" groups stand side by side
        out = Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dropout_rate,
            self.attention_dropout_rate,
            uniform_when_masked=self.compat,
            remat=self.remat,
            dtype=self.dtype,
            attention=self.attention,
            qk_norm=self.qk_norm,
            name="Transformer_0",
        )(tokens, BlockMask(StaticRule(rule), key_mask), dropout_keys, rows=rows)

        groups, start = {}, 0
        for name, group in task.items() if only_last is None else ():
            size = group.tokens.shape[-2]
            groups[name] = present(TokenGroup(out[:, start : start + size], group.mask), compat=self.compat)
            start += size
        out = out[:, start:].reshape(b, window if only_last is None else 1, -1, dim)
        start = 0
        for name in asked:
            mask = steps[name].mask if only_last is None else steps[name].mask[:, -1:]
            groups[name] = present(TokenGroup(out[:, :, start : start + sizes[name]], mask), compat=self.compat)
            start += sizes[name]
        return groups


def layout(task: Mapping[str, TokenGroup], steps: Mapping[str, TokenGroup], window: int) -> list[GroupLayout]:
    """The group layout of the whole sequence."""
    groups = [GroupLayout(name, "task", group.tokens.shape[-2], -1) for name, group in task.items()]
    for t in range(window):
        for name, group in steps.items():
            role: Literal["obs", "readout"] = "readout" if name.startswith("readout_") else "obs"
            groups.append(GroupLayout(name, role, group.tokens.shape[-2], t))
    return groups


class OctoTransformer(nn.Module):
    """Tokenizers, projections, position embeddings and the transformer.

    Attributes:
      task_tokenizers, observation_tokenizers: modules by group name; their order is the order of the sequence.
      readouts: number of readout tokens by name.
      token_dim: width D of the transformer.
      max_window: longest window the position embeddings allow.
      repeat_task_tokens: repeat the task's tokens at every timestep.
      token_norm: layer norm of every group's tokens after their projection, so that no group begins louder than others.
      position_scale: deviation of position embeddings at the start.
    """

    task_tokenizers: Mapping[str, nn.Module]
    observation_tokenizers: Mapping[str, nn.Module]
    readouts: Mapping[str, int]
    transformer: Mapping[str, Any]
    token_dim: int
    max_window: int
    repeat_task_tokens: bool = False
    compat: bool = False
    legacy_attention: bool = False
    token_norm: bool = False
    position_scale: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        dropout_keys: jax.Array | None = None,
        *,
        only_last: str | None = None,
    ) -> dict[str, TokenGroup]:
        """Returns every group by name ("task_*", "obs_*", "readout_*") and the concatenations "task" and "obs".

        Args:
          observation: schema `observation`, arrays (B, W, ...).
          task: schema `task`, arrays (B, ...).
          dropout_keys: (B,) keys, or None for deterministic outputs.
          only_last: the group a head will read ("readout_action", "obs", ...), at the last timestep (W = 1): nothing
            else is returned, and what it does not depend on is not computed. Other readouts are not in the sequence,
            which changes nothing. (With `legacy_attention` they stay: there a rule depends on the neighbours.)
        """
        step_mask = jnp.asarray(observation["timestep_pad_mask"], bool)
        b, window = step_mask.shape
        if window > self.max_window:
            raise ValueError(f"window of {window} observations, but this model was built for at most {self.max_window}")
        if not self.compat:
            observation, task = without_padding(observation, task)

        task_groups = {}
        for name, tokenizer in self.task_tokenizers.items():
            group = tokenizer(observation, task)
            if group is not None:
                check_tokens(group, tokenizer, f"task tokenizer {name!r}", (b,))
                group = present(group, compat=self.compat)
                pos = self._position(f"task_{name}_pos_embedding", (1, *group.tokens.shape[1:2], self.token_dim))
                task_groups[f"task_{name}"] = TokenGroup(self._project(f"task_{name}", group.tokens) + pos, group.mask)
        summaries = {name: masked_mean(group) for name, group in task_groups.items()}
        if task_groups:
            summaries["task"] = masked_mean(TokenGroup.concatenate(list(task_groups.values())))

        steps = {}
        for name, tokenizer in self.observation_tokenizers.items():
            group = tokenizer(observation, task, summaries)
            if group is not None:
                check_tokens(group, tokenizer, f"observation tokenizer {name!r}", (b, window))
                group = present(TokenGroup(group.tokens, group.mask & step_mask[..., None]), compat=self.compat)
                size = group.tokens.shape[-2]
                pos = self._position(f"obs_{name}_pos_embedding", (1, self.max_window, size, self.token_dim))
                tokens = self._project(f"obs_{name}", group.tokens) + pos[:, :window]
                steps[f"obs_{name}"] = TokenGroup(tokens, group.mask)
        if not steps:
            keys = sorted(key for key in observation if key != "pad_mask_dict")
            raise ValueError(f"no observation tokenizer found its input among the observation's keys {keys}")
        if self.repeat_task_tokens:
            for name, group in task_groups.items():
                tokens = jnp.broadcast_to(group.tokens[:, None], (b, window, *group.tokens.shape[1:]))
                mask = jnp.broadcast_to(group.mask[:, None], tokens.shape[:-1])
                steps[f"obs_{name}"] = TokenGroup(tokens, mask if self.compat else mask & step_mask[..., None])
        for name, size in self.readouts.items():
            if only_last not in (None, f"readout_{name}") and not self.legacy_attention:
                continue
            pos = self._position(f"readout_{name}_pos_embedding", (1, self.max_window, size, self.token_dim))
            tokens = jnp.broadcast_to(pos[:, :window], (b, window, size, self.token_dim))
            mask = jnp.ones(tokens.shape[:-1], bool)
            steps[f"readout_{name}"] = TokenGroup(tokens, mask if self.compat else mask & step_mask[..., None])

        groups = BlockTransformer(
            **self.transformer,
            compat=self.compat,
            legacy_attention=self.legacy_attention,
            dtype=self.dtype,
            name="BlockTransformer_0",
        )(task_groups, steps, dropout_keys, only_last=only_last)
        for whole, prefix in (("task", "task_"), ("obs", "obs_")):
            parts = [group for name, group in groups.items() if name.startswith(prefix)]
            if parts:
                groups[whole] = TokenGroup.concatenate(parts)
        return groups

    def _project(self, name: str, tokens: jax.Array) -> jax.Array:
        tokens = nn.Dense(self.token_dim, dtype=self.dtype, name=f"{name}_projection")(tokens)
        if self.token_norm:
            tokens = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm")(tokens)
        return tokens

    def _position(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.normal(self.position_scale), shape).astype(self.dtype)


def without_padding(observation: Mapping, task: Mapping, *, compat: bool = False) -> tuple[dict, dict]:
    """(observation, task) with zeros where the batch says that nothing is, whatever stands there.

    That is in padded timesteps, missing sensors, cameras and goals, padded dimensions of a sensor, padding words and
    missing texts. No valid token reads it here, but zero times NaN is NaN, and a part of a user's own may read it.

    Args:
      compat: a missing text becomes the empty text (</s> alone), which the releases read where their masks do not hide
        it. Otherwise it has no word at all.
    """
    step_mask = jnp.asarray(observation["timestep_pad_mask"], bool)

    def kept(value, valid):
        value = jnp.asarray(value)
        return jnp.where(
            valid.reshape(*valid.shape, *[1] * (value.ndim - valid.ndim)), value, jnp.zeros((), value.dtype)
        )

    observation, task = dict(observation), dict(task)
    for key, value in observation.items():
        if isinstance(value, Mapping) or key.endswith("pad_mask") or jnp.ndim(value) < 3:
            continue
        value = kept(value, step_mask & valid_mask(observation, key, step_mask.shape))
        if (dims := observation.get(f"{key}_pad_mask")) is not None:
            value = kept(value, jnp.asarray(dims, bool))
        observation[key] = value
    rows = step_mask.shape[:1]
    for key, value in task.items():
        valid = valid_mask(task, key, rows)
        if isinstance(value, Mapping) and "input_ids" in value:
            task[key] = _text_without_padding(value, valid, kept, compat)
        elif not isinstance(value, Mapping) and jnp.ndim(value) > 1:
            task[key] = kept(value, valid)
    return observation, task


def _text_without_padding(text: Mapping, said: jax.Array, kept, compat: bool) -> dict:
    """A text of the task {"input_ids", "attention_mask", "encoded"?} without its padding; see `without_padding`."""
    text = {key: jax.tree.map(lambda leaf: kept(leaf, said), value) for key, value in text.items()}
    text["input_ids"] = kept(text["input_ids"], text["attention_mask"] > 0)
    if compat:
        for key in ("input_ids", "attention_mask"):
            text[key] = text[key].at[:, 0].set(jnp.where(said, text[key][:, 0], 1))
    return text
