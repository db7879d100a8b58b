"""Recordings of every format become the RLDS dataset they should: numbers exactly, frames at their times."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("av")

from octo_like.common.schema import BatchSpec, check_batch  # noqa: E402
from octo_like.common.text import TextTokenizer  # noqa: E402
from octo_like.data.convert import video  # noqa: E402
from octo_like.data.convert.hdf5 import Hdf5  # noqa: E402
from octo_like.data.convert.lerobot import LeRobot  # noqa: E402
from octo_like.data.convert.npz import Npz  # noqa: E402
from octo_like.data.convert.write import Options, write_rlds  # noqa: E402
from octo_like.data.spec import DataError  # noqa: E402
from tests.data import recordings  # noqa: E402
from tests.data.streams import make_train_stream  # noqa: E402


@pytest.fixture(scope="module")
def demos():
    return recordings.make_demos()


@pytest.fixture(scope="module")
def sources(demos, tmp_path_factory):
    """{format: (function that opens it, names of cameras and state, largest mean error of a frame)}."""
    root = tmp_path_factory.mktemp("recordings")
    v3, v3_images, v21 = root / "v3", root / "v3_images", root / "v21"
    recordings.write_v3(v3, demos)
    recordings.write_v3(v3_images, demos, images=True)
    recordings.write_v21(v21, demos)
    aloha = recordings.write_aloha(root / "aloha", demos)
    jpeg = recordings.write_aloha(root / "jpeg", demos, compressed=True)
    robomimic = recordings.write_robomimic(root / "low.hdf5", demos)
    npz = recordings.write_npz(root / "npz", demos)
    both, images = {"front": "front", "hand": "hand"}, {"front": "front_image", "hand": "hand_image"}
    return {
        "v3": (lambda: LeRobot(v3), both, "state", 3.0),
        "v3_images": (lambda: LeRobot(v3_images), both, "state", 0.0),
        "v21": (lambda: LeRobot(v21), both, "state", 3.0),
        "aloha": (lambda: Hdf5(aloha), both, "qpos", 0.0),
        "jpeg": (lambda: Hdf5(jpeg), images, "qpos", 2.0),
        "robomimic": (
            lambda: Hdf5(robomimic, instruction="lift"),
            {"front": "agentview_image"},
            "robot0_joint_pos",
            0.0,
        ),
        "npz": (lambda: Npz(npz), both, "state", 0.0),
    }


def read_back(directory):
    """Episodes of a dataset as TFDS itself reads them: lists of steps, decoded."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    episodes = list(builder.as_dataset(split="train"))
    return builder, [[tfds.as_numpy(step) for step in episode["steps"]] for episode in episodes]


@pytest.mark.parametrize("format", ["v3", "v3_images", "v21", "aloha", "jpeg", "robomimic", "npz"])
def test_what_was_recorded_is_what_is_read(sources, demos, tmp_path, format):
    make, cameras, state, tolerance = sources[format]
    encoding = "jpeg" if format == "jpeg" else "png"
    written = write_rlds(make(), str(tmp_path), "mine", options=Options(encoding=encoding))
    assert (written.episodes, written.steps) == (3, 27) and set(written.cameras) == set(cameras.values())
    builder, episodes = read_back(written.directory)
    assert builder.info.splits["train"].num_examples == 3
    for demo, steps in zip(demos, episodes, strict=True):
        assert len(steps) == len(demo["action"])
        np.testing.assert_array_equal([step["action"] for step in steps], demo["action"])
        np.testing.assert_array_equal([step["observation"][state] for step in steps], demo["state"])
        text = "lift" if format == "robomimic" else demo["text"]
        assert {step["language_instruction"].decode() for step in steps} == {text}
        assert [step["is_first"] for step in steps] == [True] + [False] * (len(steps) - 1)
        assert [step["is_last"] for step in steps] == [False] * (len(steps) - 1) + [True]
        for key, name in cameras.items():
            frames = np.stack([step["observation"][name] for step in steps]).astype(int)
            # Each step's colours differ by more than the codec's error: a frame of another step would not pass.
            assert np.abs(frames - demo[key]).mean((1, 2, 3)).max() <= tolerance
            if len(steps) > 1 and tolerance:
                assert np.abs(frames[1:] - demo[key][:-1]).mean((1, 2, 3)).min() > tolerance
    if format in ("v3", "v3_images", "v21"):
        np.testing.assert_allclose([s["timestamp"] for s in episodes[0]], np.arange(9) / recordings.HZ, atol=1e-6)
        assert builder.info.metadata["control_hz"] == recordings.HZ
        assert builder.info.metadata["names"]["action"] == list(recordings.NAMES)
    if format == "robomimic":
        assert builder.info.metadata["control_hz"] == 20
        assert [step["reward"] for step in episodes[1]] == list(range(6))


