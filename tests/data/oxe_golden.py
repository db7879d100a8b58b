"""Reference trajectories of Open X-Embodiment datasets, as arrays in one compressed file, and their comparison.

    python tests/data/oxe_golden.py ../shared/oxe tests/golden/oxe/cases.xz      # makes the excerpt in the repository

The excerpt leaves out three of the four seeded random cases of every dataset; what the full set has more is read from
its own folder. It also holds the facts about each dataset and the mixtures.
"""

import json
import lzma
import pathlib
import re
import sys

import numpy as np

FACTS = ("source", "image_keys", "depth_keys", "action_dim", "proprio_width", "action_normalization_mask", "golden")
LEFT_OUT = ("s1", "s2", "s3")
# Columns of the action that are Euler angles from quaternions: compared modulo a turn.
EULER = {
    "furniture_bench_dataset_converted_externally_to_rlds": slice(3, 6),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": slice(3, 6),
    "cmu_playing_with_food": slice(3, 6),
}


def read_folder(folder: pathlib.Path, cases=lambda name: True) -> dict:
    """{file: {case: {"in" | "out": {path: array}}}} of a folder of npz files; OpenVLA's files are "openvla/name"."""
    files = {}
    for path in sorted(folder.glob("golden/**/*.npz")):
        name = path.relative_to(folder / "golden").with_suffix("").as_posix()
        files[name] = {}
        with np.load(path) as arrays:
            for key in arrays.files:
                side, _, rest = key.partition("/")
                case, _, leaf = rest.partition("/")
                if rest and cases(case):
                    files[name].setdefault(case, {}).setdefault(side, {})[leaf] = arrays[key]
    return files


def facts_of(folder: pathlib.Path) -> dict:
    """{"datasets": {name: facts}, "mixes": {project: {mix: {...}}}} of the reference's JSON files."""
    datasets = json.loads((folder / "oxe_datasets.json").read_text())["datasets"]
    mixes = json.loads((folder / "oxe_mixes.json").read_text())
    facts = {}
    for name, record in datasets.items():
        facts[name] = {key: record[key] for key in FACTS}
        facts[name]["blanked"] = record["language"]["treatment"] == "blanked"
        if "openvla" in record:
            variant = record["openvla"]
            facts[name]["openvla"] = {k: variant[k] for k in ("proprio_width", "image_keys") if k in variant}
    return {"datasets": facts, "mixes": {key: value for key, value in mixes.items() if not key.startswith("_")}}


def pack(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the excerpt: a line of JSON (facts, and name, type and shape of every array), then their bytes."""
    header, body = [], bytearray()
    for name, cases in read_folder(folder, lambda case: case not in LEFT_OUT).items():
        for case, sides in cases.items():
            for side, leaves in sides.items():
                for leaf, array in leaves.items():
                    header.append([name, case, side, leaf, array.dtype.str, array.shape])
                    body += np.ascontiguousarray(array).tobytes()
    line = json.dumps({**facts_of(folder), "arrays": header}, separators=(",", ":"))
    target.write_bytes(lzma.compress(line.encode() + b"\n" + bytes(body), preset=9 | lzma.PRESET_EXTREME))


def unpack(path: pathlib.Path) -> tuple[dict, dict]:
    """(facts as of `facts_of`, files as of `read_folder`) of the excerpt."""
    line, _, body = lzma.decompress(path.read_bytes()).partition(b"\n")
    facts = json.loads(line)
    files, start = {}, 0
    for name, case, side, leaf, dtype, shape in facts.pop("arrays"):
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, dtype, count, start).reshape(shape)
        start += array.nbytes
        files.setdefault(name, {}).setdefault(case, {}).setdefault(side, {})[leaf] = array
    return facts, files


# ---------------------------------------------------------------- comparing


def compare(got, want, where, euler=None):
    if want.dtype.kind == "S":
        assert [bytes(x).rstrip(b"\0") for x in got.tolist()] == [bytes(x) for x in want.tolist()], where
        return
    a, b = got.astype(np.float32), want.astype(np.float32)
    assert a.shape == b.shape, where
    if euler is not None:
        a = a.copy()
        difference = (a[:, euler] - b[:, euler] + np.pi) % (2 * np.pi) - np.pi
        np.testing.assert_allclose(difference, 0, atol=1e-5, err_msg=where)
        a[:, euler] = b[:, euler]
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=where)


# Leaves that the reference removes. Its files say so of images only: of other leaves they hold no untouched ones.
REMOVED = {"berkeley_autolab_ur5": {"observation/image_with_depth"}}
# Leaves that the reference does not have, because its code cannot make them; the entries do.
REPAIRED = {"utokyo_xarm_pick_and_place_converted_externally_to_rlds": {"observation/proprio"}}


def is_image(leaf):
    """Whether a reference's leaf is of images: each is a tag, f00, f01, ..."""
    return leaf.dtype.kind == "S" and all(re.fullmatch(rb"f\d\d", tag) for tag in leaf.reshape(-1).tolist())


def check_the_rest(name, where, got, sides):
    """What is not among the reference's outputs must be there, as it was in the data, unless the reference removes it.

    Images are always among the outputs: one that is not was removed.
    """
    outputs = sides["out"]
    removed = REMOVED.get(name, set()) | {
        path for path, leaf in sides["in"].items() if is_image(leaf) and path not in outputs
    }
    # Below a path that is itself an output there is nothing any more: `action/world_vector` of an `action`.
    replaced = {path for path in sides["in"] if any(path.startswith(f"{output}/") for output in outputs)}
    missing = sides["in"].keys() - got.keys() - replaced
    assert missing == removed, f"{where}: {sorted(missing ^ removed)} should be there, or should not"
    for path in got.keys() - outputs.keys() - REPAIRED.get(name, set()):
        assert path in sides["in"], f"{where}: {path} is in no output of the reference"
        compare(got[path], sides["in"][path][outputs["_frame_index"]], f"{where} {path}")


if __name__ == "__main__":
    pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
