"""Evaluation: the arithmetic of errors in physical units, plots, and rollouts in a registered environment."""

import dataclasses
import types

import gymnasium as gym
import jax
import numpy as np
import pytest

from octo_like.common.config import ConfigError, load_config
from octo_like.common.normalization import compute_statistics, normalize
from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.data.inputs import inputs_from_config
from octo_like.robot.prediction import plot_prediction
from octo_like.training.evaluation import (
    EVALUATION_SEEDS,
    action_error,
    closed_loop,
    predict_rows,
    share,
    success_scalars,
    validation_loss,
)
from octo_like.training.evaluator import Evaluator
from octo_like.training.program import network_from_config
from octo_like.training.ranking import Ranking
from octo_like.training.sharding import make_mesh
from tests.robot.test_planning import PlanningPolicy, ThereAndBackEnv
from tests.robot.toy import LineEnv, LinePolicy

SPEC = BatchSpec(window_size=2, action_horizon=3, action_dim=4, image_sizes={"primary": (8, 8)})
CONFIG = "tests/training/tiny_config.py:synthetic,smallest"
WIDTH = 3  # the dataset has one dimension less than the batch


def made_batch(seed: int, kind: str = "normal", batch_size: int = 5):
    """A batch with known physical actions; the last dimension is padding, and so are some chunk ends."""
    rng = np.random.default_rng(seed)
    data = np.random.default_rng(0).normal(size=(500, WIDTH)) * [0.01, 2.0, 1.0] + [0.0, 5.0, 0.5]
    statistics = {"action": compute_statistics(data.astype(np.float32), mask=[True, True, False])}
    batch = synthetic_batch(SPEC, batch_size, seed)
    physical = data[rng.integers(0, len(data), (batch_size, 2, 3))].astype(np.float32)
    batch["action"][..., :WIDTH] = normalize(physical, statistics["action"], kind)
    batch["action"][..., WIDTH:] = 99.0
    batch["action_pad_mask"][..., WIDTH:] = False
    batch["action_pad_mask"][0, :, 2:] = False
    return batch, physical, statistics


@pytest.mark.parametrize("kind", ["normal", "bounds"])
def test_a_perfect_policy_has_no_error(kind):
    batch, _, statistics = made_batch(1, kind)
    error = action_error(lambda b: b["action"][:, -1], [batch], statistics, kind=kind)
    told = {**statistics, "normalization": kind}
    np.testing.assert_array_equal(
        action_error(lambda b: -b["action"][:, -1], [batch], told).mae,
        action_error(lambda b: -b["action"][:, -1], [batch], statistics, kind=kind).mae,
    )
    np.testing.assert_allclose(error.mae, 0, atol=1e-6)
    np.testing.assert_allclose(error.rmse, 0, atol=1e-6)
    assert error.count.tolist() == [14, 14, 14], "5 chunks of 3, one action of them masked"


def test_errors_are_in_physical_units_and_masked():
    batches = [made_batch(seed) for seed in (1, 2)]
    statistics = batches[0][2]
    std = statistics["action"]["std"]

    def off_by(batch):
        chunk = batch["action"][:, -1].copy()
        chunk[:, :, 0] += 1.0
        chunk[:, 1:, 1] -= 2.0
        chunk[:, :, 2] += 0.25  # not normalised: its mask is False
        chunk[:, :, 3] = -1e6
        return np.where(batch["action_pad_mask"][:, -1], chunk, 1e6)

    error = action_error(off_by, [b for b, *_ in batches], statistics, names=["x", "y", "grip"])
    n, later = 28, 18
    np.testing.assert_allclose(error.mae, [std[0], 2 * std[1] * later / n, 0.25], rtol=1e-4)
    np.testing.assert_allclose(error.rmse, [std[0], 2 * std[1] * np.sqrt(later / n), 0.25], rtol=1e-4)
    np.testing.assert_allclose(error.first_mae, [std[0], 0, 0.25], rtol=1e-4, atol=1e-5)
    mask = np.stack([b["action_pad_mask"][:, -1, :, :WIDTH] for b, *_ in batches])
    true = np.stack([physical[:, -1] for _, physical, _ in batches])
    expected = (np.abs(true - statistics["action"]["mean"]) * mask).sum((0, 1, 2)) / n
    np.testing.assert_allclose(error.mean_mae, expected, rtol=1e-4)
    scalars = error.scalars("val/bridge/")
    assert scalars["val/bridge/mae/x"] == pytest.approx(std[0], rel=1e-4)
    in_std = [1.0, 2 * later / n, 0.25 / std[2]]
    assert scalars["val/bridge/mae_in_std"] == pytest.approx(np.mean(in_std), rel=1e-4)
    assert scalars["val/bridge/mean_mae_in_std"] == pytest.approx(np.mean(error.mean_mae / std), rel=1e-6)
    assert len(scalars) == 4 * WIDTH + 2, "no gripper is known, so it has no accuracy"


