"""The whole network (transformer and heads) and its construction from a plain nested dict."""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from octo_like.common.errors import ConfigError
from octo_like.common.parts import Modules, PartError, check_options, make, name_of
from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.common.words import suggest
from octo_like.model import parts
from octo_like.model.backbone import OctoTransformer
from octo_like.model.discrete import DiscreteHead
from octo_like.model.generative import DiffusionHead, FlowHead
from octo_like.model.guidance import Guidance
from octo_like.model.heads import ActionHead, RegressionHead, action_mask, head_batch
from octo_like.model.points import PointsHead
from octo_like.model.sequence import BinsHead, FastHead
from octo_like.model.special import run_once_options
from octo_like.model.stems import ConvStem, KeypointStem, PatchStem, ResNetStem, SmallStem
from octo_like.model.t5 import T5_CONFIGS, T5Config
from octo_like.model.text_head import TextHead
from octo_like.model.tokenizers import ImageTokenizer, LanguageTokenizer, LowdimTokenizer
from octo_like.model.tokens import TokenGroup
from octo_like.model.transformer import fold_in_all

STEMS = {"small": SmallStem, "patch": PatchStem, "conv": ConvStem, "keypoints": KeypointStem, "resnet": ResNetStem}
TOKENIZERS = {"image": ImageTokenizer, "language": LanguageTokenizer, "lowdim": LowdimTokenizer}
HEADS = {
    "diffusion": DiffusionHead,
    "flow": FlowHead,
    "regression": RegressionHead,
    "discrete": DiscreteHead,
    "bins": BinsHead,
    "fast": FastHead,
}
AUXILIARIES = {"points": PointsHead, "text": TextHead}
TEXT_WEIGHT = 0.1  # of the loss of a text, unless its config says another; of any other part 1
TRANSFORMER_OPTIONS = (
    "num_layers",
    "num_heads",
    "mlp_dim",
    "dropout_rate",
    "attention_dropout_rate",
    "remat",
    "attention",
    "qk_norm",
)


