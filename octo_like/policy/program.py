"""Runs a policy that was exported as a program, with JAX and NumPy alone. Every program brings a copy of this file."""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bfloat16", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "?"}
SAID = 1000  # texts that are remembered
ACCEPTED = ("timestep", "task_completed", "pad_mask_dict/timestep", "pad_mask_dict/task_completed")  # and not read
BYTE = re.compile("<0x[0-9A-F]{2}>")  # of a vocabulary that spells what it does not know


class Program:
    """The policy in `folder`; `spec`, read from program.json, says what goes in and what comes out. Raises ValueError
    for what is damaged, edited, of another format, or made for other devices, and for inputs that do not fit."""

    def __init__(self, folder: str | pathlib.Path):
        self.folder = folder = pathlib.Path(folder)
        try:
            self.spec = json.loads((folder / "program.json").read_text())
        except FileNotFoundError as error:
            raise ValueError(f"{folder} is no exported program: it has no program.json") from error
        except ValueError as error:  # of JSON, or of UTF-8
            raise ValueError(f"{folder / 'program.json'} is damaged: {error}") from error
        if not isinstance(self.spec, dict) or self.spec.get("format_version") != 1:
            version = self.spec.get("format_version") if isinstance(self.spec, dict) else None
            raise ValueError(f"{folder}: format version {version}, this file reads 1")
        self._files = read_files(folder, self.spec)
        self._calls: dict[str, Any] = {}
        here = {"gpu": {"cuda", "rocm"}}.get(jax.default_backend(), {jax.default_backend()})
        if not here & set(self.spec["platforms"]):
            raise ValueError(f"{folder} is for {', '.join(self.spec['platforms'])}; JAX runs on {' or '.join(here)}")
        self._params = jax.device_put(read_safetensors(self._files.pop("params.safetensors")))
        self._known = {text: np.array(ids, np.int32) for text, ids in self.spec["instructions"].items()}
        self._said: dict[str, np.ndarray] = {}  # the newest texts, by which they can be told to it

    def create_tasks(
        self,
        texts: Sequence[str] | None = None,
        goals: Mapping | None = None,
        *,
        tokens: Any = None,
        embeddings: Any = None,
        subtasks: Any = None,
    ) -> dict[str, np.ndarray]:
        """Tasks of B instructions, of goals {"image_...": (B, h, w, 3)}, or of both; what is not given is marked so.
        In place of texts: `tokens`, ids (B, L), or `embeddings`, for policies that read those. `subtasks`: what to do
        next, B texts that were exported with the program or said lately by `predict_text` ("" means none), or ids."""
        if goals is not None and not isinstance(goals, Mapping):
            raise ValueError(f'goals must be a dict, {{"image_...": (B, h, w, 3)}}, got {goals!r:.60}')
        given, inputs = {key: array(f"goals/{key}", goal) for key, goal in (goals or {}).items()}, self._part("task")
        if subtasks is not None and "subtask/input_ids" not in inputs:
            raise ValueError("this policy takes no subtasks")
        if embeddings is not None:
            given["language_instruction"] = array("embeddings", embeddings)
        tokens = self._tokens(texts) if texts is not None else tokens
        if tokens is None and not given and subtasks is None:
            raise ValueError("a task needs texts, goals, tokens or embeddings")
        first = tokens if tokens is not None else next(iter([*given.values(), subtasks]))
        b = len(first) if np.ndim(array("task", first)) else 0
        if b == 0:
            raise ValueError(
                f"texts, goals, tokens and embeddings have a first dimension of rows, at least one; got {first!r:.60}"
            )
        task = {key: np.zeros((b, *entry["shape"][1:]), entry["dtype"]) for key, entry in inputs.items()}
        task |= {f"pad_mask_dict/{key}": np.ones(b, bool) for key in given} | given
        heard = {"language_instruction": tokens, "subtask": self._subtasks(subtasks)}
        words: dict[str, np.ndarray] = {}
        for key, ids in heard.items():
            if ids is not None or f"{key}/input_ids" in inputs:
                ids = array(key, self._tokens([""] * b) if ids is None else ids)
                if ids.ndim != 2 or ids.dtype.kind not in "iu":
                    raise ValueError(
                        f"{key}/input_ids: expected {self._described(inputs, key)}, got {ids.shape} {ids.dtype}"
                    )
                words |= {f"{key}/input_ids": ids, f"{key}/attention_mask": ids != 0}
                task[f"pad_mask_dict/{key}"] = (ids != 0).sum(-1) > 1  # 1: no more than the end
        task |= words
        task = self._checked("task", task)
        if "encode_language" in self.spec["programs"]:
            task |= self._call("encode_language", {f"task/{key}": task[f"task/{key}"] for key in words})
        return {key.removeprefix("task/"): value for key, value in task.items()}

    def sample_actions(self, observations: Mapping, tasks: Mapping, *, rng: jax.Array) -> jax.Array:
        """Actions (B, H, A); `observations`: arrays (B, W, ...), nested or by path; `rng`: one key, or one per row.
        Raises FloatingPointError for actions that are not finite."""
        inputs = self._inputs(observations, tasks)
        if not isinstance(rng, jax.Array | np.ndarray) or rng.dtype == object:
            raise ValueError(f"rng must be a threefry key, jax.random.key(0), or one per row; got {rng!r:.60}")
        rng = jnp.asarray(rng)
        data = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
        if data.dtype != jnp.uint32 or data.shape[-1:] != (2,) or data.ndim > 2:
            raise ValueError(
                f"rng must be a threefry key, jax.random.key(0), or one per row; got {rng.dtype}{rng.shape}"
            )
        if data.ndim == 1:
            rows = len(inputs["observation/timestep_pad_mask"])
            data = jax.vmap(jax.random.fold_in, (None, 0))(data, jnp.arange(rows))
        actions = self._call("sample_actions", {**inputs, "keys": data})
        finite = np.isfinite(np.asarray(actions)).all((-2, -1))
        if not finite.all():
            raise FloatingPointError(f"the policy's actions for row {int(np.argmin(finite))} are not finite")
        return actions

    def predict_text(self, observations: Mapping, tasks: Mapping) -> list[str]:
        """B texts, the likeliest words: answers to instructions that ask, or what to do next, for `create_tasks`."""
        if "predict_text" not in self.spec["programs"]:
            raise ValueError("this policy says nothing: it has no program predict_text")
        says, ids = self.spec["says"], np.asarray(self._call("predict_text", self._inputs(observations, tasks)))
        texts = [decode(says["pieces"], row) for row in ids]
        if says["length"]:  # its words can be told to it, cut or padded to what it reads
            wide = np.pad(ids, ((0, 0), (0, max(0, says["length"] - ids.shape[1]))))[:, : says["length"]]
            wide[:, -1] = np.where((wide == 1).any(-1), wide[:, -1], 1)
            self._said |= dict(zip(texts, wide, strict=True))
            for text in list(self._said)[:-SAID]:
                del self._said[text]
        return texts

    def _inputs(self, observations, tasks):
        for what, tree in (("observations", observations), ("tasks", tasks)):
            if not isinstance(tree, Mapping):
                raise ValueError(f"{what} must be a dict of arrays, got {tree!r:.60}")
        mask = array("timestep_pad_mask", observations.get("timestep_pad_mask", np.ones((1, 1), bool)))
        mask = mask if mask.ndim == 2 else np.ones((1, 1), bool)  # another one is refused below
        defaults = {key: np.ones(mask.shape, bool) for key in self._part("observation") if "pad_mask_dict/" in key}
        defaults["timestep"] = np.broadcast_to(np.arange(mask.shape[-1], dtype=np.int32), mask.shape)
        inputs = self._checked("observation", {**defaults, **dict(flat(observations))})
        return inputs | self._checked("task", dict(flat(tasks)))

    def _part(self, part):
        inputs = self.spec["inputs"].items()
        return {key.removeprefix(f"{part}/"): entry for key, entry in inputs if key.startswith(f"{part}/")}

    def _tokens(self, texts):
        is_list = isinstance(texts, list | tuple | np.ndarray) and np.ndim(texts) == 1
        if not is_list or (unknown := [text for text in texts if text not in self._known]):
            what = f"no tokens of {unknown[0]!r}; give tokens=" if is_list else "texts must be a list"
            raise ValueError(f"{what}; texts that were exported with the program: {', '.join(map(repr, self._known))}")
        return np.array([self._known[text] for text in texts], np.int32)

    def _subtasks(self, given):
        if given is None or array("subtasks", given).dtype.kind in "iu":
            return given
        known = {**self._said, **self._known}  # what was exported stays what it was, whatever is said
        is_list = isinstance(given, list | tuple | np.ndarray) and np.ndim(given) == 1
        if not is_list or (unknown := [text for text in given if text not in known]):
            what = f"no tokens of {unknown[0]!r}; give ids" if is_list else "subtasks must be a list"
            exported = ", ".join(map(repr, self._known))
            raise ValueError(f"{what}, or texts that predict_text said lately or that were exported: {exported}")
        return np.array([known[text] for text in given], np.int32)

    def _checked(self, part, given):
        """Inputs by path, in the dtypes of the program; zeros where a mask declares something absent."""
        want, wrong = self._part(part), []
        given = {
            key: array(f"{part}/{key}", value) for key, value in given.items() if key in want or key not in ACCEPTED
        }
        wrong = [f"missing: {key}" for key in want if key not in given]
        if unknown := [key for key in given if key not in want]:
            wrong += [f"unknown: {key}" for key in unknown] + [f"valid: {', '.join(want)}"]
        fits = {}
        for key in want.keys() & given.keys():
            value, shape, dtype = given[key], want[key]["shape"], want[key]["dtype"]
            if (
                value.ndim != len(shape)
                or [*value.shape[1:]] != shape[1:]
                or not np.can_cast(value.dtype, dtype, "same_kind")
            ):
                wrong.append(f"{key}: expected {self._described(want, key)}, got {value.shape} {value.dtype}")
            elif len(value) == 0:
                wrong.append(f"{key}: no rows")
            else:
                fits[key] = value.astype(dtype)
        if not wrong:
            for key in [key for key in fits if "pad_mask" not in key and "timestep" not in key]:
                # A text's parts have one mask, and padding words are the program's.
                said = key.endswith(("input_ids", "attention_mask"))
                for name in () if said else (f"pad_mask_dict/{key.split('/')[0]}", "timestep_pad_mask"):
                    if name in fits:
                        there = fits[name].reshape(*fits[name].shape, *[1] * (fits[key].ndim - fits[name].ndim))
                        fits[key] = np.where(there, fits[key], np.zeros((), fits[key].dtype))
                if not np.isfinite(fits[key].astype(np.float32)).all():
                    wrong.append(f"{key}: NaN or infinite values")
        if wrong:
            raise ValueError(f"{part} does not fit program.json:\n  " + "\n  ".join(sorted(wrong)))
        return {f"{part}/{key}": fits[key] for key in want}

    def _described(self, inputs, key):
        entry = inputs[key if key in inputs else f"{key}/input_ids"]
        return f"({', '.join(map(str, entry['shape']))}) {entry['dtype']}"

    def _call(self, name, inputs):
        sizes, programs = sorted({len(value) for value in inputs.values()}), self.spec["programs"][name]
        size = "any" if "any" in programs else str(sizes[-1])
        if len(sizes) > 1 or size not in programs:
            raise ValueError(f"rows of observations, tasks and keys: {sizes}; expected one number of {list(programs)}")
        if (file := programs[size]) not in self._calls:
            self._calls[file] = jax.jit(export.deserialize(bytearray(self._files[file])).call)
        return self._calls[file](self._params, inputs)


