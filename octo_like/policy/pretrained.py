"""Parameters in files: the exported directory, and merging loaded parameters into a new model with a report.

An exported policy is a directory:

    config.json               format version, model config, batch spec, text tokenizer, digest of the parameters
    params.safetensors        every parameter under its path, e.g. "heads_action/mean_proj/kernel"
    dataset_statistics.json   normalisation statistics per dataset
    README.md                 the model card
    text/                     the sentencepiece model, when the policy takes language
    SHA256SUMS                of all of them but the card, as sha256sum writes it
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from octo_like.common.schema import flatten, unflatten
from octo_like.common.storage import persistently

# 1: the first. 2: a model card; the batch spec may hold language_embedding.
FORMAT_VERSION = 2
CONFIG_FILE, PARAMS_FILE, STATISTICS_FILE, TEXT_DIR = (
    "config.json",
    "params.safetensors",
    "dataset_statistics.json",
    "text",
)
CARD_FILE, SUMS_FILE = "README.md", "SHA256SUMS"


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an older format version as the present one would have written it."""
    config = dict(config)
    if config["format_version"] == 1:
        spec = {"language_embedding": None, **config.get("batch_spec", {})}
        config |= {"format_version": 2} | ({"batch_spec": spec} if "batch_spec" in config else {})
    return config


