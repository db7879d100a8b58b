"""Wrappers: against the reference arrays where these are present, and against their own contract."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from octo_like.robot.images import resize_image
from octo_like.robot.wrappers import ActionChunkWrapper, HistoryWrapper, ResizeImages, TemporalEnsembleWrapper

GOLDEN_PROPRIO = {"mean": np.array([0.1, -0.2, 0.3]), "std": np.array([1.0, 0.5, 0.0])}


class TapeEnv(gym.Env):
    """Plays recorded frames; reward 0.5 * time after the step, terminated after `length` steps; keeps its actions."""

    def __init__(self, images: np.ndarray, proprio: np.ndarray, length: int, action_dim: int = 2):
        self.images, self.proprio, self.length = images, proprio.astype(np.float32), length
        self.action_space = gym.spaces.Box(-10, 10, (action_dim,), np.float32)
        self.observation_space = gym.spaces.Dict(
            {
                "image_primary": gym.spaces.Box(0, 255, images.shape[1:], np.uint8),
                "proprio": gym.spaces.Box(-np.inf, np.inf, proprio.shape[1:], np.float32),
            }
        )
        self.actions: list[np.ndarray] = []

    def _observe(self):
        return {"image_primary": self.images[self.t], "proprio": self.proprio[self.t]}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        return self._observe(), {"t": 0}

    def step(self, action):
        self.t += 1
        self.actions.append(np.array(action))
        return self._observe(), 0.5 * self.t, self.t >= self.length, False, {"t": self.t}


def tape(length: int = 6, size: tuple[int, int] = (20, 28), seed: int = 0) -> TapeEnv:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (length + 1, *size, 3), np.uint8)
    return TapeEnv(images, rng.normal(size=(length + 1, 3)), length)


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "pipeline.npz") as arrays:
        return {key: arrays[key] for key in arrays.files if key.startswith("wrappers/")}


def golden_env(golden, case: str, proprio: np.ndarray | None = None) -> TapeEnv:
    prefix = f"wrappers/{case}/in"
    own = golden[f"{prefix}/env_proprio"] if proprio is None else proprio
    return TapeEnv(golden[f"{prefix}/env_images"], own, int(golden[f"{prefix}/env_length"]))


def test_history_matches_the_reference(golden):
    env = HistoryWrapper(golden_env(golden, "history"), window_size=3)
    observation, _ = env.reset()
    names = ["reset", *[f"step{i}" for i in range(6)]]
    for i, name in enumerate(names):
        if i:
            observation, reward, terminated, _, _ = env.step(np.zeros(2))
            assert reward == golden[f"wrappers/history/upstream/{name}/reward"]
            assert terminated == golden[f"wrappers/history/upstream/{name}/done"]
        want = {
            k: golden[f"wrappers/history/upstream/{name}/{k}"] for k in ("proprio", "timestep_pad_mask", "image_sum")
        }
        np.testing.assert_array_equal(observation["proprio"], want["proprio"])
        np.testing.assert_array_equal(observation["timestep_pad_mask"], want["timestep_pad_mask"].astype(bool))
        sums = observation["image_primary"].astype(np.int64).sum(axis=(1, 2, 3))
        np.testing.assert_array_equal(sums, want["image_sum"])
        assert observation["timestep_pad_mask"].dtype == bool
        assert observation["timestep"].tolist() == [max(i - 2 + k, 0) for k in range(3)]


def test_action_chunks_match_the_reference(golden):
    inner = golden_env(golden, "rhc")
    env = ActionChunkWrapper(HistoryWrapper(inner, window_size=2), exec_horizon=2)
    env.reset()
    for call in range(3):
        want = {
            key.rsplit("/", 1)[-1]: value
            for key, value in golden.items()
            if f"wrappers/rhc/upstream/call{call}/" in key
        }
        observation, reward, terminated, _, info = env.step(want["actions_given"])
        assert reward == want["reward_sum"]
        assert terminated == want["done"]
        np.testing.assert_array_equal(info["rewards"], want["rewards"])
        assert len(info["observations"]) == want["n_observations"]
        np.testing.assert_array_equal([one["t"] for one in info["infos"]], want["info_t"])
        np.testing.assert_array_equal(observation["proprio"], want["proprio"])
        np.testing.assert_array_equal(observation["timestep_pad_mask"], want["timestep_pad_mask"].astype(bool))
    np.testing.assert_array_equal(inner.actions, golden["wrappers/rhc/upstream/actions_executed"])


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_temporal_ensemble_matches_the_reference(golden, weight):
    name = f"wrappers/temporal_ensemble_w{weight:g}"
    inner = tape()
    env = TemporalEnsembleWrapper(inner, length=4, exp_weight=weight)
    env.reset()
    for chunk in golden[f"{name}/in/action_chunks"]:
        env.step(chunk)
    np.testing.assert_allclose(inner.actions, golden[f"{name}/upstream/actions_executed"], atol=1e-5)


def assert_like_training(image, want):
    """The reference's pictures are noise, the worst case of Pillow's rounding and clipping between the two axes."""
    difference = np.abs(image.astype(int) - want.astype(int))
    assert difference.mean() < 0.5 and difference.max() <= 12


@pytest.mark.parametrize("case, area, key", [("resize", 0.9, "augmented_key"), ("resize_plain", None, "image")])
def test_resize_matches_the_reference(golden, case, area, key):
    areas = None if area is None else {"image_primary": area}
    env = ResizeImages(golden_env(golden, case), {"image_primary": (16, 16)}, areas)
    observation, _ = env.reset()
    assert_like_training(observation["image_primary"], golden[f"wrappers/{case}/upstream/{key}"])


def test_full_stack_matches_the_reference(golden):
    """Resize, history and ensemble together; proprio arrives normalised, as the policy's own statistics would do it."""
    raw = golden["wrappers/full_stack/in/env_proprio"]
    inner = golden_env(golden, "full_stack", (raw - GOLDEN_PROPRIO["mean"]) / (GOLDEN_PROPRIO["std"] + 1e-8))
    env = TemporalEnsembleWrapper(
        HistoryWrapper(ResizeImages(inner, {"image_primary": (16, 16)}, {"image_primary": 0.9}), 2), length=2
    )
    observation, _ = env.reset()
    for i, name in enumerate(["reset", "step0", "step1", "step2"]):
        if i:
            observation, *_ = env.step(golden["wrappers/full_stack/in/action_chunks"][i - 1])
        want = {k: golden[f"wrappers/full_stack/upstream/{name}/{k}"] for k in ("image_primary", "proprio")}
        np.testing.assert_allclose(observation["proprio"], want["proprio"], rtol=1e-5)
        assert_like_training(observation["image_primary"], want["image_primary"])
    np.testing.assert_allclose(inner.actions, golden["wrappers/full_stack/upstream/actions_executed"], atol=1e-5)


