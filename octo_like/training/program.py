"""The training program of a config: everything that is compiled, and nothing that is loaded.

`train.py`, `finetune.py`, the benchmarks and the ahead-of-time proof (`aot.py`) all build their step here: what is
proven or measured is what runs.

    config -> Network (what is learned: tokenizer, batch spec, model, initial parameters, frozen paths)
           -> Program (how it is trained on a mesh: abstract state, placement, jitted step)
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

import jax
import optax

from octo_like.common import parts
from octo_like.common.config import ConfigError, to_dict
from octo_like.common.defaults import batch_spec
from octo_like.common.schema import BatchSpec, flatten
from octo_like.common.text import BUILTIN_MODELS, TextTokenizer
from octo_like.model.octo import OctoModel, build_model, explained, init_params
from octo_like.model.special import run_once_options
from octo_like.policy import surgery
from octo_like.policy.pretrained import load_t5, with_t5
from octo_like.training import sharding
from octo_like.training.augment import augmentation_from_config
from octo_like.training.optimizer import Schedule, find_optimizer, frozen_paths, make_optimizer, make_schedule
from octo_like.training.own_words import OwnSubtasks
from octo_like.training.own_words import check as check_own_subtasks
from octo_like.training.state import TrainState, create_state
from octo_like.training.step import StepConfig, make_train_step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Network:
    """What a config says is learned.

    Attributes:
      tokenizer: of instructions; None without language.
      spec: of the batches.
      model: the network.
      init_params: random key to parameters, with the T5 weights of the config in place; may be traced.
      frozen: paths of parameters that are not trained.
    """

    tokenizer: TextTokenizer | None
    spec: BatchSpec
    model: OctoModel
    init_params: Callable[[jax.Array], Any]
    frozen: frozenset[str]


def network_from_config(config: Any, *, load_weights: bool = True) -> Network:
    """The network of a pretraining config.

    Args:
      load_weights: False leaves T5 weights on disk: shapes and dtypes are the same without them.

    Raises:
      ConfigError: the config names no model, or one that cannot be built.
    """
    if config.get("model") is None:
        raise ConfigError("config.model is not set: this config starts from a checkpoint and describes no network")
    tokenizer = TextTokenizer.load(config.text.model, config.text.max_length) if config.text.model else None
    spec = batch_spec(config)
    with explained():
        model = build_model(config.model, vocab_size=tokenizer.vocab_size if tokenizer else 0)
    check_own_subtasks(own_subtasks(config), model, tokenizer)
    t5 = load_t5(config.text.t5_weights) if config.text.t5_weights and load_weights else None

    def initial(key):
        with explained():
            params = init_params(model, spec, key)
        return with_t5(params, t5)

    shapes = jax.eval_shape(initial, jax.random.key(0))
    return Network(tokenizer, spec, model, initial, frozen_paths(shapes, tuple(config.optimizer.freeze)))


def check_frozen(config: Any, network: Network, *, loaded: Collection[str] = (), resumes: bool = False) -> None:
    """Makes sure that nothing stays the random numbers it was initialised with: what is not trained has weights.

    On random batches, where nothing can be learned, and in a run that continues, a fault is logged only.

    Args:
      loaded: paths of parameters that were taken from `config.init_from`.

    Raises:
      ConfigError: parameters that are not trained come from nowhere, or a T5 gets ids of another vocabulary.
    """
    tokenizers = (to_dict(config)["model"].get("task_tokenizers") or {}).items()
    reads_t5 = any(entry.get("encoder") == "t5" for _, entry in tokenizers)
    shapes = jax.eval_shape(network.init_params, jax.random.key(0))
    encoders = surgery.never_trained(to_dict(config)["model"], [path for path, _ in flatten(shapes)])
    kept = network.frozen | encoders
    given = {path for path in kept if "/hf_model/" in path} if config.text.t5_weights else set()
    random = sorted(kept - given - set(loaded))
    faults = []
    if unfilled := [path for path in random if "/hf_model/" in path]:
        name = unfilled[0].split("/hf_model/")[0].rpartition("_")[2]
        faults.append(_no_t5(f"model.task_tokenizers.{name} is a T5 that is not trained, and text.t5_weights is None"))
    elif reads_t5 and network.tokenizer is not None:
        if config.text.model in BUILTIN_MODELS:
            faults.append(_no_t5(f"text.model={config.text.model!r} is not the vocabulary that T5 was trained with"))
        try:
            surgery.check_vocabulary(shapes, network.tokenizer.vocab_size)
        except ValueError as error:
            faults.append(str(error))
    if others := [path for path in random if "/hf_model/" not in path]:
        faults.append(
            f"optimizer.freeze={tuple(config.optimizer.freeze)} keeps {others[0]} and {len(others) - 1} more as they "
            "are initialised, at random: train them, or take their weights from a policy that has them "
            "(--config.init_from=EXPORT; finetune.py adapts one to a robot)"
        )
    if loose := sorted(encoders - network.frozen):
        faults.append(
            f"no gradient reaches {loose[0]}, and weight decay would shrink it: add 'hf_model' to optimizer.freeze, or "
            "train the encoder (finetune_encoder=True)"
        )
    if faults and not resumes and config.data.kind != "synthetic":
        raise ConfigError(faults[0])
    for fault in faults:
        log.warning("%s", fault)


def _no_t5(fault: str) -> str:
    return (
        f"{fault}: the policy would be told random numbers in place of words. Two ways out: (1) on a machine with a "
        "network (pip install huggingface_hub), `hf download google-t5/t5-base spiece.model model.safetensors "
        "--local-dir t5-base`, and then --config.text.model=t5-base/spiece.model --config.text.t5_weights=t5-base; "
        "(2) a text encoder that is trained with the policy: one word of the config, as in --config "
        "configs/octo_small.py:small,learned_text. Random batches (--config.data.kind=synthetic) need neither"
    )


def own_subtasks(config: Any) -> OwnSubtasks:
    """`config.own_subtasks`, which configs of earlier versions have not.

    Raises:
      ConfigError: numbers that make no sense.
    """
    try:
        return OwnSubtasks(**to_dict(config.get("own_subtasks", {})))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def own_parts(config: Any) -> dict[str, str]:
    """{module: hash of its source} of the parts of the user's own that a config names, each imported and checked.

    Raises:
      PartError: one cannot be imported, or is not what it has to be.
    """
    tree = to_dict(config)
    for kind in parts.kinds_in(tree):
        parts.find_class(kind, "config")
    if tree["model"]:
        build_model(tree["model"], vocab_size=1)
    for slot, fields in tree["augmentation"].items():
        augmentation_from_config(slot, fields)
    name, modules = tree["optimizer"]["name"], list(parts.modules_in(tree))
    find_optimizer(name, tree["optimizer"]["arguments"])
    if parts.is_own(name):
        modules.append(name.partition(":")[0])
    return parts.hashes_of(modules)


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step, ready to be compiled or run.

    Attributes:
      mesh: device mesh; the devices may be those of a machine that is not there.
      tx: the optimizer.
      create: what parameters are made from (a key, or loaded parameters) to the state at step 0.
      train_step: the pure function (state, batch) -> (state, metrics).
      shardings: placement of the state.
      state: shapes, dtypes and placement of the state.
      step: `train_step` jitted, state donated.
    """

    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformation
    create: Callable[[Any], TrainState]
    train_step: Callable
    shardings: Any
    state: Any
    step: Any

    def place(self, source: Any) -> TrainState:
        """The initial state, made on the devices where it will live."""
        return jax.jit(self.create, out_shardings=self.shardings, compiler_options=run_once_options())(source)