def test_the_stream_reads_it(sources, tmp_path):
    write_rlds(sources["v3"][0](), str(tmp_path), "mine")
    spec = BatchSpec(2, 4, 3, {"primary": (32, 32), "wrist": (16, 16)}, (), 3, 16)
    fields = dict(image_keys=dict(primary="front", wrist="hand"), proprio_keys=("state",), val_fraction=0.3)
    options = dict(data_dir=str(tmp_path), seed=0, batch_size=4)
    with make_train_stream({"mine": fields}, spec, TextTokenizer.load(), **options) as stream:
        check_batch(next(stream), spec)
        assert set(stream.datasets["mine"].instructions) == set(recordings.TEXTS)


@pytest.mark.parametrize(
    "lacking,said", [(0, r"episode_1.npz: a camera 'hand', which .* has not"), (1, r"episode_1.npz: no camera 'hand'")]
)
def test_missing_cameras(demos, tmp_path, lacking, said):
    """An error that names the episode; or empty frames, which the stream marks as missing. Of any episode, also of the
    first, from which a sequential writer would take the dataset's cameras."""
    partly = [{k: v for k, v in demo.items() if k != "hand" or n != lacking} for n, demo in enumerate(demos)]
    root = recordings.write_npz(tmp_path / "raw", partly)
    with pytest.raises(DataError, match=rf"{said}.*--missing_cameras mask"):
        write_rlds(Npz(str(root)), str(tmp_path / "data"), "mine")
    mask = Options(missing_cameras="mask", bgr=("hand",))
    written = write_rlds(Npz(str(root)), str(tmp_path / "data"), "mine", options=mask)
    assert set(written.cameras) == {"front", "hand"}
    spec = BatchSpec(1, 2, 3, {"primary": (32, 32), "wrist": (16, 16)}, (), None, 16)
    fields = dict(image_keys=dict(primary="front", wrist="hand"), val_fraction=0)
    options = dict(data_dir=str(tmp_path / "data"), seed=0, batch_size=27)
    with make_train_stream({"mine": fields}, spec, TextTokenizer.load(), **options) as stream:
        batch = next(stream)
    present = batch["observation"]["pad_mask_dict"]["image_wrist"][:, 0]
    assert (~present).sum() == len(demos[lacking]["action"])  # one pass: every step of that episode, and no other
    assert not batch["observation"]["image_wrist"][~present].any()
    assert batch["observation"]["image_wrist"][present].reshape(present.sum(), -1).any(1).all()
    assert batch["observation"]["pad_mask_dict"]["image_primary"].all()


def _with(demo, **changes):
    return {**demo, **changes}


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda d: dict(action=np.zeros((6, 5), np.float32)),
            "actions have 5 dimensions, in the first episode .* 3: one",
        ),
        (lambda d: dict(action=np.zeros((0, 3), np.float32)), "the episode has no steps"),
        (lambda d: dict(state=d["state"][:-1]), "6 actions, but 5 of 'state'"),
        (lambda d: dict(front=d["front"][:-2]), "6 actions, but 4 of 'front'"),
        (lambda d: dict(state=np.full((6, 3), np.nan)), "'state' is nan at step 0, dimension 0"),
        (lambda d: dict(state=np.zeros((6, 2))), "'state' has 2 dimensions, in the first episode .* 3 dimensions"),
        (lambda d: dict(extra=np.zeros((6, 2))), "'extra' has 2 dimensions, in the first episode .* nothing"),
        (lambda d: dict(top=d["front"]), "a camera 'top', which the first episode .* has not"),
        (lambda d: dict(timestamp=np.zeros(6)), "'timestamp' does not increase"),
        (lambda d: dict(text=np.array(["a", "b"])), "6 actions, but 2 of 'instruction'"),
    ],
)
def test_bad_recordings_are_named_and_leave_nothing(demos, tmp_path, change, message):
    root = recordings.write_npz(tmp_path / "raw", [demos[0], _with(demos[1], **change(demos[1])), demos[2]])
    with pytest.raises(DataError, match=f"episode_1.npz: .*{message}|episode_1.npz: {message}"):
        write_rlds(Npz(str(root)), str(tmp_path / "data"), "mine")
    assert not (tmp_path / "data" / "mine").exists()
    written = write_rlds(Npz(str(root)), str(tmp_path / "data"), "mine", options=Options(skip_broken=True))
    assert written.episodes == 2 and len(written.broken) == 1 and "episode_1.npz" in written.broken[0]
    assert len(read_back(written.directory)[1]) == 2


