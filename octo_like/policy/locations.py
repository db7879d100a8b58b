"""Where policies live: a folder, a Google Cloud Storage bucket, or the Hugging Face Hub.

    runs/pretrain/export                      a local folder (file:///... too)
    gs://bucket/path                          through tensorstore, which comes with Orbax; no TensorFlow
    hf://owner/name[@revision][/subfolder]    through huggingface_hub (the extra "hub")

`fetch` makes a local copy, `push` uploads one. Remote files are kept in a cache and downloaded again when they changed.
"""

import base64
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Select = Callable[[Sequence[str]], Sequence[str]]

SCHEMES = "a local path, gs://bucket/path or hf://owner/name[@revision][/subfolder]"
_HF = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+?))?/?")
_GENERATIONS = ".generations.json"


class LocationError(ValueError):
    """A location that cannot be read or written, and why."""


def is_remote(location: str | os.PathLike) -> bool:
    """Whether the location is not a folder of this machine."""
    return "://" in str(location) and not str(location).startswith("file://")


def fetch(
    location: str | os.PathLike, *, select: Select | None = None, cache_dir: str | os.PathLike | None = None
) -> Path:
    """A local folder with the files of `location`; local folders are returned as they are.

    Args:
      select: given all file names (relative, sorted), returns those that are needed; None takes all.
      cache_dir: where copies are kept; default: $OCTO_LIKE_CACHE or ~/.cache/octo_like. The Hub has a cache of its own.

    Raises:
      LocationError: the scheme is unknown, nothing is there, or a file cannot be read.
    """
    text = os.fspath(location)
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    if not is_remote(text):
        return Path(text)
    if text.startswith("gs://"):
        return _fetch_gcs(text, select, cache_dir)
    if text.startswith("hf://"):
        return _fetch_hub(text, select)
    raise LocationError(f"{text}: unknown scheme; valid: {SCHEMES}")


def push(folder: str | os.PathLike, location: str, *, last: str, message: str = "Upload policy") -> None:
    """Uploads every file of a local folder.

    Args:
      last: the file that makes the upload valid; it is written after all others, so that what is there at any moment is
        a whole upload or none.
      message: of the commit, on the Hub.

    Raises:
      LocationError: the location is not remote, its scheme is unknown, or writing failed.
    """
    folder = Path(folder)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    if last not in names:
        raise LocationError(f"{folder} has no {last}; it holds {names[:8]}")
    if location.startswith("gs://"):
        store = _open_gcs(location)
        # An older config.json would vouch for half of the new files.
        _gcs(location, lambda: store.delete_range(_only(last)).result())
        for name in [name for name in names if name != last] + [last]:
            _gcs(f"{location.rstrip('/')}/{name}", lambda n=name: store.write(n, (folder / n).read_bytes()).result())
        return
    if location.startswith("hf://"):
        repo, revision, subfolder = _parse_hub(location)
        hub = _hub()
        api = hub.HfApi()
        try:
            api.create_repo(repo, exist_ok=True)
            api.upload_folder(
                repo_id=repo, folder_path=folder, path_in_repo=subfolder, revision=revision, commit_message=message
            )
        except (hub.errors.HfHubHTTPError, OSError) as error:
            raise LocationError(f"{location} cannot be written: {error}") from error
        return
    raise LocationError(f"{location}: expected a remote location to push to; valid: {SCHEMES.split(', ', 1)[1]}")


def _only(name: str):
    import tensorstore

    return tensorstore.KvStore.KeyRange(name, name + "\0")


# -- Google Cloud Storage ----------------------------------------------------------------------------------------------


def _gcs(what: str, call):
    try:
        return call()
    except (ValueError, OSError) as error:
        hint = " (private buckets need `gcloud auth application-default login`)"
        raise LocationError(f"{what}: {error}{hint}") from error


def _open_gcs(location: str):
    import tensorstore

    parts = urlsplit(location)
    if not parts.netloc or not parts.path.strip("/"):
        raise LocationError(f"{location}: expected gs://bucket/path")
    spec: dict[str, Any] = {"driver": "gcs", "bucket": parts.netloc, "path": parts.path.strip("/") + "/"}
    # By default a machine without a network would be kept waiting for many minutes.
    spec["context"] = {"gcs_request_retries": {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}}
    return _gcs(location, lambda: tensorstore.KvStore.open(spec).result())


def _fetch_gcs(location: str, select: Select | None, cache_dir) -> Path:
    store = _open_gcs(location)
    keys = _gcs(location, lambda: store.list().result())
    names = sorted(name for name in (key.decode() for key in keys) if not name.endswith("/"))
    if not names:
        raise LocationError(f"{location}: nothing there")
    unsafe = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if unsafe:
        raise LocationError(f"{location}: file names that lead out of the folder: {unsafe[:3]}")
    cache = Path(cache_dir or os.environ.get("OCTO_LIKE_CACHE") or Path.home() / ".cache" / "octo_like")
    folder = cache / hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    known_file = folder / _GENERATIONS
    known = json.loads(known_file.read_text()) if known_file.is_file() else {}
    for name in set(known) - set(names):
        (folder / name).unlink(missing_ok=True)
        del known[name]
    for name in select(names) if select else names:
        file = folder / name
        have = base64.b64decode(known[name]) if name in known and file.is_file() else None
        result = _gcs(f"{location}/{name}", lambda n=name, h=have: store.read(n, if_not_equal=h).result())
        if result.state == "unspecified":
            continue  # the same generation as in the cache
        if result.state != "value":
            raise LocationError(f"{location}/{name} vanished while it was read")
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(file, result.value)
        known[name] = base64.b64encode(result.stamp.generation).decode()
        _write_whole(known_file, json.dumps(known).encode())
    return folder


def _write_whole(file: Path, data: bytes) -> None:
    """The file appears whole or not at all, also when two processes fill the same cache."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as staging:
        staging.write(data)
    os.replace(staging.name, file)


# -- Hugging Face Hub --------------------------------------------------------------------------------------------------


def _hub():
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise LocationError("hf:// needs the package huggingface_hub: pip install 'octo_like[hub]'") from error
    import huggingface_hub.errors  # the package loads its parts on demand

    return huggingface_hub


def _parse_hub(location: str) -> tuple[str, str | None, str | None]:
    match = _HF.fullmatch(location)
    if not match:
        raise LocationError(f"{location}: expected hf://owner/name[@revision][/subfolder]")
    return match["repo"], match["revision"], match["folder"]


def _fetch_hub(location: str, select: Select | None) -> Path:
    repo, revision, subfolder = _parse_hub(location)
    hub = _hub()
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
        names = sorted(name.removeprefix(prefix) for name in files if name.startswith(prefix))
        if not names:
            raise LocationError(f"{location}: nothing there; the repository holds {sorted(files)[:8]}")
        wanted = [prefix + name for name in (select(names) if select else names)]
        root = hub.snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in wanted])
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise LocationError(f"{location} cannot be read: {error}") from error
    return Path(root) / subfolder if subfolder else Path(root)
