"""Closed-loop evaluation in a toy world: outcomes, bookkeeping, blind baselines, and independence of company."""

import dataclasses
import io

import gymnasium as gym
import jax
import numpy as np
import pytest
from PIL import Image

from octo_like.robot.intervals import difference_interval, success_interval
from octo_like.robot.record import BORDER, FAILURE_COLOUR, SUCCESS_COLOUR, encode_gif, join_views, write_gif
from octo_like.robot.rollout import evaluate, hide_images, sampling_keys
from tests.robot.toy import SIZE, LineEnv, LinePolicy

SEEDS = [1_000_000_000 + i for i in range(9)]


def assert_same(one, other):
    assert one.summary() == other.summary()
    np.testing.assert_array_equal(one.actions, other.actions)


def test_outcomes_come_in_the_order_of_the_seeds_and_follow_the_options():
    options = [{"task": "left" if i % 2 else "right"} for i in range(len(SEEDS))]
    finished = []
    episodes = evaluate(
        LinePolicy(), LineEnv, SEEDS, options=options, batch_size=4, unnormalize="line", progress=finished.append
    )
    assert [e.seed for e in episodes] == SEEDS
    assert [e.task for e in episodes] == [o["task"] for o in options]
    assert all(e.success for e in episodes)
    assert [e.flags["reached_left"] for e in episodes] == [o["task"] == "left" for o in options]
    assert sorted(e.seed for e in finished) == SEEDS
    for e in episodes:
        assert e.actions.shape == (e.steps, 1) and e.reward == -e.steps and e.frames is None
        assert e.instruction == f"go {e.task}"


def test_an_episode_depends_neither_on_its_company_nor_on_its_slot():
    reference = {e.seed: e for e in evaluate(LinePolicy(), LineEnv, SEEDS, batch_size=3)}
    assert len({e.steps for e in reference.values()}) > 1, "the episodes should differ in length"
    for seeds, batch_size in [(SEEDS[::-1], 5), (SEEDS[4:5], 1), (SEEDS, 32)]:
        for episode in evaluate(LinePolicy(), LineEnv, seeds, batch_size=batch_size):
            assert_same(episode, reference[episode.seed])


def test_the_noise_follows_the_seed_of_the_evaluation():
    a = evaluate(LinePolicy(), LineEnv, SEEDS[:3], rng_seed=0)
    b = evaluate(LinePolicy(), LineEnv, SEEDS[:3], rng_seed=1)
    assert all(not np.array_equal(x.actions[:3], y.actions[:3]) for x, y in zip(a, b, strict=True))


def test_the_policy_always_sees_the_same_batch_size():
    policy = LinePolicy()
    evaluate(policy, LineEnv, SEEDS, batch_size=4)
    evaluate(policy, LineEnv, SEEDS[:2], batch_size=4)
    assert {call["batch"] for call in policy.calls} == {4}


def test_history_and_padding_reach_the_policy():
    policy = LinePolicy(window=3)
    evaluate(policy, LineEnv, SEEDS[:1], batch_size=1, exec_horizon=1)
    first, second = (call["observations"] for call in policy.calls[:2])
    assert first["timestep_pad_mask"].tolist() == [[False, False, True]]
    assert second["timestep_pad_mask"].tolist() == [[False, True, True]]
    assert second["timestep"].tolist() == [[0, 0, 1]]
    assert first["proprio"].shape == (1, 3, 1)


class FeelingEnv(LineEnv):
    """The same world with two more sensors, of which policies may read none."""

    def __init__(self):
        super().__init__()
        sensors = {key: gym.spaces.Box(-np.inf, np.inf, (2, 3), np.float32) for key in ("touch", "heat")}
        self.observation_space = gym.spaces.Dict({**self.observation_space.spaces, **sensors})

    def _observe(self):
        values = np.full((2, 3), self.x, np.float32)
        return {**super()._observe(), "touch": values, "heat": values}


def test_other_sensors_reach_the_policies_that_read_them():
    policy = LinePolicy()
    policy.batch_spec = dataclasses.replace(policy.batch_spec, extra_observations={"touch": (2, 3)})
    evaluate(policy, FeelingEnv, SEEDS[:1], batch_size=1, exec_horizon=1)
    seen = policy.calls[1]["observations"]
    assert seen["touch"].shape == (1, 2, 2, 3) and "heat" not in seen
    np.testing.assert_array_equal(seen["touch"][..., 0, 0], seen["proprio"][..., 0])


def test_images_are_resized_to_what_the_policy_reads():
    episodes = evaluate(LinePolicy(image_size=8), LineEnv, SEEDS[:2], batch_size=2, record=1)
    assert all(e.success for e in episodes)
    assert episodes[0].frames[0].shape == (SIZE, SIZE, 3), "frames are recorded as the cameras saw them"


