"""Early stopping by hand-counted sequences, and across a checkpoint."""

import json
import math

import pytest

from octo_like.training.early_stopping import EarlyStopping


def stops_at(scores, patience, mode="min", restart_before=None):
    """Index of the evaluation after which it is stopped, or None."""
    stopping = EarlyStopping(patience, mode)
    for i, score in enumerate(scores):
        if i == restart_before:
            stopping = EarlyStopping(patience, mode, json.loads(json.dumps(stopping.state())))
        stopping.update(10 * i, score)
        if stopping.stopped:
            return i
    return None


@pytest.mark.parametrize("restart", [None, 1, 2, 3, 4, 5])
def test_counting(restart):
    for scores, patience, mode, expected in (
        ([3, 2, 2, 1.9, 1.9, 2.5, 3], 2, "min", 5),
        ([3, 2, 2, 1.9, 1.9, 2.5, 3], 3, "min", 6),
        ([3, 2, 2, 1.9, 1.9, 2.5, 3], 4, "min", None),
        ([0.1, 0.3, 0.2, 0.3, 0.4, 0.1], 2, "max", 3),
        ([1, math.nan, math.nan, 0.5], 2, "min", 2),
        ([math.nan, 1, 2, None, 3], 2, "min", 4),
        ([5, 6, 7, 8], None, "min", None),
    ):
        assert stops_at(scores, patience, mode, restart) == expected


@pytest.mark.parametrize("patience", [0, -1, 1.5, "often"])
def test_patience_is_a_number_of_evaluations(patience):
    with pytest.raises(ValueError, match="early_stopping.patience"):
        EarlyStopping(patience, "min")