class OctoModel(nn.Module):
    """octo_transformer and heads; every method takes schema batches.

    Attributes:
      head_weights: weight of every head's and auxiliary's loss in the total.
      auxiliaries: other losses by name; they are not needed to act.
    """

    octo_transformer: OctoTransformer
    heads: Mapping[str, ActionHead]
    head_weights: Mapping[str, float]
    auxiliaries: Mapping[str, PointsHead | TextHead] = dataclasses.field(default_factory=dict)

    def groups(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], dropout_keys: jax.Array | None = None
    ) -> dict[str, TokenGroup]:
        """Every token group after the transformer, see `OctoTransformer`: tokens (B, n, D) or (B, W, n, D)."""
        return self.octo_transformer(observation, task, dropout_keys)

    def encode_language(self, task: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Features (B, L, d) of the frozen encoders of instructions by tokenizer, to be put under
        task/language_instruction/encoded. Those of sub-tasks, which change as a robot acts, are computed every time."""
        tokenizers = [t for t in self.octo_transformer.task_tokenizers.values() if getattr(t, "key", "") != "subtask"]
        frozen = [t for t in tokenizers if getattr(t, "is_frozen", False)]
        return {str(tokenizer.name): tokenizer(None, task, encode_only=True) for tokenizer in frozen}

    def loss_terms(self, batch: Mapping[str, Any], keys_b: jax.Array, train: bool) -> dict[str, dict[str, jax.Array]]:
        """Per head and auxiliary: masked sums ("loss", "mse", ...) and "count", the number of their entries; all ().

        Sums of micro-batches add up to the sum of the batch; dividing by the total count gives the mean.

        Args:
          batch: as `BatchSpec.batch` describes it; `action` (B, W, H, A).
          keys_b: (B,) random keys, one per sample.
          train: dropout on.
        """
        groups = self.octo_transformer(batch["observation"], batch["task"], fold_in_all(keys_b, 0) if train else None)
        terms = {}
        for i, (name, head) in enumerate(self.heads.items()):
            action, mask = head_batch(batch, name, head)
            weight, keys = mask.astype(jnp.float32), fold_in_all(keys_b, i + 1)
            options = {"tokens": batch["action_tokens"][name]} if isinstance(head, FastHead) else {}
            sums = head.loss_terms(groups, action, weight, keys, **options)
            parts.check_terms(sums, head, f"head {name!r}", counted=False)
            terms[name] = {**sums, "count": jnp.sum(head.learned_mask(mask, keys), dtype=jnp.float32)}
        for name, part in self.auxiliaries.items():
            terms[name] = part.loss_terms(groups, batch)
            parts.check_terms(terms[name], part, f"auxiliary {name!r}", counted=True)
        return terms

    def counts(self, batch: Mapping[str, Any], keys_b: jax.Array | None = None) -> dict[str, jax.Array]:
        """Number of entries every head and auxiliary learns from, () float32 each; needs no parameters.

        `keys_b`: those of `loss_terms`, for heads that draw which entries they learn from (`max_delay`).
        """
        entries = {}
        for i, (name, head) in enumerate(self.heads.items()):
            mask = action_mask(batch, name, head.action_horizon, head.action_dim)
            if head.draws_mask:
                mask = head.learned_mask(mask, fold_in_all(keys_b, i + 1))
            entries[name] = jnp.sum(mask, dtype=jnp.float32)
        return entries | {name: jnp.sum(part.mask(batch), dtype=jnp.float32) for name, part in self.auxiliaries.items()}

    def sample(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        keys_b: jax.Array,
        *,
        head: str,
        sample_shape: tuple[int, ...] = (),
        valid: jax.Array | None = None,
        guidance: Guidance | None = None,
    ) -> jax.Array:
        """Normalised actions (*sample_shape, B, H, A) for the last timestep of the window.

        `guidance`: the chunk that they continue, see `octo_like.model.guidance`; ValueError of a head that cannot.

        Only what the head reads is computed: other readouts are left out of the sequence, and the last block is that of
        the tokens that it reads. A row whose tokens are not finite gives NaN, whatever the head.
        """
        part = self.heads[head]
        groups = self.octo_transformer(observation, task, only_last=part.needed_group)
        options = {}
        if guidance is not None:
            part.check_guidance(guidance)
            options = {"guidance": guidance}
        read = _Groups(groups, part, f"head {head!r}")
        actions = part.sample(read, keys_b, sample_shape=sample_shape, valid=valid, **options)
        parts.check_actions(actions, part, f"head {head!r}", (*sample_shape, observation["timestep_pad_mask"].shape[0]))
        # A head that draws bins or words makes a number of NaN as well.
        tokens = [jnp.where(group.mask[..., None], group.tokens, 0) for group in groups.values()]
        finite = jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in tokens]).all(0)
        return jnp.where(finite[:, None, None], actions, jnp.nan)

    def predict_text(
        self,
        observation: Mapping[str, Any],
        task: Mapping[str, Any],
        keys_b: jax.Array | None = None,
        *,
        part: str = "text",
        temperature: float = 0.0,
        top_k: int = 0,
        allowed_v: jax.Array | None = None,
    ) -> jax.Array:
        """Ids (B, M) of what the model says at the last timestep of the window; 1 ends a text, 0 follows.

        Args:
          part: the auxiliary that says it. keys_b: (B,) keys; not needed at temperature 0.
          allowed_v: (V,) bool, ids that may be said besides the end; None: all.
        """
        head = self._text_head(part)
        groups = self.octo_transformer(observation, task, only_last=head.needed_group)
        return head.generate(groups, keys_b, temperature=temperature, top_k=top_k, allowed_v=allowed_v)

    def text_log_probs(
        self, observation: Mapping[str, Any], task: Mapping[str, Any], ids: jax.Array, *, part: str = "text"
    ) -> jax.Array:
        """(B,) natural logarithms of the probability that the model says the texts `ids` (B, M)."""
        head = self._text_head(part)
        return head.log_probs(self.octo_transformer(observation, task, only_last=head.needed_group), ids)

    def _text_head(self, part: str) -> TextHead:
        head = self.auxiliaries.get(part)
        if not isinstance(head, TextHead):
            texts = [name for name, one in self.auxiliaries.items() if isinstance(one, TextHead)]
            raise ValueError(f"no part {part!r} that says texts; {suggest(part, texts)}")
        return head


def total_loss(
    model: OctoModel, terms: Mapping[str, Mapping[str, jax.Array]], counts: Mapping[str, jax.Array]
) -> jax.Array:
    """Weighted sum over heads of the mean loss, (); `counts` are those of the whole batch."""
    total: Any = sum(
        model.head_weights.get(name, 1.0) * part["loss"] / jnp.maximum(counts[name], 1.0)
        for name, part in terms.items()
    )
    return total


def init_params(model: OctoModel, spec: BatchSpec, rng: jax.Array, *, vocab_size: int = 100) -> dict[str, Any]:
    """Freshly initialised parameters, a plain nested dict."""
    batch = synthetic_batch(spec, 1, language_vocab=vocab_size)

    def init(key):
        return model.init(key, batch, jax.random.split(key, 1), False, method="loss_terms")["params"]

    if isinstance(rng, jax.core.Tracer):
        return init(rng)
    # Compiled as a whole: one by one, the operations would each be compiled.
    return jax.jit(init, compiler_options=run_once_options())(rng)


def build_model(config: Mapping[str, Any], *, vocab_size: int = 0, modules: Modules = None) -> OctoModel:
    """Builds the network a config describes.

    A kind is a name of ours or "module:Class" of a part of the user's own; see `octo_like.model.parts`.

    Args:
      config: see configs/octo_small.py: token_dim, max_window, transformer, task_tokenizers, observation_tokenizers,
        readouts, heads and optionally auxiliaries, repeat_task_tokens, octo_compat, legacy_attention, token_norm,
        position_scale, dtype.
      vocab_size: of the text tokenizer; used by a "small" language encoder whose config does not give one.
      modules: those whose parts may be imported; None: all that the config names, which then is the caller's own.

    Raises:
      ValueError: naming an unknown kind or option and the valid ones, or a part that is not what it has to be.
    """
    config = _plain(config)
    shared = {"compat": bool(config.get("octo_compat", False)), "dtype": jnp.dtype(config.get("dtype", "float32"))}
    known = {
        "token_dim",
        "max_window",
        "transformer",
        "task_tokenizers",
        "observation_tokenizers",
        "readouts",
        "heads",
        "auxiliaries",
        "repeat_task_tokens",
        "octo_compat",
        "legacy_attention",
        "token_norm",
        "position_scale",
        "dtype",
    }
    check_options(config, known, "model")
    check_options(config["transformer"], set(TRANSFORMER_OPTIONS), "model.transformer")

    def tokenizers(group):
        role = group.removesuffix("s").replace("_", " ")
        return {
            name: _tokenizer(entry, shared, vocab_size, role, f"model.{group}.{name}", modules)
            for name, entry in (config.get(group) or {}).items()
        }

    if twice := sorted(set(config.get("task_tokenizers") or {}) & set(config["observation_tokenizers"])):
        if config.get("repeat_task_tokens", False):
            raise PartError(
                f"model.observation_tokenizers.{twice[0]}: there is a task tokenizer of that name, and "
                "repeat_task_tokens puts its tokens among the observations'; rename one"
            )
    heads, weights = {}, {}
    for name, entry in config["heads"].items():
        entry = dict(entry)
        weights[name] = float(entry.pop("weight", 1.0))
        heads[name] = _make(HEADS, entry, shared, "head", f"model.heads.{name}", modules)
    auxiliaries = {}
    for name, entry in (config.get("auxiliaries") or {}).items():
        if name in heads:
            raise PartError(f"model.auxiliaries.{name}: there is a head of that name")
        entry = dict(entry)
        weights[name] = float(entry.pop("weight", TEXT_WEIGHT if entry.get("kind") == "text" else 1.0))
        auxiliaries[name] = _make(AUXILIARIES, entry, shared, "auxiliary", f"model.auxiliaries.{name}", modules)
    for what, some in (("heads", heads), ("auxiliaries", auxiliaries)):
        for name, part in some.items():
            chooses = type(part).__dict__.get("needed_group") is not None and parts.is_own(config[what][name]["kind"])
            if not chooses:  # a part of the user's own may read what it wants
                _check_readout(getattr(part, "readout", None), config, f"model.{what}.{name}.readout")
    transformer = OctoTransformer(
        task_tokenizers=tokenizers("task_tokenizers"),
        observation_tokenizers=tokenizers("observation_tokenizers"),
        readouts=config["readouts"],
        transformer=config["transformer"],
        token_dim=config["token_dim"],
        max_window=config["max_window"],
        repeat_task_tokens=config.get("repeat_task_tokens", False),
        legacy_attention=config.get("legacy_attention", False),
        token_norm=config.get("token_norm", False),
        position_scale=config.get("position_scale", 0.02),
        **shared,
    )
    return OctoModel(transformer, heads, weights, auxiliaries)


def _check_readout(readout: Any, config: Mapping[str, Any], where: str) -> None:
    """Raises PartError for a group that the sequence does not have at every timestep: training may pass over that, and
    acting cannot. None is of a part of a user's own that reads what it wants."""
    groups = [f"readout_{name}" for name in config["readouts"]]
    groups += ["obs", *(f"obs_{name}" for name in config["observation_tokenizers"])]
    if config.get("repeat_task_tokens", False):
        groups += [f"obs_{'task_' + name}" for name in config.get("task_tokenizers") or {}]
    if readout is not None and readout not in groups:
        raise PartError(f"{where}: no group {readout!r} at every timestep; {suggest(readout, groups)}")


class _Groups(dict):
    """Token groups by name; one that is not there is named together with those that are."""

    def __init__(self, groups: Mapping[str, TokenGroup], part: nn.Module, where: str):
        super().__init__(groups)
        self._part, self._where = part, where

    def __missing__(self, name: str) -> TokenGroup:
        said = f"needed_group {self._part.needed_group!r}" if hasattr(self._part, "needed_group") else "its readout"
        raise PartError(
            f"{self._where} ({name_of(self._part)}) reads group {name!r}; {suggest(name, self)}. When it acts, only "
            f"its {said} is computed: a part that reads others returns None from needed_group"
        )


def check_acting(model: OctoModel, spec: BatchSpec) -> None:
    """Traces what every head and text part of a model would do on a robot, so that what training does not run is not
    refused after it. Computes nothing.

    Raises:
      PartError, ValueError: what a head refuses, with its name.
    """
    batch, keys = synthetic_batch(spec, 1), jax.random.split(jax.random.key(0), 1)
    with explained():
        params = jax.eval_shape(lambda: init_params(model, spec, jax.random.key(0)))
    given = batch["observation"], batch["task"], keys
    for name in model.heads:
        _traced(lambda p, name=name: model.apply({"params": p}, *given, head=name, method="sample"), params, name)
    for name, part in model.auxiliaries.items():
        if isinstance(part, TextHead):
            _traced(
                lambda p, name=name: model.apply({"params": p}, *given, part=name, method="predict_text"), params, name
            )


def _traced(function, params, name: str) -> None:
    try:
        jax.eval_shape(function, params)
    except PartError:
        raise
    except Exception as error:  # modules, Flax and JAX raise many kinds
        raise ValueError(f"{name!r} of the model could be trained, but not act: {error}") from error


@contextlib.contextmanager
def explained(what: str = "the model of the config cannot be built") -> Iterator[None]:
    """What a model's numbers make Python, Flax and JAX raise while it is built and traced, as one line.

    Raises:
      ConfigError: with `what`, the part of the model, and the line of code. Errors that explain themselves stay as they
        are, and so do those of the machine (OSError, MemoryError).
    """
    try:
        yield
    except (ConfigError, PartError, OSError, MemoryError):
        raise
    except Exception as error:
        part, line = "", ""
        for frame, number in traceback.walk_tb(error.__traceback__):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module.scope is not None and module.scope.path:
                part = f", in {'/'.join(module.scope.path)} ({type(module).__name__})"
            if "site-packages" not in (file := frame.f_code.co_filename):
                line = f" ({file.rpartition('/')[2]}:{number})"
        said = " ".join(str(error).split()) or type(error).__name__
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(f"{what}{part}: {kind}{said}{line}") from error


def _plain(node):
    """ConfigDicts and lists to dicts and tuples."""
    if isinstance(node, Mapping) or hasattr(node, "items"):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return tuple(_plain(value) for value in node)
    return node


def _tokenizer(entry, shared, vocab_size, role, where, modules):
    entry = dict(entry)
    if entry.get("kind") == "image":
        entry["stem"] = _stem(entry.get("stem", {"kind": "small"}), f"{where}.stem", modules)
    if entry.get("kind") == "language":
        if entry.get("encoder") == "t5":
            entry["t5"] = _t5_config(entry.get("t5", "t5-base"), where)
        elif not entry.get("vocab_size"):
            entry["vocab_size"] = vocab_size
        if entry.get("encoder", "small") == "small" and not entry["vocab_size"]:
            raise ValueError(f"{where}: a small language encoder needs vocab_size, or a text tokenizer in the run")
    elif parts.is_own(entry.get("kind")):
        shared = {**shared, **({} if "vocab_size" in entry else {"vocab_size": vocab_size})}
    tokenizer = _make(TOKENIZERS, entry, shared, role, where, modules)
    parts.check_frozen(tokenizer, where)
    return tokenizer


def _stem(entry, where, modules):
    """A constructor; the stem's name is part of the parameter paths, and follows the Octo releases."""
    entry = dict(entry)
    kind = entry.get("kind")
    cls = parts.resolve(STEMS, entry, "stem", where, modules)
    names = {
        "small": f"SmallStem{entry.get('patch_size', 16)}_0",
        "patch": "PatchEncoder_0",
        "resnet": "ResNet26FILM_0",
    }
    name = entry.pop("module_name", names.get(kind, f"{cls.__name__}_0"))
    make(cls, entry, where, dtype=jnp.float32)  # refuses what would be refused later, without a place

    takes_dtype = any(field.name == "dtype" for field in dataclasses.fields(cls))

    def construct(dtype):
        return cls(**entry, name=name, **({"dtype": dtype} if takes_dtype else {}))

    return construct


def _t5_config(value, where) -> T5Config:
    if isinstance(value, str):
        if value not in T5_CONFIGS:
            raise ValueError(f"{where}: unknown T5 size {value!r}; valid: {sorted(T5_CONFIGS)}")
        return T5_CONFIGS[value]
    check_options(value, {field.name for field in dataclasses.fields(T5Config)}, f"{where}.t5")
    return T5Config(**value)


def _make(table, entry, shared, role, where, modules):
    entry = dict(entry)
    cls = parts.resolve(table, entry, role, where, modules)
    return make(cls, entry, where, **shared)
