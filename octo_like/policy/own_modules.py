"""The modules of a policy's own parts: only named ones are imported, and a changed one is told."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from octo_like.common.parts import Modules, is_named, unnamed
from octo_like.model import parts
from octo_like.policy.pretrained import PretrainedError

log = logging.getLogger(__name__)


def check_modules(path: str | os.PathLike, config: Mapping[str, Any], modules: Modules) -> None:
    """Raises PretrainedError when a policy has parts of modules that its user has not named."""
    unknown = {where: kind for where, kind in parts.own_kinds(config["model"]).items() if not is_named(kind, modules)}
    if unknown:
        listed = ", ".join(f"{where} is {kind!r}" for where, kind in unknown.items())
        needed = sorted({kind.partition(":")[0] for kind in unknown.values()})
        raise PretrainedError(f"{path} has parts of its own ({listed}), and {unnamed(*needed)}")


def compare_sources(path: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Logs which modules of a policy's own parts are not those that it was exported with."""
    for module, now in parts.hashes(config["model"]).items():
        was = config.get("modules", {}).get(module)
        if was != now:
            log.warning(
                "%s: its parts are of module %s, whose source (hash %s) is not the one it was exported with (%s): the "
                "parameters may mean something else now",
                *(path, module, now, was or "not kept"),
            )
