"""When to stop: the held-out demonstrations have not become better predicted for a while."""

from typing import Any


class EarlyStopping:
    """Counts evaluations without a better score.

    Attributes:
      stopped: whether `patience` evaluations in a row were no better than the best before them.

    Args:
      patience: None: never stop.
      mode: "min" or "max": which score is better.
      saved: `state()` of the run that is continued, or None.
    """

    def __init__(self, patience: int | None, mode: str, saved: dict[str, Any] | None = None):
        if patience is not None and (not isinstance(patience, int) or patience < 1):
            raise ValueError(f"early_stopping.patience must be a whole number of at least 1, or None; got {patience!r}")
        self._patience, self._sign = patience, 1.0 if mode == "min" else -1.0
        state = {"best": None, "best_step": None, "without": 0} | (saved or {})
        self._best, self._best_step, self._without = state["best"], state["best_step"], state["without"]

    def update(self, step: int, score: float | None) -> None:
        """Takes the score of an evaluation; None: there was none. NaN is never better."""
        if score is None:
            return
        if self._best is None or self._sign * score < self._sign * self._best:
            if score == score:
                self._best, self._best_step, self._without = score, step, 0
                return
        self._without += 1

    @property
    def stopped(self) -> bool:
        return self._patience is not None and self._without >= self._patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"best": self._best, "best_step": self._best_step, "without": self._without}

    def __str__(self) -> str:
        return f"{self._without} evaluations without a better score than {self._best} of step {self._best_step}"
