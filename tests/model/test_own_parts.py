"""Parts of a user's own: found by name, imported only when named, and each thing they may do wrong is said by name."""

import itertools
import json
import logging
import sys

import jax
import numpy as np
import pytest

from octo_like.common import parts as common_parts
from octo_like.common.parts import PartError
from octo_like.common.schema import BatchSpec, flatten, synthetic_batch
from octo_like.model.octo import build_model
from octo_like.policy.policy import Policy
from octo_like.policy.pretrained import PretrainedError
from octo_like.training.optimizer import make_schedule
from octo_like.training.step import StepConfig, make_train_step
from tests.model import tiny

SPEC = BatchSpec(1, 2, 3, {"primary": (16, 16)}, extra_observations={"force": (6,)})

GOOD = """
import dataclasses
import flax.linen as nn
import jax
import jax.numpy as jnp
from octo_like.model.heads import ActionHead
from octo_like.model.tokens import TokenGroup, valid_mask


class Force(nn.Module):
    obs_keys: tuple = ("force",)
    features: int = 8

    @nn.compact
    def __call__(self, observation, task, summaries=None):
        if "force" not in observation:
            return None
        x = nn.Dense(self.features, name="hidden")(observation["force"])
        return TokenGroup(x[:, :, None], valid_mask(observation, "force", x.shape[:2])[..., None])


class Stem(nn.Module):
    @nn.compact
    def __call__(self, x, condition=None):
        return nn.Conv(4, (8, 8), 8, name="patches")(x)


class Head(ActionHead):
    bias: float = 0.0

    def setup(self):
        super().setup()
        self.project = nn.Dense(self.action_horizon * self.action_dim)

    def predict(self, groups, last_only=False):
        x = self.project(self.embed(groups, last_only=last_only)) + self.bias
        return x.reshape(*x.shape[:-1], self.action_horizon, self.action_dim)

    def loss_terms(self, groups, action, mask, keys_b):
        loss = (self.predict(groups) - action) ** 2 * mask
        self.report_by_sample(loss, mask)
        return {"loss": loss.sum()}

    def sample(self, groups, keys_b, *, sample_shape=(), valid=None):
        action = self.predict(groups, last_only=True)[:, -1]
        return jnp.broadcast_to(action, (*sample_shape, *action.shape))


class Effort(nn.Module):
    readout: str

    def setup(self):
        self.project = nn.Dense(1)

    def mask(self, batch):
        return batch["observation"]["timestep_pad_mask"]

    def loss_terms(self, groups, batch):
        said = self.project(groups[self.readout].tokens.mean(-2))[..., 0]
        norm = jnp.linalg.norm(batch["observation"]["force"], axis=-1)
        return {"loss": ((said - norm) ** 2 * self.mask(batch)).sum(), "count": self.mask(batch).sum()}


@dataclasses.dataclass(frozen=True)
class Invert:
    amount: float = 1.0

    def images(self, images, key):
        return 255 - images
"""

NUMBERS = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module, with replacements, under a name that was never imported; returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def write(*changes, source=GOOD):
        for old, new in changes:
            assert old in source, old
            source = source.replace(old, new)
        name = f"own_parts_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(source)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def config(module, **changes):
    return (
        dict(
            token_dim=16,
            max_window=1,
            transformer=dict(num_layers=1, num_heads=2, mlp_dim=16),
            observation_tokenizers=dict(
                primary=dict(kind="image", stem=dict(kind=f"{module}:Stem"), obs_keys=("image_primary",)),
                force=dict(kind=f"{module}:Force", obs_keys=("force",)),
            ),
            readouts=dict(action=1),
            heads=dict(
                action=dict(kind=f"{module}:Head", readout="readout_action", action_horizon=2, action_dim=3, weight=2.0)
            ),
        )
        | changes
    )


def trace(model, spec=SPEC):
    """A training step and a sample, by shapes alone."""
    import optax

    from octo_like.training.state import create_state

    batch, tx = synthetic_batch(spec, 4), optax.sgd(0.1)
    step = make_train_step(model, tx, make_schedule("constant", peak=1.0, warmup_steps=1), StepConfig())

    def both(batch):
        params = tiny.random_params(model, spec)
        keys = jax.random.split(jax.random.key(0), 4)
        actions = model.apply(
            {"params": params},
            batch["observation"],
            batch["task"],
            keys,
            head="action",
            sample_shape=(5,),
            method="sample",
        )
        return step(create_state(params, tx, frozenset()), batch)[1], actions

    return jax.eval_shape(both, batch)


