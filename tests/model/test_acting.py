"""What training accepts, acting does: a head that could be trained and not sampled is refused by name before."""

import jax
import numpy as np
import pytest

from octo_like.common.parts import PartError
from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.model.heads import RegressionHead
from octo_like.model.octo import build_model, check_acting
from octo_like.policy.policy import Policy
from octo_like.robot.images import resize_image
from octo_like.robot.rollout import evaluate
from tests.model import light, tiny

KEY = jax.random.key(0)
HEAD = dict(kind="regression", readout="readout_action", action_horizon=3, action_dim=4)


class ReadsAnother(RegressionHead):
    """A head that is trained from a readout that it does not name."""

    def embed(self, groups, *, last_only=False):
        return super().embed({self.readout: groups["readout_value"]}, last_only=last_only)


def test_a_head_that_reads_another_group_than_it_says_is_refused_before_training():
    config = light.config(
        readouts=dict(action=1, value=1), heads={"action": HEAD | dict(kind=f"{__name__}:ReadsAnother")}
    )
    model = build_model(config)
    batch, keys = synthetic_batch(light.SPEC, 1), jax.random.split(KEY, 1)
    params = tiny.random_params(model, light.SPEC)  # training passes
    jax.eval_shape(
        lambda: model.apply({"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"])
    )
    message = "head 'action' .*ReadsAnother. reads group 'readout_value'; .*needed_group 'readout_action'"
    with pytest.raises(PartError, match=message):
        check_acting(model, light.SPEC)


@pytest.mark.parametrize("readout", ["task", "task_language", "readout_acton", "obs_task"])
@pytest.mark.parametrize("kind", ["regression", "diffusion", "bins"])
def test_a_readout_that_is_no_group_of_every_timestep_is_refused(kind, readout):
    with pytest.raises(
        PartError, match=rf"model.heads.action.readout: no group '{readout}' at every timestep; .*valid"
    ):
        build_model(light.config(heads={"action": HEAD | dict(kind=kind, readout=readout)}))


@pytest.mark.parametrize("readout", ["readout_action", "obs", "obs_proprio", "obs_task_language"])
def test_groups_of_every_timestep_can_be_read(readout):
    check_acting(build_model(light.config(heads={"action": HEAD | dict(readout=readout)})), light.SPEC)


@pytest.mark.parametrize("options", [dict(clip="y"), dict(sampler="ddim", sample_steps=9)])
def test_options_of_sampling_are_checked_before_training(options):
    head = tiny.diffusion(**options)
    with pytest.raises(ValueError, match="unknown clip 'y'|sample_steps must be in 1..num_steps=5, got 9"):
        check_acting(build_model(light.config(heads={"action": head})), light.SPEC)


# -- what is given to a policy ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    tokenizer = TextTokenizer.load("builtin", tiny.SPEC.language_length)
    config = tiny.config()
    config["task_tokenizers"]["language"]["vocab_size"] = 0
    params = tiny.random_params(build_model(config, vocab_size=tokenizer.vocab_size))
    return Policy({"model": config, "batch_spec": tiny.SPEC.to_json()}, params, {}, tokenizer)


@pytest.fixture(scope="module")
def batch():
    return synthetic_batch(tiny.SPEC, 2, seed=4, language_vocab=tiny.VOCAB)


def without(tree, key):
    return {name: value for name, value in tree.items() if name != key}


