"""octo_like: pretrain, adapt and run Octo-style generalist robot policies in JAX.

    from octo_like import Policy
    policy = Policy.load_pretrained("runs/demo/pretrain/export")

`OctoModel` is the same with the names that Octo's users know.

The rooms: `common` (what a batch is), `model` (what is learned), `policy` (what is exported, loaded and carried over),
`data` (how demonstrations become batches; the only room that imports TensorFlow), `training` (how it is trained), `aot`
(proof before the pod), `robot` (how it acts), `envs` (the built-in tabletop world). docs/architecture.md shows them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octo_like.common.schema import BatchSpec
    from octo_like.policy.octo_names import OctoModel
    from octo_like.policy.policy import Policy

__all__ = ["BatchSpec", "OctoModel", "Policy", "__version__"]
__version__ = "0.1.0"

# Imported when they are first used: `import octo_like` itself takes no time and needs no JAX.
_PLACES = {
    "BatchSpec": "octo_like.common.schema",
    "OctoModel": "octo_like.policy.octo_names",
    "Policy": "octo_like.policy.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