def read_files(folder: pathlib.Path, spec: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of the files that program.json lists. Raises ValueError for one that is missing or another than was
    exported, program.json itself included, and for one that is not listed (hidden ones and __pycache__ aside)."""
    listed = spec.get("files")
    if not isinstance(listed, dict):
        raise ValueError(f"{folder / 'program.json'} is damaged: it lists no files")
    # Exports that came before listed neither program.py nor the tokenizer, and had no digest of program.json.
    if "sha256" in spec or "program.py" in listed:
        if spec.get("sha256") != digest(spec):
            raise ValueError(f"{folder / 'program.json'} was edited: its SHA-256 differs from the one that it holds")
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names = {path.as_posix() for path in found if not any(part.startswith((".", "__pyc")) for part in path.parts)}
        if extra := sorted(names - {*listed, "program.json"}):
            raise ValueError(f"{folder / extra[0]} is no file of this export; keep what is not part of it elsewhere")
    files = {}
    for name, expected in listed.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{folder / name} is missing or cannot be read: {error.strerror}") from error
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 differs from the one in program.json")
    return files


def digest(spec: Mapping[str, Any]) -> str:
    """SHA-256 of what program.json says, itself left out."""
    said = {key: value for key, value in spec.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def array(name: str, value: Any) -> np.ndarray:
    """A NumPy array. Raises ValueError for what is none."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array, got {value!r:.60}") from error


def decode(pieces: Sequence[str], ids: Iterable[int]) -> str:
    """The text of ids up to the first end (1), as sentencepiece decodes them."""
    data = bytearray()
    for number in ids:
        if number == 1:
            break
        piece = pieces[number]
        data += bytes([int(piece[3:5], 16)]) if BYTE.fullmatch(piece) else piece.replace("\u2581", " ").encode()
    return data.decode(errors="replace").removeprefix(" ")


def flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", leaf) of nested dicts."""
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """{name: array}: a header of JSON says dtype, shape and place of each."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        header[name] = np.frombuffer(data[begin:end], jnp.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
    return header
