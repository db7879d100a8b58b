"""What a config leaves out. A saved policy keeps only what its config says, so a default is part of its file format."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from octo_like.common.config import diff, load_config
from octo_like.common.schema import BatchSpec, flatten
from octo_like.model import t5
from octo_like.model.attention import attend
from octo_like.model.decoder import TokenDecoder
from octo_like.model.octo import AUXILIARIES, HEADS, STEMS, TOKENIZERS, build_model, init_params
from octo_like.model.transformer import Block, MapPooling, Mlp, MultiHeadAttention, Transformer
from tests.model import light, tiny

HEAD = dict(use_map=False, action_horizon=1, action_dim=7, max_action=5.0, resized_from=())
GENERATIVE = HEAD | dict(
    max_delay=0,
    num_samples=1,
    time_dim=32,
    num_blocks=3,
    hidden_dim=256,
    use_layer_norm=True,
    dropout_rate=0.0,
    loss="mse",
)
DIFFUSION = dict(
    num_steps=20, prediction="noise", sampler="ddpm", sample_steps=None, eta=0.0, clip="sample", min_signal=0.15
)
DECODER = dict(width=256, num_layers=2, num_heads=4, mlp_dim=0)
SEQUENCE = DECODER | dict(reads="readout", temperature=1.0, top_k=0)
PARTS = {
    STEMS["small"]: dict(
        patch_size=16,
        features=(32, 96, 192, 384),
        kernel_sizes=None,
        strides=None,
        padding=None,
        num_features=512,
        use_film=False,
        early_film=False,
    ),
    STEMS["patch"]: dict(patch_size=32, num_features=512, use_film=False),
    STEMS["conv"]: dict(use_film=False, coordinates=False, num_groups=8),
    STEMS["keypoints"]: dict(num_keypoints=32, use_film=False, num_groups=8),
    STEMS["resnet"]: dict(num_layers=(2, 2, 2, 2), width=1, use_film=False),
    TOKENIZERS["image"]: dict(
        goal_keys=(), film_keys=(), num_learned_tokens=0, normalization="default", use_pad_mask=True
    ),
    TOKENIZERS["language"]: dict(
        key="language_instruction",
        encoder="small",
        t5=None,
        finetune_encoder=False,
        encoder_dtype=None,
        vocab_size=0,
        dim=128,
        num_layers=1,
        num_heads=4,
        max_length=16,
        pool=False,
        use_pad_mask=True,
    ),
    TOKENIZERS["lowdim"]: dict(
        per="vector", discretize=False, num_bins=256, bin_type="uniform", low=0.0, high=1.0, entries=None
    ),
    HEADS["diffusion"]: GENERATIVE | DIFFUSION,
    HEADS["flow"]: GENERATIVE | dict(sample_steps=10, time_alpha=1.5),
    HEADS["regression"]: HEAD | dict(loss="mse"),
    HEADS["discrete"]: HEAD
    | dict(
        num_bins=256,
        bin_type="uniform",
        low=None,
        high=None,
        token_per="action_dim_and_action_horizon",
        temperature=1.0,
    ),
    HEADS["bins"]: HEAD | SEQUENCE | dict(num_bins=256, bin_type="uniform", low=None, high=None),
    HEADS["fast"]: HEAD | SEQUENCE,
    AUXILIARIES["text"]: DECODER | dict(max_length=24, learns=("answer", "subtask"), reads="readout", remembers=False),
    TokenDecoder: DECODER,
    MultiHeadAttention: dict(dropout_rate=0.0, uniform_when_masked=False, attention="xla", qk_norm=False),
    Mlp: dict(dropout_rate=0.0),
    Block: dict(
        dropout_rate=0.0, attention_dropout_rate=0.0, uniform_when_masked=False, attention="xla", qk_norm=False
    ),
    Transformer: dict(
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        uniform_when_masked=False,
        remat=False,
        attention="xla",
        qk_norm=False,
    ),
    MapPooling: dict(num_probes=1, uniform_when_masked=False, num_heads=8),
    t5.T5Config: dict(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
        num_buckets=32,
        max_distance=128,
        epsilon=1e-6,
        gated=False,
    ),
}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_parts_defaults(part):
    kept = {field.name: field.default for field in dataclasses.fields(part) if field.name not in ("parent", "name")}
    kept = {name: value for name, value in kept.items() if value is not dataclasses.MISSING}
    assert kept.pop("dtype", jnp.float32) == jnp.float32 and kept.pop("compat", False) is False
    assert kept == PARTS[part]


def test_every_kind_is_in_the_table():
    assert {*STEMS.values(), *TOKENIZERS.values(), *HEADS.values(), AUXILIARIES["text"]} <= set(PARTS)


def test_a_models_defaults():
    config = light.config()
    del config["repeat_task_tokens"]
    transformer = build_model(config).octo_transformer
    kept = {
        name: getattr(transformer, name)
        for name in ("repeat_task_tokens", "legacy_attention", "token_norm", "position_scale", "compat")
    }
    assert kept == dict(
        repeat_task_tokens=False, legacy_attention=False, token_norm=False, position_scale=0.02, compat=False
    )
    assert transformer.dtype == jnp.float32 and build_model(config).head_weights == {"action": 1.0}


STEM_OPTIONS = {
    "small": dict(patch_size=4, features=(32, 32), num_features=8, use_film=True, early_film=True),
    "patch": dict(patch_size=4, num_features=8, use_film=True),
    "conv": dict(layers=((4, 4, 8), (3, 2, 8)), use_film=True, coordinates=True),
    "keypoints": dict(layers=((4, 4, 8),), num_keypoints=4, use_film=True),
    "resnet": dict(num_layers=(1, 1), width=0.5, use_film=True),
}


@pytest.mark.parametrize("kind", STEMS)
def test_a_stem_in_bfloat16_multiplies_in_bfloat16_and_nothing_else(kind):
    stem = STEMS[kind](**STEM_OPTIONS[kind], dtype=jnp.bfloat16)
    x, c = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    params = jax.eval_shape(lambda x, c: stem.init(jax.random.key(0), x, c)["params"], x, c)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    program = jax.make_jaxpr(lambda p, x, c: stem.apply({"params": p}, x, c))(params, x, c)
    products = [
        line.split("=")[0]
        for line in str(program).splitlines()
        # Points are an average in float32; the rest is the stem's.
        if ("conv_general_dilated[" in line or "dot_general[" in line) and kind != "keypoints"
    ]
    assert all("bf16" in line for line in products) and (products or kind == "keypoints")
    assert jax.eval_shape(lambda p, x, c: stem.apply({"params": p}, x, c), params, x, c).dtype == jnp.bfloat16


@pytest.mark.parametrize("head_dim", [12, 136])
def test_heads_that_the_fused_kernel_cannot_do_are_named(head_dim):
    q = jnp.zeros((1, 4, 2, head_dim), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"multiple of 8 up to 128, got {head_dim}"):
        attend(q, q, q, jnp.ones((1, 4, 4), bool), implementation="cudnn")


def test_what_a_model_is_not_told_is_refused():
    for change, message in (
        (dict(task_tokenizers=dict(language=dict(kind="language", encoder="t5", t5="t5-huge"))), "'t5-huge'; valid"),
        (dict(auxiliaries=dict(action=dict(kind="points"))), "there is a head of that name"),
        (dict(heads=dict(action=tiny.diffusion() | dict(kind="difusion"))), "unknown kind 'difusion'; valid"),
        (dict(tokendim=3), "did you mean 'token_dim'"),
        (dict(transformer=dict(num_layer=3)), "did you mean 'num_layers'"),
        (dict(task_tokenizers=dict(language=dict(kind="language", encoder="small"))), "needs vocab_size"),
        (
            dict(observation_tokenizers=dict(a=dict(kind="image", obs_keys=("a",), stem=dict(kind="patch", patch=3)))),
            "a.stem: unknown option 'patch'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(light.config(**change))


def test_octo_small_that_listens_has_film_in_its_stems_and_is_itself_otherwise():
    plain, listening = (load_config(f"configs/octo_small.py:{words}") for words in ("small", "small,listen"))
    changes = {change.key for change in diff(plain, listening)}
    stems = {f"model.observation_tokenizers.{camera}.stem.{key}" for camera in ("primary", "wrist")
             for key in ("use_film", "early_film")}  # fmt: skip
    film = {f"model.observation_tokenizers.{camera}.film_keys" for camera in ("primary", "wrist")}
    assert changes == stems | film | {"model.token_norm", "model.position_scale"}
    model = listening.model.to_dict()
    model["task_tokenizers"] = dict(language=dict(kind="language", encoder="small", vocab_size=50, dim=8, max_length=8))
    model["transformer"] |= dict(num_layers=1)
    spec = BatchSpec(2, 4, 7, {"primary": (32, 32), "wrist": (32, 32)}, ("primary", "wrist"), language_length=8)
    shapes = jax.eval_shape(lambda: init_params(build_model(model), spec, jax.random.key(0)))
    names = [path for path, _ in flatten(shapes)]
    assert sum("film" in name.lower() for name in names) >= 2 * 5, names
    with pytest.raises(ValueError, match="valid: small, base, 300m, 1b, each with ,listen or ,learned_text or both"):
        load_config("configs/octo_small.py:small,hear")