def test_tags_hold_units_and_grippers_are_counted():
    """Names and units of the statistics; the share of gripper commands on the right side, padding left out."""
    batch, physical, statistics = made_batch(1)
    named = {"names": ["x", "turn", "grip"], "units": ["m", "rad/s", "open fraction"]}
    statistics["dimensions"] = {"action": named}
    wrong = batch["action"][:, -1].copy()
    wrong[1, :2, 2] = np.where(physical[1, -1, :2, 2] > 0.5, 0.0, 1.0)  # two commands turned round
    wrong[0, 2, 2] = np.where(physical[0, -1, 2, 2] > 0.5, 0.0, 1.0)  # past the end: nobody looks
    scalars = action_error(lambda b: wrong, [batch], statistics).scalars("val/d/")
    assert {"val/d/mae/x_m", "val/d/first_mae/turn_rad_per_s", "val/d/mae/grip_open_fraction"} <= scalars.keys()
    assert scalars["val/d/gripper_accuracy"] == pytest.approx(12 / 14)
    assert action_error(lambda b: batch["action"][:, -1], [batch], statistics).gripper_accuracy == 1.0
    # A dimension that never changes has no deviation to measure its error in.
    statistics["action"]["std"][0] = 0.0
    assert np.isfinite(action_error(lambda b: wrong, [batch], statistics).in_std(np.ones(3)))
    statistics["dimensions"] = {"action": {"names": ["x"], "units": ["m"]}}
    with pytest.raises(ValueError, match="1 names for 3 action dimensions: x"):
        action_error(lambda b: wrong, [batch], statistics)


def test_a_longer_predicted_chunk_is_compared_where_both_exist():
    batch, _, statistics = made_batch(1)
    longer = np.concatenate([batch["action"][:, -1], np.full((5, 2, 4), 50.0)], axis=1)
    assert action_error(lambda b: longer, [batch], statistics).mae.max() < 1e-6


def test_nothing_to_compare_is_an_error_and_an_unused_dimension_is_left_out():
    batch, _, statistics = made_batch(1)
    with pytest.raises(ValueError, match="no action to compare"):
        action_error(lambda b: b["action"][:, -1], [], statistics)
    with pytest.raises(ValueError, match="2 names for 3"):
        action_error(lambda b: b["action"][:, -1], [batch], statistics, names=["a", "b"])
    batch["action_pad_mask"][..., 1] = False
    error = action_error(lambda b: b["action"][:, -1], [batch], statistics, names=["a", "b", "c"])
    assert np.isnan(error.mae[1]) and error.count[1] == 0
    assert not any(name.endswith("/b") for name in error.scalars())


def test_validation_loss_weighs_by_counts():
    terms = [
        {"action": {"loss": 6.0, "mse": 3.0, "count": 3.0}, "other": {"loss": 0.0, "count": 0.0}},
        {"action": {"loss": 1.0, "mse": 1.0, "count": 1.0}, "other": {"loss": 0.0, "count": 0.0}},
    ]
    assert validation_loss(lambda i: terms[i], [0, 1]) == {"action/loss": 7 / 4, "action/mse": 1.0}
    with pytest.raises(ValueError, match="no validation batches"):
        validation_loss(lambda i: terms[i], [])


def episode_batches(lengths, statistics_seed: int = 1):
    batches = []
    for i, length in enumerate(lengths):
        batch, physical, statistics = made_batch(statistics_seed + i, batch_size=length)
        batch["observation"]["timestep"] = np.stack([np.maximum(np.arange(length) - 1, 0), np.arange(length)], axis=1)
        batches.append((batch, physical))
    return batches, statistics


