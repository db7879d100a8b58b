"""Demonstrations in other people's formats, written by the tests: LeRobot v3 and v2.1, ALOHA, robomimic, npz.

`make_demos` gives the episodes; every writer writes the same ones. test_convert_lerobot.py compares the LeRobot
files with those of the real package (slow).
"""

import json

import numpy as np

HZ = 10
TEXTS = ("pick up the red cube", "open the drawer")
NAMES = ("shoulder", "elbow", "gripper")


def make_demos(lengths=(9, 6, 12), seed=0, hands=True):
    """Episodes with smooth frames (codecs keep them), of which each one's colours tell episode and step."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:48, 0:64]
    demos = []
    for number, steps in enumerate(lengths):
        front = np.stack(
            [
                np.stack([x * 2 + 10 * number, y * 3 + 4 * t, np.full_like(x, 30 + 14 * t)], -1).clip(0, 255)
                for t in range(steps)
            ]
        ).astype(np.uint8)
        hand = np.stack(
            [np.full((32, 32, 3), (20 + 17 * t, 200 - 9 * t, 40 + 50 * number), np.uint8) for t in range(steps)]
        )
        action = rng.normal(size=(steps, 3)).astype(np.float32)
        demos.append(
            dict(
                front=front,
                **(dict(hand=hand) if hands else {}),
                state=np.cumsum(action, 0).astype(np.float32),
                action=action,
                text=TEXTS[number % 2],
            )
        )
    return demos


def _video(path, frames, codec="libx264"):
    """Frames at HZ, one key frame in three."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=HZ)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.options = {"g": "3", "crf": "4"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _info(demos, version, images, **more):
    cameras = [key for key in ("front", "hand") if key in demos[0]]
    features = {
        f"observation.images.{key}": dict(
            dtype="image" if images else "video",
            shape=list(demos[0][key].shape[1:]),
            names=["height", "width", "channels"],
        )
        for key in cameras
    }
    vector = dict(dtype="float32", shape=[3], names=list(NAMES))
    features |= {"observation.state": vector, "action": vector}
    features |= {key: dict(dtype="float32" if key == "timestamp" else "int64", shape=[1], names=None)
                 for key in ("timestamp", "frame_index", "episode_index", "index", "task_index")}  # fmt: skip
    total = sum(len(demo["action"]) for demo in demos)
    base = dict(codebase_version=version, robot_type="toy", total_episodes=len(demos), total_frames=total, fps=HZ)
    return base | dict(chunks_size=1000, splits={"train": f"0:{len(demos)}"}, features=features) | more, cameras


def _table(demos, first=0, images=()):
    import io

    import pyarrow as pa
    from PIL import Image

    lengths = [len(demo["action"]) for demo in demos]
    steps = np.concatenate([np.arange(n) for n in lengths])
    columns = {
        key: pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([d[name] for d in demos]).reshape(-1)), 3)
        for key, name in (("observation.state", "state"), ("action", "action"))
    }
    columns["timestamp"] = pa.array((steps / HZ).astype(np.float32))
    columns["frame_index"] = pa.array(steps)
    columns["episode_index"] = pa.array(np.repeat(np.arange(first, first + len(demos)), lengths))
    columns["index"] = pa.array(np.arange(len(steps)))
    columns["task_index"] = pa.array(np.repeat([TEXTS.index(demo["text"]) for demo in demos], lengths))
    for key in images:
        cells = []
        for frame in np.concatenate([demo[key] for demo in demos]):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        columns[f"observation.images.{key}"] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    return pa.table(columns)


