"""From a run config to its training stream and validation batches. TensorFlow is imported only when data is read."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from octo_like.common.config import ConfigError
from octo_like.common.lanes import Processes, check_lanes
from octo_like.common.schema import BatchSpec, Tree
from octo_like.common.streams import BatchStream
from octo_like.common.synthetic import SyntheticStream
from octo_like.common.text import TextTokenizer
from octo_like.common.vocabularies import NO_TARGETS, Targets
from octo_like.data.batches.stream import make_train_stream, make_val_iterators
from octo_like.data.in_memory import datasets_in_memory
from octo_like.data.order.order import spec_differences
from octo_like.data.oxe.mixes import datasets_from_config
from octo_like.data.prepare import prepare_datasets
from octo_like.data.prepared import PreparedDataset
from octo_like.data.settings import KNOBS, IndexOptions, Settings
from octo_like.data.spec import DatasetSpec, specs_from_config

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Inputs:
    """What a run trains and validates on.

    Attributes:
      stream: endless training batches.
      validation: dataset to finite batches.
      statistics: dataset with actions to statistics, with the kind of normalisation in "normalization" and the action
        head that learns from it in "head".
      environments: dataset to the gymnasium id it is rolled out in.
      episodes: dataset to a function that makes finite batches of one held-out episode in the order of time, the last
        of them filled up; datasets whose episodes cannot be looked up are not in it.
      versions: dataset of files to the version that is read; checkpoints keep it beside the order spec.
    """

    stream: BatchStream
    validation: Mapping[str, Iterable[Tree]]
    statistics: dict[str, Any]
    environments: dict[str, str]
    episodes: Mapping[str, Callable[[], Iterable[Tree]]] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def resume(self, order_spec: Mapping[str, Any], position: int, versions: Mapping[str, str] | None = None) -> None:
        """Continues at a saved position.

        Args:
          versions: that the saved run has read; None: it does not say.

        Raises:
          ConfigError: the data or its order is not what the saved run saw.
        """
        self.stream.adopt(order_spec)
        changes = spec_differences(order_spec, self.stream.order_spec)
        moved = [
            f"dataset {name}: version {was} before, {self.versions[name]} now (data.datasets.{name}.version names one)"
            for name, was in (versions or {}).items()
            if self.versions.get(name, was) != was
        ]
        if changes:
            listed = "\n  ".join([*changes, *moved])
            raise ConfigError(f"the order of the data differs from the saved run's; use a new --workdir:\n  {listed}")
        for line in moved:
            log.warning("%s; its episodes are the same", line)
        self.stream.seek(position)


def inputs_from_config(
    config: Any,
    spec: BatchSpec,
    tokenizer: TextTokenizer | None,
    *,
    targets: Targets = NO_TARGETS,
    process_index: int = 0,
    process_count: int = 1,
    workdir: str | None = None,
) -> Inputs:
    """Builds the inputs of `config.data`.

    Args:
      targets: what makes ids of texts and actions that the model learns to say, `targets_of` its config.
      workdir: of the run. Several hosts whose data is read-only keep its indices there, to read its files once and not
        each, unless `data.cache_dir` names a place.

    Raises:
      ConfigError or DataError (both ValueErrors): with the valid choices.
    """
    data, processes = config.data, Processes(process_index, process_count)
    eval_size = config.eval.batch_size or config.batch_size
    if data.kind == "synthetic":
        vocab = tokenizer.vocab_size if tokenizer else 100
        made = SyntheticStream(spec, config.batch_size, config.seed, vocab, process_index, process_count)
        held_out = SyntheticStream(spec, eval_size, config.seed + 1, vocab, process_index, process_count)
        batches = [next(held_out) for _ in range(min(config.eval.batches, 2))]
        return Inputs(made, {"synthetic": batches}, made.statistics, {})
    _check(data, config.batch_size, process_count)

    settings = settings_from_config(config)
    specs = specs_from_config(datasets_from_config(data), data.num_demos, data.get("num_demos_of", "training"))
    if config.eval.rollouts and not any(one.env for one in specs.values()):
        raise ConfigError(
            f"eval.rollouts={config.eval.rollouts}, but no dataset names an environment to act in: set one, e.g. "
            f"--config.data.datasets.{next(iter(specs))}.env=module:id, or set eval.rollouts to 0"
        )
    datasets = _prepared(config, specs, processes, workdir)
    stream = make_train_stream(datasets, spec, tokenizer, settings, targets=targets, processes=processes)
    log.info(stream.memory_line())
    for_eval = dataclasses.replace(settings, order=dataclasses.replace(settings.order, batch_size=eval_size))
    validation = make_val_iterators(
        datasets,
        spec,
        tokenizer,
        for_eval,
        targets=targets,
        max_batches=config.eval.batches,
        processes=processes,
    )
    statistics = {
        name: {
            **prepared.named_statistics,
            "normalization": specs[name].normalization,
            "head": specs[name].head,
            **({"held_out": specs[name].held_out()} if data.kind == "rlds" else {}),
            **({} if specs[name].robot is None else {"robot": specs[name].robot}),
            **({} if (relative := specs[name].relative_to) is None else {"relative_to": list(relative)}),
        }
        for name, prepared in datasets.items()
        if specs[name].action_key is not None
    }
    environments = {name: one.env for name, one in specs.items() if one.env is not None}
    episodes = {name: batches.whole_episode for name, batches in validation.items()}
    versions = {name: one.version for name, one in datasets.items() if specs[name].source is None and one.version}
    return Inputs(stream, validation, statistics, environments, episodes, versions)


def settings_from_config(config: Any) -> Settings:
    """The settings of a run's stream: the fields that `config.data` has, by their names, its seed and batch size."""
    given = {name: config.data[name] for name in KNOBS if name in config.data}
    if hasattr(given["episodes_mixed"], "items"):
        given["episodes_mixed"] = dict(given["episodes_mixed"])
    return Settings.of(seed=config.seed, batch_size=config.batch_size, **given)


def _check(data: Any, batch_size: int, process_count: int) -> None:
    """Raises ConfigError for what is wrong with `config.data` before anything is read."""
    if data.kind not in ("rlds", "memory"):
        raise ConfigError(f"data.kind is {data.kind!r}; valid: 'rlds', 'memory', 'synthetic'")
    try:
        check_lanes(data.num_lanes, batch_size, process_count)
    except ValueError as error:
        raise ConfigError(f"data.num_lanes: {error}") from error
    of_files = data.kind == "rlds" and (
        data.mix or not all(dict(fields).get("source") for fields in data.datasets.values())
    )
    if not data.data_dir and of_files:
        raise ConfigError(
            "data.data_dir is not set: give the folder of the TFDS datasets, or --config.data.kind=synthetic"
        )


def _prepared(
    config: Any, specs: Mapping[str, DatasetSpec], processes: Processes, workdir: str | None
) -> dict[str, PreparedDataset]:
    """The datasets of a mixture, with their indices and statistics."""
    data = config.data
    if data.kind == "memory":
        return datasets_in_memory(
            specs, data.data_dir, data.episodes, data.generator, seed=config.seed, workers=data.workers
        )
    options = IndexOptions(
        workers=data.index_workers,
        processes=data.index_processes,
        max_bad_fraction=data.max_bad_fraction,
        pod_dir=None if workdir is None else os.path.join(os.path.expanduser(workdir), "data_index"),
    )
    return prepare_datasets(specs, data.data_dir, data.cache_dir, options=options, hosts=processes)