def test_predictions_follow_one_episode():
    batches, statistics = episode_batches([6, 4])
    sample_fns = [lambda b: b["action"][:, -1] + 0.0, lambda b: b["action"][:, -1] + 1.0]
    prediction = predict_rows(sample_fns, [b for b, _ in batches], statistics)
    assert prediction.timestep.tolist() == [0, 1, 2, 3, 4, 5]
    assert prediction.predicted.shape == (2, 6, 3, WIDTH)
    np.testing.assert_allclose(prediction.true, batches[0][1][:, -1, 0], atol=1e-5)
    np.testing.assert_allclose(prediction.predicted[0, :, 0], prediction.true, atol=1e-5)
    shift = (prediction.predicted[1, :, 0] - prediction.true).mean(0)
    np.testing.assert_allclose(shift, [*statistics["action"]["std"][:2], 1.0], rtol=1e-3)
    assert predict_rows(sample_fns, [batches[0][0]], statistics, limit=4).timestep.tolist() == [0, 1, 2, 3]


def test_relative_actions_are_drawn_where_they_lead():
    """A chunk lies along the actions that it predicts, which are relative to another place at every step."""
    steps, horizon = 7, 3
    rng = np.random.default_rng(0)
    place, target = rng.normal(size=(steps, 1)), rng.normal(size=(steps + horizon, 2))
    index = np.arange(steps)[:, None] + np.arange(horizon)
    chunks = target[index].copy()
    chunks[..., 0] -= place
    stats = {
        "action": compute_statistics(chunks.reshape(-1, 2).astype(np.float32)),
        "proprio": compute_statistics(place.astype(np.float32)),
        "relative_to": [0, None],
    }
    batch = {
        "action": normalize(chunks[:, None].astype(np.float32), stats["action"]),
        "action_pad_mask": np.ones((steps, 1, horizon, 2), bool),
        "observation": {
            "timestep": np.arange(steps)[:, None],
            "proprio": np.concatenate([normalize(place.astype(np.float32), stats["proprio"]), place], 1)[:, None],
        },
    }
    prediction = predict_rows([lambda b: b["action"][:, -1]], [batch], stats, limit=None)
    np.testing.assert_allclose(prediction.true, target[:steps], atol=1e-5)
    np.testing.assert_allclose(prediction.predicted[0], target[index], atol=1e-5)


def test_an_episode_ends_where_its_batches_are_filled_up():
    """Steps that a filter left out are no end; a row that comes again is one."""
    batch, _, statistics = made_batch(1)
    batch["observation"]["timestep"][:, -1] = [0, 1, 4, 5, 5]
    prediction = predict_rows([lambda b: b["action"][:, -1]], [batch], statistics, limit=None)
    assert prediction.timestep.tolist() == [0, 1, 4, 5]
    assert plot_prediction(prediction).shape[2] == 3


def test_shares_of_rollouts_are_all_of_them():
    """What processes find in their shares is what one finds in all episodes."""
    for episodes, count in ((5, 7), (20, 3), (4, 4), (1, 2)):
        parts = [share(episodes, index, count) for index in range(count)]
        assert [number for part in parts for number in part] == list(range(episodes))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    name = "octo_like_tests/Line-v0"
    if name not in gym.registry:
        gym.register(name, entry_point=LineEnv)
    whole = closed_loop(LinePolicy(), name, "line", episodes=5, batch_size=4, record=0)
    found = []
    for index in range(2):
        mine = share(5, index, 2)
        part = closed_loop(LinePolicy(), name, "line", episodes=len(mine), seed=EVALUATION_SEEDS + mine.start, record=0)
        found += [episode.summary() for episode in part.episodes]
    assert success_scalars(found) == whole.scalars and found == [one.summary() for one in whole.episodes]


def test_plots_show_truth_and_samples_for_every_dimension(tmp_path):
    batches, statistics = episode_batches([6])
    near, far = (predict_rows([lambda b, k=k: b["action"][:, -1] + k], [batches[0][0]], statistics) for k in (0.0, 3.0))
    path = tmp_path / "plots" / "episode.png"
    picture = plot_prediction(near, ["x", "y", "grip"], units=["m", "m", ""], title="an episode", path=path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[0] > 3 * 100
    assert np.abs(picture.astype(int) - plot_prediction(far, ["x", "y", "grip"], title="an episode")).max() > 100
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 100).any(axis=1)
    rows = np.array_split(blue, WIDTH)
    assert all(row.any() for row in rows), "every dimension has predictions drawn"