def test_only_the_asked_episodes_are_recorded_with_every_step():
    episodes = evaluate(LinePolicy(), LineEnv, SEEDS[:3], batch_size=2, record=2)
    assert [e.frames is not None for e in episodes] == [True, True, False]
    for e in episodes[:2]:
        assert len(e.frames) == e.steps + 1


class LookingEnv(LineEnv):
    """Black pictures while nobody looks; counts those that were drawn."""

    drawn = 0

    def __init__(self):
        super().__init__()
        self.looks = True

    def _observe(self):
        observation = super()._observe()
        if not self.looks:
            return {**observation, "image_primary": np.zeros_like(observation["image_primary"])}
        type(self).drawn += 1
        return observation


@pytest.mark.parametrize("window", [1, 2])
def test_pictures_that_the_policy_does_not_read_are_left_out(window):
    """The outcome is that of looking always; of a chunk of three, the last `window` are looked at."""
    always = evaluate(LinePolicy(window=window), LineEnv, SEEDS, batch_size=4, exec_horizon=3)
    LookingEnv.drawn = 0
    sometimes = evaluate(LinePolicy(window=window), LookingEnv, SEEDS, batch_size=4, exec_horizon=3)
    for one, other in zip(always, sometimes, strict=True):
        assert_same(one, other)
    looked = sum(1 + sum(t % 3 >= 3 - window for t in range(e.steps)) for e in sometimes)
    assert LookingEnv.drawn == looked < sum(1 + e.steps for e in sometimes)


def test_recorded_episodes_are_looked_at_in_every_step():
    LookingEnv.drawn = 0
    (episode,) = evaluate(LinePolicy(), LookingEnv, SEEDS[:1], exec_horizon=3, record=1)
    assert LookingEnv.drawn == len(episode.frames) == episode.steps + 1
    assert all(frame.any() for frame in episode.frames)


def test_blind_policies_fail():
    seeing = evaluate(LinePolicy(), LineEnv, SEEDS)
    vision = evaluate(LinePolicy(), LineEnv, SEEDS, blind="vision")
    language = evaluate(LinePolicy(), LineEnv, SEEDS, blind="language")
    assert np.mean([e.success for e in seeing]) == 1
    assert np.mean([e.success for e in vision]) == 0
    assert np.mean([e.success for e in language]) == 0
    assert all(e.instruction.startswith("go ") for e in language), "what was asked is still reported"


def test_hidden_images_are_black_and_marked_missing():
    images = np.full((2, 3, 4, 4, 3), 9, np.uint8)
    observations = {"image_primary": images, "proprio": np.ones((2, 3, 1))}
    hidden = hide_images(observations)
    assert not hidden["image_primary"].any() and not hidden["pad_mask_dict"]["image_primary"].any()
    assert hidden["pad_mask_dict"]["image_primary"].shape == (2, 3)
    np.testing.assert_array_equal(hidden["proprio"], observations["proprio"])
    assert images.all(), "the original is left alone"
    with pytest.raises(ValueError, match="no images"):
        hide_images({"proprio": np.ones((2, 3, 1))})


def test_an_endless_environment_is_stopped_and_closed():
    made = []

    def make():
        made.append(LineEnv(time_limit=None))
        return made[-1]

    (episode,) = evaluate(LinePolicy(noise=0.0), make, SEEDS[:1], blind="language", max_steps=30)
    assert not episode.success and episode.steps == 30
    assert len(made) == 1 and made[0].closed


def test_a_head_with_shorter_chunks_than_the_longest_is_executed_to_its_end():
    class TwoHeads(LinePolicy):
        def chunk_horizon(self, unnormalize):
            return {"line": 2}[unnormalize]

        def sample_actions(self, observations, tasks, **kwargs):
            return super().sample_actions(observations, tasks, **kwargs)[:, :2]

    (episode,) = evaluate(TwoHeads(), LineEnv, SEEDS[:1], unnormalize="line")
    assert episode.success
    with pytest.raises(ValueError, match=r"in 1\.\.2"):
        evaluate(TwoHeads(), LineEnv, SEEDS[:1], unnormalize="line", exec_horizon=3)


