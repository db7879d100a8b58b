"""Policy: the public face of a trained model. Pure JAX; loading and running it imports no TensorFlow.

policy = Policy.load_pretrained("runs/pretrain/export")
task = policy.create_tasks(texts=["put the green block on the blue plate"])
actions = policy.sample_actions(observation, task, rng=jax.random.key(0), unnormalize="tabletop_gripper")
"""

import functools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from octo_like.common import normalization
from octo_like.common.chunks import Continuation
from octo_like.common.parts import Modules
from octo_like.common.schema import BatchSpec, check_tree, flatten, synthetic_batch
from octo_like.common.text import TextTokenizer
from octo_like.common.words import check_words, suggest, whole_number
from octo_like.model import parts
from octo_like.model.backbone import without_padding
from octo_like.model.octo import OctoModel, build_model, init_params
from octo_like.model.tokenizers import DECLARED, match_keys
from octo_like.policy import locations
from octo_like.policy.continuing import guidance_of, methods_of
from octo_like.policy.describe import model_card, pretty_spec
from octo_like.policy.devices import find_devices
from octo_like.policy.observations import (
    ACCEPTED,
    array_module,
    as_array,
    check_actions,
    check_layout,
    check_mask,
    check_sensor,
    check_tasks,
    last_proprio,
    row_keys,
    with_window,
)
from octo_like.policy.octo_release import (
    EXAMPLE,
    is_release,
    load_release,
    name_statistics,
    release_files,
    release_spec,
)
from octo_like.policy.own_modules import check_modules, compare_sources
from octo_like.policy.pretrained import CONFIG_FILE, PretrainedError, load_directory, save_directory
from octo_like.policy.tasks import make_tasks
from octo_like.policy.words import Saying, log_probs, say

log = logging.getLogger(__name__)