def test_plot_of_scattered_rows():
    batch, _, statistics = made_batch(1)
    batch["observation"]["timestep"][:, -1] = [7, 3, 30, 2, 11]
    prediction = predict_rows([lambda b: b["action"][:, -1]], [batch], statistics)
    assert prediction.timestep.tolist() == [7, 3, 30, 2, 11]
    assert plot_prediction(prediction).shape[2] == 3


def test_closed_loop_in_a_registered_environment():
    name = "octo_like_tests/Line-v0"
    if name not in gym.registry:
        gym.register(name, entry_point=LineEnv)
    result = closed_loop(LinePolicy(), name, "line", episodes=6, batch_size=4, record=2)
    assert result.scalars["success"] == 1.0 and result.scalars["success_high"] == 1.0
    assert 0.5 < result.scalars["success_low"] < 1.0
    assert {"success/left", "success/right"} <= result.scalars.keys()
    assert [e.seed for e in result.episodes] == [1_000_000_000 + i for i in range(6)]
    assert list(result.videos) == ["0", "1"]
    assert result.videos["0"].shape[0] == result.episodes[0].steps + 1 and result.videos["0"].dtype == np.uint8
    there_and_back = "octo_like_tests/ThereAndBack-v0"
    if there_and_back not in gym.registry:
        gym.register(there_and_back, entry_point=ThereAndBackEnv)
    for every in (1, 2, None):  # chunks of 3 actions
        said = closed_loop(PlanningPolicy(), there_and_back, "line", episodes=3, plan_every=every)
        steps = [plan.step for plan in said.episodes[0].plans]
        assert steps == ([] if every is None else list(range(0, said.episodes[0].steps, 3 * every)))
    with pytest.raises(ValueError, match=r"unknown environment 'octo_like_tests/Line-v1'.*Line-v0"):
        closed_loop(LinePolicy(), "octo_like_tests/Line-v1", "line")


@pytest.fixture(scope="module")
def evaluated():
    """A run as the evaluator sees it before the first step; its dataset names an environment."""
    config = load_config(CONFIG)
    network, mesh = network_from_config(config), make_mesh(1, 1, jax.devices()[:1])
    inputs = inputs_from_config(config, network.spec, network.tokenizer)
    (name,) = inputs.validation
    inputs = dataclasses.replace(inputs, environments={name: "octo_like/Tabletop-arm-v0"})
    run = types.SimpleNamespace(config=config, mesh=mesh, model=network.model, inputs=inputs)
    return run, types.SimpleNamespace(ema_params=jax.eval_shape(network.init_params, jax.random.key(0)))


def check_before_the_first_step(evaluated, env="octo_like/Tabletop-arm-v0", exec_horizon=3, **keys):
    run, state = evaluated
    settings = {"checkpoint.keep_best": 1, "eval.rollouts": 2, "eval.exec_horizon": exec_horizon} | keys
    config = load_config(CONFIG, [(key, str(value)) for key, value in settings.items()])
    inputs = dataclasses.replace(run.inputs, environments=dict.fromkeys(run.inputs.environments, env))
    run = types.SimpleNamespace(**{**vars(run), "config": config, "inputs": inputs})
    Evaluator(run, None).check(state, Ranking.from_config(config))


@pytest.mark.parametrize("metric", ["val/*/*/loss", "*/loss", "val/*/mae_in_std", "rollout/*/success",
                                    "rollout/synthetic/success/pick*", "val/synthetic/mae/*"])  # fmt: skip
def test_metrics_that_will_be_measured(evaluated, metric):
    check_before_the_first_step(evaluated, **{"checkpoint.best_metric": metric})


@pytest.mark.parametrize(
    "keys,words",
    [
        (
            {"checkpoint.best_metric": "val/nope/*/loss"},
            "matches nothing of what is measured: .*val/synthetic/action/loss",
        ),
        ({"checkpoint.best_metric": "val/*/*/los"}, "matches nothing of what is measured"),
        ({"checkpoint.best_metric": "rollout/other/success/x"}, "rollout/synthetic/success"),
        (dict(env="nope:x"), "data.datasets.synthetic.env: .*importing nope fails"),
        (dict(env="nope"), "data.datasets.synthetic.env: unknown environment 'nope'"),
        (dict(exec_horizon=9), "eval.exec_horizon=9 is more than the 3 actions of a chunk"),
    ],
)
def test_what_would_stop_the_first_evaluation_is_found_before_the_first_step(evaluated, keys, words):
    with pytest.raises(ConfigError, match=words):
        check_before_the_first_step(evaluated, **keys)
