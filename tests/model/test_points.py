"""The auxiliary loss of named things, and what came with it: ordered instructions, early FiLM, norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.model.octo import build_model, init_params, total_loss

WIDTH = 16


def spec(**changes):
    fields = dict(
        window_size=2,
        action_horizon=2,
        action_dim=3,
        image_sizes={"primary": (16, 16)},
        goal_images=("primary",),
        proprio_dim=3,
        language_length=6,
        points=("cup", "plate"),
    )
    return BatchSpec(**(fields | changes))


def config(**changes):
    small = dict(kind="language", encoder="small", max_length=6, num_layers=0)
    stem = dict(kind="small", patch_size=8, features=(32,), num_features=8, use_film=True, early_film=True)
    return (
        dict(
            token_dim=WIDTH,
            max_window=2,
            transformer=dict(num_layers=1, num_heads=2, mlp_dim=32),
            task_tokenizers=dict(
                language=dict(**small, dim=8), sentence=dict(**small, dim=12, pool="ngrams", vocab_size=100)
            ),
            observation_tokenizers=dict(
                primary=dict(
                    kind="image",
                    stem=stem,
                    obs_keys=("image_primary",),
                    goal_keys=("image_primary",),
                    film_keys=("task_sentence",),
                )
            ),
            readouts=dict(action=1),
            heads=dict(action=dict(kind="regression", readout="readout_action", action_horizon=2, action_dim=3)),
            auxiliaries=dict(
                points=dict(kind="points", readout="readout_action", names=("cup", "plate"), weight=3.0),
            ),
        )
        | changes
    )


@functools.cache
def as_configured():
    model = build_model(config(), vocab_size=100)
    return model, init_params(model, spec(), jax.random.key(0))


def made(**changes):
    if changes:
        model = build_model(config(**changes), vocab_size=100)
        params = init_params(model, spec(), jax.random.key(0))
    else:
        model, params = as_configured()
    batch = synthetic_batch(spec(), 4, seed=1)
    rng = np.random.default_rng(0)
    batch["points"] = rng.uniform(0, 1, (4, 2, 2, 2)).astype(np.float32)
    batch["points_pad_mask"] = rng.random((4, 2, 2)) < 0.6
    batch["observation"]["timestep_pad_mask"] = np.array([[False, True]] + [[True, True]] * 3)
    return model, params, batch


def terms_of(model, params, batch):
    @jax.jit
    def terms(params, batch):
        keys = jax.random.split(jax.random.key(1), len(batch["sample_id"]))
        return model.apply({"params": params}, batch, keys, False, method="loss_terms", mutable=["by_sample"])[0]

    return terms(params, batch)


def groups_of(model, params, batch):
    run = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, method="groups"))
    return run(params, batch["observation"], batch["task"])


def test_loss_is_the_masked_squared_error_of_the_readout_s_linear_map():
    model, params, batch = made()
    terms = terms_of(model, params, batch)["points"]
    groups = groups_of(model, params, batch)
    readout = np.asarray(groups["readout_action"].tokens, np.float64).mean(-2)
    layer = params["auxiliaries_points"]["project"]
    raw = readout @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
    loss = error = count = 0.0
    for b in range(4):
        for w in range(2):
            for k in range(2):
                if batch["points_pad_mask"][b, w, k] and batch["observation"]["timestep_pad_mask"][b, w]:
                    wanted = 2 * batch["points"][b, w, k].astype(np.float64) - 1  # the image reaches from -1 to 1
                    difference = raw[b, w, 2 * k : 2 * k + 2] - wanted
                    loss += (difference**2).mean()
                    error += np.hypot(*difference) / 2
                    count += 1
    np.testing.assert_allclose([terms["loss"], terms["error"], terms["count"]], [loss, error, count], rtol=1e-5)
    assert float(model.apply({}, batch, method="counts")["points"]) == count


def test_its_weight_is_that_of_the_total():
    model, params, batch = made()
    terms = terms_of(model, params, batch)
    counts = model.apply({}, batch, method="counts")
    want = sum(weight * terms[name]["loss"] / counts[name] for name, weight in (("action", 1.0), ("points", 3.0)))
    np.testing.assert_allclose(total_loss(model, terms, counts), want, rtol=1e-6)


def test_what_is_not_labelled_does_not_matter_not_even_nan():
    model, params, batch = made()

    @jax.jit
    @jax.grad
    def slope(params, batch):
        return total_loss(model, terms_of(model, params, batch), model.apply({}, batch, method="counts"))

    def gradient(batch):
        return slope(params, batch)

    spoilt = {**batch, "points": np.where(batch["points_pad_mask"][..., None], batch["points"], np.nan)}
    jax.tree.map(np.testing.assert_array_equal, gradient(batch), gradient(spoilt))


@pytest.mark.parametrize("how", ["absent", "masked"])
def test_without_labels_nothing_is_learned_from_it(how):
    model, params, batch = made()
    if how == "absent":
        batch = {key: value for key, value in batch.items() if not key.startswith("points")}
    else:
        batch["points_pad_mask"] = np.zeros_like(batch["points_pad_mask"])

    def loss(params):
        terms = terms_of(model, params, batch)
        return terms["points"]["loss"], terms

    (value, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value == 0 and terms["points"]["count"] == 0 and np.isfinite(terms["action"]["loss"])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_mistakes_name_what_is_valid():
    with pytest.raises(ValueError, match=r"auxiliaries.boxes: unknown kind 'boxes'; valid: \['points', 'text'\]"):
        build_model(config(auxiliaries=dict(boxes=dict(kind="boxes"))), vocab_size=100)
    with pytest.raises(ValueError, match="auxiliaries.action: there is a head of that name"):
        build_model(config(auxiliaries=dict(action=dict(kind="points", readout="x", names=("a",)))), vocab_size=100)
    wrong = dict(points=dict(kind="points", readout="readout_acton", names=("cup", "plate")))
    with pytest.raises(ValueError, match="no group 'readout_acton' at every timestep; did you mean 'readout_action'"):
        made(auxiliaries=wrong)
    bad = config()
    bad["observation_tokenizers"]["primary"]["film_keys"] = ("task_sentense",)
    with pytest.raises(ValueError, match=r"no 'task_sentense'; valid: \['task', 'task_language', 'task_sentence'\]"):
        init_params(build_model(bad, vocab_size=100), spec(), jax.random.key(0))


# ---------------------------------------------------------------- instructions in order


def sentence(model, params, ids, mask):
    """The token of the group "sentence" before the transformer: (B, 12)."""
    task = {"language_instruction": {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}}
    tokenizer = model.octo_transformer.task_tokenizers["sentence"]
    scope = params["octo_transformer"]["task_tokenizers_sentence"]
    return np.asarray(tokenizer.clone(parent=None).apply({"params": scope}, None, task).tokens[:, 0])


def test_ngrams_are_a_convolution_and_its_maximum():
    model, params, _ = made()
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), params["octo_transformer"]["task_tokenizers_sentence"])
    ids, mask = np.array([[5, 9, 7, 1, 0, 0], [5, 1, 0, 0, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    words = own["embedding"]["embedding"][ids] + own["pos_embedding"][0]
    norm = lambda x, p: (x - x.mean()) / np.sqrt(x.var() + 1e-6) * p["scale"] + p["bias"]  # noqa: E731
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    got = sentence(model, params, ids, mask)
    for row in range(2):
        length, best = int(mask[row].sum()), None
        heard = np.stack([norm(word, own["encoder"]["encoder_norm"]) for word in words[row, :length]])
        padded = np.concatenate([heard, np.zeros((2, 12))])
        for start in range(length):
            gram = gelu(padded[start : start + 3].reshape(-1) @ own["ngrams"]["kernel"] + own["ngrams"]["bias"])
            best = gram if best is None else np.maximum(best, gram)
        want = norm(best @ own["ngrams_out"]["kernel"] + own["ngrams_out"]["bias"], own["pool_out_norm"])
        np.testing.assert_allclose(got[row], want, atol=2e-5)


def test_word_order_counts_and_padding_does_not():
    model, params, _ = made()
    mask = np.array([[1, 1, 1, 1, 1, 0]])
    one, other = (sentence(model, params, np.array([ids]), mask) for ids in ([5, 9, 7, 8, 1, 0], [7, 9, 5, 8, 1, 0]))
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(one, sentence(model, params, np.array([[5, 9, 7, 8, 1, 77]]), mask))


# ---------------------------------------------------------------- early FiLM, norms


def test_early_film_begins_as_no_film_and_the_instruction_reaches_every_convolution():
    model, params, batch = made()
    paths = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    stem = "octo_transformer/observation_tokenizers_primary/SmallStem8_0/"
    assert {stem + "EarlyFilm_0/Dense_0/kernel", stem + "FilmConditioning_0/Dense_0/kernel"} <= paths
    plain = config()
    plain["observation_tokenizers"]["primary"]["stem"]["early_film"] = False
    without = build_model(plain, vocab_size=100)
    # Operation by operation: compiled as a whole, two programs may round differently.
    groups = lambda m: m.apply({"params": params}, batch["observation"], batch["task"], method="groups")  # noqa: E731
    np.testing.assert_array_equal(groups(model)["obs_primary"].tokens, groups(without)["obs_primary"].tokens)
    params = jax.tree.map(jnp.copy, params)
    early = params["octo_transformer"]["observation_tokenizers_primary"]["SmallStem8_0"]["EarlyFilm_0"]["Dense_0"]
    early["kernel"] = early["kernel"] + 0.3
    assert np.abs(groups(model)["obs_primary"].tokens - groups(without)["obs_primary"].tokens).max() > 1e-3


def test_query_and_key_norms_bound_the_logits():
    from octo_like.model.transformer import MultiHeadAttention

    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    mask = np.ones((2, 5, 5), bool)
    layer = MultiHeadAttention(2, qk_norm=True)
    params = layer.init(jax.random.key(0), x, mask)["params"]
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    project = lambda n: np.einsum("bnd,dhk->bnhk", x.astype(np.float64), own[n]["kernel"]) + own[n]["bias"]  # noqa: E731
    rms = lambda a: a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    logits = np.einsum("bqhk,bmhk->bhqm", rms(project("query")), rms(project("key"))) / np.sqrt(4)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.einsum("bhqm,bmhk->bqhk", weights, project("value"))
    want = np.einsum("bqhk,hkd->bqd", out, own["out"]["kernel"]) + own["out"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x, mask), want, atol=1e-5)
    assert np.abs(logits).max() <= np.sqrt(4) + 1e-6
    assert {"query_norm", "key_norm"} <= set(params)


def test_token_norm_makes_all_groups_equally_loud():
    model, params, batch = made(token_norm=True, position_scale=0.5)
    assert {"obs_primary_norm", "task_language_norm"} <= set(params["octo_transformer"])
    assert 0.3 < float(jnp.std(params["octo_transformer"]["obs_primary_pos_embedding"])) < 0.7
    assert np.isfinite(terms_of(model, params, batch)["action"]["loss"])
