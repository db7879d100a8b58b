"""Index arithmetic of windows, chunks and goals by hand; test_references.py holds it to reference values."""

import numpy as np
import pytest

from octo_like.data.order import windows


@pytest.mark.parametrize("compat", [False, True])
def test_windows_and_chunks_written_out(compat):
    T, W, H, goal = 7, 3, 4, np.array([3, 1, 5, 6, 6, 5, 6], np.int32)
    history = windows.window_steps(np.arange(T, dtype=np.int32), W)
    window = windows.within(history, T)
    chunk = windows.within(windows.chunk_steps(window, H), T)
    done = windows.task_completed(windows.chunk_steps(history, H), goal, octo_compat=compat)
    for t in range(T):
        for w in range(W):
            step = t - W + 1 + w
            assert history[t, w] == step and window[t, w] == max(step, 0)
            for h in range(H):
                assert chunk[t, w, h] == min(max(step, 0) + h, T - 1)
                assert done[t, w, h] == (step + h - 2 >= goal[t] if compat else step + h > goal[t])


def test_goals_are_never_behind_and_reach_the_end():
    u = np.random.default_rng(0).random(20000).astype(np.float32)
    t = np.tile(np.arange(10, dtype=np.int32), 2000)
    goal = windows.goal_step(u, t, 10)
    assert (goal >= t).all() and (goal <= 9).all()
    assert set(goal[t == 0]) == set(range(10)) and set(goal[t == 8]) == {8, 9}
    assert windows.goal_step(np.float32([0.99999994]), np.int32([0]), 10)[0] == 9


def test_kept_camera_is_one_that_is_there_and_any_of_them():
    flags = np.array([[True, False, True, True]] * 3000 + [[False, True, False, False]])
    u = np.append(np.random.default_rng(0).random(3000), 0.999)
    chosen = windows.nth_true(flags, u)
    assert flags[np.arange(3001), chosen].all() and chosen[-1] == 1
    share = np.bincount(chosen[:3000], minlength=4) / 3000
    np.testing.assert_allclose(share, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.03)
