"""A run that is stopped or killed at any moment ends as one that is not: its best policy, its export, its metrics.

Signals, checkpoints and exports are real, so is the training step; the evaluation is a table of scores.
"""

import functools
import json
import os
import pathlib
import signal

import pytest

import train
from octo_like.common.synthetic import SyntheticStream
from octo_like.training import exits, loop
from octo_like.training.checkpoint import Checkpointer
from octo_like.training.saver import Saver

CONFIG = pathlib.Path(__file__).parent / "tiny_config.py"
STEPS, SAVED = 4, 2  # evaluated after every step
TABLES = {
    "the last one is the best": (4.0, 3.0, 2.0, 1.0),
    "the best one is not saved": (4.0, 3.0, 0.5, 1.0),
    "an early one is the best": (4.0, 1.0, 3.0, 2.0),
}


class Killed(BaseException):
    """Nothing more is done, as after SIGKILL."""


@pytest.fixture(scope="module")
def build():
    """Programs are built once: all runs have the same."""
    original, made = loop.build_program, []

    def build_program(*args, **kwargs):
        if not made:
            made.append(original(*args, **kwargs))
        return made[0]

    return build_program


@pytest.fixture
def run(monkeypatch, tmp_path, build):
    """run(name, scores, act, moment) -> (exit status, names of all moments); `act` is called at that moment."""

    def start(name, scores, act=None, moment=None):
        happened = []

        def noted(function):
            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                happened.append(function.__name__)
                if act is not None and len(happened) - 1 == moment:
                    act()
                return function(*args, **kwargs)

            return wrapper

        class Table:
            def __init__(self, run, writer):
                self.writer = writer

            def check(self, state, ranking):
                pass

            def evaluate(self, step, state):
                found = {"val/x/action/loss": scores[step - 1]}
                self.writer.scalars(step, found)
                return found

            __call__ = noted(evaluate)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "build_program", build)
            patched.setattr(loop, "Evaluator", Table)
            patched.setattr(SyntheticStream, "__next__", noted(SyntheticStream.__next__))
            patched.setattr(Checkpointer, "save", noted(Checkpointer.save))
            patched.setattr(Saver, "_export", noted(Saver._export))
            options = {"num_steps": STEPS, "batch_size": 2, "log_every": 1, "optimizer.decay_steps": 9}
            options |= {"checkpoint.every": SAVED, "checkpoint.keep_best": 1, "eval.every": 1}
            arguments = ["--config", f"{CONFIG}:synthetic,smallest", "--workdir", str(tmp_path / name)]
            overrides = [f"--config.{key}={value}" for key, value in options.items()]
            return train.main([*arguments, "--distributed=off", *overrides]), happened

    return start


def left_by(workdir):
    """What a run leaves: its policies by their files, the ranks of its steps, its metrics."""
    policies = {name: (workdir / name / "params.safetensors").read_bytes() for name in ("export", "export_best")}
    ranks = {}
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit():
            ranks[int(folder.name)] = json.loads((folder / "manifest.json").read_text())["body"]["metric"]
    metrics = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for key, value in values.items():
            if key.startswith(("val/", "train/loss", "train/grad_norm")):
                metrics[values["step"], key] = value
    return policies, ranks, metrics


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def kill():
    raise Killed


def ends_as(whole, run, workdir, scores, act, moment):
    """Whether a run to which `act` happens at a moment, and which is then started again, leaves the same."""
    try:
        status, _ = run(workdir.name, scores, act, moment)
    except Killed:
        status = None
    assert status in (exits.DONE, exits.PREEMPTED, None)
    if status != exits.DONE:
        assert run(workdir.name, scores)[0] == exits.DONE
    policies, ranks, metrics = left_by(workdir)
    assert policies == whole[0]
    assert {step: rank for step, rank in ranks.items() if rank is not None} == {
        step: rank for step, rank in whole[1].items() if step in ranks and rank is not None
    }
    assert {min(whole[1], key=whole[1].get), STEPS} <= set(ranks)  # the best and the last
    assert metrics == whole[2]


@pytest.mark.parametrize("table", TABLES)
def test_a_stop_or_a_kill_at_any_moment_changes_nothing(run, tmp_path, table):
    scores = TABLES[table]
    status, moments = run("whole", scores)
    assert status == exits.DONE and {"__next__", "evaluate", "save", "_export"} == set(moments)
    whole = left_by(tmp_path / "whole")
    assert all(rank is not None for rank in whole[1].values())
    everything = table == "the last one is the best"
    for moment, name in enumerate(moments):
        # The first is a batch of validation; the step that follows another is the one at whose end the run stops.
        if name == "__next__" and moment and (everything or "__next__" not in moments[moment + 1 :]):
            ends_as(whole, run, tmp_path / f"stopped-{moment}", scores, terminate, moment)
        elif name in ("_export", "save") and everything:
            ends_as(whole, run, tmp_path / f"killed-{moment}", scores, kill, moment)
