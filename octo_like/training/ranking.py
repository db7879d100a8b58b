"""Which checkpoints are the best."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.common.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Which checkpoints are the best: by the mean of the evaluation's metrics whose names match a pattern.

    Attributes:
      pattern: fnmatch, e.g. "val/*/*/loss".
      enabled: whether best checkpoints are kept at all.
    """

    pattern: str
    enabled: bool

    @classmethod
    def from_config(cls, config: Any) -> "Ranking":
        """Raises ConfigError for settings under which no step would ever have a metric."""
        options, every = config.checkpoint, config.eval.every
        if options.export not in ("ema", "raw"):
            raise ConfigError(f"checkpoint.export is {options.export!r}; valid: 'ema', 'raw'")
        if options.keep_best and every is None:
            raise ConfigError("checkpoint.keep_best needs evaluations, but eval.every is None")
        if options.keep_best and every and options.every and every % options.every and options.every % every:
            raise ConfigError(
                f"checkpoint.keep_best: evaluation every {every} steps and checkpoints every {options.every} seldom "
                "meet; make one a multiple of the other"
            )
        if config.early_stopping.patience is not None and not (options.keep_best and every):
            raise ConfigError(
                "early_stopping.patience counts evaluations and leaves the best policy behind: it needs eval.every of "
                f"at least 1 (now {every}) and checkpoint.keep_best of at least 1 (now {options.keep_best})"
            )
        return cls(options.best_metric, bool(options.keep_best))

    def metric(self, scores: Mapping[str, float] | None) -> float | None:
        """The number a step is ranked by, or None without an evaluation.

        Raises:
          ConfigError: nothing that was measured matches the pattern.
        """
        if not self.enabled or scores is None:
            return None
        chosen = [value for name, value in scores.items() if fnmatch.fnmatchcase(name, self.pattern)]
        if not chosen:
            raise ConfigError(
                f"checkpoint.best_metric {self.pattern!r} matches nothing of what was measured: "
                f"{', '.join(sorted(scores))}"
            )
        return float(np.mean(chosen))