class Policy:
    """A model, its parameters, and what it needs to speak in physical units and words.

    Attributes:
      config: {"model": ..., "batch_spec": ..., and anything else worth keeping}, JSON-able.
      params: nested dict of arrays.
      statistics: normalisation statistics by dataset name; see `octo_like.common.normalization`. The entry
        "normalization" of a dataset says which kind ("normal", "bounds") its numbers were trained with, "relative_to"
        which of its actions are relative to which proprioception.
      text_tokenizer: None for a policy without language.
      batch_spec: sizes of everything that goes in and comes out.
      sample_program, text_program, score_program, language_program: the jitted functions behind `sample_actions`,
        `predict_text`, `text_log_probs` and `create_tasks`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        params: Mapping[str, Any],
        statistics: Mapping[str, Any],
        text_tokenizer: TextTokenizer | None = None,
        *,
        modules: Modules = None,
    ):
        """`modules`: see `octo_like.model.octo.build_model`; None is for a config of the caller's own."""
        self.config, self.params, self.statistics = dict(config), params, dict(statistics)
        self.text_tokenizer = text_tokenizer
        self.batch_spec = BatchSpec.from_json(config["batch_spec"])
        vocab_size = text_tokenizer.vocab_size if text_tokenizer else 0
        self.model = build_model(config["model"], vocab_size=vocab_size, modules=modules)
        self.sample_program = jax.jit(functools.partial(_sample, self.model), static_argnames=("head", "sample_shape"))
        self.text_program = jax.jit(
            functools.partial(_predict_text, self.model), static_argnames=("part", "temperature", "top_k")
        )
        self.score_program = jax.jit(functools.partial(_text_log_probs, self.model), static_argnames="part")
        self.language_program = jax.jit(
            lambda params, task: self.model.apply({"params": params}, task, method="encode_language")
        )
        self._warned: set[str] = set()

    # -- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def load_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        step: int | None = None,
        text_model: str | os.PathLike | None = None,
        t5: Mapping[str, Any] | None = None,
        modules: Modules = (),
    ) -> "Policy":
        """Loads an exported policy (what `save_pretrained` and `push` write) or a released Octo checkpoint.

        Args:
          path: a folder, `gs://bucket/path` or `hf://owner/name[@revision][/subfolder]`.
          step: of a release that holds several; the newest when None.
          text_model: sentencepiece model of a release (T5's spiece.model), which does not bring its own. A release
            without it acts on goals and on token ids, and refuses texts.
          t5: fields of `T5Config` that a release's parameters do not tell: max_distance (128) and epsilon (1e-6).
          modules: of the policy's own parts (docs/extending.md), by name or as modules. Only these, and what is in them
            when they are packages, are imported: a policy that was downloaded runs no code by itself.

        Raises:
          PretrainedError: when the path is no policy, or is damaged, or has parts of modules that are not named.
          PartError: a named module cannot be imported, or has no such part.
          LocationError: when a remote location cannot be read.
        """
        find_devices()  # before anything is downloaded
        folder = locations.fetch(path, select=functools.partial(release_files, step=step))
        if is_release(folder):
            policy = cls._from_release(folder, step, text_model, t5)
        else:
            if step is not None or text_model is not None or t5 is not None:
                raise PretrainedError(
                    f"{path} is not a released Octo checkpoint: step, text_model and t5 are for those"
                )
            config, params, statistics, text_dir = load_directory(folder)
            check_modules(path, config, modules)
            tokenizer = TextTokenizer.load(str(text_dir)) if text_dir else None
            named = normalization.from_json(statistics) if statistics else {}
            policy = cls(config, params, named, tokenizer, modules=modules)
            compare_sources(path, config)
        policy._check_params(path)
        return policy

    @classmethod
    def _from_release(cls, folder, step, text_model, t5) -> "Policy":
        model, params, statistics, example = load_release(folder, step=step, t5=t5)
        spec = release_spec(model, example, model["heads"], os.path.join(folder, EXAMPLE))
        tokenizer = TextTokenizer.load(os.fspath(text_model), spec.language_length) if text_model is not None else None
        named = normalization.from_json(name_statistics(statistics)) if statistics else {}
        try:
            return cls({"model": model, "batch_spec": spec.to_json()}, params, named, tokenizer, modules=())
        except (ValueError, TypeError) as error:
            raise PretrainedError(f"{folder}: {CONFIG_FILE} describes no model that can be built: {error}") from error

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes the policy as one self-contained directory; it appears whole or not at all."""
        derived = ("format_version", "params_sha256", "modules")
        config = {key: value for key, value in self.config.items() if key not in derived}
        if own := parts.hashes(config["model"]):
            config["modules"] = own
        tokenizer = self.text_tokenizer
        save_directory(
            path,
            config=config,
            params=jax.device_get(self.params),
            statistics=normalization.to_json(self.statistics),
            save_text=None if tokenizer is None else lambda folder: tokenizer.save(str(folder)),
            card=model_card(self),
        )

    def push(self, location: str, *, message: str = "Upload policy") -> None:
        """Uploads the policy to gs://bucket/path or hf://owner/name; a local path is the same as `save_pretrained`.

        Raises:
          LocationError: the location cannot be written.
        """
        if not locations.is_remote(location):
            self.save_pretrained(locations.fetch(location))
            return
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(os.path.join(folder, "policy"))
            locations.push(os.path.join(folder, "policy"), location, last=CONFIG_FILE, message=message)

    def _check_params(self, path) -> None:
        try:
            expected = jax.eval_shape(lambda: init_params(self.model, self.batch_spec, jax.random.key(0)))
        except Exception as error:  # modules, Flax and JAX raise many kinds
            raise PretrainedError(f"{path}: {CONFIG_FILE} describes no model that can be built: {error}") from error
        want = {name: leaf.shape for name, leaf in flatten(expected)}
        got = {name: leaf.shape for name, leaf in flatten(self.params)}
        problems = [
            f"{n}: config.json says {want[n]}, the file has {got[n]}" for n in want if got.get(n, want[n]) != want[n]
        ]
        problems += [f"{n} {want[n]} is missing" for n in want if n not in got]
        problems += [f"{n} {got[n]} is in no part of this model" for n in got if n not in want]
        if problems:
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            listed = "\n  ".join(problems[:20])
            raise PretrainedError(f"{path}: {len(problems)} parameters do not fit config.json:\n  {listed}{more}")

    # -- what goes in -------------------------------------------------------------------------------------------------

    @property
    def example_batch(self) -> dict[str, Any]:
        """A random batch of one sample with every key and shape the model knows."""
        return synthetic_batch(self.batch_spec, 1)

    def create_tasks(
        self,
        texts: Sequence[str] | None = None,
        goals: Mapping[str, np.ndarray] | None = None,
        *,
        embeddings: np.ndarray | None = None,
        subtasks: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Tasks from instructions, goal images, or both.

        A frozen language encoder runs here, once per task, and not again in `sample_actions`.

        Args:
          texts: B instructions; "" means no instruction.
          goals: "image_{slot}" to (B, h, w, 3) or (h, w, 3) uint8, of the sizes in `batch_spec`.
          embeddings: (B, *batch_spec.language_embedding) float, for a policy that takes precomputed embeddings.
          subtasks: B texts of what to do next, "" means none; a person's, a planner's, or `predict_text`'s.

        Returns:
          Schema `task`; whatever was not given is marked missing in its pad_mask_dict.
        """
        return make_tasks(self, texts, goals, embeddings, subtasks)

    def prepare_observations(self, observations: Mapping[str, Any], unnormalize: str | None = None) -> dict[str, Any]:
        """Checks observations, normalises proprio and other sensors, and fills in what is missing (marked so, and
        logged once).

        What a mask declares absent has no effect, whatever stands there. That holds for a released Octo too, whose own
        masks do not reach all of its tokens: a missing picture is black there, as in Octo's data, and the tokens of a
        missing low-dimensional sensor are not read. One that is not given at all stays out of the observation, as in
        Octo.

        Args:
          observations: (B, W, ...) arrays: image_{slot} uint8, proprio and other sensors (physical units when
            `unnormalize` names statistics, else normalised), timestep_pad_mask, optionally pad_mask_dict,
            proprio_pad_mask, timestep and Octo's task_completed, which is not read. W may be any up to the model's.

        Raises:
          ValueError: a key that the policy does not read; an array of another shape or type; no rows; no camera; values
            that are not finite where no mask hides them.
        """
        spec = self.batch_spec
        known = spec.observation()
        if not isinstance(observations, Mapping):
            raise ValueError(f"observations must be a dict of arrays (B, W, ...), got {observations!r:.60}")
        observations = dict(observations)
        check_words(observations, [key for key in known if key != "timestep"], "observation", ACCEPTED)
        if "timestep_pad_mask" not in observations:
            raise ValueError(f"observation/timestep_pad_mask (B, W) bool is missing; got {sorted(observations)}")
        steps = as_array(observations["timestep_pad_mask"], "observation/timestep_pad_mask")
        if np.ndim(steps) != 2:
            raise ValueError(
                f"observation/timestep_pad_mask: expected (B, W), got {np.shape(steps)}; a single window needs a batch "
                "of one, observation = jax.tree.map(lambda x: x[None], window)"
            )
        b, w = np.shape(steps)
        check_mask(steps, "observation/timestep_pad_mask", (b, w))
        if b == 0 or not 1 <= w <= self.model.octo_transformer.max_window:
            raise ValueError(
                f"observation/timestep_pad_mask is {(b, w)}: expected at least one row, and a window of 1 to "
                f"{self.model.octo_transformer.max_window}"
            )
        xp = array_module(steps)
        pads = observations.get("pad_mask_dict", {})
        if not isinstance(pads, Mapping):
            raise ValueError(f"observation/pad_mask_dict: expected a dict of (B, W) bool, got {pads!r:.60}")
        check_words(pads, known["pad_mask_dict"], "observation/pad_mask_dict", ACCEPTED)
        for key, mask in pads.items():
            check_mask(mask, f"observation/pad_mask_dict/{key}", (b, w))
        if "proprio_pad_mask" in observations:
            shape = (b, w, spec.proprio_dim)
            check_mask(observations["proprio_pad_mask"], "observation/proprio_pad_mask", shape, "(B, W, P)")
        sensors = {"proprio", *spec.extra_observations}
        for key in set(observations) - {"pad_mask_dict"}:
            observations[key] = as_array(observations[key], f"observation/{key}", numbers=key in sensors)
            if key.startswith(("image_", "depth_")):
                check_layout(observations[key], f"observation/{key}")
        for key in known["pad_mask_dict"]:
            if key in observations:
                check_sensor(key, observations)
        out: dict[str, Any] = {"timestep_pad_mask": observations["timestep_pad_mask"], "pad_mask_dict": {}}
        out["timestep"] = observations.get("timestep", xp.broadcast_to(np.arange(w, dtype=np.int32), (b, w)))
        if "proprio" in observations and "proprio" in known:
            observations.update(self._proprio(observations, unnormalize))
        observations.update(self._extras(observations, unnormalize))
        for key in list(known["pad_mask_dict"]):
            leaf = known[key]
            if key in observations:
                out[key] = observations[key]
                out["pad_mask_dict"][key] = pads.get(key, xp.ones((b, w), bool))
            elif self._is_left_out(key, observations):
                if key not in self._warned:
                    log.warning("observation/%s is missing: its tokens are left out", key)
                    self._warned.add(key)
                known = {name: leaf for name, leaf in known.items() if name not in (key, f"{key}_pad_mask")}
                known["pad_mask_dict"] = {name: leaf for name, leaf in known["pad_mask_dict"].items() if name != key}
            else:
                if key not in self._warned:
                    log.warning("observation/%s is missing: it is marked as such and masked out", key)
                    self._warned.add(key)
                out[key] = xp.zeros((b, w, *leaf.shape[1:]), leaf.dtype)
                out["pad_mask_dict"][key] = xp.zeros((b, w), bool)
        if "proprio" in known:
            assert spec.proprio_dim is not None
            default = xp.broadcast_to(xp.asarray(out["pad_mask_dict"]["proprio"])[..., None], (b, w, spec.proprio_dim))
            out["proprio_pad_mask"] = observations.get("proprio_pad_mask", default)
        images = [key for key in known if key.startswith("image_")]
        if images and not any(key in observations for key in images):
            raise ValueError(f"the observation has none of this policy's cameras {images}; got {sorted(observations)}")
        expected = {key: with_window(leaf, w) for key, leaf in known.items()}
        check_tree(out, expected, where="observation")
        return out

    def _is_left_out(self, key: str, observations: Mapping[str, Any]) -> bool:
        """Whether a sensor that is missing is one of a released Octo whose tokens must not be there at all. (Where a
        tokenizer reads several sensors and has some of them, its tokens have to stay: zeros stand for the others.)"""
        model = self.config["model"]
        if not model.get("octo_compat"):
            return False
        sensors = list(self.batch_spec.observation()["pad_mask_dict"])
        for part in model["observation_tokenizers"].values():
            read = match_keys(dict.fromkeys(sensors), tuple(part["obs_keys"]), prefix=True)
            if key in read and (part["kind"] != "lowdim" or any(other in observations for other in read)):
                return False
        return True

    def _proprio(self, observations, unnormalize) -> dict[str, Any]:
        xp = array_module(observations["proprio"])
        proprio = xp.asarray(observations["proprio"], np.float32)
        want, width = self.batch_spec.proprio_dim, proprio.shape[-1] if proprio.ndim else 0
        assert want is not None
        entry = None if unnormalize is None else self._entry(unnormalize)
        if entry is not None and "proprio" not in entry:
            raise ValueError(f"dataset {unnormalize!r} was trained without proprio; leave it out of the observation")
        expected = want if entry is None else len(entry["proprio"]["mean"])
        if proprio.ndim != 3 or width > want or (entry is not None and width != expected):
            whose = f", as {unnormalize!r} was trained with" if entry is not None else ", or fewer dimensions"
            shape = ", ".join(map(str, proprio.shape))
            raise ValueError(f"observation/proprio: expected (B, W, {expected}) float32{whose}; got ({shape})")
        if entry is not None:
            proprio = normalization.normalize(proprio, entry["proprio"], entry.get("normalization", "normal"))
        pad = [(0, 0)] * (proprio.ndim - 1) + [(0, want - width)]
        valid = observations.get("proprio_pad_mask")
        if valid is None:
            valid = xp.broadcast_to(np.arange(want) < width, (*proprio.shape[:-1], want))
        return {"proprio": xp.pad(proprio, pad), "proprio_pad_mask": valid}

    def _extras(self, observations: Mapping[str, Any], unnormalize: str | None) -> dict[str, Any]:
        """Other sensors, normalised; as they are where the policy has no statistics of them, as a released Octo."""
        entry, found = None if unnormalize is None else self._entry(unnormalize), {}
        for key, shape in self.batch_spec.extra_observations.items():
            if key not in observations:
                continue
            found[key] = array_module(observations[key]).asarray(observations[key], np.float32)
            if entry is None or not any(key in one.get("extra", {}) for one in self.statistics.values()):
                continue
            if key not in entry.get("extra", {}):
                raise ValueError(f"dataset {unnormalize!r} was trained without {key}; leave it out of the observation")
            if found[key].shape[2:] == tuple(shape):  # others are refused by name, with everything else that is wrong
                kind = entry.get("normalization", "normal")
                found[key] = normalization.normalize_sensor(found[key], entry["extra"][key], kind)
        return found

    def _entry(self, name: str) -> Mapping[str, Any]:
        if not isinstance(name, str):
            raise ValueError(
                f"unnormalize must be the name of a dataset, or None; got {name!r:.60}. Valid: "
                f"{', '.join(sorted(self.statistics)) or '(none)'}"
            )
        if name not in self.statistics:
            raise ValueError(f"unknown unnormalisation {name!r}; None, or {suggest(name, self.statistics)}")
        return self.statistics[name]

    # -- what comes out -----------------------------------------------------------------------------------------------

    def sample_actions(
        self,
        observations: Mapping[str, Any],
        tasks: Mapping[str, Any],
        *,
        rng: jax.Array,
        unnormalize: str | None = None,
        head: str | None = None,
        sample_shape: tuple[int, ...] = (),
        continuing: Continuation | None = None,
        check_finite: bool = True,
    ) -> jax.Array:
        """Samples action chunks for the last timestep of the window.

        Args:
          observations: see `prepare_observations`.
          tasks: from `create_tasks`.
          rng: one key, or B keys (row i then depends on key i alone, whatever else is in the batch).
          unnormalize: dataset whose statistics turn actions (and proprio) into physical units and say how many action
            dimensions the robot has; None gives the model's own normalised numbers.
          head: name of the head; None: the one that learned from the dataset `unnormalize`, else the only one, or the
            one called "action".
          sample_shape: leading dimensions of independent samples.
          continuing: the chunk that is being executed, in the units of `unnormalize` (None: normalised numbers), which
            the new one goes on from; see `continuation_methods`.
          check_finite: waits for the actions and looks at them. False is for who traces or differentiates this
            (`jax.jit`, `jax.grad`), or looks at them later: a row that could not be computed is then NaN.

        Returns:
          (*sample_shape, B, H, A) float32. Where the dataset's actions were learned relative to the proprioception
          (`DatasetSpec.relative_to`), that of the last timestep is added: in physical units they are always absolute.

        Raises:
          ValueError: what `prepare_observations` refuses, unknown heads or statistics, a wrong number of tasks, actions
            that are relative to a proprioception that is missing, a chunk that the head cannot continue, or a call that
            is traced without `check_finite=False`.
          FloatingPointError: actions that are not finite.
        """
        head = self.head_of(unnormalize, head)
        shape = tuple(sample_shape) if isinstance(sample_shape, list | tuple) else (sample_shape,)
        shape = tuple(whole_number(size, "sample_shape: each size") for size in shape)
        given, observations = observations, self.prepare_observations(observations, unnormalize)
        relative_to, origin_bp = None, None
        if unnormalize is not None and (relative_to := self._entry(unnormalize).get("relative_to")) is not None:
            origin_bp = last_proprio(given, unnormalize)
        b = observations["timestep_pad_mask"].shape[0]
        check_tasks(tasks, self.batch_spec, b)
        keys_b = row_keys(rng, b)
        dim = self.model.heads[head].action_dim
        if unnormalize is not None:
            entry = self._entry(unnormalize)
            dim = len(entry["action"]["mean"])
            if dim > self.model.heads[head].action_dim:
                raise ValueError(
                    f"statistics {unnormalize!r} have {dim} action dimensions, head {head!r} has "
                    f"{self.model.heads[head].action_dim}"
                )
        valid = np.arange(self.model.heads[head].action_dim) < dim
        options: dict[str, Any] = dict(head=head, sample_shape=shape)
        if continuing is not None:
            if not isinstance(continuing, Continuation):
                raise ValueError(f"continuing must be a Continuation, or None; got {continuing!r:.60}")
            statistics = None if unnormalize is None else entry
            options["guidance"] = guidance_of(continuing, self.model.heads[head], b, statistics, origin_bp)
        actions = self.sample_program(self.params, observations, tasks, keys_b, valid, **options)
        if unnormalize is not None:
            actions = array_module(actions).asarray(actions)[..., :dim]
            actions = normalization.unnormalize(actions, entry["action"], entry.get("normalization", "normal"))
            if relative_to is not None and origin_bp is not None:
                actions = normalization.to_absolute(actions, origin_bp[:, None], relative_to)
            # jnp.asarray would compile a program for every shape.
            actions = actions if isinstance(actions, jax.Array) else jax.device_put(actions)
        if check_finite:
            check_actions(actions)
        return actions

    def predict_text(
        self,
        observations: Mapping[str, Any],
        tasks: Mapping[str, Any],
        *,
        rng: jax.Array | None = None,
        unnormalize: str | None = None,
        part: str = "text",
        temperature: float = 0.0,
        top_k: int = 0,
        only: Sequence[str] | None = None,
    ) -> list[str]:
        """What the model says at the last timestep of the window: the answer to an instruction that asks, or what to do
        next (`create_tasks(..., subtasks=...)` takes it).

        Args:
          observations, tasks, unnormalize: as `sample_actions`.
          rng: one key or B keys; needed where `temperature` draws.
          part: of `model.auxiliaries`.
          temperature: 0 says the likeliest word at every step; top_k: draw among the k likeliest.
          only: texts of whose pieces alone, in any order and number, the answer is made:
            `octo_like.common.location_tokens.TOKENS` for places. To choose one of some texts: `text_log_probs`.

        Returns:
          B texts.

        Raises:
          ValueError: a policy that says nothing, or could not say one of `only`; also as `sample_actions`.
        """
        return say(self, observations, tasks, rng, unnormalize, Saying(part, temperature, top_k, only))

    def text_log_probs(
        self,
        observations: Mapping[str, Any],
        tasks: Mapping[str, Any],
        texts: Sequence[str],
        *,
        unnormalize: str | None = None,
        part: str = "text",
    ) -> np.ndarray:
        """(B,) natural logarithms of the probability that the model would say the texts, each to its end: which of some
        sub-tasks does it think is next?

        Args:
          texts: one for each row; for several of one moment repeat it, and its task.

        Raises:
          ValueError: a text too long, or with what the policy cannot say; not one for each row; as `predict_text`.
        """
        return log_probs(self, observations, tasks, texts, unnormalize, part=part)

    def chunk_horizon(self, unnormalize: str | None = None, head: str | None = None) -> int:
        """H of the chunks that `sample_actions` gives for the same arguments."""
        return self.model.heads[self.head_of(unnormalize, head)].action_horizon

    def continuation_methods(self, unnormalize: str | None = None, head: str | None = None) -> dict[str, int]:
        """{method: largest delay} of the `Continuation`s that `sample_actions` takes for the same arguments."""
        return methods_of(self.model.heads[self.head_of(unnormalize, head)])

    def head_of(self, unnormalize: str | None = None, head: str | None = None) -> str:
        """Name of the head that `sample_actions` uses for the same arguments. Raises ValueError for an unknown one."""
        heads = list(self.model.heads)
        if head is None and unnormalize is not None and self._entry(unnormalize).get("head") in heads:
            return self._entry(unnormalize)["head"]
        if head is None:
            head = heads[0] if len(heads) == 1 else "action"
        if head not in heads:
            raise ValueError(f"unknown head {head!r}; valid: {heads}")
        return head

    # -- what it is ---------------------------------------------------------------------------------------------------

    def get_pretty_spec(self) -> str:
        """What the policy takes, gives and holds: inputs, actions, the token sequence, parameters by part."""
        return pretty_spec(self)


