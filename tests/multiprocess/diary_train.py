"""train.py, unchanged, with a diary of the batches it was given and, on request, a fault.

    DIARY=folder [FAULT=kind:step[,step...][@process]] python tests/multiprocess/diary_train.py --config ...

The diary is DIARY/<process>.jsonl, a line per batch handed to the devices: {"ids": [...], "sha": hash of all arrays}.
Faults, on all processes or on one, at the batches of the given steps (1 is the first): "nan", an action that is NaN;
"hang", no batch ever comes; "mistake" and "lost", a ValueError and a FileNotFoundError; "kill", SIGKILL to itself. At
step 0 all but "nan" happen where the data is opened.
"""

import hashlib
import json
import os
import pathlib
import signal
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
steps, _, only = steps.partition("@")
steps = {int(step) for step in steps.split(",") if step}
batch_size = next(int(a.split("=")[1]) for a in ["--config.batch_size=16", *sys.argv][::-1] if "batch_size=" in a)


def happen(step):
    """Errors and kills, if it is the turn of this process and step."""
    if step not in steps or only not in ("", str(jax.process_index())):
        return
    if kind == "mistake":
        raise ValueError(f"a mistake at step {step}")
    if kind == "lost":
        raise FileNotFoundError(f"a shard is gone at step {step}")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        threading.Event().wait()


def inputs_from_config(*args, **kwargs):
    happen(0)
    return read_inputs(*args, **kwargs)


def recorded(batch, mesh):
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(batch)):
        digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    ids = batch["sample_id"].tolist()
    step = ids[0] // batch_size + 1
    happen(step)
    if step in steps and kind == "nan":
        batch = {**batch, "action": np.array(batch["action"])}
        batch["action"][1, -1, 0, 0] = np.nan
    with open(pathlib.Path(os.environ["DIARY"]) / f"{jax.process_index()}.jsonl", "a") as file:
        file.write(json.dumps({"ids": ids, "sha": digest.hexdigest()}) + "\n")
    return put_batch(batch, mesh)


sharding.put_batch = recorded
read_inputs, train.inputs_from_config = train.inputs_from_config, inputs_from_config
if __name__ == "__main__":
    command(train.main)
