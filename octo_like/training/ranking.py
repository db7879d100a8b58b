"""Which checkpoints are the best."""

import dataclasses
import fnmatch
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from octo_like.common.checks import check_ranking
from octo_like.common.config import ConfigError, to_dict
from octo_like.training.integrity import read_manifest
from octo_like.training.storage import CheckpointDamaged, CheckpointUnreadable

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Which checkpoints are the best: by the mean of the evaluation's metrics whose names match a pattern.

    Attributes:
      pattern: fnmatch, e.g. "val/*/*/loss".
      enabled: whether best checkpoints are kept at all.
      texts: parts of the model that say texts; their metrics count where the pattern names the part.
    """

    pattern: str
    enabled: bool
    texts: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> "Ranking":
        """Raises ConfigError for settings under which no step would ever have a metric."""
        check_ranking(to_dict(config))
        options = config.checkpoint
        if options.export not in ("ema", "raw"):
            raise ConfigError(f"checkpoint.export is {options.export!r}; valid: 'ema', 'raw'")
        parts = ((config.get("model") or {}).get("auxiliaries") or {}).items()
        texts = tuple(name for name, part in parts if part.get("kind") == "text")
        return cls(options.best_metric, bool(options.keep_best), texts)

    def metric(self, scores: Mapping[str, float] | None) -> float | None:
        """The number a step is ranked by, or None without an evaluation.

        Raises:
          ConfigError: nothing that was measured matches the pattern.
        """
        if not self.enabled or scores is None:
            return None
        return float(np.mean([scores[name] for name in self.chosen(scores)]))

    def chosen(self, names: Collection[str]) -> list[str]:
        """Those of the names of metrics that a step is ranked by.

        Raises:
          ConfigError: none is.
        """
        # A pattern that does not name a text part does not mean it: its nats would outweigh the actions' errors.
        apart = [f"val/*/{text}/*" for text in self.texts if f"/{text}/" not in self.pattern]
        chosen = [
            name
            for name in names
            if fnmatch.fnmatchcase(name, self.pattern) and not any(fnmatch.fnmatchcase(name, one) for one in apart)
        ]
        if not chosen:
            raise ConfigError(
                f"checkpoint.best_metric {self.pattern!r} matches nothing of what is measured: "
                f"{', '.join(sorted(names)) or 'nothing is'}"
            )
        return chosen


class BestSteps:
    """The saved steps by their metrics, and Orbax's policy to preserve the best of them.

    Args:
      folder: of the steps.
      mode: "min" or "max": which metric is the best.
      count: how many are preserved.
    """

    def __init__(self, folder: epath.Path, mode: str, count: int):
        self._folder, self._sign, self._count = folder, 1.0 if mode == "min" else -1.0, count
        self._metrics: dict[int, float | None] = {}

    def note(self, step: int, metric: float | None) -> None:
        """The metric of a step that is being written."""
        self._metrics[step] = metric

    def ranked(self, steps: Iterable[int]) -> list[int]:
        """Those of `steps` that have a metric, the best first. Manifests are read once: they never change.

        Raises:
          CheckpointUnreadable: the storage does not answer.
        """
        for step in steps:
            if step not in self._metrics:
                try:
                    self._metrics[step] = read_manifest(self._folder / str(step)).metric
                except CheckpointDamaged:
                    self._metrics[step] = None
        measured = [(self._sign * metric, -step) for step in steps if (metric := self._metrics[step]) is not None]
        return [-negative for _, negative in sorted(measured)]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Called by Orbax."""
        steps = [info.step for info in checkpoints]
        try:
            kept = set(self.ranked(steps)[: self._count])
        except CheckpointUnreadable as error:
            log.warning("no old checkpoint is deleted this time, since the best are not known: %s", error)
            kept = set(steps)
        return [step in kept for step in steps]