WRONG = {
    "reads no 'propio'; did you mean 'proprio'": lambda o: without(o, "proprio") | {"propio": o["proprio"]},
    "reads no 'image_wrst'; did you mean 'image_wrist'": lambda o: o | {"image_wrst": o["image_wrist"]},
    "pad_mask_dict: the policy reads no 'image_primry'": lambda o: (
        o | {"pad_mask_dict": {"image_primry": o["timestep_pad_mask"]}}
    ),
    r"timestep_pad_mask: expected \(B, W\) = \(2, 2\) bool, got \(2, 2\) float64": lambda o: (
        o | {"timestep_pad_mask": np.ones((2, 2))}
    ),
    "timestep_pad_mask: expected a NumPy or JAX array, got a list": lambda o: (
        o | {"timestep_pad_mask": [[True, True]] * 2}
    ),
    r"pad_mask_dict/proprio: expected \(B, W\) = \(2, 2\) bool, got \(2, 2\) float64": lambda o: (
        o | {"pad_mask_dict": {"proprio": np.ones((2, 2))}}
    ),
    r"proprio_pad_mask: expected \(B, W, P\) = \(2, 2, 5\) bool, got \(2, 2, 5\) float32": lambda o: (
        o | {"proprio_pad_mask": np.ones((2, 2, 5), np.float32)}
    ),
    r"proprio_pad_mask: expected \(B, W, P\) = \(2, 2, 5\) bool, got \(2, 2\) bool": lambda o: (
        o | {"proprio_pad_mask": o["timestep_pad_mask"]}
    ),
    "proprio_pad_mask: expected a NumPy or JAX array, got a list": lambda o: (
        o | {"proprio_pad_mask": o["proprio_pad_mask"].tolist()}
    ),
    "pad_mask_dict: expected a dict": lambda o: o | {"pad_mask_dict": [True]},
    "at least one row": lambda o: jax.tree.map(lambda leaf: leaf[:0], o),
    "channels come first": lambda o: o | {"image_primary": np.moveaxis(o["image_primary"], -1, -3)},
    "without pixels": lambda o: o | {"image_primary": np.zeros((2, 2, 0, 0, 3), np.uint8)},
    r"image_primary: expected .* uint8, got .* <U1": lambda o: o | {"image_primary": np.full((2, 2, 32, 32, 3), "a")},
    "proprio: expected an array of numbers": lambda o: o | {"proprio": [["a"]]},
    "proprio: expected an array of numbers, got \\[None": lambda o: o | {"proprio": [None] * 2},
    "proprio: expected an array of numbers, got \\['1": lambda o: o | {"proprio": ["1", "2"]},
    "proprio: expected an array of numbers, got one of object": lambda o: (
        o | {"proprio": np.full(o["proprio"].shape, None)}
    ),
    "proprio: expected an array of numbers, got one of [|]S1": lambda o: (
        o | {"proprio": np.full(o["proprio"].shape, b"1")}
    ),
    "proprio: expected an array of numbers, got one of <U1": lambda o: (
        o | {"proprio": np.full(o["proprio"].shape, "a")}
    ),
    "proprio: expected an array of numbers, got one of complex64": lambda o: (
        o | {"proprio": o["proprio"] + np.complex64(1j)}
    ),
    "observations must be a dict": lambda o: 5,
}


def test_sensors_of_other_number_types_are_read(policy, batch):
    whole = batch["observation"] | {"proprio": np.round(batch["observation"]["proprio"])}
    wanted = policy.sample_actions(whole, batch["task"], rng=KEY)
    for dtype in (jax.numpy.bfloat16, np.int16, np.float64):
        other = whole | {"proprio": jax.numpy.asarray(whole["proprio"].astype(dtype))}
        np.testing.assert_array_equal(policy.sample_actions(other, batch["task"], rng=KEY), wanted)


@pytest.mark.parametrize("message", WRONG)
def test_observations_that_do_not_fit_are_named(policy, batch, message):
    with pytest.raises(ValueError, match=message):
        policy.sample_actions(WRONG[message](batch["observation"]), batch["task"], rng=KEY)


WRONG_TASKS = {
    "reads no 'language_instructon'; did you mean 'language_instruction'": lambda t: t | {"language_instructon": 1},
    "pad_mask_dict: the policy reads no 'image_primry'": lambda t: t | {"pad_mask_dict": {"image_primry": 1}},
    "2 observations but 3 tasks .task/image_primary": lambda t: (
        t | {"image_primary": np.zeros((3, 32, 32, 3), np.uint8)}
    ),
    "expected a dict of input_ids and attention_mask": lambda t: t | {"language_instruction": {"input_ids": 1}},
    r"image_primary: expected .* got .* float64": lambda t: t | {"image_primary": np.zeros((2, 32, 32, 3))},
}


@pytest.mark.parametrize("message", WRONG_TASKS)
def test_tasks_that_do_not_fit_are_named(policy, batch, message):
    with pytest.raises(ValueError, match=message):
        policy.sample_actions(batch["observation"], WRONG_TASKS[message](batch["task"]), rng=KEY)


