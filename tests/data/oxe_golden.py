"""Reference trajectories of Open X-Embodiment datasets, as arrays in one compressed file.

    python tests/data/oxe_golden.py ../shared/oxe tests/golden/oxe/cases.xz      # makes the excerpt in the repository

The excerpt leaves out three of the four seeded random cases of every dataset; what the full set has more is read from
its own folder. It also holds the facts about each dataset and the mixtures.
"""

import json
import lzma
import pathlib
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


if __name__ == "__main__":
    pack(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