def test_frames_and_rows_must_agree(demos, tmp_path):
    """One frame too many or too few in a video, a frame at the wrong time: the episode and camera are named."""
    longer = [
        _with(demos[0]),
        _with(demos[1], front=np.concatenate([demos[1]["front"], demos[1]["front"][-1:]])),
        demos[2],
    ]
    root = recordings.write_v21(tmp_path / "longer", longer)
    with pytest.raises(
        DataError, match=r"episode 1, camera 'front': .*000001.mp4 has 7 frames, but the table has 6 rows"
    ):
        write_rlds(LeRobot(root), str(tmp_path), "mine")
    # v3: a frame is missing at the end of the file, so the last episode has one less.
    shorter = [*demos[:2], _with(demos[2], front=demos[2]["front"][:-1])]
    root = recordings.write_v3(tmp_path / "shorter", shorter)
    with pytest.raises(DataError, match=r"episode 2, camera 'front': .* has 11 frames from 1.5 s to 2.7 s, .* 12 rows"):
        write_rlds(LeRobot(root), str(tmp_path), "mine")
    path = str(tmp_path / "longer/videos/chunk-000/observation.images.front/episode_000000.mp4")
    times = np.arange(9) / recordings.HZ
    with pytest.raises(DataError, match=r"ep: .* has no frame at 0.34 s \(row 3\); the nearest is shown at 0.3 s"):
        video.frames_at(path, times + 0.04 * (np.arange(9) == 3), where="ep")
    assert len(list(video.frames_at(path, times))) == 9
    part = list(video.frames_at(path, times[4:7], start=0.4, end=0.7))
    whole = list(video.frames_at(path, times))
    np.testing.assert_array_equal(part, whole[4:7])  # sought from the middle, between key frames


def test_broken_lerobot_datasets(demos, tmp_path):
    root = recordings.write_v3(tmp_path / "whole", demos)

    def copy(name):
        return shutil.copytree(root, tmp_path / name)

    with pytest.raises(DataError, match="not a LeRobot dataset: no meta/info.json"):
        LeRobot(tmp_path)
    old = copy("old")
    (old / "meta/info.json").write_text((old / "meta/info.json").read_text().replace("v3.0", "v1.6"))
    with pytest.raises(DataError, match="codebase_version is 'v1.6'; valid: v2.0, v2.1, v3.0"):
        LeRobot(old)
    lost = copy("lost")
    shutil.rmtree(lost / "videos/observation.images.hand")
    with pytest.raises(DataError, match="file-000.mp4: the video file is missing"):
        write_rlds(LeRobot(lost), str(tmp_path), "mine")
    cut = copy("cut")
    path = cut / "videos/observation.images.hand/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match="file-000.mp4: cannot be read as a video"):
        write_rlds(LeRobot(cut), str(tmp_path), "mine")
    with pytest.raises(DataError, match="no actions 'actoin'; did you mean 'action'"):
        LeRobot(root, action_key="actoin")
    table = copy("table")
    (table / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="file-000.parquet: cannot be read as parquet"):
        write_rlds(LeRobot(table), str(tmp_path), "mine")
    assert not (tmp_path / "mine").exists()


def test_options(demos, tmp_path):
    root = recordings.write_npz(tmp_path / "raw", demos)
    options = Options(encoding="png", image_size=(24, 32), bgr=("front",))
    written = write_rlds(Npz(str(root)), str(tmp_path), "small", options=options)
    step = read_back(written.directory)[1][0][0]
    assert step["observation"]["front"].shape == (24, 32, 3) and step["observation"]["hand"].shape == (24, 32, 3)
    want = demos[0]["front"][0].reshape(24, 2, 32, 2, 3).mean((1, 3))[..., ::-1]
    assert np.abs(step["observation"]["front"].astype(int) - want)[2:-2, 2:-2].mean() < 2
    for arguments, message in (
        (dict(name="My Robot"), "a TFDS name is lower case"),
        (dict(options=Options(bgr=("frnt",))), "bgr: no camera 'frnt'; did you mean 'front'"),
    ):
        with pytest.raises(DataError, match=message):
            write_rlds(Npz(str(root)), str(tmp_path), **(dict(name="other") | arguments))
    with pytest.raises(DataError, match="version '1': expected three numbers"):
        Options(version="1")
    with pytest.raises(DataError, match="small/1.0.0 exists"):
        write_rlds(Npz(str(root)), str(tmp_path), "small")
    write_rlds(Npz(str(root)), str(tmp_path), "small", options=Options(overwrite=True))
    assert not list((tmp_path / "small").glob("incomplete*"))


