"""One geometry for training's pictures and a robot's: what openpi's clients letterbox is undone, or trained on."""

import functools
import io
import logging

import numpy as np
import pytest
from PIL import Image

from octo_like.common.geometry import RESIZES, placement
from octo_like.common.schema import BatchSpec
from octo_like.data.batches import frames
from octo_like.data.episode import EncodedFrame
from octo_like.robot.client import PolicyClient, PolicyServerError
from octo_like.robot.images import resize_image
from octo_like.robot.local import LocalPolicy
from octo_like.robot.openpi import Bars, Keys, OpenpiPolicy, OpenpiServer
from octo_like.robot.rollout import _PolicyView
from octo_like.robot.server import PolicyServer
from tests.robot.test_images import scene
from tests.robot.test_openpi import Wire
from tests.robot.toy import LineEnv, LinePolicy

pytest.importorskip("websockets")

CAMERAS = ((480, 640), (720, 1280), (640, 480), (256, 256), (376, 672), (96, 250))
POLICIES = ((224, 224), (256, 256), (96, 128))


def their_letterbox(image: np.ndarray, size: int = 224) -> np.ndarray:
    """What openpi's clients do with a picture before they send it: bilinear, at its aspect ratio, black beside it."""
    h, w = image.shape[:2]
    ratio = max(w / size, h / size)
    inner = Image.fromarray(image).resize((int(w / ratio), int(h / ratio)), Image.Resampling.BILINEAR)
    whole = Image.new("RGB", (size, size), 0)
    whole.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return np.asarray(whole)