def test_resize_of_a_stack_equals_resize_of_each_and_same_size_is_untouched():
    images = np.random.default_rng(2).integers(0, 256, (3, 12, 10, 3), np.uint8)
    together = resize_image(images, (6, 8))
    np.testing.assert_array_equal(together, np.stack([resize_image(one, (6, 8)) for one in images]))
    assert resize_image(images, (12, 10)) is images
    constant = np.full((12, 10, 3), 77, np.uint8)
    assert (resize_image(constant, (5, 31), crop_area=0.5) == 77).all()


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        resize_image(np.zeros((4, 4, 3), np.float32), (2, 2))
    with pytest.raises(ValueError, match="crop_area"):
        resize_image(np.zeros((4, 4, 3), np.uint8), (2, 2), crop_area=1.5)
    with pytest.raises(ValueError, match=r"image_wrist.*image_primary"):
        ResizeImages(tape(), {"image_wrist": (8, 8)})


def test_history_starts_anew_at_reset():
    env = HistoryWrapper(tape(), window_size=2)
    env.reset()
    for _ in range(3):
        observation, *_ = env.step(np.zeros(2))
    assert observation["timestep"].tolist() == [2, 3]
    observation, _ = env.reset()
    assert observation["timestep_pad_mask"].tolist() == [False, True]
    np.testing.assert_array_equal(observation["proprio"][0], observation["proprio"][1])


def test_chunk_stops_at_the_end_of_the_episode():
    inner = tape(length=3)
    env = ActionChunkWrapper(inner, exec_horizon=2)
    env.reset()
    env.step(np.ones((4, 2)))
    _, reward, terminated, _, info = env.step(np.ones((4, 2)))
    assert terminated and info["rewards"] == [1.5] and reward == 1.5 and len(inner.actions) == 3


def test_ensemble_weights_favour_the_oldest_and_forget_at_reset():
    inner = tape()
    env = TemporalEnsembleWrapper(inner, length=2, exp_weight=1.0)
    env.reset()
    env.step(np.array([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]))
    env.step(np.array([[3.0, 3.0], [0.0, 0.0]]))
    old = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(inner.actions[1], old * 1.0 + (1 - old) * 3.0)
    env.reset()
    env.step(np.array([[5.0, 5.0], [0.0, 0.0]]))
    np.testing.assert_allclose(inner.actions[0], 5.0)


@pytest.mark.parametrize("wrapper", [ActionChunkWrapper, TemporalEnsembleWrapper])
def test_short_or_flat_chunks_are_refused(wrapper):
    env = wrapper(tape(), 3)
    env.reset()
    for bad in (np.zeros(2), np.zeros((2, 2))):
        with pytest.raises(ValueError, match=r"\(H, A\) with H >= \w+ = 3"):
            env.step(bad)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_wrapped_environments_pass_gymnasiums_checker():
    env = ActionChunkWrapper(HistoryWrapper(ResizeImages(tape(40), {"image_primary": (8, 8)}), 2), 3)
    check_env(env, skip_render_check=True)
