"""The schema of a batch: the treaty between data, model, training and robot.

A batch is a plain nested dict of arrays. `BatchSpec` states which keys a run uses and their sizes; everything that
needs shapes (model initialisation, synthetic batches, ahead-of-time compilation, input checks) derives them from it.

Letters: B batch, W window (history), H action horizon, A action dim, P proprio dim, L language tokens, h w image size.

    observation/image_{slot}               B W h w 3  uint8
    observation/depth_{slot}               B W h w 1  float32, metres; 0: no reading
    observation/proprio                    B W P      float32, normalised
    observation/proprio_pad_mask           B W P      bool, False: padded dimension
    observation/{sensor}                   B W ...    float32, normalised; of `extra_observations`
    observation/timestep                   B W        int32, index in the episode
    observation/timestep_pad_mask          B W        bool, False: before the episode began
    observation/pad_mask_dict/{key}        B W        bool, False: this modality is missing
    task/language_instruction/input_ids    B L        int32
    task/language_instruction/attention_mask B L      int32, 0: padding token
    task/language_instruction              B [n] d    float32, in place of the two above: precomputed embeddings
    task/image_{slot}                      B h w 3    uint8, goal image
    task/timestep                          B          int32, index of the goal step
    task/pad_mask_dict/{key}               B          bool
    action                                 B W H A    float32, normalised
    action_pad_mask                        B W H A    bool, False: padded dimension, or past the goal/end
    task/subtask/{input_ids,attention_mask} B L       int32, what to do next (or was done last), in words; of `subtask`
    points                                 B W K 2    float32, column and row of named things, fractions of the image
    points_pad_mask                        B W K      bool, False: not labelled, or not in the picture
    text_target/input_ids                  B M        int32, what the model learns to say at the window's last step
    text_target/attention_mask             B M        int32, 0: nothing is to be said there
    text_target_kind                       B          int32, 0: nothing; else 1 + its place in TEXT_KINDS
    action_tokens/{head}                   B W M      int32, the chunk as ids of the head's vocabulary; 0: padding
    action_head_mask/{head}                B          bool, which heads learn from this sample
    dataset_id                             B          int32
    sample_id                              B          int64, the global number n of this sample
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from octo_like.common.geometry import check_resize
from octo_like.common.words import whole_number

Tree = dict[str, Any]

IMAGE_CHANNELS = 3
# What a text that is learned can be: the answer to an instruction that asks, or what the robot is doing just now.
TEXT_KINDS = ("answer", "subtask")
TEXT_LENGTH = 24  # ids of a text that is said, where a model's config does not say another number
# Names among the observations that no other sensor can have; "action" stands beside them in an index.
RESERVED = ("action", "proprio", "timestep", "pad_mask_dict")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape (with the batch dimension left out) and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def describe(self) -> str:
        return f"({', '.join(['B', *map(str, self.shape)])}) {self.dtype}"


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Which keys a run's batches have, and their sizes.

    Attributes:
      window_size: W, observations of history including the present one.
      action_horizon: H, length of an action chunk (the longest of all heads).
      action_dim: A (the widest of all heads).
      image_sizes: camera slot ("primary", "wrist", ...) to (height, width).
      goal_images: slots that also appear as goal images in the task.
      proprio_dim: P, or None when the run uses no proprioception.
      language_length: L, or None when the run uses no language.
      heads: names of the action heads.
      depth_sizes: camera slot to (height, width) of its depth map, for cameras whose depth the run uses.
      language_embedding: (d,) or (n, d) of instructions that come as precomputed embeddings in place of tokens.
      points: names of the things whose place in the image is told, for `model.auxiliaries`.
      text_target: M, ids of the texts that the model learns to say; None: it learns none.
      action_tokens: head to M, most ids of a chunk, for heads with a vocabulary of action tokens.
      subtask: whether tasks also say what to do next (`task/subtask`, of `language_length`).
      resize: how pictures of other sizes and aspect ratios come to these sizes, see `octo_like.common.geometry`.
      extra_observations: other sensors by name (of `DatasetSpec.extra_keys`), float32 of this shape per timestep.
    """

    window_size: int
    action_horizon: int
    action_dim: int
    image_sizes: Mapping[str, tuple[int, int]]
    goal_images: tuple[str, ...] = ()
    proprio_dim: int | None = None
    language_length: int | None = None
    heads: tuple[str, ...] = ("action",)
    depth_sizes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    language_embedding: tuple[int, ...] | None = None
    extra_observations: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    points: tuple[str, ...] = ()
    text_target: int | None = None
    subtask: bool = False
    action_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    resize: str = "stretch"

    def __post_init__(self):
        check_resize(self.resize)
        unknown = set(self.goal_images) - set(self.image_sizes)
        if unknown:
            raise ValueError(f"goal_images {sorted(unknown)} are not cameras; valid: {sorted(self.image_sizes)}")
        if self.subtask and self.language_length is None:
            raise ValueError("subtask needs language_length: sub-tasks are texts, tokenized as instructions are")
        if self.text_target is not None and self.text_target < 2:
            raise ValueError(f"text_target must be at least 2, a word and the end, got {self.text_target}")
        if self.language_length is not None and self.language_embedding is not None:
            raise ValueError("language is tokens (language_length) or embeddings (language_embedding), not both")
        for name, shape in self.extra_observations.items():
            _check_sensor(name, shape)
        for name in ("window_size", "action_horizon", "action_dim"):
            whole_number(getattr(self, name), name)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "BatchSpec":
        """Inverse of `to_json`; keys that came later may be missing."""
        fields = dict(data)
        for name in ("image_sizes", "depth_sizes", "extra_observations"):
            fields[name] = {key: tuple(shape) for key, shape in data.get(name, {}).items()}
        for name in ("goal_images", "heads", "points"):
            fields[name] = tuple(data.get(name, ()))
        if fields.get("language_embedding") is not None:
            fields["language_embedding"] = tuple(fields["language_embedding"])
        return cls(**fields)

    def to_json(self) -> Tree:
        """Plain lists and numbers; points, texts to say and sub-tasks only where there are any, and how pictures are
        resized unless they are stretched: most runs have none."""
        fields = dataclasses.asdict(self)
        seldom = {name: fields.pop(name) for name in ("points", "text_target", "subtask", "action_tokens", "resize")}
        if self.resize == "stretch":
            del seldom["resize"]
        return {
            **fields,
            "image_sizes": {slot: list(size) for slot, size in self.image_sizes.items()},
            "depth_sizes": {slot: list(size) for slot, size in self.depth_sizes.items()},
            "extra_observations": {key: list(shape) for key, shape in self.extra_observations.items()},
            "goal_images": list(self.goal_images),
            "heads": list(self.heads),
            "language_embedding": None if self.language_embedding is None else list(self.language_embedding),
            **{name: list(value) if name == "points" else value for name, value in seldom.items() if value},
        }

    def observation(self) -> Tree:
        W = self.window_size
        leaves: Tree = {
            f"image_{slot}": Leaf((W, *size, IMAGE_CHANNELS), np.dtype(np.uint8))
            for slot, size in self.image_sizes.items()
        }
        for slot, size in self.depth_sizes.items():
            leaves[f"depth_{slot}"] = Leaf((W, *size, 1), np.dtype(np.float32))
        if self.proprio_dim is not None:
            leaves["proprio"] = Leaf((W, self.proprio_dim), np.dtype(np.float32))
            leaves["proprio_pad_mask"] = Leaf((W, self.proprio_dim), np.dtype(bool))
        for key, shape in self.extra_observations.items():
            leaves[key] = Leaf((W, *shape), np.dtype(np.float32))
        modalities = [key for key in leaves if not key.endswith("_pad_mask")]
        leaves["timestep"] = Leaf((W,), np.dtype(np.int32))
        leaves["timestep_pad_mask"] = Leaf((W,), np.dtype(bool))
        leaves["pad_mask_dict"] = {key: Leaf((W,), np.dtype(bool)) for key in modalities}
        return leaves

    def task(self) -> Tree:
        leaves: Tree = {}
        if self.language_length is not None:
            ids = Leaf((self.language_length,), np.dtype(np.int32))
            leaves["language_instruction"] = {"input_ids": ids, "attention_mask": ids}
            if self.subtask:
                leaves["subtask"] = {"input_ids": ids, "attention_mask": ids}
        if self.language_embedding is not None:
            leaves["language_instruction"] = Leaf(tuple(self.language_embedding), np.dtype(np.float32))
        for slot in self.goal_images:
            leaves[f"image_{slot}"] = Leaf((*self.image_sizes[slot], IMAGE_CHANNELS), np.dtype(np.uint8))
        modalities = list(leaves)
        leaves["timestep"] = Leaf((), np.dtype(np.int32))
        leaves["pad_mask_dict"] = {key: Leaf((), np.dtype(bool)) for key in modalities}
        return leaves

    def batch(self) -> Tree:
        chunk = (self.window_size, self.action_horizon, self.action_dim)
        points: Tree = {}
        if self.points:
            places = (self.window_size, len(self.points))
            points["points"] = Leaf((*places, 2), np.dtype(np.float32))
            points["points_pad_mask"] = Leaf(places, np.dtype(bool))
        texts: Tree = {}
        if self.text_target is not None:
            ids = Leaf((self.text_target,), np.dtype(np.int32))
            texts["text_target"] = {"input_ids": ids, "attention_mask": ids}
            texts["text_target_kind"] = Leaf((), np.dtype(np.int32))
        if self.action_tokens:
            texts["action_tokens"] = {
                head: Leaf((self.window_size, length), np.dtype(np.int32))
                for head, length in self.action_tokens.items()
            }
        return {
            "observation": self.observation(),
            "task": self.task(),
            "action": Leaf(chunk, np.dtype(np.float32)),
            "action_pad_mask": Leaf(chunk, np.dtype(bool)),
            **points,
            **texts,
            "action_head_mask": {head: Leaf((), np.dtype(bool)) for head in self.heads},
            "dataset_id": Leaf((), np.dtype(np.int32)),
            "sample_id": Leaf((), np.dtype(np.int64)),
        }


