"""Settings by their names, from keywords and from configs, and what a run asks of any stream."""

import ast
import dataclasses
import pathlib

import numpy as np
import pytest

from octo_like.common.defaults import default_config
from octo_like.common.schema import BatchSpec, flatten
from octo_like.common.streams import BatchStream
from octo_like.common.synthetic import SyntheticStream
from octo_like.data.inputs import Inputs, settings_from_config
from octo_like.data.settings import KNOBS, HostOptions, IndexOptions, OrderOptions, Settings, TaskOptions
from octo_like.data.spec import DataError
from tests.data.streams import make_train_stream


def test_every_setting_comes_from_the_config():
    """A field that no config can set, or a default that differs, is a mistake."""
    config = default_config()
    assert {name for name in KNOBS if name not in config.data} == {"seed", "batch_size", "exact"}
    settings = settings_from_config(config)
    assert settings == Settings(OrderOptions(batch_size=256))  # the defaults of configs are those of the classes
    config.data.update(drop_task_prob=0.25, num_lanes=4, host_threads=7, decode="fast", paraphrases="x.json")
    config.data.episodes_mixed = dict(a=3, b=4)
    config.seed, config.batch_size = 5, 16
    settings = settings_from_config(config)
    assert settings.order == OrderOptions(16, 5, 4, {"a": 3, "b": 4})
    assert type(settings.order.episodes_mixed) is dict
    assert settings.task == TaskOptions(drop_task_prob=0.25) and settings.host == HostOptions(host_threads=7)
    assert (settings.decode, settings.paraphrases) == ("fast", "x.json")


def test_what_changes_batches_is_in_the_order_spec():
    settings = Settings.of(batch_size=8, drop_task_prob=0.1, decode="fast", host_memory_gb=2)
    spec = settings.spec()
    assert spec["memory"] == {"host_memory_gb": 2.0} and spec["decode"] == "fast"
    every = {field.name for field in dataclasses.fields(TaskOptions)}
    told, last = {"drop_subtask_prob", "subtask_alone_prob"}, {"last_subtask_prob", "last_subtask_steps"}
    assert set(spec["task"]) == every - told - last  # a run without them has none
    assert set(settings.spec(subtasks=True)["task"]) == every - last
    assert set(Settings.of(batch_size=8, last_subtask_prob=0.5).spec(subtasks=True)["task"]) == every
    assert spec["task"]["drop_task_prob"] == 0.1 and spec["task"]["paraphrase_prob"] == 0.0  # there are none
    assert Settings.of(batch_size=8, paraphrases="x.json").spec()["task"]["paraphrase_prob"] == 0.5
    assert Settings.of(batch_size=8, episodes_mixed=3).spec()["memory"] is None


def test_validation_drops_nothing_and_takes_a_share_of_the_memory():
    settings = Settings.of(
        batch_size=8,
        octo_compat=True,
        max_goal_distance=3,
        drop_task_prob=0.5,
        image_dropout_prob=0.5,
        paraphrases="x.json",
        host_memory_gb=10.0,
    ).for_validation()
    assert (
        settings.task == TaskOptions(octo_compat=True, max_goal_distance=3, drop_subtask_prob=1.0)
        and settings.paraphrases is None
    )
    assert settings.host.host_memory_gb == pytest.approx(1.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Settings.of(batch_size=8, drop_task_probability=0.1), "'drop_task_probability'; did you mean 'drop_"),
        (lambda: Settings.of(batch_size=8, keep_goal_prob=1.5), r"keep_goal_prob must be in \[0, 1\], got 1.5"),
        (lambda: Settings.of(batch_size=8, max_goal_distance=0), "max_goal_distance must be at least 1 or None"),
        (
            lambda: Settings.of(batch_size=8, last_subtask_prob=0.5, drop_subtask_prob=0.0),
            "share of the samples that are not told their sub-task, and drop_subtask_prob=0 leaves none",
        ),
        (lambda: Settings.of(batch_size=8, last_subtask_steps=0), "last_subtask_steps must be at least 1, got 0"),
        (lambda: Settings.of(batch_size=8, decode="quick"), "decode mode 'quick'; .*valid: fast, parity"),
        (lambda: Settings.of(batch_size=8, prefetch=0), "prefetch must be at least 1"),
        (lambda: HostOptions(max_bad_fraction=2.0), r"max_bad_fraction must be in \[0, 1\], got 2.0"),
        (lambda: IndexOptions(processes=0), "processes must be at least 1, or None for as many as there is work for"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_the_streams_have_what_a_run_asks_of_one(toy, tmp_path):
    spec = BatchSpec(2, 3, 4, {"primary": (8, 8)})
    places = dict(data_dir=toy.data_dir, cache_dir=str(tmp_path))
    read = make_train_stream({"toy": toy.fields()}, spec, None, batch_size=8, host_threads=1, **places)
    for stream in (SyntheticStream(spec, 8, 0, 100), read):
        assert isinstance(stream, BatchStream)
        assert set(stream.statistics) == set(stream.dataset_names) and stream.batch_spec == spec
        first, second = next(stream), next(stream)
        assert stream.position == 16
        for (path, a), (_, b) in zip(flatten(second), flatten(stream.batch(1)), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path)
        assert stream.position == 16  # batch() moves nothing
        Inputs(stream, {}, {}, {}).resume(stream.order_spec, 0)
        np.testing.assert_array_equal(next(stream)["action"], first["action"])
        assert set(stream.bad_counts) <= set(stream.dataset_names) and isinstance(stream.memory_line(), str)
        stream.close()


def test_no_function_of_the_data_room_has_more_than_eight_parameters():
    folder = pathlib.Path(__file__).resolve().parents[2] / "octo_like" / "data"
    found = set()
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 8:
                    found.add(f"{path.name}: {node.name}")
    # The keywords are what a conversion script writes down, each optional.
    assert found <= {"write.py: write_rlds"}
