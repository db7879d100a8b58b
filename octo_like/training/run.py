"""Everything a run is made of, as train.py and finetune.py put it together for the loop."""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from octo_like.common.config import ConfigError
from octo_like.common.schema import flatten
from octo_like.model.heads import check_datasets
from octo_like.model.octo import OctoModel
from octo_like.model.points import PointsHead
from octo_like.model.text_head import TextHead
from octo_like.policy.policy import Policy
from octo_like.training.attempt import Attempt
from octo_like.training.program import own_subtasks

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """Everything a run is made of.

    Attributes:
      config: frozen run config.
      workdir: where checkpoints, metrics and the export go.
      mesh: device mesh.
      model: the network.
      init_params: makes the initial parameters from `init_from`; traced, so that they are made where they will live.
      init_from: a random key, or loaded parameters.
      inputs: `octo_like.data.inputs.Inputs`.
      make_policy: parameters to Policy, for evaluation and export.
      attempt: what holds for this process; entered.
      loaded_from: where the parameters in `init_from` were loaded from; None: from nowhere, they are made.
      frozen: paths of parameters that are not trained.
      documents: texts to keep in the workdir, by file name.
    """

    config: Any
    workdir: str
    mesh: jax.sharding.Mesh
    model: OctoModel
    init_params: Callable[[Any], Any]
    init_from: Any
    inputs: Any
    make_policy: Callable[[Any], Policy]
    attempt: Attempt
    loaded_from: str | None = None
    frozen: frozenset[str] = frozenset()
    documents: Mapping[str, str] = dataclasses.field(default_factory=dict)


def asked_words(config: Any) -> dict[str, Any]:
    """What a config wants of a model that speaks, as `check_words` takes it."""
    return {
        "own_subtasks": own_subtasks(config).prob,
        "last_subtask": config.data.get("last_subtask_prob", 0.0),
        "plan_every": config.eval.get("plan_every"),
    }


def check_words(
    model: OctoModel,
    order_spec: Mapping[str, Any],
    *,
    new: Collection[str],
    own_subtasks: float = 0.0,
    last_subtask: float = 0.0,
    plan_every: int | None = None,
) -> None:
    """Checks that some dataset has what each part that speaks is to learn: parameters that are made for this run would
    end as they began.

    Args:
      new: names of the auxiliaries whose parameters are made for this run.
      own_subtasks: share of the samples that are to be told their own sub-task.
      last_subtask: `data.last_subtask_prob`.
      plan_every: `eval.plan_every`.

    Raises:
      ConfigError: none has; names the part, its kinds of texts, and what the datasets have. Or samples hear what was
        done before, and no part is asked so when it acts, or the other way round; or nothing can say in rollouts what
        is done next.
    """
    if plan_every is not None and (plan_every < 1 or not _plans(model)):
        raise ConfigError(
            f"eval.plan_every={plan_every}: a number of chunks, for a model that hears sub-tasks (a task tokenizer "
            "with key='subtask') and says them (model.auxiliaries.text); None for others"
        )
    _check_memory(model, new, own_subtasks, last_subtask)
    views = _drawn(order_spec)
    if not views:  # synthetic data has texts, and none
        return
    texts = {name: view.get("text_keys", {}) for name, view in views.items()}  # left out of the views that have none
    kinds = {name: [kind for kind, key in found.items() if key is not None] for name, found in texts.items()}
    there = {kind for found in kinds.values() for kind in found}
    have = "; ".join(f"{dataset}: {', '.join(found) or 'none'}" for dataset, found in kinds.items())
    for name, part in model.auxiliaries.items():
        if isinstance(part, TextHead) and name in new and not set(part.learns) & there:
            raise ConfigError(
                f"model.auxiliaries.{name} learns texts ({', '.join(part.learns)}), and no dataset has any of these. "
                f"Texts of the datasets (text_keys): {have}. Add such a dataset, or leave the part out"
            )
    if own_subtasks and "subtask" not in there:
        raise ConfigError(f"own_subtasks.prob={own_subtasks}, but no dataset has sub-tasks (text_keys): {have}")
    if last_subtask and "subtask" not in there:
        raise ConfigError(f"data.last_subtask_prob={last_subtask}, but no dataset has sub-tasks (text_keys): {have}")