def _check_sensor(name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for another observation whose name the schema has already, or without a shape."""
    taken = name in RESERVED or name.startswith(("image_", "depth_")) or name.endswith("pad_mask") or "/" in name
    if taken or not name:
        raise ValueError(
            f"extra_observations: {name!r} cannot be the name of a sensor: {', '.join(RESERVED)}, image_..., depth_... "
            "and ..._pad_mask are the schema's own"
        )
    if not all(isinstance(size, int) and size > 0 for size in shape) or not shape:
        raise ValueError(f"extra_observations.{name} is {shape}; expected the shape of one step's values, e.g. (6,)")


def flatten(tree: Mapping[str, Any], prefix: str = "", sep: str = "/") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b/c", leaf) of a nested mapping, in insertion order."""
    for key, value in tree.items():
        path = f"{prefix}{sep}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, path, sep)
        else:
            yield path, value


def unflatten(items: Mapping[str, Any], sep: str = "/") -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, value in items.items():
        *parents, last = path.split(sep)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


SYNTHETIC_VOCAB = 100


def synthetic_batch(spec: BatchSpec, batch_size: int, seed: int = 0, *, language_vocab: int = SYNTHETIC_VOCAB) -> Tree:
    """A random but valid batch of the given spec: the same seed gives the same batch. Needs no data, no TensorFlow."""
    rng = np.random.default_rng([seed, 0x0C70])

    def fill(path: str, leaf: Leaf) -> np.ndarray:
        shape = (batch_size, *leaf.shape)
        name = path.rsplit("/", 1)[-1]
        if leaf.dtype == bool:
            return np.ones(shape, bool)
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, shape, np.uint8)
        if name == "attention_mask":
            lengths = rng.integers(1, leaf.shape[-1] + 1, (batch_size, 1))
            return (np.arange(leaf.shape[-1])[None] < lengths).astype(np.int32)
        if name == "input_ids":
            # What is to be said has a vocabulary of its own, of at least so many.
            vocab = language_vocab if path.startswith("task/") else min(language_vocab, SYNTHETIC_VOCAB)
            return rng.integers(2, vocab, shape, np.int32)
        if path.startswith("action_tokens/"):
            return np.zeros(shape, np.int32)
        if name == "text_target_kind":
            return np.ones(shape, np.int32)
        if name == "sample_id":
            return np.arange(batch_size, dtype=np.int64) + seed * batch_size
        if name == "dataset_id":
            return np.zeros(shape, np.int32)
        if name == "timestep":
            return np.broadcast_to(
                np.arange(shape[-1], dtype=np.int32) if len(shape) > 1 else np.int32(50), shape
            ).copy()
        if name.startswith("depth_"):
            return rng.uniform(0.3, 3.0, shape).astype(leaf.dtype)  # metres
        return rng.normal(size=shape).astype(leaf.dtype)

    return unflatten({path: fill(path, leaf) for path, leaf in flatten(spec.batch())})