@functools.cache
def camera(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A picture of that size without a black pixel."""
    picture = np.asarray(Image.fromarray(scene(seed)).resize(size[::-1], Image.Resampling.BICUBIC)).clip(1)
    picture.setflags(write=False)
    return picture


def trained(image: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """The picture in training's batches."""
    return frames.resize_frames(image[None], size, "parity", resize)[0]


class Seeing(LinePolicy):
    """Keeps the pictures that it was given."""

    def __init__(self, size: tuple[int, int], resize: str):
        super().__init__(window=1)
        self.batch_spec = BatchSpec(
            window_size=1,
            action_horizon=3,
            action_dim=1,
            image_sizes={"primary": size},
            proprio_dim=1,
            language_length=4,
            resize=resize,
        )

    def sample_actions(self, observations, tasks, *, rng, unnormalize):
        self.seen = np.asarray(observations["image_primary"])[0, -1]
        return np.zeros((len(rng), 3, 1), np.float32)


@pytest.mark.parametrize("raw", CAMERAS)
@pytest.mark.parametrize("size", POLICIES)
def test_the_parts_of_each_geometry(raw, size):
    whole, out = (0, 0, *raw), (0, 0, *size)
    assert placement("stretch", raw, size) == (whole, out)
    source, target = placement("letterbox", raw, size)
    assert source == whole and target.height <= size[0] and target.width <= size[1]
    assert abs(target.height * raw[1] / (target.width * raw[0]) - 1) < 0.02
    assert 0 <= size[0] - target.height - 2 * target.top <= 1 and 0 <= size[1] - target.width - 2 * target.left <= 1
    assert target.height >= size[0] - 1 or target.width >= size[1] - 1
    source, target = placement("crop", raw, size)
    assert target == out and abs(source.height * size[1] / (source.width * size[0]) - 1) < 0.02
    assert source.height == raw[0] or source.width == raw[1]
    assert 0 <= raw[0] - source.height - 2 * source.top <= 1 and 0 <= raw[1] - source.width - 2 * source.left <= 1
    for resize in RESIZES:
        assert placement(resize, size, size) == (out, out)


def test_letterboxed_pictures_are_those_of_openpis_clients():
    """The same pixels are black, and what is between them differs by the filter alone."""
    for raw in CAMERAS:
        image = camera(raw)
        theirs, ours = their_letterbox(image).astype(int), trained(image, (224, 224), "letterbox")
        np.testing.assert_array_equal(theirs.any((1, 2)), ours.any((1, 2)))
        np.testing.assert_array_equal(theirs.any((0, 2)), ours.any((0, 2)))
        assert np.abs(theirs - ours).mean() < 2


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("raw", CAMERAS)
def test_a_robot_resizes_as_training_does(raw, resize):
    image = camera(raw)
    for size in POLICIES:
        levels = np.abs(trained(image, size, resize).astype(int) - resize_image(image, size, resize=resize))
        assert levels.mean() < 0.4, (size, levels.mean())
    both = resize_image(np.stack([image, image[::-1]])[None], POLICIES[0], resize=resize)
    np.testing.assert_array_equal(both[0, 1], resize_image(image[::-1], POLICIES[0], resize=resize))


@pytest.mark.parametrize("resize", RESIZES)
def test_a_jpeg_lies_where_its_pixels_do_in_both_modes(resize):
    """A reduced JPEG has a rounded size; its place in the result follows from the size that was stored."""
    for raw in ((479, 641), (481, 639), (700, 1301)):
        buffer = io.BytesIO()
        Image.fromarray(camera(raw)).save(buffer, "JPEG", quality=95)
        frame = EncodedFrame(buffer.getvalue())
        parity = frames.decode_frames([frame], (112, 100), "parity", resize)[0].astype(int)
        fast = frames.decode_frames([frame], (112, 100), "fast", resize)[0]
        np.testing.assert_array_equal(parity.any((1, 2)), fast.any((1, 2)))
        np.testing.assert_array_equal(parity.any((0, 2)), fast.any((0, 2)))
        assert np.abs(parity - fast).mean() < 4


def test_depth_lies_where_the_picture_does():
    depth = np.arange(1, 48 * 64 + 1, dtype=np.uint16).reshape(48, 64)
    stretch, letterbox, crop = (frames.resize_depth(depth, (32, 32), None, resize)[..., 0] for resize in RESIZES)
    assert not letterbox[:4].any() and not letterbox[-4:].any()  # no reading where the picture is black
    np.testing.assert_array_equal(letterbox[4:-4], frames.resize_depth(depth, (24, 32), None)[..., 0])
    np.testing.assert_array_equal(crop, frames.resize_depth(depth[:, 8:-8], (32, 32), None)[..., 0])
    np.testing.assert_array_equal(stretch, frames.resize_depth(depth, (32, 32), None)[..., 0])


@pytest.mark.parametrize("resize", RESIZES)
def test_every_way_to_the_policy_shows_it_the_picture_of_training(resize):
    """One frame of a camera of 480x640, over openpi's wire, ours, in process and in rollouts: training's."""
    image, size = camera((480, 640)), (224, 224)
    want = trained(image, size, resize).astype(int)
    policy = Seeing(size, resize)
    state = np.zeros(1, np.float32)
    with OpenpiServer(policy, Keys({"cam": "primary"}, ("q",)), unnormalize="line", port=0).running() as server:
        Wire(server).infer({"cam": their_letterbox(image), "q": state, "prompt": "go left"})
    levels = np.abs(policy.seen - want)
    print(f"{resize}: openpi's client, letterboxed to 224x224: mean {levels.mean():.2f} levels of 255")
    assert levels.mean() < 2
    observation = {"image_primary": image, "proprio": state}
    with (
        PolicyServer(policy, unnormalize="line", port=0).running() as server,
        PolicyClient(port=server.port, limits=False) as client,
    ):
        client.act(observation, "go left")
        assert np.abs(policy.seen - want).mean() < 0.4
        request = {"type": "act", "observation": client.window, "instruction": "go", "step": 0}
        if resize == "stretch":
            client._request(request)  # older clients do not say how they resize: they stretch
        else:
            with pytest.raises(PolicyServerError, match=f"resized by '{resize}'.*not 'stretch': use a newer client"):
                client._request(request)
    local = LocalPolicy(policy, "line")
    local.observe(observation)
    assert np.abs(local.window["image_primary"][-1] - want).mean() < 0.4
    view = _PolicyView(LineEnv(), policy.batch_spec)
    assert np.abs(view.observation(observation)["image_primary"] - want).mean() < 0.4


def test_a_servers_picture_of_other_sizes_than_the_clients():
    for raw in CAMERAS:
        for size in POLICIES:
            for resize in RESIZES:
                image = camera(raw)
                cut = Bars("primary").cut(their_letterbox(image))
                levels = np.abs(resize_image(cut, size, resize=resize).astype(int) - trained(image, size, resize))
                assert levels.mean() < 4, (raw, size, resize, levels.mean())


def test_bars_are_cut_where_they_are_and_nowhere_else(caplog):
    caplog.set_level(logging.INFO)
    bars = Bars("primary")
    first, second = (their_letterbox(camera((480, 640), seed)) for seed in range(2))
    assert bars.cut(first).shape == (168, 224, 3) and bars.cut(np.zeros_like(first)).shape == (168, 224, 3)
    assert "primary: pictures of 224x224 have black bars, and are cut to the 168x224" in caplog.text
    caplog.clear()
    assert bars.cut(second).shape == (168, 224, 3) and not caplog.records
    square = their_letterbox(camera((256, 256)))
    assert bars.cut(square).shape == (224, 224, 3)  # what was black is a part of the picture after all
    assert "not cut any more" in caplog.text
    assert bars.cut(first).shape == (224, 224, 3)
    tall = Bars("wrist")
    assert tall.cut(their_letterbox(camera((640, 480)))).shape == (224, 168, 3)


def test_a_dark_picture_is_corrected_by_the_next_ones(caplog):
    dark = camera((480, 640)).copy()
    dark[-60:] = 0  # a strip of the picture itself
    assert Bars("primary").cut(their_letterbox(dark)).shape == (168, 224, 3)
    lit = camera((480, 640)).copy()
    lit[:60], lit[-60:] = 0, 0  # as if the camera were wider
    bars = Bars("primary")
    assert bars.cut(their_letterbox(lit)).shape[0] < 168
    assert bars.cut(their_letterbox(camera((480, 640)))).shape == (168, 224, 3)
    assert "168x224 between them" in caplog.text
    # A black world with something small in it has no bars, and is no reason to guess: it says so.
    caplog.clear()
    world = np.zeros((224, 224, 3), np.uint8)
    world[90:120, 60:200] = 200
    assert Bars("primary").cut(world).shape == (224, 224, 3)
    assert "not where openpi's clients put bars" in caplog.text


def test_our_rollouts_send_openpis_servers_letterboxed_pictures():
    """As their own clients do: their models were trained so."""
    policy = Seeing((224, 224), "letterbox")
    with OpenpiServer(policy, Keys({"cam": "primary"}, ("q",)), unnormalize="line", port=0).running() as server:
        theirs = OpenpiPolicy(
            f"127.0.0.1:{server.port}", Keys({"cam": "primary"}, ("q",)), action_horizon=3, action_dim=1, proprio_dim=1
        )
        view = _PolicyView(LineEnv(), theirs.batch_spec)
        sent = view.observation({"image_primary": camera((480, 640)), "proprio": np.zeros(1, np.float32)})
        theirs.close()
    np.testing.assert_array_equal(sent["image_primary"].any((1, 2)), their_letterbox(camera((480, 640))).any((1, 2)))


def test_a_geometry_that_is_none_is_an_error():
    spec = dict(window_size=1, action_horizon=1, action_dim=1, image_sizes={})
    with pytest.raises(ValueError, match="resize 'strech'; did you mean 'stretch'"):
        BatchSpec(**spec, resize="strech")
    for call in (
        lambda: resize_image(camera((48, 64)), (32, 32), resize="pad"),
        lambda: placement("pad", (1, 1), (1, 1)),
    ):
        with pytest.raises(ValueError, match="valid: crop, letterbox, stretch"):
            call()
    with pytest.raises(ValueError, match="has no pixels"):
        resize_image(np.zeros((0, 64, 3), np.uint8), (32, 32))
    # The default is not written: specs, batches and exports from before are as they were.
    assert "resize" not in BatchSpec(**spec).to_json()
    assert BatchSpec.from_json(BatchSpec(**spec, resize="crop").to_json()).resize == "crop"