def test_liberos_pictures_are_turned_as_its_rlds_and_openpis_client_have_them(demos, tmp_path):
    """The files hold what the simulator gives; the client turns that by 180 degrees before it sends it."""
    one = [{**demos[0], "front": demos[0]["front"][:, :, 8:56]}]  # its cameras are square
    source = Hdf5(recordings.write_libero(tmp_path / "task_demo.hdf5", one))
    assert source.turned == ("agentview_rgb",)

    def stored(name, turned):
        options = Options(encoding="png", turned=turned)
        written = write_rlds(source, str(tmp_path / "data"), name, options=options)
        return [step["observation"]["agentview_rgb"] for step in read_back(written.directory)[1][0]]

    for step, frame in enumerate(stored("as_rlds", None)):
        sent_by_openpis_client = one[0]["front"][step][::-1, ::-1]
        np.testing.assert_array_equal(frame, sent_by_openpis_client)
    np.testing.assert_array_equal(stored("as_stored", ()), one[0]["front"])
    with pytest.raises(DataError, match="turned: no camera 'agentview'; did you mean 'agentview_rgb'"):
        stored("wrong", ("agentview",))
    # Another program's files of the same layout are not LIBERO's; without its attributes a camera's name says so.
    assert Hdf5(recordings.write_robomimic(tmp_path / "lift.hdf5", demos), instruction="lift").turned == ()
    import h5py

    with h5py.File(tmp_path / "task_demo.hdf5", "a") as file:
        del file["data"].attrs["problem_info"]
    assert Hdf5(str(tmp_path / "task_demo.hdf5")).turned == ("agentview_rgb",)


def test_compressed_frames_are_turned_too(demos, tmp_path):
    aloha = recordings.write_aloha(tmp_path / "aloha", demos[:1], compressed=True)
    plain, turned = (
        read_back(write_rlds(Hdf5(aloha), str(tmp_path), name, options=Options(turned=cameras)).directory)[1][0][0]
        for name, cameras in (("plain", None), ("turned", ("front_image",)))
    )
    a, b = (step["observation"]["front_image"].astype(int) for step in (plain, turned))
    assert np.abs(a[::-1, ::-1] - b).mean() < 2
    np.testing.assert_array_equal(plain["observation"]["hand_image"], turned["observation"]["hand_image"])


def test_a_killed_conversion_leaves_no_dataset(demos, tmp_path):
    class Stops(Npz):
        def read(self, number):
            if number == 2:
                raise KeyboardInterrupt
            return super().read(number)

    root = recordings.write_npz(tmp_path / "raw", demos)
    with pytest.raises(KeyboardInterrupt):
        write_rlds(Stops(str(root)), str(tmp_path), "mine")
    assert not (tmp_path / "mine").exists()


def test_command_line(sources, demos, tmp_path, repository, monkeypatch, capsys):
    path = repository / "scripts" / "convert_demos.py"
    spec = importlib.util.spec_from_file_location("convert_demos", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_demos.py", *map(str, arguments)])
        return module.main()

    raw = recordings.write_npz(tmp_path / "Raw-Data", demos, note=np.float32(1))
    assert main(raw, "--from", "npz", "--to", tmp_path, "--control_hz", 10, "--image_size", 24, 32) == 0
    printed = capsys.readouterr().out
    assert "raw_data/1.0.0: 3 episodes, 27 steps" in printed and "not converted: note: a single value" in printed
    assert "cameras: front, hand" in printed and "action: 3 dimensions at 10 Hz" in printed
    from PIL import Image

    picture = Image.open(tmp_path / "raw_data_preview.png")
    assert picture.size[0] > 400 and picture.size[1] > 300
    episode = read_back(str(tmp_path / "raw_data/1.0.0"))[1][0]
    np.testing.assert_allclose([step["timestamp"] for step in episode], np.arange(9) / 10)
    for arguments, message in (
        ((tmp_path / "nowhere", "--from", "npz"), "nowhere does not exist"),
        ((raw, "--from", "hdf5"), "no HDF5 files"),
        ((raw, "--from", "lerobot"), "not a LeRobot dataset"),
        ((raw, "--from", "npz"), "exists"),
        ((raw, "--from", "npz", "--name", "x", "--action_key", "actoin"), "did you mean 'action'"),
    ):
        assert main(*arguments, "--to", tmp_path) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, error