def _sample(model: OctoModel, params, observations, tasks, keys_b, valid, guidance=None, **static):
    """`static`: head and sample_shape."""
    arguments = dict(valid=valid, guidance=guidance, **static)
    given = _declared(model, observations, tasks)
    return model.apply({"params": params}, *given, keys_b, **arguments, method="sample")


def _predict_text(model: OctoModel, params, observations, tasks, keys_b, allowed_v=None, **static):
    """`static`: part, temperature and top_k."""
    options = static | {"allowed_v": allowed_v}
    given = _declared(model, observations, tasks)
    return model.apply({"params": params}, *given, keys_b, **options, method="predict_text")


def _text_log_probs(model: OctoModel, params, observations, tasks, ids, *, part):
    given = _declared(model, observations, tasks)
    return model.apply({"params": params}, *given, ids, part=part, method="text_log_probs")


def _declared(model: OctoModel, observations, tasks):
    """(observations, tasks) without what their masks declare absent. The model does so itself, unless it is a released
    Octo, whose masks do not reach all of its tokens. There a missing picture or goal is black and a missing text empty,
    as in the data that it was trained on, and tokens of a missing sensor are not attended to."""
    if not model.octo_transformer.compat:
        return observations, tasks
    observations, tasks = without_padding(observations, tasks, compat=True)
    return {**observations, DECLARED: observations["pad_mask_dict"]}, tasks
