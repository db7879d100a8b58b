"""`OctoModel`: code written for Octo gets what `Policy` gives, or an error that says where it is here."""

import jax
import numpy as np
import pytest

import octo_like
from octo_like.common.normalization import compute_statistics, normalize
from octo_like.common.schema import synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.model.octo import build_model
from octo_like.policy.policy import Policy
from tests.model import tiny


@pytest.fixture(scope="module")
def policy():
    rng = np.random.default_rng(0)
    config = tiny.config()
    tokenizer = TextTokenizer.load("builtin", tiny.SPEC.language_length)
    config["task_tokenizers"]["language"]["vocab_size"] = 0
    params = tiny.random_params(build_model(config, vocab_size=tokenizer.vocab_size))
    statistics = {
        "arm": {
            "action": compute_statistics(rng.normal(3.0, 2.0, (100, 4)), [True, True, True, False]),
            "proprio": compute_statistics(rng.normal(1.0, 0.5, (100, 5))),
            "normalization": "normal",
        },
        "small": {"action": compute_statistics(rng.normal(0.0, 1.0, (100, 2))), "normalization": "bounds"},
    }
    return Policy({"model": config, "batch_spec": tiny.SPEC.to_json()}, params, statistics, tokenizer)


@pytest.fixture(scope="module")
def model(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "policy"
    policy.save_pretrained(folder)
    return octo_like.OctoModel.load_pretrained(str(folder))


@pytest.fixture
def observation():
    return synthetic_batch(tiny.SPEC, 2, seed=4)["observation"]


def test_the_actions_are_those_of_the_policy(policy, model, observation):
    """Octo's caller normalises the proprioception; `Policy` does it itself."""
    texts = ["reach the red block", "reach the blue block"]
    tasks, wanted_tasks = model.create_tasks(texts=texts), policy.create_tasks(texts=texts)
    rng = jax.random.PRNGKey(5)
    got = model.sample_actions(observation, tasks, rng=rng, train=False, argmax=False, temperature=1.0)
    np.testing.assert_array_equal(got, policy.sample_actions(observation, wanted_tasks, rng=rng))
    units = {**observation, "proprio": np.asarray(observation["proprio"]) * 0.5 + 1.0}
    normalised = {**observation, "proprio": normalize(units["proprio"], policy.statistics["arm"]["proprio"])}
    statistics = model.dataset_statistics["arm"]["action"]
    got = model.sample_actions(normalised, tasks, unnormalization_statistics=statistics, rng=rng, sample_shape=(2,))
    want = policy.sample_actions(units, wanted_tasks, rng=rng, unnormalize="arm", sample_shape=(2,))
    assert got.shape == (2, 2, 3, 4)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_goals_come_first_and_a_pad_mask_may_be_given_apart(model, observation):
    goal = np.zeros((2, 32, 32, 3), np.uint8)
    tasks = model.create_tasks({"image_primary": goal})
    assert tasks["pad_mask_dict"]["image_primary"].all()
    rng, pad = jax.random.PRNGKey(0), np.array([[False, True], [True, True]])
    apart = {key: value for key, value in observation.items() if key != "timestep_pad_mask"}
    got = model.sample_actions(apart, tasks, timestep_pad_mask=pad, rng=rng)
    np.testing.assert_array_equal(got, model.sample_actions({**apart, "timestep_pad_mask": pad}, tasks, rng=rng))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rng": None}, ValueError, r"needs rng=jax.random.PRNGKey\(seed\)"),
        ({"unnormalization_statistics": "arm"}, ValueError, r"not a name; valid: dataset_statistics\['arm'\]"),
        ({"unnormalization_statistics": {"action": {}}}, ValueError, r"add \['action'\]"),
        ({"unnormalization_statistics": {"mean": 0, "std": 1}}, ValueError, "none of this policy's datasets"),
        ({"argmax": True}, TypeError, "temperature=0 in its config"),
        ({"temperature": 0.5}, TypeError, "setting of a discrete head"),
        ({"train": True}, TypeError, "dropout"),
        ({"steps": 3}, TypeError, "no argument 'steps'"),
    ],
)
def test_what_means_nothing_here_is_refused(model, observation, change, error, message):
    tasks = model.create_tasks(texts=["a", "b"])
    with pytest.raises(error, match=message):
        model.sample_actions(observation, tasks, **{"rng": jax.random.PRNGKey(0), **change})


def test_other_places_are_named(model, observation):
    small = model.dataset_statistics["small"]["action"]
    given = {key: value for key, value in observation.items() if not key.startswith("proprio")}
    tasks, rng = model.create_tasks(texts=["a", "b"]), jax.random.PRNGKey(0)
    with pytest.raises(TypeError, match="trained with 'bounds' for 'small'"):
        model.sample_actions(given, tasks, small, rng=rng, normalization_type="normal")
    assert model.sample_actions(given, tasks, small, rng=rng, normalization_type="bounds").shape == (2, 3, 2)
    with pytest.raises(ValueError, match="renamed in Octo 1.5: call it timestep_pad_mask"):
        model.sample_actions({**given, "pad_mask": 1}, tasks, rng=rng)
    with pytest.raises(AttributeError, match="OctoModel.policy.model is the Flax module"):
        model.module  # noqa: B018
    assert not hasattr(model, "nonsense") and model.get_pretty_spec() == model.policy.get_pretty_spec()
