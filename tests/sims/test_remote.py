"""Speaking with a process that simulates: answers, errors, deaths. A stand-in worker; no simulator is needed."""

import os
import signal
import threading

import gymnasium
import numpy as np
import pytest

import octo_like.envs  # noqa: F401  (registers the environments)
from octo_like.envs.sims import ENVIRONMENTS, GROUPS
from octo_like.envs.sims.remote import SimulatorError, SimulatorPool, SimulatorProcess
from octo_like.envs.sims.tasks import METAWORLD_HELDOUT, METAWORLD_PRETRAIN, find_task


@pytest.fixture
def process(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository))
    process = SimulatorProcess("tests.sims.echo_worker")
    yield process
    process.close()


def test_answers_come_from_another_process_that_has_imported_nothing_heavy(process):
    assert process.call("add", 2, 3) == 5
    assert process.call("pid") == process.pid != os.getpid()
    np.testing.assert_array_equal(process.call("chatter"), [0, 1, 2])  # what it prints does not disturb
    assert process.call("imported") == []


def test_mistakes_of_the_caller_arrive_as_what_they_are_and_do_no_harm(process):
    with pytest.raises(ValueError, match="no such task"):
        process.call("fail", "ValueError", "no such task")
    with pytest.raises(SimulatorError, match="(?s)failed in fail: KeyError: 'door'.*echo_worker.py"):
        process.call("fail", "KeyError", "door")
    with pytest.raises(SimulatorError, match=r"pip install 'octo_like\[sim\]'"):
        process.call("fail", "ModuleNotFoundError", "No module named 'mujoco'")
    assert process.call("add", "a", "b") == "ab"


def test_a_process_that_dies_says_how_and_stays_dead(process):
    with pytest.raises(SimulatorError, match=f"(?s)status -{int(signal.SIGABRT)} in die.*last words"):
        process.call("die")
    with pytest.raises(SimulatorError, match="ended with status"):
        process.call("add", 1, 1)
    process.close()
    with pytest.raises(SimulatorError, match="was closed"):
        process.call("add", 1, 1)


def test_calls_from_many_threads_get_their_own_answers(process):
    wrong = []

    def ask(i):
        wrong.extend(i for _ in range(50) if process.call("add", i, i) != 2 * i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closing_ends_the_process(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository))
    process = SimulatorProcess("tests.sims.echo_worker")
    pid = process.call("pid")
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_pool_of_none_is_refused():
    with pytest.raises(ValueError, match="at least one process"):
        SimulatorPool(0)


def test_the_tables_are_sound():
    assert len(METAWORLD_PRETRAIN) >= 8 and not set(METAWORLD_PRETRAIN) & set(METAWORLD_HELDOUT)
    assert set(ENVIRONMENTS) == set(GROUPS)
    for group, (simulator, tasks) in GROUPS.items():
        assert simulator in ("metaworld", "fetch") and ENVIRONMENTS[group] in gymnasium.registry
        for name, task in tasks.items():
            assert task.name == name and task.instructions
            assert bool(task.expert) == (simulator == "metaworld")
    with pytest.raises(ValueError, match="unknown task 'fly'; valid: faucet-close"):
        find_task(METAWORLD_HELDOUT, "fly")


def test_instructions_fit_the_small_policies_and_differ_between_tasks():
    from configs.metaworld import TEXT_LENGTH
    from octo_like.common.text import TextTokenizer

    tokenizer = TextTokenizer.load("builtin", 64)
    for _, tasks in GROUPS.values():
        texts = [text for task in tasks.values() for text in task.instructions]
        assert len(set(texts)) == len(texts)
        lengths = tokenizer.encode(texts)["attention_mask"].sum(1)
        assert lengths.max() <= TEXT_LENGTH, texts[int(lengths.argmax())]
