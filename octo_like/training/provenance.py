"""Which code a run is made by: version, commit, a hash of the sources, and the libraries underneath."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import octo_like
from octo_like.common import parts

# Libraries whose versions decide what a run computes or how it is saved.
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu")


def library_versions() -> dict[str, str]:
    """Installed versions of LIBRARIES."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def source_digests() -> dict[str, str]:
    """SHA-256 (hex) of every source file of the package by its path within it."""
    package = pathlib.Path(octo_like.__file__).parent
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(package.rglob("*.py"))
    }


def code_version() -> dict[str, Any]:
    """JSON-able; stored with every checkpoint.

    "fingerprint" is a hash of the package's sources, so that it tells apart what a version number or a commit with
    local changes does not. "commit" ends in "+changes" when the working tree differs from it. "parts" has the hashes of
    the modules of a user's own parts.
    """
    return {**_own_version(), **({"parts": found} if (found := parts.used()) else {})}


@functools.cache
def _own_version() -> dict[str, Any]:
    sources = json.dumps(source_digests(), sort_keys=True)
    return {
        "version": octo_like.__version__,
        "commit": _commit(pathlib.Path(octo_like.__file__).parent.parent),
        "fingerprint": hashlib.sha256(sources.encode()).hexdigest(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def _commit(root: pathlib.Path) -> str | None:
    if not (root / ".git").exists():
        return None  # an installed package
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not ours to read
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def differences(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """What changed between two `code_version()`s, in words; empty when the code and its libraries are the same."""
    if old is None:
        return ["the checkpoint does not say which code wrote it"]
    lines = []
    if old.get("fingerprint") != new["fingerprint"]:
        before, after = (f"{v.get('version')} ({v.get('commit') or 'no commit'})" for v in (old, new))
        lines.append(f"octo_like: {before} -> {after}, sources differ")
    before, after = old.get("parts", {}), new.get("parts", {})
    lines += [
        f"{name}: the source of its parts has the hash {after[name]}, it had {before[name]}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    before, after = old.get("libraries", {}), new["libraries"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}")
    return lines
