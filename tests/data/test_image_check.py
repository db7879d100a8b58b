"""Frames that training would take as they come out: found by the look that prepare_data takes with --check_images."""

import concurrent.futures
import json
import multiprocessing
import sys

import numpy as np
import pytest

from octo_like.data.batches.frames import decode_frames
from octo_like.data.check import images
from octo_like.data.tf import tf
from scripts import prepare_data


def entropy_start(jpeg: bytes) -> int:
    """The byte at which the compressed data of a JPEG with one scan begins."""
    scan = jpeg.index(b"\xff\xda")
    return scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")


def cut_inside(jpeg: bytes) -> bytes:
    """Without the second half of its compressed data, but with its end marker."""
    start = entropy_start(jpeg)
    return jpeg[: start + (len(jpeg) - start) // 2] + b"\xff\xd9"


def rewrite(path, change):
    """Writes a file anew; checksums are right."""
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number, record in enumerate(records):
            example = tf.train.Example.FromString(record)
            change(number, example.features.feature)
            writer.write(example.SerializeToString())


@pytest.fixture
def damaged(copied):
    """The toy with a JPEG cut inside, one that is none, a damaged PNG, and a missing frame, which is no fault."""
    path = sorted(copied.path.glob("*tfrecord*"))[1]

    def change(number, features):
        hand = features["steps/observation/hand_rgb"].bytes_list.value
        front = features["steps/observation/front_rgb"].bytes_list.value
        if number == 1:
            hand[2] = cut_inside(hand[2])
            decode_frames([hand[2]], (24, 24))  # nobody notices
            hand[0] = b""
        if number == 3:
            hand[1] = hand[1][:20] + b"garbage"
            front[0] = front[0][:60] + bytes([front[0][60] ^ 1]) + front[0][61:]

    rewrite(path, change)
    return copied, path


def test_what_the_script_lists(damaged, monkeypatch, capsys):
    toy, path = damaged
    fields = [f"{key}={json.dumps(value)}" for key, value in toy.fields().items() if key != "name"]
    options = ["--data_dir", toy.data_dir, toy.name, "--workers", "1", "--check_images", "--set", *fields]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *options])
    assert prepare_data.main() == 1
    printed = capsys.readouterr().out
    count = 2 * sum(map(len, toy.episodes)) - 1
    assert f"toy_buttons: 3 of {count} frames are damaged" in printed
    listed = [line.strip() for line in printed.splitlines() if line.startswith(f"  {path}")]
    found = dict(line.removeprefix(f"{path}: ").split(": ", 1) for line in listed)
    assert set(found) == {
        "episode 1, step 2, 'hand_rgb' (wrist)",
        "episode 3, step 1, 'hand_rgb' (wrist)",
        "episode 3, step 0, 'front_rgb' (primary)",
    }
    assert found["episode 1, step 2, 'hand_rgb' (wrist)"] == "Corrupt JPEG data: premature end of data segment"


def picture(rng):
    """Discs on noise, (128, 128, 3) uint8."""
    y, x = np.mgrid[:128, :128] / 128
    image = rng.normal(0, 6, (128, 128, 3))
    for cy, cx, radius in rng.random((12, 3)):
        image += (((y - cy) ** 2 + (x - cx) ** 2) < (0.05 + 0.2 * radius) ** 2)[..., None] * rng.random(3) * 120
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_how_much_of_it_is_found():
    """docs/data.md quotes these shares: what libjpeg says nothing about is not found."""
    rng = np.random.default_rng(0)
    frames = [tf.io.encode_jpeg(picture(rng), quality=(75, 95)[n % 2]).numpy() for n in range(100)]

    def changed(change):
        result = []
        for frame in frames:
            content = bytearray(frame)
            change(content, int(rng.integers(entropy_start(frame), len(frame) - 70)))
            result.append(bytes(content))
        return result

    def flip(content, at):
        content[at] ^= 1 << int(rng.integers(8))

    def zero(content, at):
        content[at : at + 16] = bytes(16)

    def garble(content, at):
        content[at : at + 64] = rng.bytes(64)

    kinds = [frames, *map(changed, (flip, zero, garble))]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=images._watch_errors) as pool:
        none, one_bit, zeros, garbled = [len(found) / 100 for found in pool.map(images._complaints, kinds)]
    assert none == 0
    print(f"found: one bit {one_bit:.0%}, 16 zeros {zeros:.0%}, 64 random bytes {garbled:.0%}")
    assert 0.15 < one_bit < 0.35 and 0.35 < zeros < 0.6 and 0.75 < garbled < 0.95, (one_bit, zeros, garbled)