def test_keys_depend_on_all_their_parts_and_on_nothing_else():
    def data(*args):
        return np.asarray(jax.random.key_data(sampling_keys(*args)))

    base = data(0, [5, 6], [0, 0])
    np.testing.assert_array_equal(base[::-1], data(0, [6, 5], [0, 0]))
    np.testing.assert_array_equal(base[1:], data(0, [6], [0]))
    others = [data(1, [5], [0]), data(0, [5], [1]), data(0, [5 + 2**32], [0]), base[1:]]
    assert all(not np.array_equal(base[:1], other) for other in others)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"blind": "deaf"}, "valid: vision, language"),
        ({"exec_horizon": 4}, r"in 1\.\.3"),
        ({"exec_horizon": 2.5}, r"in 1\.\.3 .* got 2\.5"),
        ({"options": [{}]}, "2 seeds, 1 options"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"unnormalize": "bridge"}, "valid: line"),
    ],
)
def test_bad_arguments_name_the_valid_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(LinePolicy(), LineEnv, SEEDS[:2], **arguments)


def test_an_environment_without_the_policys_observations_is_refused():
    class Elsewhere(LineEnv):
        def __init__(self):
            super().__init__()
            self.observation_space = type(self.observation_space)({"camera": self.observation_space["image_primary"]})

    with pytest.raises(ValueError, match=r"has \['camera'\], policy reads \['image_primary', 'proprio'\]"):
        evaluate(LinePolicy(), Elsewhere, SEEDS[:1])


def test_gif_shows_every_frame_with_a_border_for_the_outcome(tmp_path):
    episodes = evaluate(LinePolicy(), LineEnv, SEEDS[:1], record=1)
    frames = episodes[0].frames
    for success, colour in [(True, SUCCESS_COLOUR), (False, FAILURE_COLOUR)]:
        path = write_gif(tmp_path / "deep" / "x.gif", frames, "put the red block on the plate", success, scale=8)
        with Image.open(path) as gif:
            assert gif.n_frames == len(frames)
            corner = np.array(gif.convert("RGB"))[1, 1]
            assert np.abs(corner.astype(int) - colour).max() < 12
            assert gif.width == SIZE * 8 + 2 * BORDER
    with pytest.raises(ValueError, match="no frames"):
        encode_gif([])
    assert Image.open(io.BytesIO(encode_gif(frames))).height == SIZE * 3 + 2 * BORDER


def test_views_of_different_sizes_stand_side_by_side_at_one_height():
    large = np.full((4, 6, 3), 9, np.uint8)
    small = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    joined = join_views([large, small])
    assert joined.shape == (4, 12, 3) and joined.dtype == np.uint8
    np.testing.assert_array_equal(joined[:, :6], large)
    np.testing.assert_array_equal(joined[:, 6:], small.repeat(2, axis=0).repeat(2, axis=1))
    odd = join_views([np.zeros((5, 5, 3), np.uint8), np.full((3, 2, 3), 7, np.uint8)])
    assert odd.shape == (5, 8, 3) and (odd[:, 5:] == 7).all(), "nothing is padded"
    np.testing.assert_array_equal(join_views([small]), small)


def test_wilson_interval():
    # 8 of 10 at 95%: the textbook values.
    low, high = success_interval([True] * 8 + [False] * 2, level=0.95)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert success_interval([True] * 20)[1] == 1.0 and success_interval([True] * 20)[0] > 0.85
    assert success_interval([False] * 20)[0] == 0.0
    with pytest.raises(ValueError, match="no episodes"):
        success_interval([])


def test_wilson_interval_covers_at_its_level():
    rng = np.random.default_rng(0)
    hits = [lo <= 0.7 <= hi for lo, hi in (success_interval(rng.random(100) < 0.7) for _ in range(1000))]
    assert 0.87 < np.mean(hits) < 0.93


def test_paired_difference_uses_the_pairs():
    rng = np.random.default_rng(0)
    b = rng.random(200) < 0.5
    a = b.copy()
    a[:20] = True
    low, high = difference_interval(a, b)
    assert low <= np.mean(a) - np.mean(b) <= high
    assert high - low < 0.08, "pairs that agree add no uncertainty"
    assert difference_interval(a, a) == (0.0, 0.0)
    with pytest.raises(ValueError, match="paired"):
        difference_interval(a, b[:-1])


def test_threads_change_nothing():
    reference = evaluate(LinePolicy(), LineEnv, SEEDS, batch_size=4)
    for one, other in zip(reference, evaluate(LinePolicy(), LineEnv, SEEDS, batch_size=4, threads=3), strict=True):
        assert_same(one, other)


def test_an_environment_that_fails_in_a_thread_is_heard_of_and_all_are_closed():
    made = []

    class Broken(LineEnv):
        def __init__(self):
            super().__init__()
            made.append(self)

        def step(self, action):
            raise OSError("the cable is out")

    with pytest.raises(OSError, match="the cable is out"):
        evaluate(LinePolicy(), Broken, SEEDS, batch_size=4, threads=2)
    assert len(made) == 4 and all(env.closed for env in made)
