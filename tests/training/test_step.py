"""The training step: accumulation, non-finite gradients, freezing, averages, schedules, augmentation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from octo_like.common.schema import flatten, synthetic_batch, unflatten
from octo_like.model.octo import build_model
from octo_like.training import sharding
from octo_like.training.augment import (
    Augmentation,
    adjust_contrast,
    augment_batch,
    crop_resize,
    hsv_to_rgb,
    rgb_to_hsv,
)
from octo_like.training.optimizer import (
    decay_mask,
    frozen_paths,
    join_params,
    make_optimizer,
    make_schedule,
    split_params,
)
from octo_like.training.state import create_state
from octo_like.training.step import StepConfig, make_train_step
from tests.model import tiny


@pytest.fixture(scope="module")
def model():
    model = build_model(tiny.config(transformer=dict(num_layers=1, num_heads=4, mlp_dim=32, dropout_rate=0.2)))
    return model, jax.tree.map(jnp.asarray, tiny.random_params(model))


def batch():
    batch = synthetic_batch(tiny.SPEC, 4, language_vocab=tiny.VOCAB)
    batch["action_pad_mask"][1, :, 1:] = False  # unequal masks: a mean of means would differ
    return sharding.put_batch(batch, sharding.make_mesh(devices=jax.devices()[:1]))


def make(model, params, frozen=frozenset(), warmup_steps=0, **config):
    schedule = make_schedule("constant", peak=1e-3, warmup_steps=warmup_steps)
    tx = make_optimizer(schedule)
    step = jax.jit(make_train_step(model, tx, schedule, StepConfig(**config)))
    return create_state(params, tx, frozen), step


def test_accumulation_changes_nothing(model):
    model, params = model
    results = []
    for accumulate in (1, 2):
        state, step = make(model, params, accumulate=accumulate)
        results.append(step(state, batch()))
    (one, first), (two, second) = results
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)
    np.testing.assert_allclose(first["grad_norm"], second["grad_norm"], rtol=1e-4)
    for path in one.trained:
        if path.endswith("key/bias"):
            continue  # softmax does not see it: its gradient is rounding, which Adam's first step makes as large as any
        np.testing.assert_allclose(one.trained[path], two.trained[path], rtol=1e-3, atol=2e-5, err_msg=path)


def test_a_step_is_a_function_of_ids_and_step(model):
    model, params = model
    state, step = make(model, params)
    first, second = step(state, batch())[1]["loss"], step(state, batch())[1]["loss"]
    other = batch()
    other["sample_id"] = other["sample_id"] + 100
    assert first == second and first != step(state, other)[1]["loss"]


def test_non_finite_gradients_change_nothing_but_counters(model):
    model, params = model
    state, step = make(model, params, warmup_steps=10)
    bad = batch()
    bad["action"] = bad["action"].at[0, 0, 0, 0].set(jnp.nan)
    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"]) and after.skipped == 1 and after.step == 1
    for name in ("trained", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(after, name))
    again, metrics = step(after, batch())
    assert again.skipped == 1
    # The optimizer has not counted the step that was skipped, and the rate that is logged is the one it uses.
    assert metrics["learning_rate"] == step(state, batch())[1]["learning_rate"]
    assert step(again, batch())[1]["learning_rate"] != metrics["learning_rate"]


def test_a_broken_optimizer_state_changes_no_parameter(model):
    """The gradient is finite and the update is not."""
    model, params = model
    state, step = make(model, params)
    state = state.replace(opt_state=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim else x, state.opt_state))
    after, metrics = step(state, batch())
    assert np.isfinite(metrics["grad_norm"]) and not metrics["finite"] and after.skipped == 1
    for name in ("trained", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(after, name))


def test_frozen_parameters_have_no_state(model):
    model, params = model
    frozen = frozen_paths(params, ("BlockTransformer", "^heads_"))
    state, step = make(model, params, frozen)
    assert not set(state.trained) & frozen and set(state.ema) == set(state.trained)
    after, _ = step(state, batch())
    for path, leaf in flatten(after.params):
        same = np.array_equal(leaf, dict(flatten(params))[path])
        assert same or path not in frozen, path
    moments = [x for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in state.trained.values())
    with pytest.raises(ValueError, match="matches no parameter"):
        frozen_paths(params, ("nothing",))
    with pytest.raises(ValueError, match="nothing to train"):
        frozen_paths(params, (".",))
    joined = join_params(*split_params(params, frozen))
    jax.tree.map(np.testing.assert_array_equal, joined, params)


def test_average_follows_its_formula(model):
    model, params = model
    """The decay warms up as (1 + t) / (10 + t) and stays at `ema_decay` from where the two meet, here at t = 80."""
    state, step = make(model, params, ema_decay=0.9)
    # Far from the parameters: what the old average contributes is seen in every entry.
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.trained))
    decays = {0: 1 / 10, 1: 2 / 11, 10: 11 / 20, 79: 80 / 89, 80: 0.9, 81: 0.9, 1_000_000: 0.9}
    for t, decay in decays.items():
        after, _ = step(state.replace(step=jnp.int32(t)), batch())
        for path, old in state.ema.items():
            want = decay * np.asarray(old) + (1 - decay) * np.asarray(after.trained[path])
            np.testing.assert_allclose(after.ema[path], want, rtol=1e-5, atol=1e-6, err_msg=f"t = {t}, {path}")


def test_schedules_against_closed_forms():
    steps = np.array([0, 5, 10, 60, 110, 1000])
    rsqrt = make_schedule("rsqrt", peak=2.0, warmup_steps=10, timescale=50)
    want = [0, 1, 2, 2, 2 / np.sqrt(3), 2 / np.sqrt(1040 / 50)]
    want[3] = 2 / np.sqrt(2)
    np.testing.assert_allclose([rsqrt(s) for s in steps], want, rtol=1e-5)
    cosine = make_schedule("cosine", peak=2.0, warmup_steps=10, decay_steps=110, end=0.5)
    np.testing.assert_allclose([cosine(s) for s in steps], [0, 1, 2, 1.25, 0.5, 0.5], rtol=1e-5)
    with pytest.raises(ValueError, match="cosine"):
        make_schedule("cosin", peak=1.0, warmup_steps=0)
    with pytest.raises(ValueError, match="decay_steps"):
        make_schedule("cosine", peak=1.0, warmup_steps=10, decay_steps=5)


@pytest.fixture(scope="module")
def pipeline(shared):
    return np.load(shared / "golden" / "pipeline.npz"), json.loads(
        (shared / "golden" / "pipeline_meta.json").read_text()
    )


@pytest.mark.parametrize("case", ["cosine", "cosine_end", "rsqrt", "rsqrt_short", "constant"])
def test_reference_schedules(pipeline, case):
    arrays, meta = pipeline
    options = meta[f"lr_schedule/{case}"]
    schedule = make_schedule(
        options["name"],
        peak=options["peak_value"],
        warmup_steps=options["warmup_steps"],
        init=options["init_value"],
        timescale=options.get("timescale", 10_000),
        decay_steps=options.get("decay_steps"),
        end=options.get("end_value", 0.0),
    )
    got = [float(schedule(step)) for step in arrays["lr_schedule/steps"]]
    np.testing.assert_allclose(got, arrays[f"lr_schedule/{case}/upstream/lr"], rtol=1e-5, atol=1e-9)


def test_reference_first_update(pipeline):
    """Clipping, decay mask and freezing. Later updates differ: the reference keeps its first moment in bfloat16."""
    arrays, meta = pipeline
    options = meta["optimizer/frozen_clip"]

    def read(part):
        head = f"optimizer/frozen_clip/{part}/"
        return unflatten({key.removeprefix(head): arrays[key] for key in arrays.files if key.startswith(head)})

    params = read("in/params")
    trained, _ = split_params(params, frozen_paths(params, ("hf_model",)))
    lr = options["learning_rate"]
    schedule = make_schedule(
        lr["name"], peak=lr["peak_value"], warmup_steps=lr["warmup_steps"], timescale=lr["timescale"]
    )
    tx = make_optimizer(schedule, weight_decay=options["weight_decay"], clip_norm=options["clip_gradient"])
    state = tx.init(trained)
    for number in range(2):
        grads = {path: leaf for path, leaf in flatten(read(f"in/grads/step{number}")) if path in trained}
        updates, state = tx.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
        want = dict(flatten(read(f"upstream/params_after_step{number}")))
        # The learning rate of the first update is 0, so the second is the first that moves anything; by then the
        # reference's moment has been rounded to 8 bits once.
        for path, leaf in trained.items():
            np.testing.assert_allclose(leaf, want[path], atol=3e-5, err_msg=path)


@pytest.mark.parametrize("case", ["brightness_0.1", "contrast_1.15", "saturation_1.2", "hue_0.05", "crop_resize_0"])
def test_reference_augmentation(pipeline, case):
    arrays, _ = pipeline
    image = jnp.asarray(arrays["augment/in/image"], jnp.float32)[None] / 255.0
    name, value = case.rsplit("_", 1)
    value = float(value)
    if name == "crop_resize":
        got = crop_resize(image, jnp.asarray(arrays[f"augment/{case}/in/box_y1x1y2x2"]))
        want = arrays[f"augment/{case}/upstream/float"]
    else:
        hsv = rgb_to_hsv(image)
        got = {
            "brightness": lambda: image + value,
            "contrast": lambda: adjust_contrast(image, value),
            "saturation": lambda: hsv_to_rgb(hsv.at[..., 1].set(jnp.clip(hsv[..., 1] * value, 0, 1))),
            "hue": lambda: hsv_to_rgb(hsv.at[..., 0].set((hsv[..., 0] + value) % 1.0)),
        }[name]()
        want = arrays[f"augment/{case}/upstream/float_clipped"]
    np.testing.assert_allclose(jnp.clip(got[0], 0, 1), np.clip(want, 0, 1), atol=2e-5)


def test_decay_mask_is_by_kernel(model):
    flat = dict(flatten(decay_mask(model[1])))
    assert flat["heads_action/diffusion_model/reverse_network/Dense_0/kernel"]
    assert not flat["heads_action/diffusion_model/reverse_network/Dense_0/bias"]


def test_sharding_is_inferred_from_shapes():
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    tree = {"big": jax.ShapeDtypeStruct((64, 128), jnp.float32), "small": jax.ShapeDtypeStruct((3,), jnp.float32)}
    placed = sharding.infer_sharding(tree, mesh, min_size=100, overrides=(("small", (None,)),))
    assert placed["big"].is_fully_replicated and placed["small"].is_fully_replicated
    with pytest.raises(ValueError, match="devices"):
        sharding.make_mesh(data=7, fsdp=3)
    with pytest.raises(ValueError, match="multiple of 2"):
        sharding.check_batch_size(5, mesh, accumulate=2)


def test_colour_conversion_round_trip_and_known_values():
    rgb = jax.random.uniform(jax.random.key(0), (50, 3))
    np.testing.assert_allclose(hsv_to_rgb(rgb_to_hsv(rgb)), rgb, atol=1e-5)
    known = jnp.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.5, 0.5, 0.5]])
    want = [[0, 1, 1], [1 / 3, 1, 1], [2 / 3, 1, 1], [0, 0, 0.5]]
    np.testing.assert_allclose(rgb_to_hsv(known), want, atol=1e-6)


def test_crop_against_brute_force():
    image = jax.random.uniform(jax.random.key(1), (1, 7, 5, 3))
    box = jnp.array([0.1, 0.2, 0.8, 0.9])
    got = crop_resize(image, box)
    for i in range(7):
        for j in range(5):
            y, x = 0.1 * 6 + i * 0.7, 0.2 * 4 + j * 0.7
            y0, x0 = min(int(y), 5), min(int(x), 3)
            dy, dx = y - y0, x - x0
            square = image[0, y0 : y0 + 2, x0 : x0 + 2]
            want = (square[0, 0] * (1 - dx) + square[0, 1] * dx) * (1 - dy)
            want = want + (square[1, 0] * (1 - dx) + square[1, 1] * dx) * dy
            np.testing.assert_allclose(got[0, i, j], want, atol=1e-5)
    np.testing.assert_allclose(adjust_contrast(image, 1.0), image, atol=1e-6)


def test_augmentation_is_one_draw_per_sample_and_skips_missing_images():
    data = synthetic_batch(tiny.SPEC, 3)
    frame = data["observation"]["image_primary"][:, :1]
    data["observation"]["image_primary"] = np.repeat(frame, 2, axis=1)
    data["task"]["image_primary"] = frame[:, 0]
    data["observation"]["pad_mask_dict"]["image_primary"][1, 0] = False
    config = {"primary": Augmentation(crop_scale=(0.5, 0.9), brightness=0.2, contrast=(0.8, 1.2), hue=0.1)}
    keys = jax.random.split(jax.random.key(0), 3)
    out = augment_batch(data, config, keys)
    frames, goal = np.asarray(out["observation"]["image_primary"]), np.asarray(out["task"]["image_primary"])
    np.testing.assert_array_equal(frames[0, 0], frames[0, 1])
    np.testing.assert_array_equal(frames[0, 0], goal[0])
    np.testing.assert_array_equal(frames[1, 0], frame[1, 0])
    assert np.any(frames[1, 1] != frame[1, 0]) and np.any(frames[2, 0] != frame[2, 0])
    np.testing.assert_array_equal(out["observation"]["image_wrist"], data["observation"]["image_wrist"])
    with pytest.raises(ValueError, match="primary"):
        augment_batch(data, {"secondary": Augmentation()}, keys)


def test_clipping_is_by_the_norm_of_trained_gradients():
    tx = make_optimizer(make_schedule("constant", peak=1.0, warmup_steps=0), clip_norm=1.0)
    params = {"a/kernel": jnp.zeros(3)}
    grads = {"a/kernel": jnp.array([30.0, 0.0, 40.0])}
    state = tx.init(params)
    _, state = tx.update(grads, state, params)
    moment = [x for x in jax.tree.leaves(state) if getattr(x, "shape", None) == (3,)][0]
    np.testing.assert_allclose(moment, 0.1 * np.array([0.6, 0.0, 0.8]), rtol=1e-6)
    assert float(optax.global_norm(grads)) == 50.0
