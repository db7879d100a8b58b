"""The decoder: against a NumPy twin, step by step against all at once, and what may be said where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.model.decoder import Filling, Places, TokenDecoder, UntilEnd, choose
from octo_like.model.sequence import reading
from octo_like.model.tokens import TokenGroup
from octo_like.model.transformer import fold_in_all
from tests.model.light import HeadAlone, groups

N, L, V, M, D, HEADS = 5, 6, 11, 3, 8, 2
ANYTHING = Places(np.ones((1, L, V), bool))
BINS = dict(
    kind="bins", readout="readout_action", action_horizon=3, action_dim=4, num_bins=9, width=16, num_layers=2,
    num_heads=2, low=-2.0, high=2.0,
)  # fmt: skip


def decoder():
    return TokenDecoder(V, L, width=D, num_layers=2, num_heads=HEADS)


def read(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((N, M), bool)
    mask[1, 2] = mask[4, :2] = False
    return TokenGroup(rng.normal(size=(N, M, 16)).astype(np.float32), mask)


@pytest.fixture(scope="module")
def params():
    drawn = decoder().init(jax.random.key(0), jnp.zeros((N, L), jnp.int32), read())["params"]
    leaves, tree = jax.tree.flatten(drawn)
    rng = np.random.default_rng(1)  # biases and scales, too, must be told from zero and one
    return jax.tree.unflatten(tree, [np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def ids(seed=0):
    return np.random.default_rng(seed).integers(0, V, (N, L)).astype(np.int32)


def all_at_once(params, ids, read):
    return np.asarray(decoder().apply({"params": params}, ids, read))


# -- the twin ----------------------------------------------------------------------------------------------------------


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attention(x, others, seen, p):
    out = np.zeros((len(x), D))
    q, k, v = dense(x, p["query"]), dense(others, p["key"]), dense(others, p["value"])
    size = D // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            visible = [j for j in range(len(others)) if seen(i, j)]
            score = np.array([q[i, part] @ k[j, part] / np.sqrt(size) for j in visible])
            weight = np.exp(score - score.max())
            out[i, part] = sum(w * v[j, part] for w, j in zip(weight / weight.sum(), visible, strict=True))
    return dense(out, p["out"])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def twin(p, ids_l, tokens, mask):
    """Logits (L, V) of one sequence."""
    x = np.stack([p["embedding"]["embedding"][i] for i in [V, *ids_l[:-1]]]) + p["positions"][: len(ids_l)]
    for block in (p["blocks_0"], p["blocks_1"]):
        h = norm(x, block["norm_said"])
        x = x + attention(h, h, lambda i, j: j <= i, block["said"])
        x = x + attention(norm(x, block["norm_reading"]), tokens, lambda i, j: mask[j], block["reading"])
        mlp = block["mlp"]
        x = x + dense(gelu(dense(norm(x, block["norm_mlp"]), mlp["Dense_0"])), mlp["Dense_1"])
    return dense(norm(x, p["norm"]), p["logits"])


def test_logits_are_those_of_a_numpy_twin(params):
    context = read()
    got = all_at_once(params, ids(), context)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    want = np.stack([twin(p, *row) for row in zip(ids(), context.tokens, context.mask, strict=True)])
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-4)


# -- one after the other -----------------------------------------------------------------------------------------------


def say(params, context, rule=ANYTHING, keys=None, **options):
    run = jax.jit(lambda params, context: decoder().apply(
        {"params": params}, context, rule, keys, method="generate", **options
    ))  # fmt: skip
    return np.asarray(run(params, context))


def test_the_likeliest_is_what_all_at_once_says(params):
    context = read()
    said = say(params, context)
    logits = all_at_once(params, said, context)
    np.testing.assert_array_equal(said, logits.argmax(-1))
    assert len({tuple(row) for row in said}) > 1


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=2.5, top_k=3)])
def test_draws_are_those_of_the_logits_all_at_once(params, options):
    context, keys = read(), jax.random.split(jax.random.key(3), N)
    said = say(params, context, keys=keys, **options)
    logits = all_at_once(params, said, context)
    options = {"top_k": 0} | options
    want = [choose(jnp.asarray(logits[:, i]), fold_in_all(keys, i), **options) for i in range(L)]
    np.testing.assert_array_equal(said, np.stack(want, axis=1))


def test_a_sequence_depends_on_its_own_key_and_tokens_only(params):
    context, keys = read(), jax.random.split(jax.random.key(3), N)
    whole = say(params, context, keys=keys, temperature=1.0)
    part = say(params, TokenGroup(context.tokens[2:4], context.mask[2:4]), keys=keys[2:4], temperature=1.0)
    np.testing.assert_array_equal(part, whole[2:4])


def test_several_sequences_read_the_same_tokens(params):
    context, keys = read(), jax.random.split(jax.random.key(3), 3 * N)
    together = say(params, context, keys=keys, temperature=1.0)
    repeated = TokenGroup(np.repeat(context.tokens, 3, axis=0), np.repeat(context.mask, 3, axis=0))
    np.testing.assert_array_equal(together, say(params, repeated, keys=keys, temperature=1.0))
    assert len({tuple(row) for row in together[:3]}) == 3


def test_frequencies_are_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    many = jnp.broadcast_to(logits, (len(keys), 4))
    share = lambda **options: np.bincount(np.asarray(choose(many, keys, **options)), minlength=4) / len(keys)  # noqa: E731
    np.testing.assert_allclose(share(temperature=1.0, top_k=0), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(share(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.015)
    flat = np.sqrt([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(share(temperature=2.0, top_k=0), flat / flat.sum(), atol=0.015)
    np.testing.assert_array_equal(share(temperature=0, top_k=0), [1, 0, 0, 0])


def test_log_probabilities_of_a_text(params):
    context = read()
    got = np.asarray(decoder().apply({"params": params}, ids(), context, method="log_probs"))
    logits = all_at_once(params, ids(), context).astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got, np.take_along_axis(want, ids()[..., None], -1)[..., 0], atol=1e-5)


def test_what_comes_later_and_what_is_masked_changes_nothing_bitwise(params):
    context, said = read(), ids()
    want = all_at_once(params, said, context)
    later = said.copy()
    later[:, 3:] = (later[:, 3:] + 1) % V
    # The logits at 3 are of the fourth id, given the first three.
    np.testing.assert_array_equal(all_at_once(params, later, context)[:, :4], want[:, :4])
    tokens = np.where(context.mask[..., None], context.tokens, 1e6).astype(np.float32)
    np.testing.assert_array_equal(all_at_once(params, said, TokenGroup(tokens, context.mask)), want)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_a_text_ends_and_is_padded(params):
    words = np.zeros(V, bool)
    words[[3, 5]] = True
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), N)
        for row in say(params, read(), UntilEnd(words, L), keys, temperature=3.0):
            end = list(row).index(1)
            assert set(row[:end]) <= {3, 5} and not row[end + 1 :].any()


def test_pieces_fill_a_space_exactly(params):
    lengths = np.array([0, 1, 1, 2, 3, 4, 2, 3, 6, 7, 5])
    seen = set()
    for seed in range(8):
        keys = jax.random.split(jax.random.key(seed), N)
        for row in say(params, read(), Filling(lengths, L, L), keys, temperature=5.0):
            assert lengths[row].sum() == L
            count = int((row > 0).sum())
            assert not row[count:].any()
            seen.add(count)
    assert len(seen) > 2


def test_places_say_what_may_stand_where(params):
    table = np.zeros((N, L, V), bool)
    want = ids(4)
    np.put_along_axis(table, want[..., None], True, -1)
    keys = jax.random.split(jax.random.key(0), N)
    np.testing.assert_array_equal(say(params, read(), Places(table), keys, temperature=1.0), want)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(width=9), "width 9 is not divisible by its 2 heads"),
        (dict(num_layers=0), "num_layers must be at least 1"),
        (dict(max_length=5), "a sequence of 6 ids, but this decoder was made for at most 5"),
    ],
)
def test_bad_sizes(change, message):
    options = dict(vocab_size=V, max_length=L, width=D, num_layers=2, num_heads=HEADS) | change
    with pytest.raises(ValueError, match=message):
        TokenDecoder(**options).init(jax.random.key(0), jnp.zeros((N, L), jnp.int32), read())


@pytest.mark.parametrize(
    "rule,message",
    [
        (Places(np.arange(L)[:, None] * np.ones(V) != 3), "position 3"),
        (UntilEnd(np.zeros(V, bool), L), "leaves nothing but the end"),
        (Filling(np.array([0] + [2] * (V - 1)), 2 * L + 1, L), "cannot fill"),
        (Filling(np.array([0] + [2] * (V - 1)), 3, L), "cannot fill 3"),
    ],
)
def test_a_rule_that_leaves_no_id_is_refused(params, rule, message):
    if isinstance(rule, Places):
        rule = Places(rule.table[None])
    with pytest.raises(ValueError, match=message):
        say(params, read(), rule, None)


# -- the head of bins --------------------------------------------------------------------------------------------------


def chunks(seed=0, rows=4, window=2):
    return np.random.default_rng(seed).uniform(-1.9, 1.9, (rows, window, 3, 4)).astype(np.float32)


def test_padded_entries_are_not_learned_from_and_not_seen():
    head, keys = HeadAlone(BINS), jax.random.split(jax.random.key(0), 4)
    mask = np.ones((4, 2, 3, 4), np.float32)
    mask[..., 2:] = 0  # two padded dimensions
    mask[1, :, 1:] = 0  # past the end
    terms = lambda action: head.apply(groups(), action, mask, keys, method="loss_terms")  # noqa: E731
    want, garbage = terms(chunks()), terms(np.where(mask > 0, chunks(), 1.7).astype(np.float32))
    assert {key: float(value) for key, value in want.items()} == {key: float(value) for key, value in garbage.items()}
    gradient = jax.grad(lambda action: head.apply(groups(), action, mask, keys, method="loss_terms")["mse"])(chunks())
    assert not np.asarray(gradient)[mask == 0].any()


def test_sampled_chunks_respect_padded_dimensions_rows_and_keys():
    head = HeadAlone(BINS)
    keys = jax.random.split(jax.random.key(0), 4)
    valid = np.ones((4, 4), bool)
    valid[2, 1:] = False
    sample = lambda *args, **options: np.asarray(head.apply(*args, method="sample", **options))  # noqa: E731
    actions = sample(groups(), keys, sample_shape=(3, 2), valid=valid)
    assert actions.shape == (3, 2, 4, 3, 4)
    centres = np.linspace(-2, 2, 10)
    centres = (centres[1:] + centres[:-1]) / 2
    assert np.isclose(actions[..., None], centres, atol=1e-6).any(-1)[:, :, [0, 1, 3]].all()
    assert not actions[:, :, 2, :, 1:].any()
    assert len({chunk.tobytes() for chunk in actions[:, :, 0].reshape(6, -1)}) > 4
    few = {key: TokenGroup(group.tokens[1:3], group.mask[1:3]) for key, group in groups().items()}
    np.testing.assert_array_equal(sample(few, keys[1:3], sample_shape=(3, 2), valid=valid[1:3]), actions[:, :, 1:3])


def test_at_temperature_zero_all_samples_are_the_likeliest():
    head = HeadAlone(BINS | dict(temperature=0))
    keys = jax.random.split(jax.random.key(0), 4)
    actions = np.asarray(head.apply(groups(), keys, sample_shape=(3,), method="sample"))
    assert actions.shape == (3, 4, 3, 4) and (actions == actions[0]).all()
    # Given what it says, nothing is likelier.
    whole = np.repeat(actions[0][:, None], 2, axis=1)
    logits = np.asarray(head.apply(groups(), whole, np.ones_like(whole), method="logits"))[:, -1]
    np.testing.assert_allclose(logits.argmax(-1), np.floor((actions[0] + 2) / (4 / 9)), atol=0)


def test_it_can_read_the_task_and_the_observations_of_its_own_timestep():
    rng = np.random.default_rng(0)
    task = TokenGroup(rng.normal(size=(4, 5, 16)).astype(np.float32), np.ones((4, 5), bool))
    whole = groups() | {"task": task}
    read = reading(whole, "readout_action", "all")
    assert read.tokens.shape == (8, 1 + 3 + 5, 16) and read.mask.shape == (8, 9)
    np.testing.assert_array_equal(read.tokens[5, 1:4], whole["obs"].tokens[2, 1])
    np.testing.assert_array_equal(read.tokens[5, 4:], task.tokens[2])
    last = reading(whole, "readout_action", "all", last_only=True)
    np.testing.assert_array_equal(last.tokens, np.asarray(read.tokens).reshape(4, 2, 9, 16)[:, 1])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reads="everything"), "unknown reads 'everything'; valid: 'readout', 'all'"),
        (dict(use_map=True), "use_map pools"),
        (dict(temperature=-1.0), "must not be negative"),
        (dict(low=1.0, high=(2.0, 2.0, 0.5, 2.0)), r"dimension 2 span \[1.0, 0.5\]"),
    ],
)
def test_bad_settings_of_the_head(change, message):
    with pytest.raises(ValueError, match=message):
        HeadAlone(BINS | change)


@pytest.mark.parametrize("top_k,expected", [(1, {1}), (2, {1, 2}), (3, {1, 2, 4}), (4, {1, 2, 4}), (99, {1, 2, 4})])
def test_top_k_with_ties_draws_no_more_than_k(top_k, expected):
    """Of equally likely ids the lowest; what is not allowed is never drawn, however large k is."""
    logits = jnp.tile(jnp.array([-jnp.inf, 1.0, 1.0, -jnp.inf, 1.0]), (200, 1))
    drawn = choose(logits, jax.random.split(jax.random.key(0), 200), 1.0, top_k)
    assert set(np.asarray(drawn).tolist()) == expected