class PretrainedError(ValueError):
    """A directory that cannot be loaded as a policy, and why."""


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      PretrainedError: no such file, no JSON (with the place of the mistake), or something else than an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PretrainedError(f"{path} is missing") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise PretrainedError(f"{path} is damaged, expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise PretrainedError(f"{path} holds {value!r:.60}; expected a JSON object")
    return value


def save_directory(
    path: str | os.PathLike,
    *,
    config: Mapping,
    params: Mapping,
    statistics: Mapping,
    save_text: Callable[[Path], object] | None = None,
    card: str = "",
) -> None:
    """Writes an exported policy; the directory appears whole or not at all, and replaces an earlier export.

    Args:
      save_text: called with the path of the text/ directory to fill it.
      card: contents of the model card, Markdown.
    """
    with whole_directory(path, CONFIG_FILE, "an exported policy") as staging:
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(params)}
        safetensors.numpy.save_file(arrays, staging / PARAMS_FILE)
        digest = hashlib.sha256((staging / PARAMS_FILE).read_bytes()).hexdigest()
        document = {"format_version": FORMAT_VERSION, "params_sha256": digest, **config}
        (staging / CONFIG_FILE).write_text(json.dumps(document, indent=2))
        (staging / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2))
        if card:
            (staging / CARD_FILE).write_text(card)
        if save_text is not None:
            (staging / TEXT_DIR).mkdir()
            save_text(staging / TEXT_DIR)
        files = sorted(p for p in staging.rglob("*") if p.is_file() and p.name != CARD_FILE)
        sums = [f"{_sha256(file)}  {file.relative_to(staging).as_posix()}\n" for file in files]
        (staging / SUMS_FILE).write_text("".join(sums))


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_sums(path: Path, params_sha256: str) -> None:
    """Raises PretrainedError when a file of an export is not the one that was written. Older exports have no sums.

    Args:
      params_sha256: of the parameters, which are not read for this.
    """
    sums = path / SUMS_FILE
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not name:
            raise PretrainedError(f"{sums} is damaged: {line!r:.90} is not a SHA-256 and a name")
        file = path / name
        if not file.is_file():
            raise PretrainedError(f"{file} is missing, which {SUMS_FILE} names")
        if (params_sha256 if name == PARAMS_FILE else _sha256(file)) != digest:
            raise PretrainedError(
                f"{file} is damaged: its SHA-256 differs from the one in {SUMS_FILE}. If it was edited on purpose, "
                f"remove {SUMS_FILE}"
            )


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike, marker: str, what: str) -> Iterator[Path]:
    """A folder to be filled, which becomes `path` when the context ends well, in place of an earlier one of its kind.

    Args:
      marker: a file that every folder of this kind has, `what`: its name for the error.

    Raises:
      PretrainedError: there is something else at `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path / marker).exists() and (not path.is_dir() or any(path.iterdir())):
        raise PretrainedError(f"{path} exists and is not {what}; it is not overwritten")
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        # safetensors writes for the owner alone; the mode of the other files is what the user's umask allows.
        for file in staging.glob("*.safetensors"):
            file.chmod((staging / marker).stat().st_mode & 0o666)
        staging.chmod(0o755)
        previous = None
        if path.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / "old"
            path.rename(previous)
        staging.rename(path)
        if previous is not None:
            shutil.rmtree(previous.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_directory(path: str | os.PathLike) -> tuple[dict, dict, dict, Path | None]:
    """Reads an exported policy: (config, params, statistics, text directory or None).

    Raises:
      PretrainedError: when the path is not an exported policy, is of a newer format, or is damaged.
      StorageError: the storage does not answer, or refuses.
    """
    return persistently(lambda: _load_directory(Path(path)), path)


def _load_directory(path: Path) -> tuple[dict, dict, dict, Path | None]:
    if not path.is_dir():
        raise PretrainedError(
            f"{path} is not a directory; expected an exported policy with {CONFIG_FILE} and {PARAMS_FILE}"
        )
    missing = [name for name in (CONFIG_FILE, PARAMS_FILE, STATISTICS_FILE) if not (path / name).is_file()]
    if missing:
        found = sorted(entry.name for entry in path.iterdir())[:8]
        exported = sorted(str(p.parent.relative_to(path)) for p in path.glob(f"*/{CONFIG_FILE}"))
        hint = f"; did you mean {path / exported[0]}?" if exported else ""
        raise PretrainedError(f"{path} is not an exported policy: {', '.join(missing)} missing (found: {found}){hint}")
    config, statistics = read_json(path / CONFIG_FILE), read_json(path / STATISTICS_FILE)
    version = config.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise PretrainedError(f"{path}: format version {version}, this release reads 1 to {FORMAT_VERSION}")
    lacking = [key for key in ("params_sha256", "model", "batch_spec") if key not in config]
    if lacking:
        raise PretrainedError(f"{path / CONFIG_FILE} lacks {', '.join(lacking)}; it has {sorted(config)}")
    _check_sums(path, config["params_sha256"])
    data = (path / PARAMS_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != config["params_sha256"]:
        raise PretrainedError(f"{path / PARAMS_FILE} is damaged: its SHA-256 differs from the one in {CONFIG_FILE}")
    params = unflatten(safetensors.numpy.load(data))
    text = path / TEXT_DIR
    return upgrade(config), params, statistics, text if text.is_dir() else None


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every parameter of a new model.

    Attributes:
      status: path to "loaded", "resized" or "new".
      notes: path to the reason, for "resized" and "new".
      unused: paths of the checkpoint that the new model does not have.
      sizes: path to the number of entries.
      frozen: paths that will not be trained.
      itemsizes: path to the bytes of an entry; 4 where it does not say.
      lost: paths of the checkpoint of which nothing is used, `unused` ones and those that fit nowhere, to their number
        of entries.
    """

    status: dict[str, str]
    notes: dict[str, str]
    unused: tuple[str, ...]
    sizes: dict[str, int]
    frozen: frozenset[str] = frozenset()
    itemsizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def paths(self, column: str) -> list[str]:
        """Paths with a status, or those that are "frozen" or "trained"."""
        if column in ("frozen", "trained"):
            return [path for path in self.status if (path in self.frozen) == (column == "frozen")]
        return [path for path, status in self.status.items() if status == column]

    def count(self, column: str) -> tuple[int, int]:
        """(number of arrays, number of entries) of a column."""
        paths = self.paths(column)
        return len(paths), sum(self.sizes[path] for path in paths)

    def bytes_of(self, column: str) -> int:
        """Bytes of the parameters of a column."""
        return sum(self.sizes[path] * self.itemsizes.get(path, 4) for path in self.paths(column))

    def with_adapters(self, params: Mapping[str, Any]) -> "LoadReport":
        """The report of the tree `params`, which has further arrays that are all new (low-rank factors)."""
        leaves = dict(flatten(params))
        added = {path: leaf for path, leaf in leaves.items() if path not in self.status}
        return dataclasses.replace(
            self,
            status={path: self.status.get(path, "new") for path in leaves},
            sizes=self.sizes | {path: int(np.prod(leaf.shape)) for path, leaf in added.items()},
            itemsizes=dict(self.itemsizes) | {path: np.dtype(leaf.dtype).itemsize for path, leaf in added.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        summary = {}
        for column in COLUMNS:
            arrays, entries = self.count(column)
            summary[column] = {"arrays": arrays, "parameters": entries, "bytes": self.bytes_of(column)}
        return {
            "summary": summary,
            "status": self.status,
            "notes": self.notes,
            "unused": list(self.unused),
            "lost": dict(self.lost),
            "frozen": sorted(self.frozen),
        }

    def __str__(self) -> str:
        """A table by module, what it takes in memory, then every resized, new and unused array."""
        rows: dict[str, dict[str, int]] = {}
        for column in COLUMNS:
            for path in self.paths(column):
                row = rows.setdefault(module_of(path), {})
                row[column] = row.get(column, 0) + self.sizes[path]
        width = max(map(len, [*rows, "parameters"]))

        def line(name: str, values: Sequence[str]) -> str:
            return f"{name:<{width}}" + "".join(f"{value:>12}" for value in values)

        numbers = lambda row: [f"{row[column]:,}" if row.get(column) else "-" for column in COLUMNS]  # noqa: E731
        lines = [line("parameters", COLUMNS)]
        lines += [line(module, numbers(row)) for module, row in rows.items()]
        lines.append(line("total", numbers({column: self.count(column)[1] for column in COLUMNS})))
        lines.append(
            line("bytes", [_bytes(self.bytes_of(column)) if self.paths(column) else "-" for column in COLUMNS])
        )
        whole, trained = (sum(map(self.bytes_of, columns)) for columns in (("frozen", "trained"), ("trained",)))
        lines.append(
            f"state on the devices: parameters {_bytes(whole)}, their average {_bytes(trained)}, optimizer "
            f"{_bytes(2 * trained)}; the last two are for what is trained only"
        )
        lines.append(f"lost of the checkpoint: {_by_module(self.lost)}")
        lines.append(f"new here: {_by_module({path: self.sizes[path] for path in self.paths('new')})}")
        lines += _listed((self.status[path], path, note) for path, note in self.notes.items())
        lines += _listed(("unused", path, "") for path in self.unused)
        return "\n".join(lines)


def _listed(entries: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines for (status, path, note), arrays of a module with the same fate in one."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for status, path, note in entries:
        # A note about an array itself (its shape, where it came from) is a line of its own.
        module = module_of(path) if note in ("", "not in the checkpoint", "replaced on request") else path
        together.setdefault((status, module, note), []).append(path)
    lines = []
    for (status, module, note), paths in together.items():
        what = paths[0] if len(paths) == 1 else f"{module}: {len(paths)} arrays"
        lines.append(f"  {status:<8} {what}" + (f": {note}" if note else ""))
    return lines


def _by_module(sizes: Mapping[str, int]) -> str:
    """ "1,234 parameters (heads_action 1,000, ...)", largest first."""
    modules: dict[str, int] = {}
    for path, size in sizes.items():
        modules[module_of(path)] = modules.get(module_of(path), 0) + size
    ranked = sorted(modules.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{module} {count:,}" for module, count in ranked)
    return f"{sum(modules.values()):,} parameters ({listed})" if modules else "nothing"


COLUMNS = ("loaded", "resized", "new", "frozen", "trained")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def module_of(path: str) -> str:
    """The part of the model a parameter belongs to, for reports."""
    parts = path.split("/")
    if parts[0] != "octo_transformer" or len(parts) == 1:
        return parts[0]
    return "transformer" if parts[1] == "BlockTransformer_0" else parts[1]


def merge_params(
    target: Mapping,
    source: Mapping,
    *,
    reinitialize: Sequence[str] = (),
    frozen: frozenset[str] = frozenset(),
    copies: Mapping[str, str] | None = None,
    resize: Callable[[str, np.ndarray, np.ndarray], np.ndarray | None] = lambda path, old, new: None,
    anew: Mapping[str, str] | None = None,
) -> tuple[dict, LoadReport]:
    """Puts loaded parameters into a freshly initialised tree.

    A parameter of equal path and shape is loaded. A position embedding of another length is resized: the common entries
    are loaded, the others stay as initialised. Other arrays are resized if `resize` knows how. Everything else stays
    new.

    Args:
      target: initialised parameters of the new model.
      source: loaded parameters.
      reinitialize: regexes (matched at the start of a path); matching parameters stay new.
      frozen: paths that will not be trained, for the report.
      copies: prefix of paths in the target -> prefix in the source that is loaded there instead. Position embeddings of
        copied groups of tokens are moved by a vector of the copy's own, see `_told_apart`.
      resize: (path, loaded array, initial array of another shape) to the array to use, or None; see `surgery.carry`.
      anew: prefix of paths in the target that stay new although they would fit -> why.

    Returns:
      The merged parameters and the report.

    Raises:
      PretrainedError: when a regex matches nothing, or nothing could be loaded.
    """
    copies = copies or {}
    new, old = dict(flatten(target)), dict(flatten(source))
    for pattern in reinitialize:
        if not any(re.match(pattern, path) for path in new):
            raise PretrainedError(f"reinitialize pattern {pattern!r} matches no parameter; modules: {_modules(new)}")
    merged, status, notes, used, carried = {}, {}, {}, set(), set()
    for path, leaf in new.items():
        merged[path], status[path] = leaf, "new"
        prefix = next((prefix for prefix in copies if path.startswith(prefix)), "")
        origin = copies[prefix] + path.removeprefix(prefix) if prefix else path
        copied = f"copied from {origin}" if prefix else ""
        moved = bool(prefix) and re.fullmatch(GROUP_POSITIONS, path) is not None
        on_request = any(re.match(pattern, path) for pattern in reinitialize)
        begins = (why for beginning, why in (anew or {}).items() if path.startswith(beginning))
        if why := "replaced on request" if on_request else next(begins, ""):
            notes[path] = why
            used.add(origin)
        elif origin not in old:
            notes[path] = f"{origin} is not in the checkpoint" if prefix else "not in the checkpoint"
        elif old[origin].shape == leaf.shape and not moved:
            merged[path], status[path] = np.asarray(old[origin], leaf.dtype), "loaded"
            used.add(origin)
            carried.add(origin)
            notes |= {path: copied} if copied else {}
        else:
            used.add(origin)
            was, value = np.asarray(old[origin]), None
            if was.ndim == leaf.ndim and "pos_embed" in path.rsplit("/", 1)[-1]:
                value = _resized_positions(was, leaf, moved)
            elif was.ndim == leaf.ndim:
                value = resize(path, was, np.asarray(leaf))
            if value is not None:
                merged[path], status[path] = np.asarray(value, leaf.dtype), "resized"
                carried.add(origin)
                resized = "" if was.shape == leaf.shape else f"{_shape(was)} to {_shape(leaf)}"
                apart = "moved by a vector of its own" if moved else ""
                notes[path] = "; ".join(filter(None, [resized, copied, apart]))
            else:
                notes[path] = f"shape {_shape(was)} in the checkpoint, {_shape(leaf)} here"
    if "loaded" not in status.values():
        raise PretrainedError(
            f"no parameter of the checkpoint fits this model; it holds {_modules(old)}, the model has {_modules(new)}"
        )
    unused = tuple(path for path in old if path not in used)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in new.items()}
    itemsizes = {path: np.dtype(leaf.dtype).itemsize for path, leaf in new.items()}
    lost = {path: int(np.prod(np.shape(leaf))) for path, leaf in old.items() if path not in carried}
    return unflatten(merged), LoadReport(status, notes, unused, sizes, frozen, itemsizes, lost)


def _resized_positions(was: np.ndarray, fresh: np.ndarray, moved: bool) -> np.ndarray:
    """`fresh` with the entries that both have, as they were; `moved` by a vector of its own if it is a copy's."""
    value = np.array(fresh)
    common = tuple(slice(0, min(a, b)) for a, b in zip(was.shape, fresh.shape, strict=True))
    value[common] = _told_apart(was[common], value) if moved else was[common]
    return value


# What is added to all tokens of a camera, of the proprioception, or of a task.
GROUP_POSITIONS = r"octo_transformer/(obs|task)_.+_pos_embedding"


def _told_apart(copied: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Position embeddings (..., D) of a copy: those of the original plus one vector (D,), the same for all tokens.

    Places within the picture keep the distances that they had. Without the vector the tokens of the two groups would
    differ in nothing but what they show. Its direction is random (the first row of `fresh`), its size that of the
    original's rows.
    """
    row = fresh.reshape(-1, fresh.shape[-1])[0].astype(np.float64)
    size = np.sqrt(np.mean(np.square(copied, dtype=np.float64)) / max(np.mean(row**2), 1e-30))
    return (copied + (size if size > 0 else 1.0) * row).astype(copied.dtype)


def _shape(leaf) -> str:
    return "x".join(map(str, leaf.shape)) or "scalar"


def _modules(flat: Mapping[str, Any]) -> list[str]:
    return sorted({module_of(path) for path in flat})


def load_t5(path: str | os.PathLike) -> dict:
    """A T5 encoder from a directory of Hugging Face safetensors, as the tree of `octo_like.model.t5`.

    The weights do not tell the activation of the feed-forward layers: config.json beside them does, if it is there.

    Raises:
      PretrainedError: no safetensors there, they hold no T5 encoder, or one with another activation.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise PretrainedError(f"{path} has no *.safetensors; expected the files of a T5 model, e.g. model.safetensors")
    flat: dict[str, np.ndarray] = {}
    for file in files:
        for name, array in safetensors.numpy.load_file(file).items():
            if name.startswith("encoder.") and name.endswith(".weight") and "embed_tokens" not in name:
                *parents, last, _ = name.split(".")
                if last.endswith("layer_norm"):
                    flat["/".join([*parents, last, "weight"])] = array
                elif last == "relative_attention_bias":
                    flat["/".join([*parents, last, "embedding"])] = array
                else:
                    # Torch keeps (out, in).
                    flat["/".join([*parents, last, "kernel"])] = np.ascontiguousarray(array.T)
            elif name in ("shared.weight", "encoder.embed_tokens.weight"):
                flat["shared/embedding"] = array
    if "shared/embedding" not in flat or not any(path.startswith("encoder/block/0") for path in flat):
        raise PretrainedError(f"{path}: the safetensors hold no T5 encoder (no shared.weight or encoder.block.0...)")
    if (path / CONFIG_FILE).is_file():
        check_feed_forward(path / CONFIG_FILE, read_json(path / CONFIG_FILE), any("/wi_0/" in name for name in flat))
    return unflatten(flat)


def check_feed_forward(file: str | os.PathLike, config: Mapping[str, Any], gated: bool) -> None:
    """A T5's own config (Hugging Face's) has the feed-forward layers that `octo_like.model.t5` computes.

    Args:
      gated: whether the weights are those of a gated feed-forward layer (wi_0 and wi_1, not wi).

    Raises:
      PretrainedError: it has others.
    """
    expected = "gated-gelu" if gated else "relu"
    given = config.get("feed_forward_proj", expected)
    if given != expected:
        weights = "wi_0 and wi_1" if gated else "wi"
        raise PretrainedError(
            f"{file}: feed_forward_proj is {given!r}; expected {expected!r}, the only one that is computed here for "
            f"weights with {weights}"
        )


def with_t5(params: Mapping, t5: Mapping | None) -> dict:
    """Puts T5 weights under every "hf_model" of a parameter tree; None leaves it as it is.

    Raises:
      PretrainedError: the model has no T5 encoder, or one of another size.
    """
    if t5 is None:
        return dict(params)
    flat, weights = dict(flatten(params)), dict(flatten(t5))
    found = False
    for name, leaf in flat.items():
        if "/hf_model/" not in name:
            continue
        found, inner = True, name.split("/hf_model/", 1)[1]
        if inner not in weights or weights[inner].shape != leaf.shape:
            got = weights[inner].shape if inner in weights else "nothing"
            raise PretrainedError(f"T5 parameter {inner}: the model needs {leaf.shape}, the files hold {got}")
        flat[name] = np.asarray(weights[inner], leaf.dtype)
    if not found:
        raise PretrainedError("T5 weights were given, but no tokenizer of this model is a T5 encoder")
    return unflatten(flat)
