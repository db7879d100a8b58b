"""What a mask declares absent has no effect on what a policy does, also on a released Octo; what is not finite is never
an action."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.normalization import compute_statistics
from octo_like.common.schema import BatchSpec, flatten, synthetic_batch, unflatten
from octo_like.model.octo import build_model, init_params, total_loss
from octo_like.model.tokenizers import valid_mask
from octo_like.model.tokens import TokenGroup
from octo_like.policy.policy import Policy
from octo_like.policy.program import Program
from octo_like.policy.program_export import export_program
from tests.model import light, tiny

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def released(shared):
    """name -> (policy, observation, task, head) of a release, every mask of which says that all is there."""
    found = {}
    for name, head in {"octo_tiny_diffusion": "action", "octo_tiny_film_map": "l1"}.items():
        folder = shared / "golden" / name
        given = unflatten(dict(np.load(folder / "io.npz")))["in"]
        for path, leaf in flatten({"observation": given["observation"], "task": given["task"]}):
            if "pad_mask" in path or path.endswith("attention_mask"):
                leaf[:] = 1
        found[name] = Policy.load_pretrained(folder), given["observation"], given["task"], head
    return found


def garbage(value, fill):
    """Other values of the same type; NaN or infinity where there are any."""
    if value.dtype == np.uint8:
        return value ^ 0x55
    return np.full_like(value, 7) if value.dtype.kind == "i" else np.full_like(value, fill)


# Of a release: (the mask, where it is False, what it hides), by the kind of thing.
HIDDEN = {
    "a camera": ("observation/pad_mask_dict/image_primary", (slice(1, None),), "observation/image_primary"),
    "a camera of two that one tokenizer reads": (
        "observation/pad_mask_dict/image_secondary",
        (0,),
        "observation/image_secondary",
    ),
    "proprioception": ("observation/pad_mask_dict/proprio", (slice(0, 2),), "observation/proprio"),
    "proprioception of one moment": ("observation/pad_mask_dict/proprio", (1, 0), "observation/proprio"),
    "dimensions of proprioception": (
        "observation/proprio_pad_mask",
        (slice(None), slice(None), 2),
        "observation/proprio",
    ),
    "a goal": ("task/pad_mask_dict/image_primary", (0,), "task/image_primary"),
    "an instruction": ("task/pad_mask_dict/language_instruction", (1,), "task/language_instruction"),
    "padding words": (
        "task/language_instruction/attention_mask",
        (slice(None), slice(3, None)),
        "task/language_instruction/input_ids",
    ),
    "a timestep": ("observation/timestep_pad_mask", (slice(None), 0), "observation/"),
}
CASES = {
    "octo_tiny_diffusion": ("a camera", "a goal", "an instruction", "padding words", "a timestep"),
    "octo_tiny_film_map": [kind for kind in HIDDEN if kind != "padding words"],
}


@pytest.mark.parametrize("name,kind", [(name, kind) for name, kinds in CASES.items() for kind in kinds])
def test_a_release_does_not_read_what_is_marked_missing(released, name, kind):
    """Bitwise, whatever stands there; without the mask the same change moves the actions."""
    policy, observation, task, head = released[name]
    mask_path, index, hidden = HIDDEN[kind]
    tree = dict(flatten({"observation": dict(observation), "task": dict(task)}))
    if mask_path == "observation/proprio_pad_mask":
        tree[mask_path] = np.ones(tree["observation/proprio"].shape, bool)
    masked = tree | {mask_path: tree[mask_path].copy()}
    masked[mask_path][index] = 0

    def changed(tree, fill):
        out = dict(tree)
        for path, value in tree.items():
            reads = path.startswith(hidden) and not path.endswith("attention_mask") and "timestep" not in path
            if reads and "pad_mask" not in path and "completed" not in path:
                out[path] = value.copy()
                out[path][index] = garbage(value[index], fill)
        return out

    def actions(tree):
        tree = unflatten(tree)
        return np.asarray(policy.sample_actions(tree["observation"], tree["task"], rng=KEY, head=head))

    want = actions(masked)
    for fill in (5.0, np.nan, np.inf):
        np.testing.assert_array_equal(actions(changed(masked, fill)), want)
    if kind != "a timestep":  # whose pictures the last one sees only through two layers
        assert np.abs(actions(changed(tree, 5.0)) - actions(tree)).max() > 1e-6


def test_a_sensor_marked_missing_is_as_one_that_is_not_there(released):
    """Of a release: its tokens are not read, in the rows where it is missing and in no other."""
    policy, observation, task, head = released["octo_tiny_film_map"]
    sample = lambda obs: np.asarray(policy.sample_actions(obs, task, rng=KEY, head=head))  # noqa: E731
    without = sample({key: value for key, value in observation.items() if key != "proprio"})
    present = np.array([[False, False], [True, True], [False, False]])
    pads = observation["pad_mask_dict"] | {"proprio": present}
    some, whole = sample(observation | {"pad_mask_dict": pads}), sample(observation)
    np.testing.assert_allclose(some[[0, 2]], without[[0, 2]], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(some[1], whole[1])


def test_the_program_of_a_release_does_not_read_it_either(released, tmp_path):
    policy, observation, task, head = released["octo_tiny_film_map"]
    program = Program(export_program(policy, tmp_path / "p", head=head, platforms=["cpu"]))
    given = {key: value for key, value in observation.items() if key != "proprio_pad_mask"}
    given["pad_mask_dict"] = given["pad_mask_dict"] | {"proprio": np.zeros((3, 2), bool)}
    want = program.sample_actions(given, task | {"timestep": np.zeros(3, np.int32)}, rng=KEY)
    np.testing.assert_allclose(want, policy.sample_actions(given, task, rng=KEY, head=head), rtol=1e-5, atol=1e-5)
    for fill in (5.0, np.nan):
        given["proprio"] = np.full_like(given["proprio"], fill)
        got = program.sample_actions(given, task | {"timestep": np.zeros(3, np.int32)}, rng=KEY)
        np.testing.assert_array_equal(got, want)


# -- a part of the user's own that says NaN where it says that nothing is ---------------------------------------------

SPEC = BatchSpec(
    window_size=2, action_horizon=2, action_dim=3, image_sizes={"primary": (16, 16)}, proprio_dim=3, language_length=6
)
FILL: dict[str, Any] = {"value": 0.0}  # what stands at masked tokens


class Spoiling(nn.Module):
    """Proprioception as one token, which is `FILL` where it is missing or before the episode."""

    obs_keys: tuple[str, ...]

    @nn.compact
    def __call__(self, observation, task, summaries=None):
        x = jnp.asarray(observation["proprio"], jnp.float32)
        valid = valid_mask(observation, "proprio", x.shape[:2]) & observation["timestep_pad_mask"]
        tokens = jnp.where(valid[..., None], nn.Dense(8)(x), FILL["value"])
        return TokenGroup(tokens[:, :, None], valid[..., None])


class SpoilingTask(nn.Module):
    """The instruction as one token, `FILL` where there is none."""

    @nn.compact
    def __call__(self, observation, task, summaries=None):
        ids = task["language_instruction"]["input_ids"]
        said = valid_mask(task, "language_instruction", ids.shape[:1])
        tokens = jnp.where(said[:, None], nn.Dense(8)(ids.astype(jnp.float32)), FILL["value"])
        return TokenGroup(tokens[:, None], said[:, None])


class SpoilingStem(nn.Module):
    """Features that are `FILL` where a picture is missing, which it recognises by its zeros."""

    @nn.compact
    def __call__(self, x, condition=None):
        there = jnp.any(x != 0, axis=(1, 2, 3), keepdims=True)
        return jnp.where(there, nn.Conv(8, (8, 8), (8, 8))(x), FILL["value"])


HEADS = {
    "diffusion": dict(kind="diffusion", readout="readout_action", num_steps=3, hidden_dim=8),
    "pooled": dict(kind="regression", readout="obs", use_map=True),
    "mean": dict(kind="regression", readout="obs"),
    "bins": dict(kind="bins", readout="readout_action", reads="all", num_bins=4, width=8, num_layers=1, num_heads=2),
}


def spoiling_config(compat):
    stem = dict(kind=f"{__name__}:SpoilingStem")
    image = dict(kind="image", stem=stem, obs_keys=("image_primary",), film_keys=())
    return dict(
        token_dim=16,
        max_window=2,
        repeat_task_tokens=True,
        octo_compat=compat,
        transformer=dict(num_layers=1, num_heads=2, mlp_dim=16),
        task_tokenizers=dict(words=dict(kind=f"{__name__}:SpoilingTask")),
        observation_tokenizers=dict(
            own=dict(kind=f"{__name__}:Spoiling", obs_keys=("proprio",)),
            primary=image,
            learned=image | dict(num_learned_tokens=2),
        ),
        readouts=dict(action=1),
        heads={name: head | dict(action_horizon=2, action_dim=3) for name, head in HEADS.items()},
    )


@pytest.mark.parametrize("compat", [False, True], ids=["own layout", "released layout"])
def test_what_a_part_computes_where_it_masks_ends_there(compat, monkeypatch):
    """Losses, gradients and actions of every head are finite, and the same bits whatever stands at masked tokens."""
    batch = synthetic_batch(SPEC, 4, seed=2)
    batch["observation"]["timestep_pad_mask"][0, 0] = False
    batch["observation"]["pad_mask_dict"]["proprio"][1] = False
    batch["observation"]["pad_mask_dict"]["image_primary"][2] = False
    batch["observation"]["image_primary"][2] = 0
    batch["task"]["pad_mask_dict"]["language_instruction"][3] = False
    model, keys = build_model(spoiling_config(compat)), jax.random.split(KEY, 4)
    params = init_params(model, SPEC, KEY)

    @jax.jit
    def everything(params, fill):
        monkeypatch.setitem(FILL, "value", fill)

        def loss(params):
            terms, _ = model.apply({"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"])
            return total_loss(model, terms, model.apply({}, batch, keys, method="counts"))

        given = {"params": params}, batch["observation"], batch["task"], keys
        return jax.value_and_grad(loss)(params), [model.apply(*given, head=head, method="sample") for head in HEADS]

    want = everything(params, 0.0)
    for leaf in jax.tree.leaves(want):
        assert np.isfinite(leaf).all()
    for fill in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, everything(params, fill), want)


# -- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["diffusion", "regression", "discrete", "bins"])
def test_actions_that_are_not_finite_are_an_error(head):
    """Also of heads that choose among bins, which make a number of NaN."""
    entries = {
        "diffusion": tiny.diffusion(),
        "regression": dict(kind="regression", readout="readout_action", action_horizon=3, action_dim=4),
        "discrete": dict(kind="discrete", readout="readout_action", action_horizon=3, action_dim=4, token_per=""),
        "bins": dict(kind="bins", readout="readout_action", action_horizon=3, action_dim=4, width=16, num_layers=1),
    }
    config = light.config(heads={"action": entries[head]}, task_tokenizers={})
    spec = BatchSpec.from_json(light.SPEC.to_json() | {"language_length": None})
    params = tiny.random_params(build_model(config), spec)
    params["octo_transformer"]["obs_proprio_projection"]["kernel"][0] = np.nan
    policy = Policy({"model": config, "batch_spec": spec.to_json()}, params, {})
    batch = synthetic_batch(spec, 2)
    batch["observation"]["timestep_pad_mask"][:, 0] = False
    batch["observation"]["pad_mask_dict"]["proprio"][0] = False
    given = batch["observation"], {"timestep": np.zeros(2, np.int32)}
    with pytest.raises(FloatingPointError, match="actions for row 0|actions for row 1"):
        policy.sample_actions(*given, rng=KEY)
    assert np.isnan(policy.sample_actions(*given, rng=KEY, check_finite=False)[1]).all()


def test_differentiating_and_tracing_need_a_flag(tmp_path):
    config = light.config(task_tokenizers={})
    spec = BatchSpec.from_json(light.SPEC.to_json() | {"language_length": None})
    statistics = {"arm": {"action": compute_statistics(np.random.default_rng(0).normal(0.1, 0.05, (100, 4)))}}
    policy = Policy(
        {"model": config, "batch_spec": spec.to_json()}, tiny.random_params(build_model(config), spec), statistics
    )
    batch, task = synthetic_batch(spec, 2), {"timestep": np.zeros(2, np.int32)}

    def total(proprio, **options):
        return policy.sample_actions(batch["observation"] | {"proprio": proprio}, task, rng=KEY, **options).sum()

    with pytest.raises(ValueError, match="traced or differentiated.*check_finite=False"):
        jax.grad(total)(batch["observation"]["proprio"])
    assert np.isfinite(jax.grad(lambda x: total(x, check_finite=False))(batch["observation"]["proprio"])).all()
    # An exported program looks at what it returns, whatever went wrong inside.
    policy.statistics["arm"]["action"]["std"][1] = np.nan
    task = {}
    program = Program(export_program(policy, tmp_path / "p", unnormalize="arm", platforms=["cpu"]))
    observation = {k: v for k, v in batch["observation"].items() if k in ("timestep_pad_mask",)}
    with pytest.raises(FloatingPointError, match="actions for row 0 are not finite"):
        program.sample_actions(observation, {"timestep": np.zeros(2, np.int32)}, rng=KEY)