def check_tree(tree: Mapping[str, Any], expected: Mapping[str, Any], *, where: str = "batch") -> None:
    """Compares a nested dict of arrays with a tree of `Leaf`.

    Raises:
      ValueError: a named list of every wrong shape or dtype, missing key and extra key.
    """
    got, want = dict(flatten(tree)), dict(flatten(expected))
    problems = []
    for path, leaf in want.items():
        if path not in got:
            continue
        shape, dtype = tuple(np.shape(got[path])), np.dtype(got[path].dtype)
        # int64 ids become int32 on devices without 64-bit integers.
        same_dtype = dtype == leaf.dtype or (leaf.dtype.kind == dtype.kind == "i")
        if shape[1:] != leaf.shape or len(shape) != 1 + len(leaf.shape) or not same_dtype:
            problems.append(f"{path}: expected {leaf.describe()}, got ({', '.join(map(str, shape))}) {dtype}")
    missing, extra = [p for p in want if p not in got], [p for p in got if p not in want]
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if extra:
        problems.append(f"extra: {', '.join(extra)}")
    if problems:
        raise ValueError(f"{where} does not match its spec:\n  " + "\n  ".join(problems))


def check_batch(batch: Mapping[str, Any], spec: BatchSpec) -> None:
    """Checks a whole training batch against its spec. Raises ValueError with a named diff."""
    check_tree(batch, spec.batch())
