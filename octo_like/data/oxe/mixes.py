"""Named mixtures of registry datasets: name -> {dataset: weight}."""

from typing import Any

from octo_like.data.oxe import registry
from octo_like.data.spec import DataError, suggest

MIXES: dict[str, dict[str, float]] = {
    "bridge": {"bridge_dataset": 1.0},
}


def mix(name: str) -> dict[str, dict[str, Any]]:
    """A mixture as the `datasets` entry of a config: {dataset: {fields of its DatasetSpec}}.

    Raises:
      DataError: no such mixture, with the valid names.
    """
    if name not in MIXES:
        raise DataError(f"no mixture {name!r}; {suggest(name, MIXES)}")
    return {
        dataset: {"name": dataset, "weight": weight, "standardize": dataset, **registry.spec_fields(dataset)}
        for dataset, weight in MIXES[name].items()
    }