def policy_of(module, **changes):
    model = config(module, **changes)
    params = tiny.random_params(build_model(model), SPEC)
    unit = {k: np.ones(6, np.float32) * v for k, v in dict(mean=2, std=4, min=0, max=9, p01=0, p99=9).items()}
    unit["mask"] = np.ones(6, bool)
    three = {key: values[:3] for key, values in unit.items()}
    statistics = {"mine": {"action": three, "extra": {"force": unit}, "num_transitions": 9, "num_trajectories": 1}}
    return Policy({"model": model, "batch_spec": SPEC.to_json()}, params, statistics)


def observation(rows=2, **changes):
    batch = synthetic_batch(SPEC, rows)["observation"]
    return {key: value for key, value in batch.items() if key != "pad_mask_dict"} | changes


# ------------------------------------------------------------------------------------------------------- what works


def test_own_parts_train_act_and_report(module):
    name = module()
    auxiliaries = dict(effort=dict(kind=f"{name}:Effort", readout="readout_action", weight=0.5))
    model = build_model(config(name, auxiliaries=auxiliaries))
    metrics, actions = trace(model)
    assert actions.shape == (5, 4, 2, 3) and metrics["samples"]["loss"].shape == (4,)
    assert {"action/loss", "effort/loss", "grad_norm/heads_action"} <= set(metrics)
    paths = {path for path, _ in flatten(tiny.random_params(model, SPEC))}
    assert "octo_transformer/observation_tokenizers_force/hidden/kernel" in paths
    assert "octo_transformer/observation_tokenizers_primary/Stem_0/patches/kernel" in paths
    assert model.head_weights == {"action": 2.0, "effort": 0.5}


def test_a_sensor_reaches_the_policy_in_physical_units_and_is_masked_when_missing(module, caplog):
    policy = policy_of(module())
    task = {"timestep": np.zeros(2, np.int32), "pad_mask_dict": {}}
    force = np.full((2, 1, 6), 6.0)  # float64, as robots send it
    prepared = policy.prepare_observations(observation(force=force), "mine")
    np.testing.assert_allclose(prepared["force"], 1.0)
    assert prepared["force"].dtype == np.float32 and prepared["pad_mask_dict"]["force"].all()
    rng = jax.random.key(0)
    act = lambda **changes: policy.sample_actions(observation(**changes), task, rng=rng, unnormalize="mine")  # noqa: E731
    assert np.abs(act(force=force) - act(force=force + 1)).max() > 1e-3
    without = {key: value for key, value in observation().items() if key != "force"}
    missing = policy.prepare_observations(without, "mine")
    assert "observation/force is missing" in caplog.text and not missing["pad_mask_dict"]["force"].any()
    with pytest.raises(ValueError, match=r"force: expected \(B, 1, 6\) float32, got \(2, 1, 5\)"):
        act(force=force[..., :5])
    extra = policy.statistics["mine"].pop("extra")
    plain = policy.prepare_observations(observation(force=force), "mine")
    np.testing.assert_array_equal(plain["force"], force)  # no statistics of it at all: as a release takes it
    policy.statistics["other"] = {**policy.statistics["mine"], "extra": extra}
    with pytest.raises(ValueError, match="'mine' was trained without force"):
        act(force=force)


# ------------------------------------------------------------------------------------------------ who may import what


def test_loading_imports_nothing_that_is_not_named(module, tmp_path, caplog):
    name = module()
    policy = policy_of(name)
    policy.save_pretrained(tmp_path / "export")
    document = json.loads((tmp_path / "export" / "config.json").read_text())
    assert document["modules"] == {name: common_parts.hashes_of([name])[name]}
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"modules=['{name}']" in card and document["modules"][name] in card
    del sys.modules[name]
    with pytest.raises(PretrainedError, match=f"(?s)model.heads.action is '{name}:Head'.*modules=\\['{name}'\\]"):
        Policy.load_pretrained(tmp_path / "export")
    with pytest.raises(PretrainedError, match="not named"):
        Policy.load_pretrained(tmp_path / "export", modules=["json", name + "x"])
    assert name not in sys.modules
    loaded = Policy.load_pretrained(tmp_path / "export", modules=[name])
    assert "hash" not in caplog.text
    for modules in (name, [sys.modules[name]]):
        Policy.load_pretrained(tmp_path / "export", modules=modules)
    for path, leaf in flatten(loaded.params):
        np.testing.assert_array_equal(leaf, dict(flatten(policy.params))[path])
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["modules"] == document["modules"]


