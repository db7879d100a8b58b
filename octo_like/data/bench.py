"""What `scripts/bench_input.py` measures with: made-up datasets, decode floors, a simulated shuffle buffer, memory."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from octo_like.data.batches import frames
from octo_like.data.batches.memory import resident_bytes
from octo_like.data.episode import encoded_size
from octo_like.data.order.order import Order
from octo_like.data.tf import tf

# ---------------------------------------------------------------- datasets


def picture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8 with soft shapes, edges and sensor noise: as a JPEG, about as large as a camera's."""
    from PIL import Image

    def noise(rows: int, columns: int) -> np.ndarray:
        small = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), np.uint8))
        return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)

    image = 0.75 * noise(8, 8) + 0.25 * noise(height // 8, width // 8)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + height // 6, left : left + width // 6] += rng.uniform(-60, 60, 3)
    image += rng.normal(0, 3, (height, width, 1))
    return image.clip(0, 255).astype(np.uint8)


def make_datasets(
    data_dir: str, count: int, *, size: tuple[int, int] = (256, 256), episodes: int = 16, steps: int = 50, seed: int = 0
) -> list[str]:
    """Writes RLDS datasets `bench_{height}x{width}_{i}` with two JPEG cameras, state, 7 actions and an instruction.

    Dataset i has `episodes` (i + 1) episodes of `steps` / 2 to 3 `steps` / 2 steps. Frames are drawn from 64 pictures
    per camera, encoded once: to a decoder they are all different work. Returns the names; finished ones are kept.
    """
    import tensorflow_datasets as tfds
    from etils import epath
    from PIL import Image

    step = tfds.features.FeaturesDict(
        {
            "observation": {
                "image": tfds.features.Image(shape=(*size, 3), encoding_format="jpeg"),
                "wrist_image": tfds.features.Image(shape=(*size, 3), encoding_format="jpeg"),
                "state": tfds.features.Tensor(shape=(8,), dtype=np.float32),
            },
            "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
            "language_instruction": tfds.features.Text(),
            **{f"is_{what}": tfds.features.Scalar(dtype=np.bool_) for what in ("first", "last", "terminal")},
        }
    )

    def encoded(rng: np.random.Generator) -> list[bytes]:
        result = []
        for _ in range(64):
            buffer = io.BytesIO()
            Image.fromarray(picture(*size, rng)).save(buffer, "jpeg", quality=92)
            result.append(buffer.getvalue())
        return result

    # TFDS brings no types: mypy looks for the argument in `object.__init_subclass__`.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        code_path = epath.Path(__file__)
        VERSION = tfds.core.Version("1.0.0")
        number = 0

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            rng = np.random.default_rng([seed, self.number])
            cameras = [encoded(rng), encoded(rng)]
            for episode in range(episodes * (self.number + 1)):
                length = int(rng.integers(steps // 2, 3 * steps // 2 + 1))
                yield episode, {"steps": [self._step(rng, cameras, t, length) for t in range(length)]}

        def _step(self, rng, cameras, t, length):
            first, second = (io.BytesIO(camera[rng.integers(64)]) for camera in cameras)
            return {
                "observation": {
                    "image": first,
                    "wrist_image": second,
                    "state": rng.normal(size=8).astype(np.float32),
                },
                "action": rng.normal(size=7).astype(np.float32),
                "language_instruction": f"put block {self.number} into bin {length}",
                "is_first": t == 0,
                "is_last": t == length - 1,
                "is_terminal": t == length - 1,
            }

    names = []
    tfds.disable_progress_bar()
    for number in range(count):
        Builder.name = f"bench_{size[0]}x{size[1]}_{number}"
        Builder.number = number
        config = tfds.download.DownloadConfig(
            num_shards=min(4, episodes), compute_stats=tfds.download.ComputeStatsMode.SKIP
        )
        Builder(data_dir=data_dir).download_and_prepare(download_config=config)
        names.append(Builder.name)
    return names


def bench_fields(name: str) -> dict[str, Any]:
    """Fields of the DatasetSpec that reads what `make_datasets` wrote."""
    return {
        "name": name,
        "image_keys": {"primary": "image", "wrist": "wrist_image"},
        "proprio_keys": ("state",),
        "weight": 1.0 + int(name.rsplit("_", 1)[1]),
    }


# ---------------------------------------------------------------- floors


class Decodes:
    """Counts the frames that batches decode, and keeps the first of them with the sizes they are decoded to."""

    def __init__(self, keep: int):
        self.count = 0
        self.kept: list[tuple[bytes, tuple[int, int]]] = []
        self._keep, self._lock = keep, threading.Lock()

    @contextlib.contextmanager
    def watching(self) -> Iterator["Decodes"]:
        """Watches every stream of this process."""
        original = frames.decode_frame

        def watched(contents, size, *args):
            with self._lock:
                self.count += 1
                if len(self.kept) < self._keep:
                    self.kept.append((bytes(contents), tuple(size)))
            return original(contents, size, *args)

        frames.decode_frame = watched
        try:
            yield self
        finally:
            frames.decode_frame = original


def floor(kept: Sequence[tuple[bytes, tuple[int, int]]], kind: str, mode: str, threads: int) -> Callable[[], int]:
    """A function that decodes all of `kept` once in a bare tf.data loop and returns how many it decoded.

    The loop is `from_tensor_slices(frames).map(decode, num_parallel_calls=threads)` on a private pool of `threads`
    threads. Each element is one number of its frame, so no pixel is copied, batched or handed to Python.

    Args:
      kind: "plain", full decoding (DecodeImage), no resizing; "own", the decode operations of `mode` (reduced JPEG
        decoding in fast mode), no resizing; "resized", those and `tf.image.resize` with the mode's antialiased kernel
        to the size that the batch wants (what a tf.data pipeline with the same result has to do).
    """
    groups: dict[tuple, list[bytes]] = {}
    for frame, size in kept:
        raw = encoded_size(frame)
        reduced = mode == "fast" and kind != "plain" and frame[:2] == b"\xff\xd8"
        ratio = frames.reduction(raw, size) if reduced else 1
        scaled = raw is None or tuple(-(-side // ratio) for side in raw) != size
        groups.setdefault((ratio, size if kind == "resized" and scaled else None), []).append(frame)

    def decoder(ratio: int, size: tuple[int, int] | None) -> Callable[[tf.Tensor], tf.Tensor]:
        def decode(contents: tf.Tensor) -> tf.Tensor:
            if ratio == 1:
                image = tf.raw_ops.DecodeImage(contents=contents, channels=3, dtype=tf.uint8, expand_animations=False)
            else:
                image = tf.io.decode_jpeg(contents, channels=3, ratio=ratio)
            if size is not None:
                method = {"lanczos3": "lanczos3", "triangle": "bilinear"}[frames.KERNELS[mode]]
                image = tf.image.resize(tf.ensure_shape(image, [None, None, 3]), size, method=method, antialias=True)
                image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
            return image[0, 0, 0]

        return decode

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    loops = [
        tf.data.Dataset.from_tensor_slices(contents)
        .map(decoder(*key), num_parallel_calls=threads)
        .batch(len(contents))
        .with_options(options)
        for key, contents in groups.items()
    ]

    def run() -> int:
        for loop in loops:
            for _ in loop:
                pass
        return len(kept)

    return run


# ---------------------------------------------------------------- mixing


def distinct_in_order(order: Order, window: int = 1000, windows: int = 20, start: int = 0) -> float:
    """Mean number of distinct episodes among `window` consecutive samples, over `windows` of them from `start` on."""
    samples = order.samples(start + np.arange(window * windows))
    identity = samples.dataset.astype(np.int64) << 40 | samples.episode
    return float(np.mean([len(np.unique(part)) for part in identity.reshape(windows, window)]))


def frames_held(order: Order, start: int = 0, batches: int = 20) -> int:
    """Frames of the episodes that the stream holds because it is in the midst of them, on average over some batches."""
    first = start // order.batch_size
    pairs = [pair for batch in range(first, first + batches) for pair in order.live(batch)]
    return round(sum(int(order.datasets[d].frames[e]) for d, e in pairs) / batches)


def distinct_in_buffer(
    order: Order, size: int, window: int = 1000, windows: int = 20, start: int = 0, seed: int = 0
) -> float:
    """The same for a shuffle buffer of `size` frames over interleaved trajectories, simulated.

    Each dataset's episodes come in random order, again and again, their frames in turn; frames of datasets are mixed
    by weight and go through one buffer that gives a random frame and takes the next: `sample_from_datasets` and
    `shuffle(size)`. Counted from sample `start` on, 0 being the first that a full buffer gives.
    """
    rng = np.random.default_rng(seed)
    total = size + start + window * windows
    drawn = rng.choice(len(order.datasets), total, p=order.mixture.weights)
    identity = np.empty(total, np.int64)
    for d, data in enumerate(order.datasets):
        rows = np.flatnonzero(drawn == d)
        parts, have = [], 0
        while have < len(rows):
            parts.append(rng.permutation(len(data.frames)))
            have += int(np.sum(data.frames))
        episodes = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
        identity[rows] = d << 40 | np.repeat(episodes, np.asarray(data.frames)[episodes])[: len(rows)]
    buffer, out = identity[:size].copy(), np.empty(start + window * windows, np.int64)
    for i, place in enumerate(rng.integers(0, size, len(out))):
        out[i], buffer[place] = buffer[place], identity[size + i]
    return float(np.mean([len(np.unique(part)) for part in out[start:].reshape(windows, window)]))


# ---------------------------------------------------------------- memory


class PeakMemory:
    """Samples the resident memory ten times a second while it is open."""

    def __init__(self):
        self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, resident_bytes())

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())


def timed(work: Callable[[], int], seconds: float) -> tuple[int, float]:
    """Repeats `work` for about `seconds`: (what its results sum to, seconds taken)."""
    total, start = 0, time.perf_counter()
    while True:
        total += work()
        taken = time.perf_counter() - start
        if taken >= seconds:
            return total, taken