def _drawn(order_spec: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The views of the datasets that samples are drawn from: one of weight 0 teaches nothing. {} of synthetic data."""
    datasets = order_spec.get("order", {}).get("datasets", ())
    unused = {one["name"] for one in datasets if one["weight"] == 0}
    return {name: view for name, view in order_spec.get("views", {}).items() if name not in unused}


def check_taught(
    model: OctoModel, inputs: Any, *, new: Callable[[str], bool], words: bool = True, resumes: bool = False
) -> tuple[str, ...]:
    """Checks that some sample teaches each part: weight decay alone would act on one that none does.

    Args:
      inputs: `octo_like.data.inputs.Inputs`.
      new: whether the parameters below "heads_NAME" or "auxiliaries_NAME" are made or changed in this run.
      words: tasks may be instructions; places are learned beside these only.
      resumes: the run has begun: what is wrong is logged only.

    Returns:
      The parts ("heads_NAME", "auxiliaries_NAME") that no sample teaches, whose parameters are to stay as they are.

    Raises:
      ConfigError: a part that is new, and what it would need. ValueError: see `check_datasets`.
    """
    check_datasets(model.heads, inputs.statistics)
    faults = _untaught(model, inputs.statistics, _drawn(inputs.stream.order_spec), words)
    for part, fault in faults.items():
        if new(part) and not resumes:
            raise ConfigError(
                f"{fault}. Weight decay alone would change it: give it such data, leave the part out, or, if its "
                f"weights are loaded, keep them: --config.optimizer.freeze=\"('^{part}/',)\""
            )
        log.warning("%s: nothing of this run's data teaches it", fault)
    return tuple(faults)


def _untaught(
    model: OctoModel, statistics: Mapping[str, Mapping[str, Any]], views: Mapping[str, Any], words: bool
) -> dict[str, str]:
    """What is wrong with the parts that no sample teaches, by the beginning of their parameters' paths."""
    if not views:
        return {}
    faults = {}
    acting = {name: entry for name, entry in statistics.items() if name in views}
    heads = ", ".join(f"{name}: {entry['head']!r}" for name, entry in acting.items())
    for name in check_datasets(model.heads, acting) if acting else ():  # without actions, pictures teach the rest
        faults[f"heads_{name}"] = (
            f"model.heads.{name}: no dataset with a weight above 0 trains this action head (heads of the datasets, "
            f"data.datasets.NAME.head: {heads})"
        )
    for name in model.heads:
        if model.head_weights.get(name, 1.0) == 0:
            faults[f"heads_{name}"] = f"model.heads.{name}.weight is 0: this action head learns nothing"
    points = {name: view.get("point_keys", {}).items() for name, view in views.items()}
    said = {name: [point for point, key in found if key is not None] for name, found in points.items()}
    have = "; ".join(f"{name}: {', '.join(found) or 'none'}" for name, found in said.items())
    # Robot data says where things are beside an instruction, pictures with words do always.
    spoken = {name for name, view in views.items() if name not in statistics or (words and view["language_key"])}
    texts = {kind for view in views.values() for kind, key in view.get("text_keys", {}).items() if key is not None}
    for name, part in model.auxiliaries.items():
        where, path = f"model.auxiliaries.{name}", f"auxiliaries_{name}"
        if isinstance(part, PointsHead) and not any(set(part.names) & set(said[data]) for data in spoken):
            faults[path] = (
                f"{where} learns where things are ({', '.join(part.names)}), and no dataset with a weight above 0 says "
                f"so beside an instruction (data.datasets.NAME.point_keys, with a language_key): {have}"
            )
        elif isinstance(part, TextHead) and not set(part.learns) & texts:
            faults[path] = f"{where} learns texts ({', '.join(part.learns)}), and no dataset has any (text_keys)"
        elif model.head_weights.get(name, 1.0) == 0 and isinstance(part, TextHead):
            faults[path] = f"{where}.weight is 0: the part learns nothing, and would say what it is initialised to"
        elif model.head_weights.get(name, 1.0) == 0:
            log.warning("%s.weight is 0: its error is measured, and it learns nothing", where)
    return faults


def _hears_subtasks(model: OctoModel) -> bool:
    return any(getattr(reader, "key", "") == "subtask" for reader in model.octo_transformer.task_tokenizers.values())


def _plans(model: OctoModel) -> bool:
    text = model.auxiliaries.get("text")
    return isinstance(text, TextHead) and "subtask" in text.learns and _hears_subtasks(model)


def _check_memory(model: OctoModel, new: Collection[str], own_subtasks: float, last_subtask: float) -> None:
    """Checks that a part that is asked with what was said last learns what that means, and the other way round."""
    for name, part in model.auxiliaries.items():
        if not isinstance(part, TextHead) or not part.remembers:
            continue
        where = f"model.auxiliaries.{name} has remembers=True"
        if name != "text" or "subtask" not in part.learns:
            raise ConfigError(
                f"{where}: only the part named 'text' is asked what to do next, and it must learn sub-tasks; this one "
                f"learns {', '.join(part.learns)}"
            )
        if not _hears_subtasks(model):
            raise ConfigError(
                f"{where}, and no task tokenizer of the model has key='subtask', to hear what was said last"
            )
        if own_subtasks:
            raise ConfigError(
                f"{where}, and own_subtasks.prob={own_subtasks}: a single picture of training has no last words of the "
                "model's own, so it would say something else than when it acts; use one of the two"
            )
        if not last_subtask and name in new:
            raise ConfigError(
                f"{where}, and data.last_subtask_prob is 0: it would be asked with what was said last, and has not "
                "learned what that means; 0.5 is a good share"
            )
        if not last_subtask:
            log.warning(
                "%s, and data.last_subtask_prob is 0: it does not learn from this run's data what that means", where
            )
    text = model.auxiliaries.get("text")
    if last_subtask and not (isinstance(text, TextHead) and text.remembers):
        raise ConfigError(
            f"data.last_subtask_prob={last_subtask}: samples would hear what was done before, and no part of "
            "model.auxiliaries is asked so at run time; give 'text', of kind 'text', remembers=True"
        )


def describe(run: Run) -> str:
    """One paragraph about what is going to be trained, for the log."""
    shapes = jax.eval_shape(run.init_params, run.init_from)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(shapes)}
    trained = sum(size for path, size in sizes.items() if path not in run.frozen)
    counts = {name: stats["num_transitions"] for name, stats in run.inputs.statistics.items()}
    return (
        f"{run.mesh.size} device(s) {dict(run.mesh.shape)}, {trained:,} trained of {sum(sizes.values()):,} parameters, "
        f"batch {run.config.batch_size}, {run.config.num_steps} steps; transitions {counts}"
    )
