"""Parity with Octo-1.5 in its released format: every token group, head, loss and sample of the reference arrays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common import normalization
from octo_like.common.schema import flatten
from octo_like.model.octo import build_model
from octo_like.policy.octo_release import PretrainedError, load_release
from tests.model.golden_io import TOLERANCE, Golden

CASES = {
    "octo_tiny_diffusion": ("io", "io_window1", "io_window3", "io_missing_keys", "io_goal_only"),
    "octo_tiny_film_map": ("io", "io_window1"),
}
ALL = [(name, case) for name, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def golden(shared):
    return {name: Golden(shared / "golden" / name) for name in CASES}


def close(got, want, name):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("name,case", ALL)
def test_transformer_outputs(golden, name, case):
    checkpoint, tree = golden[name], golden[name].case(case)
    groups = checkpoint.apply(tree["in"]["observation"], tree["in"].get("task", {}))
    assert set(tree["out"]["group"]) <= set(groups)
    for group, want in tree["out"]["group"].items():
        close(groups[group].tokens, want["tokens"], group)
        np.testing.assert_array_equal(np.asarray(groups[group].mask, bool), np.asarray(want["mask"], bool), group)


@pytest.mark.parametrize("name", CASES)
def test_legacy_attention(golden, name):
    checkpoint, tree = golden[name], golden[name].case()
    model = build_model(checkpoint.config | {"legacy_attention": not checkpoint.config["legacy_attention"]})
    run = jax.jit(lambda p, *args: model.apply({"params": p}, *args, method="groups"))
    groups = run(checkpoint.params, tree["in"]["observation"], tree["in"]["task"])
    for group, want in tree["out"]["legacy_attention"]["group"].items():
        close(groups[group].tokens, want["tokens"], group)


@pytest.mark.parametrize("name,head", [("octo_tiny_diffusion", "action"), ("octo_tiny_film_map", "diff")])
def test_diffusion_head(golden, name, head):
    checkpoint, tree = golden[name], golden[name].case()
    draws, out = tree["in"]["draws"]["head"][head], tree["out"]["head"][head]
    action = draws.get("action", tree["in"]["action"])
    mask = draws.get("action_pad_mask", tree["in"]["action_pad_mask"])
    obs, task = tree["in"]["observation"], tree["in"]["task"]
    h, a = checkpoint.model.heads[head].action_horizon, checkpoint.model.heads[head].action_dim
    if name == "octo_tiny_film_map":
        a = 5
    action, mask = action[:, :, :h, :a], mask[:, :, :h, :a] & obs["timestep_pad_mask"][:, :, None, None]

    def run(module):
        groups = module.groups(obs, task)
        embedding = module.heads[head].embed(groups)
        results = {"embedding": embedding}
        results["pred_eps"] = module.heads[head].predict_noise(
            embedding, draws["eps"]["noisy_actions"], draws["eps"]["time"]
        )
        for case in ("loss", "loss_n4"):
            terms = module.heads[head].loss_terms(
                groups, action, mask.astype(np.float32), None, draws=(draws[case]["time"], draws[case]["noise"])
            )
            results[case] = {key: value / mask.sum() for key, value in terms.items()}
        for case in ("sample", "sample_embodiment_dim", "sample_shape2"):
            noise = out[case]["initial_noise"][..., -1, :], out[case]["step_noise"][..., -1, :]
            dim = out[case].get("embodiment_action_dim")
            valid = None if dim is None else np.arange(a) < dim
            shape = (2,) if case == "sample_shape2" else ()
            results[case] = module.heads[head].sample(groups, None, sample_shape=shape, valid=valid, noise=noise)
        return results

    got = checkpoint.apply(method=run)
    close(got["embedding"], out["embedding"], "embedding")
    close(got["pred_eps"], out["eps"]["pred_eps"], "pred_eps")
    for case in ("loss", "loss_n4"):
        close(got[case]["loss"], out[case]["loss"], case)
        close(got[case]["mse"], out[case]["metrics"]["mse"], case)
    for case in ("sample", "sample_embodiment_dim", "sample_shape2"):
        close(got[case], out[case]["actions"], case)


@pytest.mark.parametrize("head", ["action", "l1", "disc"])
def test_regression_and_discrete_heads(golden, head):
    checkpoint, tree = golden["octo_tiny_film_map"], golden["octo_tiny_film_map"].case()
    out, draws = tree["out"]["head"][head], tree["in"]["draws"]["head"].get(head, tree["in"])
    obs, task = tree["in"]["observation"], tree["in"]["task"]
    mask = draws["action_pad_mask"] & obs["timestep_pad_mask"][:, :, None, None]

    def run(module):
        groups = module.groups(obs, task)
        terms = module.heads[head].loss_terms(groups, draws["action"], mask.astype(np.float32), None)
        pred = module.heads[head].logits(groups) if head == "disc" else module.heads[head].predict(groups)
        return terms, pred, module.heads[head].embed(groups)

    terms, pred, embedding = checkpoint.apply(method=run)
    close(embedding, out["embedding"], "embedding")
    close(pred, out["pred"], "pred")
    for name, want in out["loss"]["metrics"].items():
        close(terms[name] / mask.sum(), want, name)
    if head == "disc":
        model = build_model(
            checkpoint.config | {"heads": {"disc": checkpoint.config["heads"]["disc"] | {"temperature": 0}}}
        )
        params = {k: v for k, v in checkpoint.params.items() if k in ("octo_transformer", "heads_disc")}
        greedy = jax.jit(lambda p: model.apply({"params": p}, obs, task, None, head="disc", method="sample"))(params)
        close(greedy, out["predict_action_argmax"], "argmax")
    else:
        sampled = checkpoint.apply(obs, task, None, head=head, method="sample")
        close(sampled, out["predict_action"], "predict_action")


@pytest.mark.parametrize("name", CASES)
def test_gradients(golden, name):
    checkpoint, tree = golden[name], golden[name].case()
    want = json.loads((checkpoint.directory / "io_grads.json").read_text())
    obs, task = tree["in"]["observation"], tree["in"]["task"]

    def losses(module):
        groups, found = module.groups(obs, task), []
        for head in want:
            draws = tree["in"]["draws"]["head"].get(head, {})
            action = draws.get("action", tree["in"]["action"])
            mask = draws.get("action_pad_mask", tree["in"]["action_pad_mask"])
            mask = mask & obs["timestep_pad_mask"][:, :, None, None]
            kwargs = {"draws": (draws["loss"]["time"], draws["loss"]["noise"])} if "loss" in draws else {}
            terms = module.heads[head].loss_terms(groups, action, mask.astype(np.float32), None, **kwargs)
            found.append(terms["loss"] / mask.sum())
        return jnp.stack(found)

    @jax.jit
    def values_and_gradients(params):
        """All losses, and the gradient of each: compiled once for all heads."""
        values, pull = jax.vjp(lambda p: checkpoint.model.apply({"params": p}, method=losses), params)
        return values, jax.vmap(pull)(jnp.eye(len(want)))[0]

    values, gradients = values_and_gradients(jax.tree.map(jnp.asarray, checkpoint.params))
    for i, (head, entry) in enumerate(want.items()):
        close(values[i], entry["loss"], head)
        for path, grads in flatten(gradients):
            grad = grads[i]
            stats = entry["params"].get(path) if "params" in entry else entry["grads"].get(path)
            if stats is None:
                continue
            norm = float(jnp.linalg.norm(grad))
            expected = stats["l2"] if "l2" in stats else stats["norm"]
            assert abs(norm - expected) <= 1e-4 * (1 + abs(expected)), f"{head} {path}: {norm} vs {expected}"


@pytest.mark.parametrize("kind", ["normal", "bounds"])
def test_sampled_actions_in_physical_units(golden, kind):
    """The model-level API: statistics give the number of action dimensions, the mask and the units."""
    checkpoint, tree = golden["octo_tiny_diffusion"], golden["octo_tiny_diffusion"].case()
    out, head = tree["out"]["sample_actions"], checkpoint.model.heads["action"]
    stats = {name: np.asarray(value) for name, value in out["stats"].items()}
    assert len(stats["mean"]) == head.action_dim

    def run(module):
        groups = module.octo_transformer(tree["in"]["observation"], tree["in"]["task"], only_last=head.readout)
        noise = out["initial_noise"][:, -1], out["step_noise"][:, :, -1]
        return module.heads["action"].sample(groups, None, noise=noise)

    actions = checkpoint.apply(method=run)
    close(actions, out["none"], "none")
    close(normalization.unnormalize(actions, stats, kind), out[kind], kind)


def test_not_a_release(tmp_path):
    (tmp_path / "something.txt").write_text("x")
    with pytest.raises(PretrainedError, match="something.txt"):
        load_release(tmp_path)
