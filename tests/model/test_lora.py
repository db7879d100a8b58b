"""Low-rank adapters: a transformation of trees that starts as nothing and ends as one matrix product per kernel."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.octo import build_model
from octo_like.model.stems import ConvStem, KeypointStem, PatchStem, ResNetStem, SmallStem
from octo_like.policy import lora
from octo_like.training.optimizer import make_optimizer, make_schedule
from octo_like.training.state import create_state
from octo_like.training.step import StepConfig, make_train_step
from tests.model import light, tiny

# The suite compiles with other emitters (tests/conftest.py), which round a product with its sum in another order.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
SPEC = lora.LoraSpec(rank=2, alpha=3.0)
KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.fixture(scope="module")
def model():
    return build_model(light.config())


@pytest.fixture(scope="module")
def params(model):
    return tiny.random_params(model, light.SPEC)


@pytest.fixture(scope="module")
def batch():
    return synthetic_batch(light.SPEC, 3, language_vocab=tiny.VOCAB)


def adapted(params, spec=SPEC):
    return lora.add_adapters(params, lora.find_targets(params, spec), spec, jax.random.key(1))


def trained(params):
    """Factors as training could have left them."""
    rng = np.random.default_rng(5)
    return unflatten(
        {
            path: 0.1 * rng.normal(size=leaf.shape).astype(np.float32) if lora.is_adapter(path) else leaf
            for path, leaf in flatten(params)
        }
    )


def test_default_targets_are_the_projections_of_the_blocks(params):
    targets = lora.find_targets(params, SPEC)
    ends = {path.split("encoderblock_")[1].split("/", 1)[1] for path in targets}
    attention = {f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert ends == attention | {"MlpBlock_0/Dense_0/kernel", "MlpBlock_0/Dense_1/kernel"}
    assert all("BlockTransformer_0" in path for path in targets), "the language encoder has blocks of its own"


def test_at_the_start_outputs_are_bitwise_the_base_model_s(model, params, batch):
    def outputs(network):
        def run(params):
            args = batch["observation"], batch["task"], KEYS
            return (
                network.apply({"params": params}, batch, KEYS, True, method="loss_terms"),
                network.apply({"params": params}, *args, head="action", method="sample"),
            )

        return jax.jit(run, compiler_options=AS_FOR_USERS)

    base, start = outputs(model)(params), outputs(lora.AdaptedModel(model, SPEC))(adapted(params))
    for (path, one), (_, other) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (base, start)), strict=True):
        np.testing.assert_array_equal(one, other, jax.tree_util.keystr(path))


def test_merging_for_export_changes_nothing(model, params, batch):
    tree = trained(adapted(params))
    sample = lambda network: jax.jit(  # noqa: E731
        lambda p: network.apply(
            {"params": p}, batch["observation"], batch["task"], KEYS, head="action", method="sample"
        )
    )
    merged = lora.merge(tree, SPEC)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    one, other = sample(lora.AdaptedModel(model, SPEC))(tree), sample(model)(merged)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert not np.allclose(other, sample(model)(params), atol=1e-2), "the factors do something"


def test_the_product_entry_by_entry():
    """Dense, attention in and out, convolution: the delta of every entry is a sum over the rank."""
    rng = np.random.default_rng(0)
    shapes = {
        "m/Dense_0/kernel": (6, 5),
        "a/query/kernel": (6, 2, 4),
        "a/out/kernel": (2, 4, 6),
        "c/Conv_0/kernel": (3, 3, 2, 5),
    }
    params = unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})
    spec = lora.LoraSpec(rank=2, alpha=6.0, targets=("kernel",))
    tree = trained(lora.add_adapters(params, tuple(shapes), spec, jax.random.key(0)))
    flat, merged = dict(flatten(tree)), dict(flatten(lora.merge(tree, spec)))
    inputs = {"m/Dense_0/kernel": 1, "a/query/kernel": 1, "a/out/kernel": 2, "c/Conv_0/kernel": 3}
    for path, shape in shapes.items():
        a, b = flat[path.replace("kernel", "lora_a")], flat[path.replace("kernel", "lora_b")]
        a = a.reshape(*shape[: inputs[path]], 2)
        b = b.reshape(2, *shape[inputs[path] :])
        for index in np.ndindex(shape):
            row, column = index[: inputs[path]], index[inputs[path] :]
            delta = 3.0 * sum(a[(*row, r)] * b[(r, *column)] for r in range(2))
            np.testing.assert_allclose(merged[path][index], flat[path][index] + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "stem",
    [
        SmallStem(patch_size=4, features=(32, 32), num_features=12, use_film=True),
        ResNetStem(num_layers=(1,), width=0.5),
        PatchStem(patch_size=8, num_features=12, use_film=True),
        ConvStem(layers=((4, 4, 8), (3, 1, 8)), use_film=True),
        KeypointStem(layers=((4, 4, 8), (3, 1, 8)), num_keypoints=5, use_film=True),
    ],
    ids=lambda stem: type(stem).__name__,
)
def test_image_encoders_are_adapted_and_merged(stem):
    """Every kernel of every stem: convolutions, also those that are standardised, and FiLM. At the start nothing has
    changed, every factor of a kernel learns, and the exported kernels alone are what the factors were trained to."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.float32) / 127.5 - 1
    words = rng.normal(size=(2, 6)).astype(np.float32)
    params = tiny.random_values(jax.eval_shape(lambda: stem.init(jax.random.key(0), images, words)["params"]))
    spec = lora.LoraSpec(rank=3, alpha=2.0, targets=(r"/kernel$",))
    targets = lora.find_targets(params, spec)
    assert set(targets) == {path for path, _ in flatten(params) if path.endswith("/kernel")}
    tree = lora.add_adapters(params, targets, spec, jax.random.key(1))
    network = lora.AdaptedModel(stem, spec)
    apply = jax.jit(lambda p: network.apply({"params": p}, images, words))
    alone = jax.jit(lambda p: stem.apply({"params": p}, images, words))
    np.testing.assert_array_equal(apply(tree), alone(params))
    tree = trained(tree)
    merged = lora.merge(tree, spec)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(apply(tree), alone(merged), atol=1e-4)
    assert not np.allclose(alone(merged), alone(params), atol=1e-2), "the factors do something"
    gradients = dict(flatten(jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(apply(p)))))(tree)))
    assert all(np.any(leaf) for path, leaf in gradients.items() if lora.is_adapter(path))


