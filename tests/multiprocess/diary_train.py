"""train.py, unchanged, with a diary of the batches it was given and, on request, a fault.

    DIARY=folder [FAULT=kind:step[,step...]] python tests/multiprocess/diary_train.py --config ... --workdir ...

The diary is DIARY/<process>.jsonl, a line per batch handed to the devices: {"ids": [...], "sha": hash of all arrays}.
Faults, at the batches of the given steps (1 is the first): "nan", an action that is NaN; "hang", no batch ever comes.
"""

import hashlib
import json
import os
import pathlib
import sys
import threading

import jax
import numpy as np

from octo_like.common.schema import flatten
from octo_like.training import sharding
from octo_like.training.attempt import command

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import train  # noqa: E402

put_batch = sharding.put_batch
kind, _, steps = os.environ.get("FAULT", "").partition(":")
steps = {int(step) for step in steps.split(",") if step}
batch_size = next(int(a.split("=")[1]) for a in ["--config.batch_size=16", *sys.argv][::-1] if "batch_size=" in a)


def recorded(batch, mesh):
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(batch)):
        digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    ids = batch["sample_id"].tolist()
    step = ids[0] // batch_size + 1
    if step in steps and kind == "hang":
        threading.Event().wait()
    if step in steps and kind == "nan":
        batch = {**batch, "action": np.array(batch["action"])}
        batch["action"][1, -1, 0, 0] = np.nan
    with open(pathlib.Path(os.environ["DIARY"]) / f"{jax.process_index()}.jsonl", "a") as file:
        file.write(json.dumps({"ids": ids, "sha": digest.hexdigest()}) + "\n")
    return put_batch(batch, mesh)


sharding.put_batch = recorded
if __name__ == "__main__":
    command(train.main)