def build_program(
    config: Any,
    model: OctoModel,
    mesh: jax.sharding.Mesh,
    *,
    init_params: Callable[[Any], Any],
    init_from: Any,
    frozen: frozenset[str],
) -> Program:
    """The program of a config on a mesh. Nothing is computed and nothing allocated.

    Args:
      init_params, init_from: parameters are `init_params(init_from)`; only their shapes are looked at.
      frozen: paths of parameters that are not trained.

    Raises:
      ValueError: the batch does not split over the mesh, or mesh.overrides do not fit the parameters.
    """
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    schedule, tx = optimizer_from_config(config)
    create = functools.partial(_create, init_params=init_params, tx=tx, frozen=frozen)
    shapes = jax.eval_shape(create, init_from)
    shardings = sharding.infer_sharding(
        shapes, mesh, min_size=config.mesh.min_size, overrides=tuple(config.mesh.overrides), params=shapes.trained
    )

    def gather(trained, rest):
        return sharding.gather(trained, shardings.trained), sharding.gather(rest, shardings.frozen)

    augmentation = {slot: augmentation_from_config(slot, fields) for slot, fields in config.augmentation.items()}
    step = StepConfig(config.seed, config.accumulate, config.ema_decay, augmentation, own_subtasks(config))
    train_step = make_train_step(model, tx, schedule, step, gather)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Program(mesh, tx, create, train_step, shardings, state, jit_train_step(train_step, shardings, mesh))


def _create(source, *, init_params, tx, frozen):
    return create_state(init_params(source), tx, frozen)


def optimizer_from_config(config: Any) -> tuple[Schedule, optax.GradientTransformation]:
    """Learning-rate schedule and optimizer.

    Raises:
      ValueError: a schedule or an optimizer that does not exist, or that cannot be made of what the config gives.
    """
    opt = config.optimizer
    schedule = make_schedule(
        opt.schedule,
        peak=opt.peak,
        warmup_steps=opt.warmup_steps,
        timescale=opt.timescale,
        decay_steps=opt.decay_steps or config.num_steps,
        end=opt.end,
    )
    return schedule, make_optimizer(
        schedule,
        name=opt.name,
        weight_decay=opt.weight_decay,
        clip_norm=opt.clip_norm,
        b2=opt.b2,
        arguments=to_dict(opt.arguments),
    )


def jit_train_step(train_step: Callable, shardings: Any, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """The step as it runs: state donated and placed as `shardings` say, batch split over the mesh."""
    return jax.jit(
        sharding.traced_on(mesh, train_step),
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