def test_a_depends_on_its_own_kernel_only(params):
    few = lora.LoraSpec(rank=2, targets=("query/kernel",))
    one, many = (dict(flatten(adapted(params, spec))) for spec in (few, SPEC))
    path = next(path for path in one if path.endswith("query/lora_a"))
    np.testing.assert_array_equal(one[path], many[path])
    key = path.replace("query", "key")
    assert not np.array_equal(many[path], many[key])
    large = lora.add_adapters({"d": {"kernel": np.zeros((4000, 64), np.float32)}}, ("d/kernel",), SPEC, KEYS[0])
    assert abs(large["d"]["lora_a"].std() * np.sqrt(4000) - 1) < 0.03


def test_train_step(model, params, batch):
    """Only factors have optimizer state; their gradient is that of the kernels, seen through the other factor."""
    tree = trained(adapted(params))
    frozen = frozenset(path for path, _ in flatten(tree) if not lora.is_adapter(path))
    schedule = make_schedule("constant", peak=1e-2, warmup_steps=0)
    tx = make_optimizer(schedule, weight_decay=0.1)
    network = lora.AdaptedModel(model, SPEC)
    state = create_state(tree, tx, frozen)
    assert set(state.trained) == set(state.ema) and not any(p.endswith("kernel") for p in state.trained)
    entries = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    counters = 2
    assert entries <= 2 * sum(leaf.size for leaf in state.trained.values()) + counters
    after, metrics = jax.jit(make_train_step(network, tx, schedule, StepConfig()))(state, batch)
    assert np.isfinite(metrics["loss"])
    for path, leaf in state.frozen.items():
        np.testing.assert_array_equal(leaf, after.frozen[path], path)
    assert all(not np.array_equal(leaf, after.trained[path]) for path, leaf in state.trained.items())

    def loss(network):
        def total(p):
            return network.apply({"params": p}, batch, KEYS, False, method="loss_terms")["action"]["loss"]

        return jax.jit(jax.grad(total))

    of_kernels = dict(flatten(loss(model)(lora.merge(tree, SPEC))))
    of_factors = dict(flatten(loss(network)(tree)))
    flat = dict(flatten(tree))
    for path in lora.find_targets(params, SPEC):
        a, b = path.replace("kernel", "lora_a"), path.replace("kernel", "lora_b")
        kernel = np.asarray(of_kernels[path]).reshape(flat[a].shape[0], -1)
        scale = np.abs(kernel).max()
        np.testing.assert_allclose(of_factors[a], 1.5 * kernel @ flat[b].T, rtol=1e-3, atol=1e-4 * scale)
        np.testing.assert_allclose(of_factors[b], 1.5 * flat[a].T @ kernel, rtol=1e-3, atol=1e-4 * scale)


def test_sixteen_bit_compute_keeps_float32_factors(params, batch):
    model = build_model(light.config(dtype="bfloat16"))
    network, tree = lora.AdaptedModel(model, SPEC), adapted(params)

    def total(p):
        return network.apply({"params": p}, batch, KEYS, True, method="loss_terms")["action"]["loss"]

    grads = {path: leaf for path, leaf in flatten(jax.jit(jax.grad(total))(tree)) if lora.is_adapter(path)}
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in grads.values())
    assert all(np.any(leaf) == path.endswith("lora_b") for path, leaf in grads.items()), "B moves first, A after it"


def test_a_tree_without_factors_is_merged_as_it_is(params):
    assert dict(flatten(lora.merge(params, SPEC))).keys() == dict(flatten(params)).keys()


@pytest.mark.parametrize(
    "spec,words",
    [
        (dict(targets=("attention/query",)), ["matches no parameter", "MultiHeadDotProductAttention_*/query"]),
        (dict(targets=("pos_embedding",)), ["matches no kernel", "obs_proprio_pos_embedding", "kernels are at"]),
        (dict(targets=(r"query/bias$",)), ["matches no kernel", "query/bias"]),
        (dict(rank=17), ["rank=17", "at most"]),
    ],
)
def test_targets_that_make_no_sense(params, spec, words):
    with pytest.raises(ValueError) as error:
        lora.find_targets(params, lora.LoraSpec(**spec))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(alpha=0.0), dict(targets=())])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lora.LoraSpec(**wrong)
