"""`Policy.sample_actions(continuing=...)`: a previous chunk in the robot's units, whatever the model's are."""

import dataclasses

import jax
import numpy as np
import pytest

from octo_like.common.chunks import METHODS, Continuation
from octo_like.common.normalization import compute_statistics
from octo_like.common.text import TextTokenizer
from octo_like.model.octo import build_model, init_params
from octo_like.policy.policy import Policy
from tests.model import light, tiny

H, A, P = 6, 4, 5
HEAD = dict(kind="flow", readout="readout_action", action_horizon=H, action_dim=A, hidden_dim=16, sample_steps=4)


@pytest.fixture(scope="module")
def policy():
    tokenizer = TextTokenizer.load("builtin", 6)
    model = light.config(heads={"action": HEAD | dict(max_delay=2)})
    model["task_tokenizers"]["language"]["vocab_size"] = tokenizer.vocab_size
    spec = dataclasses.replace(light.SPEC, action_horizon=H)
    rng = np.random.default_rng(0)
    built = build_model(model, vocab_size=tokenizer.vocab_size)
    shapes = jax.eval_shape(lambda: init_params(built, spec, jax.random.key(0)))
    params = tiny.random_values(shapes)

    def statistics(dims, **more):
        numbers = rng.normal(size=(50, dims)).astype(np.float32) * 0.03 + 0.5
        return {
            "action": compute_statistics(numbers, [True] * (dims - 1) + [False]),
            "proprio": compute_statistics(rng.normal(size=(50, P)).astype(np.float32)),
            **more,
        }

    named = {
        "plain": statistics(3),
        "bounds": statistics(4, normalization="bounds"),
        "relative": statistics(4, relative_to=(2, None, 0, None)),
    }
    return Policy({"model": model, "batch_spec": spec.to_json()}, params, named, tokenizer)


def observations(rows=3, moved=0.0):
    """`moved`: how far the robot is from where it was, physical units."""
    rng = np.random.default_rng(0)
    proprio = rng.normal(size=(rows, 2, P)) + moved * rng.normal(size=(rows, 2, P))
    return {"proprio": proprio.astype(np.float32), "timestep_pad_mask": np.ones((rows, 2), bool)}


@pytest.mark.parametrize("dataset", ["plain", "bounds", "relative", None])
@pytest.mark.parametrize("method", METHODS)
def test_the_given_actions_come_back_in_the_robots_units(policy, dataset, method):
    """Also beyond the bounds of a normalisation that clips, and after the robot has moved."""
    tasks, rng = policy.create_tasks(texts=["go"] * 3), jax.random.key(0)
    arguments = dict(rng=rng, unnormalize=dataset)
    before = np.asarray(policy.sample_actions(observations(), tasks, **arguments))
    plain = np.asarray(policy.sample_actions(observations(moved=0.03), tasks, **arguments))
    how = Continuation(before, [1, 2, H], [2, 1, 0], method)
    after = np.asarray(policy.sample_actions(observations(moved=0.03), tasks, continuing=how, **arguments))
    np.testing.assert_allclose(after[0, :2], before[0, 1:3], atol=2e-5)
    np.testing.assert_allclose(after[1, :1], before[1, 2:3], atol=2e-5)
    np.testing.assert_allclose(after[2], plain[2], atol=2e-4)  # nothing to continue
    if method == "trained":
        assert np.abs(after[0, 2:5] - before[0, 3:]).max() > 1e-3


def test_other_delays_do_not_compile_again(policy):
    tasks, rng = policy.create_tasks(texts=["go"] * 3), jax.random.key(0)
    previous = np.zeros((3, H, 3), np.float32)
    sizes = []
    for executed, delay in ((1, 2), ([1, 2, 3], [0, 1, 2]), (np.int32(H), 0)):
        how = Continuation(previous, executed, delay, max_weight=1.0 + np.max(executed))
        policy.sample_actions(observations(), tasks, rng=rng, unnormalize="plain", continuing=how)
        sizes.append(policy.sample_program._cache_size())
    assert len(set(sizes)) == 1


def test_what_cannot_be_continued_is_said(policy):
    tasks, rng = policy.create_tasks(texts=["go"] * 3), jax.random.key(0)
    chunk = np.zeros((3, H, 3), np.float32)
    for message, how in {
        r"previous chunk has shape \(3, 6, 4\); expected \(3, 6, 3\)": Continuation(np.zeros((3, H, 4)), 1),
        r"previous chunk has shape \(1, 6, 3\)": Continuation(chunk[:1], 1),
        "at most max_delay=2 given": Continuation(chunk, 1, 3, "trained"),
    }.items():
        with pytest.raises(ValueError, match=message):
            policy.sample_actions(observations(), tasks, rng=rng, unnormalize="plain", continuing=how)
    assert policy.continuation_methods("plain") == {"jacobian_free": H, "vjp": H, "trained": 2}