def test_arguments_that_do_not_fit_are_named(policy, batch):
    def refused(message, rng=KEY, **options):
        with pytest.raises(ValueError, match=message):
            policy.sample_actions(batch["observation"], batch["task"], rng=rng, **options)

    refused("unnormalize must be the name of a dataset, or None; got {", unnormalize={"mean": 0})
    refused("sample_shape: each size must be a whole number, got 2.5", sample_shape=(2.5,))
    refused("continuing must be a Continuation", continuing=np.zeros((2, 3, 4)))
    for rng in (
        np.zeros((), np.uint32),
        np.zeros(3, np.uint32),
        np.array([None], object),
        np.zeros((2, 2, 2), np.uint32),
    ):
        refused("rng must be a key", rng=rng)


def test_goals_and_texts_that_do_not_fit_are_named(policy):
    for message, arguments in {
        "no UTF-8": dict(texts=["\ud800"]),
        "texts must be a list of instructions": dict(texts=np.array("a")),
        "texts must be strings, at least one": dict(texts=np.array([["a", "b"]])),
        "subtasks must be strings, at least one": dict(subtasks=np.array([1, 2])),
        "goals/image_primary: all input arrays must have the same shape": dict(
            goals={"image_primary": [np.zeros((32, 32, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)]}
        ),
        "no goal 'image_primry'; did you mean 'image_primary'": dict(goals={"image_primry": np.zeros((8, 8, 3))}),
        "channels come first": dict(goals={"image_primary": np.zeros((3, 32, 32), np.uint8)}),
        "without pixels": dict(goals={"image_primary": np.zeros((0, 0, 3), np.uint8)}),
        "at least one row": dict(goals={"image_primary": np.zeros((0, 32, 32, 3), np.uint8)}),
        "expected a NumPy or JAX array, got a list": dict(goals={"image_primary": [0]}),
        "goals must be a dict": dict(goals=np.zeros((1, 32, 32, 3), np.uint8)),
    }.items():
        with pytest.raises(ValueError, match=message):
            policy.create_tasks(**arguments)


@pytest.mark.parametrize("as_given", [tuple, np.array, lambda texts: np.array(texts, object)])
def test_arrays_of_texts_and_lists_of_goals_are_tasks(policy, as_given):
    pictures = synthetic_batch(tiny.SPEC, 2)["task"]["image_primary"]
    want = policy.create_tasks(["lift the cup", ""], {"image_primary": pictures})
    got = policy.create_tasks(as_given(["lift the cup", ""]), {"image_primary": list(pictures)})
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got["pad_mask_dict"]["language_instruction"].tolist() == [True, False]


def test_what_is_left_among_observations_of_a_batch_is_accepted(policy, batch):
    """Octo's bookkeeping and the goal's sensors may stand there: nothing of them is read."""
    more = {"timestep": np.zeros((2, 2), np.int64), "task_completed": np.zeros((2, 2, 3), bool)}
    pads = batch["observation"]["pad_mask_dict"] | {"timestep": np.ones((2, 2), bool)}
    goal = {"proprio": np.zeros((2, 5), np.float32), "task_completed": np.zeros((2, 3), bool)}
    want = policy.sample_actions(batch["observation"], batch["task"], rng=KEY)
    got = policy.sample_actions(batch["observation"] | more | {"pad_mask_dict": pads}, batch["task"] | goal, rng=KEY)
    np.testing.assert_array_equal(got, want)


def test_pictures_and_numbers_of_rollouts_that_do_not_fit_are_named(policy):
    for message, image in {
        "has 64 channels; the channels come last": np.zeros((3, 48, 64), np.uint8),
        "has no pixels": np.zeros((0, 0, 3), np.uint8),
    }.items():
        with pytest.raises(ValueError, match=message):
            resize_image(image, (32, 32))
    for name, value in dict(exec_horizon=2.5, batch_size=1.5, plan_every=0, max_steps="a", record=-1).items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            evaluate(policy, lambda: None, [0], **{name: value})


def test_a_batch_spec_of_a_policy_says_whole_numbers():
    with pytest.raises(ValueError, match="action_horizon must be a whole number, got 2.5"):
        BatchSpec(1, 2.5, 4, image_sizes={})