def test_another_source_is_told(module, tmp_path, caplog):
    name = module()
    policy_of(name).save_pretrained(tmp_path / "export")
    del sys.modules[name]
    file = tmp_path / f"{name}.py"
    file.write_text(file.read_text() + "\n# changed\n")
    with caplog.at_level(logging.WARNING):
        Policy.load_pretrained(tmp_path / "export", modules=[name])
    assert f"module {name}, whose source" in caplog.text


def test_a_package_stands_for_what_is_in_it(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "heads.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    policy_of("own_package.heads").save_pretrained(tmp_path / "export")
    assert Policy.load_pretrained(tmp_path / "export", modules=["own_package"]).batch_spec == SPEC
    with pytest.raises(PretrainedError, match="not named"):
        Policy.load_pretrained(tmp_path / "export", modules=["own_pack"])


def test_modules_that_cannot_be_imported(module, tmp_path):
    name = module()
    policy_of(name).save_pretrained(tmp_path / "export")
    del sys.modules[name]
    (tmp_path / f"{name}.py").unlink()
    with pytest.raises(PartError, match=f"there is no module '{name}' here; .*PYTHONPATH"):
        Policy.load_pretrained(tmp_path / "export", modules=[name])
    broken = module(source="import a_library_that_nobody_has\n")
    with pytest.raises(PartError, match="importing .* failed: ModuleNotFoundError: No module named 'a_library"):
        build_model(config(broken))
    wrong = module(source="this is no Python")
    with pytest.raises(PartError, match="importing .* failed: SyntaxError"):
        build_model(config(wrong))


# -------------------------------------------------------------------------------------------------------- mistakes


def changed_entry(group, **changes):
    def change(name):
        whole = config(name)
        entries = whole[group]
        which = next(reversed(entries))
        return {**whole, group: {**entries, which: {**entries[which], **changes}}}

    return change


def without(group, key):
    def change(name):
        whole = config(name)
        which = next(reversed(whole[group]))
        entry = {k: v for k, v in whole[group][which].items() if k != key}
        return {**whole, group: {**whole[group], which: entry}}

    return change


def kind(group, text):
    return lambda name: changed_entry(group, kind=text.format(name))(name)


@pytest.mark.parametrize(
    "source,change,message",
    [
        ((), kind("heads", "{}:"), "kind '.*:' is not 'module:Class'"),
        ((), kind("heads", "{}:Haed"), r"has no class 'Haed'; it has \['Effort', 'Force', 'Head', 'Invert', 'Stem'\]"),
        ((), kind("heads", "{}:Force"), "Force cannot be a head: it is no subclass of .*ActionHead"),
        (
            (),
            kind("observation_tokenizers", "{}:Invert"),
            "Invert cannot be a observation tokenizer: .*flax.linen.Module",
        ),
        ((), kind("heads", "gaussian"), r"unknown kind 'gaussian'; valid: \[.*'flow'.*or 'module:Class' of your own"),
        ((), changed_entry("heads", spread=1.0), "model.heads.action: unknown option 'spread'"),
        ((), changed_entry("observation_tokenizers", feature=1), "'feature'; did you mean 'features'"),
        ((), without("heads", "action_dim"), "model.heads.action: say 'action_dim' in the config"),
        ((), without("observation_tokenizers", "obs_keys"), "model.observation_tokenizers.force: say 'obs_keys'"),
        ([("def sample", "def draw")], None, "own_parts_.*:Head cannot be a head: it has no method sample"),
        (
            [("def loss_terms(self, groups, action, mask, keys_b)", "def loss_terms(self, groups)")],
            None,
            "loss_terms does not take 4 argument",
        ),
        ([("*, sample_shape=(), valid=None", "")], None, "sample does not take .*sample_shape=, valid="),
        (
            [("def __call__(self, observation, task, summaries=None)", "def __call__(self, observation)")],
            None,
            "__call__ does not take 3",
        ),
        (
            [("def __call__(self, x, condition=None)", "def __call__(self, x)")],
            None,
            r"primary.stem: .*:Stem: __call__ does not take 2",
        ),
        (
            [("bias: float = 0.0", "weight: float = 0.0")],
            None,
            "has a field 'weight', which in a config means something",
        ),
        (
            [("features: int = 8", "features: int = 8\n    size: int = dataclasses.field(kw_only=True)")],
            None,
            "needs the option 'size'",
        ),
    ],
)
def test_a_config_or_class_that_cannot_be(module, source, change, message):
    name = module(*source)
    with pytest.raises(PartError, match=message):
        build_model(change(name) if change else config(name))


GROUP = "return TokenGroup"
TOKENS = f'{GROUP}(x[:, :, None], valid_mask(observation, "force", x.shape[:2])[..., None])'


@pytest.mark.parametrize(
    "old,new,message",
    [
        (
            TOKENS,
            "return x",
            r"observation tokenizer 'force' \(own_parts_.*:Force\) returned \(\d, 1, 8\) float32; .*TokenGroup",
        ),
        (
            TOKENS,
            f"{GROUP}(x, jnp.ones(x.shape[:-1], bool))",
            r"returned tokens \(\d, 1, 8\) .*expected \(B, W, n, F\)",
        ),
        (TOKENS, f"{GROUP}(x[:1, :, None], jnp.ones((1, 1, 1), bool))", r"with \(B, W\) = \(4, 1\)"),
        (
            TOKENS,
            f"{GROUP}(x[:, :, None], jnp.ones(x.shape[:2], bool))",
            r"returned the mask \(\d, 1\) bool; expected \(\d, 1, 1\) bool",
        ),
        (
            TOKENS,
            f"{GROUP}(x[:, :, None], jnp.ones((*x.shape[:2], 1)))",
            r"returned the mask \(\d, 1, 1\) float32; expected .*bool",
        ),
        (
            TOKENS,
            f"{GROUP}(jnp.ones((*x.shape[:2], 1, 3), int), jnp.ones((*x.shape[:2], 1), bool))",
            "expected floating",
        ),
        (
            'name="patches")(x)',
            'name="patches")(x).mean((1, 2))',
            r"the stem of tokenizer .*primary.*:Stem\) returned \(\d, 4\) float32",
        ),
        ('return {"loss": loss.sum()}', "return loss.sum()", "loss_terms returned .*expected a dict with 'loss'"),
        (
            'return {"loss": loss.sum()}',
            'return {"error": loss.sum()}',
            r"returned the keys \['error'\]; expected a dict with 'loss'",
        ),
        (
            'return {"loss": loss.sum()}',
            'return {"loss": loss}',
            r"loss_terms\['loss'\] is \(\d, 1, 2, 3\) float32; expected",
        ),
        (
            'return {"loss": loss.sum()}',
            'return {"loss": loss.sum(), "count": mask.sum()}',
            "has 'count', which the model counts",
        ),
        ("self.report_by_sample(loss, mask)", "pass", "did not call self.report_by_sample"),
        (
            "self.report_by_sample(loss, mask)",
            "self.report_by_sample(loss, mask, batch_axis=2)",
            "was given a loss of .*and a mask of",
        ),
        (
            "(*sample_shape, *action.shape))",
            "action.shape)",
            r"sample returned \(4, 2, 3\) float32; expected \(5, 4, 2, 3\)",
        ),
    ],
)
def test_what_a_part_returns_wrongly_is_said_when_the_step_is_traced(module, old, new, message):
    model = build_model(config(module((old, new))))
    with pytest.raises(PartError, match=message):
        trace(model)


def test_a_frozen_tokenizer_has_to_encode_by_itself(module):
    name = module(("features: int = 8", "features: int = 8\n    is_frozen = True"))
    with pytest.raises(PartError, match="model.task_tokenizers.words: .*Force is_frozen, but .* encode_only=True"):
        build_model(config(name, task_tokenizers=dict(words=dict(kind=f"{name}:Force"))))


def test_names_that_clash(module):
    name = module()
    both = dict(task_tokenizers=dict(force=dict(kind=f"{name}:Force")), repeat_task_tokens=True)
    with pytest.raises(PartError, match="observation_tokenizers.force: there is a task tokenizer of that name"):
        build_model(config(name, **both))
    auxiliaries = dict(action=dict(kind=f"{name}:Effort", readout="readout_action"))
    with pytest.raises(PartError, match="auxiliaries.action: there is a head of that name"):
        build_model(config(name, auxiliaries=auxiliaries))
