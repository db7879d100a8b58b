"""Action tokens of frequencies: what is learned, and that every sequence is a chunk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octo_like.common import fast, vocabularies
from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.model.octo import build_model, init_params
from octo_like.model.tokens import TokenGroup
from tests.model import light

H, A = 5, 3
SIZES = dict(kind="fast", readout="readout_action", action_horizon=H, action_dim=A, width=16, num_heads=2)


@functools.cache
def vocabulary():
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(400, H, A)).cumsum(1) / 3
    chunks[::3, :, 2] = 0.0  # a robot with two dimensions
    return fast.train(chunks.astype(np.float32), vocab_size=200, scale=6.0)


def entry(**changes):
    return SIZES | dict(vocabulary=vocabulary().to_json()) | changes


@functools.cache
def head():
    module = light.HEADS["fast"](**{key: value for key, value in entry().items() if key != "kind"})
    groups = light.groups(tokens=4)
    tokens = np.zeros((4, 2, vocabulary().max_tokens), np.int32)
    zeros = np.zeros((4, 2, H, A), np.float32)
    init = lambda: module.init(jax.random.key(0), groups, zeros, zeros, None, tokens=tokens, method="loss_terms")  # noqa: E731
    params = light.tiny.random_values(jax.eval_shape(lambda: init()["params"]), 0)
    return module, params, groups


def apply(*args, method, params=None, **options):
    module, mine, _ = head()
    return module.apply({"params": mine if params is None else params}, *args, method=method, **options)


def test_the_loss_is_that_of_the_tokens_and_nothing_behind_them():
    """Every piece in turn, the first id too: its cross-entropy given those before; padding costs nothing."""
    module, params, groups = head()
    ids = np.zeros((4, 2, vocabulary().max_tokens), np.int32)
    ids[0, 0, :3], ids[1, 1, :2], ids[2, 0, :1] = (1, 5, 1), (7, 1), (1,)
    mask = np.broadcast_to(ids.any(-1)[..., None, None], (4, 2, H, A)).astype(np.float32)
    zeros = np.zeros((4, 2, H, A), np.float32)
    terms = apply(groups, zeros, mask, None, tokens=ids, method="loss_terms")
    flat = ids.reshape(8, -1)
    logits = np.asarray(
        module.apply({"params": params}, method=lambda m: m.decoder(jnp.asarray(flat), m.read(groups))), np.float64
    )
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, flat[..., None], -1)[..., 0]
    np.testing.assert_allclose(terms["loss"], (each * (flat > 0)).sum(), rtol=1e-4)


def test_chunks_of_ids_are_those_of_the_vocabulary():
    chunks = np.random.default_rng(1).normal(size=(50, H, A)).cumsum(1) / 3
    ids, _ = vocabulary().encode(chunks.astype(np.float32), low_pass=True)
    want, ok = vocabulary().decode(ids)
    assert ok.all()
    got = jax.jit(lambda ids: apply(ids, method="chunks"))(ids)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(apply(ids.reshape(5, 10, -1), method="chunks"), want.reshape(5, 10, H, A), atol=1e-5)


def test_every_sequence_that_is_said_is_a_chunk():
    keys = jax.random.split(jax.random.key(0), 4)
    groups = head()[2]
    ids = np.asarray(
        jax.jit(lambda keys: apply(groups, keys, (50,), method=lambda m, *args: m._say(*args, rule_of(m))))(keys)
    ).reshape(200, -1)
    _, ok = vocabulary().decode(ids)
    assert ok.all() and len({tuple(row) for row in ids}) > 150


def rule_of(module):
    from octo_like.model.decoder import Filling

    return Filling(module.fast.piece_lengths, H * A, module.fast.max_tokens)


def test_a_short_limit_is_kept_by_what_is_said():
    chunks = np.random.default_rng(1).normal(size=(300, H, A)).cumsum(1) / 3
    whole = vocabulary()
    few = dataclasses.replace(whole, max_tokens=int(whole.lengths(chunks.astype(np.float32)).min()) + 2)
    module = light.HEADS["fast"](
        **{key: value for key, value in entry(vocabulary=few.to_json()).items() if key != "kind"}
    )
    groups, zeros = light.groups(tokens=4), np.zeros((4, 2, H, A), np.float32)
    tokens = np.zeros((4, 2, few.max_tokens), np.int32)
    variables = module.init(jax.random.key(0), groups, zeros, zeros, None, tokens=tokens, method="loss_terms")
    keys = jax.random.split(jax.random.key(0), 4)
    ids = module.apply(variables, groups, keys, (30,), method=lambda m, *args: m._say(*args, rule_of(m)))
    assert few.decode(np.asarray(ids).reshape(120, -1))[1].all()


def test_the_loss_is_of_whole_chunks_by_their_entries():
    rng = np.random.default_rng(2)
    action = (rng.normal(size=(4, 2, H, A)).cumsum(2) / 3).astype(np.float32)
    mask = np.ones((4, 2, H, A), np.float32)
    mask[0, :, 3:] = 0  # past the end
    mask[1, ..., 2] = 0  # a robot with two dimensions
    mask[2, 0] = 0
    action = np.where(mask > 0, action, 0).astype(np.float32)
    whole = np.array([[False, False], [True, True], [False, True], [True, True]])
    tokens = np.zeros((4, 2, vocabulary().max_tokens), np.int32)
    tokens[whole] = vocabulary().encode(action[whole])[0]
    groups = head()[2]
    terms = apply(groups, action, mask, None, tokens=tokens, method="loss_terms")
    flat = {
        key: TokenGroup(g.tokens.reshape(8, 1, *g.tokens.shape[2:]), g.mask.reshape(8, 1, -1))
        for key, g in groups.items()
    }
    loss = right = 0.0
    for i, (row, ok) in enumerate(zip(tokens.reshape(8, -1), whole.ravel(), strict=True)):
        if not ok:
            continue
        one = {key: TokenGroup(g.tokens[i : i + 1], g.mask[i : i + 1]) for key, g in flat.items()}
        logits = apply(method=lambda m, one=one, row=row: m.decoder(jnp.asarray(row[None]), m.read(one)))
        logits = np.asarray(logits[0], np.float64)
        for place, token in enumerate(row[row > 0]):
            loss -= logits[place, token] - np.log(np.exp(logits[place]).sum())
            size = vocabulary().piece_lengths[token] / (H * A)
            right += (logits[place].argmax() == token) * size * mask.reshape(8, -1)[i].sum()
    np.testing.assert_allclose([terms["loss"], terms["accuracy"]], [loss, right], rtol=1e-4)
    learned = apply(mask > 0, None, method="learned_mask")
    np.testing.assert_array_equal(np.asarray(learned), (mask > 0) & whole[..., None, None])
    # What stands in the tokens of a chunk that is not whole does not matter.
    garbage = np.where(whole[..., None], tokens, 10**6).astype(np.int32)
    again = apply(groups, action, mask, None, tokens=garbage, method="loss_terms")
    assert {key: float(value) for key, value in terms.items()} == {key: float(value) for key, value in again.items()}


def test_it_learns_one_of_two_ways():
    """Chunks that rise or fall: as often the one as the other, and nothing between."""
    rows, steps = 64, 300
    ramp = np.linspace(-1, 1, H, dtype=np.float32)[:, None] * np.array([1.0, 0.5, -1.0], np.float32)
    ways = np.stack([ramp, -ramp])
    words = fast.train(np.repeat(ways, 40, 0), vocab_size=60, scale=8.0)
    module = light.HEADS["fast"](
        **{key: value for key, value in entry(vocabulary=words.to_json()).items() if key != "kind"}
    )
    tokens = TokenGroup(jnp.ones((rows, 1, 1, 16)), jnp.ones((rows, 1, 1), bool))
    ids = words.encode(ways)[0]
    mask = jnp.ones((rows, 1, H, A))
    variables = module.init(
        jax.random.key(0), {"readout_action": tokens}, mask, mask, None,
        tokens=jnp.zeros((rows, 1, words.max_tokens), jnp.int32), method="loss_terms",
    )  # fmt: skip
    optimizer = optax.adam(3e-3)

    def step(carry, key):
        params, state = carry
        which = jax.random.bernoulli(key, shape=(rows,)).astype(int)

        def loss(params):
            said = jnp.asarray(ids)[which][:, None]
            terms = module.apply(
                {"params": params}, {"readout_action": tokens}, mask, mask, None, tokens=said, method="loss_terms",
                mutable=["by_sample"],
            )[0]  # fmt: skip
            return terms["loss"] / mask.size

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        params = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps))[0][0]
        one = {"readout_action": TokenGroup(tokens.tokens[:1], tokens.mask[:1])}
        keys = jax.random.split(jax.random.key(1), 1)
        return module.apply({"params": params}, one, keys, sample_shape=(400,), method="sample")

    samples = np.asarray(run(variables["params"]))[:, 0]
    near = [np.abs(samples - way).max((1, 2)) < 0.1 for way in ways]
    assert min(near[0].mean(), near[1].mean()) > 0.4 and (near[0] | near[1]).mean() > 0.98


def test_a_model_says_what_batch_it_needs_and_mistakes_are_named(tmp_path):
    vocabulary().save(tmp_path / "words.json")
    model = light.config(heads=dict(action=SIZES | dict(vocabulary=str(tmp_path / "words.json"))))
    vocabularies.resolve(model)
    assert vocabularies.targets_of(model).actions["action"] == vocabulary()
    spec = dataclasses.replace(
        light.SPEC, action_horizon=H, action_dim=A, action_tokens={"action": vocabulary().max_tokens}
    )
    assert BatchSpec.from_json(spec.to_json()) == spec
    built = build_model(model)
    params = init_params(built, spec, jax.random.key(0))
    batch = synthetic_batch(spec, 2, language_vocab=light.tiny.VOCAB)
    keys = jax.random.split(jax.random.key(0), 2)
    actions = built.apply({"params": params}, batch["observation"], batch["task"], keys, head="action", method="sample")
    assert actions.shape == (2, H, A) and np.isfinite(actions).all()
    for change, message in (
        (dict(action_dim=2), "chunks of 5 steps of 3 dimensions, the head's have 5 steps of 2"),
        (dict(vocabulary="words.json"), "vocabulary 'words.json' is a name"),
        (dict(vocabulary=vocabulary().to_json() | {"scale": 7.0}), "was changed after it was written"),
    ):
        wrong = build_model(light.config(heads=dict(action=entry(**change))))
        sizes = dict(action_dim=2) if "action_dim" in change else {}
        with pytest.raises(ValueError, match=message):
            init_params(wrong, dataclasses.replace(spec, **sizes), jax.random.key(0))
    with pytest.raises(vocabularies.VocabularyError, match="no action vocabulary at 'nowhere.json'"):
        vocabularies.resolve({"heads": {"action": {"vocabulary": "nowhere.json"}}})