def write_v3(root, demos, *, images=False):
    """LeRobot v3.0: one parquet file of all episodes (a row group each), one mp4 file per camera."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    info, cameras = _info(demos, "v3.0", images, data_path=data, video_path=None if images else video)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": list(TEXTS)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    tables = [_table([demo], n, cameras if images else ()) for n, demo in enumerate(demos)]
    with pq.ParquetWriter(root / "data/chunk-000/file-000.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    rows, start = [], 0
    for number, demo in enumerate(demos):
        steps = len(demo["action"])
        row = {"episode_index": number, "tasks": [demo["text"]], "length": steps}
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": start, "stats/action/max": [0.0]}
        for key in [] if images else cameras:
            place = f"videos/observation.images.{key}"
            row |= {f"{place}/chunk_index": 0, f"{place}/file_index": 0}
            row |= {f"{place}/from_timestamp": start / HZ, f"{place}/to_timestamp": (start + steps) / HZ}
        rows.append(row)
        start += steps
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    for key in [] if images else cameras:
        path = root / video.format(video_key=f"observation.images.{key}", chunk_index=0, file_index=0)
        _video(path, np.concatenate([demo[key] for demo in demos]))
    return root


def write_v21(root, demos):
    """LeRobot v2.1: a parquet and an mp4 file for each episode."""
    import pyarrow.parquet as pq

    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info, cameras = _info(demos, "v2.1", False, data_path=data, video_path=video)
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"task_index": i, "task": text}) for i, text in enumerate(TEXTS)]
    (root / "meta/tasks.jsonl").write_text("\n".join(lines) + "\n")
    lines = [
        json.dumps({"episode_index": n, "tasks": [d["text"]], "length": len(d["action"])}) for n, d in enumerate(demos)
    ]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    for n, demo in enumerate(demos):
        place = dict(episode_chunk=0, episode_index=n)
        pq.write_table(_table([demo], n), root / data.format(**place))
        for key in cameras:
            _video(root / video.format(video_key=f"observation.images.{key}", **place), demo[key])
    return root


def write_aloha(root, demos, *, compressed=False):
    """One HDF5 file per episode, as ALOHA's recorder does; optionally with padded JPEG frames."""
    import io

    import h5py
    from PIL import Image

    root.mkdir(parents=True)
    for n, demo in enumerate(demos):
        with h5py.File(root / f"episode_{n}.hdf5", "w") as file:
            file.attrs["sim"] = True
            file.attrs["instruction"] = demo["text"]
            file["action"] = demo["action"]
            file["observations/qpos"] = demo["state"]
            for key in ("front", "hand"):
                if key not in demo:
                    continue
                frames = demo[key]
                if compressed:
                    encoded = []
                    for frame in frames:
                        buffer = io.BytesIO()
                        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
                        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
                    longest = max(map(len, encoded)) + 7
                    frames = np.stack([np.pad(e, (0, longest - len(e))) for e in encoded])
                file[f"observations/images/{key if not compressed else key + '_image'}"] = frames
    return root


def write_robomimic(path, demos):
    """All episodes in one HDF5 file, as robomimic does."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": 20}})
        for n, demo in enumerate(demos):
            group = data.create_group(f"demo_{n}")
            group.attrs["num_samples"] = len(demo["action"])
            group["actions"] = demo["action"].astype(np.float64)
            group["rewards"] = np.arange(len(demo["action"]), dtype=np.float64)
            group["obs/agentview_image"] = demo["front"]
            group["obs/robot0_joint_pos"] = demo["state"].astype(np.float64)
            group["next_obs/agentview_image"] = demo["front"]
    return path


def write_libero(path, demos):
    """One file of all episodes with LIBERO's names, pictures as its simulator gives them."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["open the drawer"]})
        for number, demo in enumerate(demos):
            group = data.create_group(f"demo_{number}")
            group["actions"] = demo["action"]
            group["obs/agentview_rgb"] = demo["front"]
            group["obs/ee_states"] = demo["state"]
    return str(path)


def write_npz(root, demos, **changes):
    """A folder of one archive per episode."""
    root.mkdir(parents=True, exist_ok=True)
    for n, demo in enumerate(demos):
        arrays = {("instruction" if key == "text" else key): value for key, value in demo.items()}
        np.savez(root / f"episode_{n}.npz", **(arrays | changes))
    return root
