"""Checkpoints: asynchronous, atomic, verified. The only file that imports Orbax.

    workdir/checkpoints/
      1000/              one directory per saved step; it gets this name only when everything in it is complete
        state/           the arrays, written by Orbax (OCDBT), each process its own shards
        manifest.json    what was saved: shape, dtype and checksums of every array, SHA-256 of files, `extra`
      damaged/           steps that failed their verification while a run resumed; kept for inspection, never read

A checkpoint that loads is the checkpoint that was saved: `integrity` says how this is verified. Remote files are not
read back for hashing; the checksums of the arrays hold for them as well. When the newest step fails its verification,
`restore(None, ...)` says so and falls back to the newest good one. A storage that does not answer is asked again
(`storage`); when it still does not, that is an error, and no step is overlooked or set aside for it. Which steps there
are, and what their manifests say, is read by process 0 for all processes.
"""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from octo_like.common.storage import may_pass, persistently
from octo_like.training import storage
from octo_like.training.integrity import (
    MANIFEST,
    Manifest,
    checked_json,
    checksums,
    contents,
    note_metric,
    read_manifest,
    some,
    verify_arrays,
    verify_files,
    write_manifest,
)
from octo_like.training.leaves import (
    abstract_data,
    cast_to,
    check_structure,
    data_struct,
    describe_state,
    from_data,
    leaf_entry,
    named_leaves,
)
from octo_like.training.ranking import BestSteps
from octo_like.training.storage import FILES, CheckpointDamaged, CheckpointError, CheckpointUnreadable

FOLDER = "checkpoints"
DAMAGED = "damaged"

_STATE = "state"
_TEMPORARY = ".orbax-checkpoint-tmp"
_MARK = "commit_success.txt"  # Orbax's, of a complete step in a bucket

log = logging.getLogger(__name__)


class CheckpointNotFound(CheckpointError):
    """There is no checkpoint where one was expected."""


class NonFiniteState(CheckpointError):
    """The state holds NaN or infinity and was not saved."""


class Checkpointer:
    """Saves and restores the training state of one run.

    Every process of a run creates it, and every process calls `save` and `restore` with the same arguments.

    Args:
      workdir: the run's directory; checkpoints live in its `checkpoints/`.
      keep_last: how many of the newest steps are kept.
      keep_every: steps divisible by this number are kept for ever (None: no others).
      keep_best: how many of the steps that were saved with the best `metric` are kept besides.
      best_mode: "min" or "max": which metric is the best.
      metadata: JSON-able dict stored with every step (config, code version).
      read_only: open an existing run without creating or cleaning anything; `workdir` may then also be the
        `checkpoints` directory or one step's directory.

    Raises:
      CheckpointNotFound: read_only, and there is no checkpoint.
      CheckpointError: `workdir` is a file.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
        best_mode: str = "min",
        metadata: dict[str, Any] | None = None,
        read_only: bool = False,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if best_mode not in ("min", "max"):
            raise ValueError(f"unknown best_mode {best_mode!r}; valid: 'min', 'max'")
        self._metadata = metadata or {}
        self._only_step: int | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._saving: dict[str, Any] = {}
        if read_only:
            self.directory, self._only_step = find_checkpoints(workdir)
            self._best = BestSteps(self.directory, best_mode, keep_best)
            return
        root = storage.absolute(workdir)
        if FILES.is_file(root):
            raise CheckpointError(f"workdir {root} is a file, expected a directory")
        self.directory = root / FOLDER
        self._best = BestSteps(self.directory, best_mode, keep_best)
        _tidy(self.directory)
        policies = [checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        if keep_best:
            policies.append(self._best)
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=False,  # `_tidy` does it, which knows an error from an absence
            lightweight_initialize=True,  # a damaged step must not prevent the others from being listed
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )

        def manager() -> ocp.CheckpointManager:
            return ocp.CheckpointManager(self.directory, options=options)

        # Making it is an act of all processes together, which none of them can repeat by itself.
        alone = jax.process_count() == 1
        self._manager = persistently(manager, self.directory) if alone else manager()
        self._list_anew()

    # ------------------------------------------------------------------------------------------------------------ steps

    def all_steps(self) -> list[int]:
        """Completely written steps, ascending. They are not verified."""
        if self._only_step is not None:
            return [self._only_step]
        if self._manager is not None:
            return sorted(self._manager.all_steps())  # as `_list_anew` found them; the same on all processes
        return _listed_steps(self.directory)

    def _list_anew(self) -> None:
        """Makes Orbax see every step that there is: its own look takes an error for an absence.

        Raises:
          CheckpointUnreadable: the storage does not answer.
        """
        manager = self._manager
        assert manager is not None  # not read-only

        def look() -> None:
            steps = storage.of_first(lambda: _listed_steps(self.directory))
            problem: CheckpointError | None = None
            try:
                if sorted(manager.all_steps()) != steps:
                    manager.reload()
                if (found := sorted(manager.all_steps())) != steps:
                    problem = CheckpointUnreadable(f"{self.directory} holds steps {steps}, Orbax finds {found}")
            except Exception as error:  # whatever the storage raises
                problem = CheckpointUnreadable(f"{self.directory} cannot be listed: {storage.first_line(error)}")
            if problem is not None:
                raise problem

        storage.settled(look, self.directory, storage.agree)

    def latest_step(self) -> int | None:
        """The newest completely written step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self, *, besides: int | None = None) -> int | None:
        """The step with the best metric (of equal ones the newest), or None when none was saved with one.

        Args:
          besides: a step that counts as well although it is still being written.
        """
        steps = {*self.all_steps(), *([] if besides is None else [besides])}
        return next(iter(self._best.ranked(sorted(steps))), None)

    # ------------------------------------------------------------------------------------------------------------- save

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None, *, metric: float | None = None) -> bool:
        """Starts saving; returns when the arrays are copied off the devices, so that they may be donated.

        Args:
          step: training step; becomes the directory's name.
          state: pytree of jax.Arrays (typed PRNG keys included).
          extra: JSON-able dict: data position, order spec, statistics, clock.
          metric: how good the state is, for `keep_best`; None or NaN: not measured.

        Returns:
          False when this step is on disk already, else True. One on disk is not written again; it gets the metric, if
          there is one.

        Raises:
          NonFiniteState: an array holds NaN or infinity; nothing was written.
          CheckpointError: `extra` is not JSON, a leaf is no jax.Array, or the previous save failed in the background.
        """
        if self._manager is None:
            raise CheckpointError(f"{self.directory} was opened read-only")
        extra = checked_json(extra or {}, "extra")
        metadata = checked_json(self._metadata, "metadata")
        self.wait()
        if step in self._manager.all_steps():
            log.info("checkpoint %d exists already; not saved again", step)
            if metric is not None and math.isfinite(metric):
                self._best.note(step, float(metric))
                if jax.process_index() == 0:
                    note_metric(self.directory / str(step), float(metric))
            return False
        with jax.transfer_guard("allow"):
            leaves, tree = describe_state(state)
            sums, bad = checksums(tree)
            if bad:
                raise NonFiniteState(f"step {step} was not saved: not finite in {some(bad)}")
            described = {name: leaf_entry(leaf, tree[name], sums[name]) for name, leaf in leaves.items()}
            metric = None if metric is None or not math.isfinite(metric) else float(metric)
            self._saving = {"step": step, "leaves": described, "extra": extra, "metadata": metadata, "metric": metric}
            self._best.note(step, metric)
            self._manager.save(step, args=ocp.args.Composite(**{_STATE: ocp.args.StandardSave(tree)}), force=True)
        return True

    def _write_manifest(self) -> None:
        """Called by Orbax on process 0, in its thread, when all files are closed but not yet in place."""
        saving = self._saving
        step = str(saving["step"])
        listed = FILES.names(self.directory) or []
        names = [name for name in listed if name == step or name.startswith(step + _TEMPORARY)]
        if len(names) != 1:
            raise CheckpointError(
                f"expected one unfinished directory of step {step} in {self.directory}, found {names}"
            )
        write_manifest(self.directory / names[0], saving, hash_files="://" not in os.fspath(self.directory))

    def wait(self) -> None:
        """Blocks until the save in progress is complete on disk.

        Raises:
          CheckpointError: it failed; the step is not on disk.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # whatever the storage raised in Orbax's thread
            raise CheckpointError(
                f"saving step {self._saving.get('step')} to {self.directory} failed: {error}"
            ) from error

    def close(self) -> None:
        """Waits and releases threads. The object cannot save afterwards."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                self._manager.close()
                self._manager = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------------- restore

    def restore(self, step: int | None, abstract_state: Any, *, cast: bool = False) -> tuple[Any, dict[str, Any]]:
        """Loads and verifies a step.

        Args:
          step: a step, or None for the newest good one.
          abstract_state: pytree of jax.ShapeDtypeStruct (or arrays) with the shardings to restore to; these need not be
            the shardings the state was saved with. Without shardings, arrays come to the first device.
          cast: floating-point arrays may be wanted in another dtype than they were saved in; they are verified as they
            were saved, then converted. Training does not use it: what is resumed is what was saved.

        Returns:
          (state, extra). With step=None, damaged newer steps are reported as warnings and moved to `damaged/`, so that
          the run can write them anew.

        Raises:
          CheckpointNotFound: no such step, or none at all.
          StateMismatch: the arrays of the checkpoint and of `abstract_state` differ in names, shapes or dtypes.
          CheckpointDamaged: the step, or with None every step, failed its verification.
          CheckpointUnreadable: the storage does not answer; nothing was set aside.
        """
        self.wait()
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise CheckpointNotFound(f"{wanted} was expected in {self.directory}; found {contents(self.directory)}")
        reasons: dict[int, str] = {}
        for candidate in [step] if step is not None else sorted(steps, reverse=True):
            result, reason = self._try_restore(candidate, abstract_state, cast)
            if reason is None:
                self._set_aside(reasons)
                return result
            reasons[candidate] = reason
            log.warning("checkpoint %s is damaged: %s", self.directory / str(candidate), reason)
        details = "\n".join(f"  step {s}: {reason}" for s, reason in reasons.items())
        raise CheckpointDamaged(f"no good checkpoint in {self.directory}:\n{details}")

    def _try_restore(self, step: int, abstract_state: Any, cast: bool) -> tuple[Any, str | None]:
        """((state, extra), None) or (None, why the step is damaged), the same on every process."""
        folder = self.directory / str(step)

        def verified() -> dict[str, Any]:
            manifest = read_manifest(folder)
            verify_files(folder, manifest)
            return dataclasses.asdict(manifest)

        try:
            manifest = Manifest(**storage.of_first(verified))
            names, treedef = named_leaves(abstract_state)
            check_structure(names, manifest, folder, cast)
            with jax.transfer_guard("allow"):
                arrays = _load_verified(folder, names, manifest, manifest.files is not None, storage.agree)
                if cast:
                    arrays = {name: cast_to(array, names[name]) for name, array in arrays.items()}
        except CheckpointDamaged as error:
            return None, str(error)
        leaves = [from_data(arrays[name], manifest.leaves[name]) for name in names]
        return (jax.tree_util.tree_unflatten(treedef, leaves), manifest.extra), None

    def load_arrays(self, step: int, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix`, verified, on the host; reads no others.

        With "ema/", for instance, the averaged parameters of a training state by path. Every process reads all of it.

        Raises:
          CheckpointNotFound: no such step, or no such array in it.
          CheckpointDamaged: what was read is not what was saved.
          CheckpointUnreadable: the storage does not answer.
        """
        folder = self.directory / str(step)
        manifest = self.read(step)
        names = {name: data_struct(entry) for name, entry in manifest.leaves.items() if name.startswith(prefix)}
        if not names:
            tops = sorted({name.split("/")[0] for name in manifest.leaves})
            raise CheckpointNotFound(f"{folder} has no array under {prefix!r}; it holds {', '.join(tops)}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        names = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for n, x in names.items()}
        arrays = _load_verified(folder, names, manifest, hashed=False)
        return {name.removeprefix(prefix): np.asarray(array) for name, array in arrays.items()}

    def _set_aside(self, damaged: dict[int, str]) -> None:
        if not damaged or self._manager is None:
            return
        if jax.process_index() == 0:
            for step in damaged:
                target = self.directory / DAMAGED / str(step)
                number = 1
                while FILES.look(target) is not None:
                    number += 1
                    target = self.directory / DAMAGED / f"{step}-{number}"
                storage.make_folder(target.parent)
                _move(self.directory / str(step), target)
                log.warning("moved to %s", target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._list_anew()

    def read(self, step: int | None = None) -> Manifest:
        """`extra` and `metadata` of a step without its arrays; with None, of the newest step whose manifest is sound.

        Of a run's own checkpoints, process 0 reads it for all, and every process has to call this.

        Raises:
          CheckpointNotFound: there is no such step.
          CheckpointDamaged: the manifest is damaged, with None those of all steps are.
          CheckpointUnreadable: the storage does not answer.
        """
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            raise CheckpointNotFound(f"no checkpoint in {self.directory}; found {contents(self.directory)}")

        def sound() -> dict[str, Any]:
            problems = []
            for candidate in [step] if step is not None else sorted(steps, reverse=True):
                try:
                    return dataclasses.asdict(read_manifest(self.directory / str(candidate)))
                except CheckpointDamaged as error:
                    problems.append(str(error))
            raise CheckpointDamaged("\n".join(problems))

        return Manifest(**(sound() if self._manager is None else storage.of_first(sound)))

    def verify(self, step: int) -> list[str]:
        """Reads a whole step on this process's first device and compares it with its manifest. Changes nothing.

        Returns:
          The problems found; empty when the step is what was saved.

        Raises:
          CheckpointUnreadable: the storage does not answer.
        """
        folder = self.directory / str(step)
        try:
            manifest = read_manifest(folder)
            verify_files(folder, manifest)
            names = {name: data_struct(entry) for name, entry in manifest.leaves.items()}
            _load_verified(folder, names, manifest, manifest.files is not None)
        except CheckpointDamaged as error:
            return [str(error)]
        return []


# ---------------------------------------------------------------------------------------------------------------- files


def has_checkpoint(workdir: str | os.PathLike) -> bool:
    """Whether a run in this directory would resume. Raises StorageError when the storage does not answer."""
    return bool(_listed_steps(storage.absolute(workdir) / FOLDER))


def _listed_steps(folder: epath.Path) -> list[int]:
    """The complete steps in a folder, ascending; none where there is no folder. Errors of the storage are errors."""
    names = [name for name in FILES.names(folder) or [] if name.isdigit()]
    return sorted(int(name) for name in names if FILES.is_folder(folder / name) and _is_complete(folder / name))


def _is_complete(step: epath.Path) -> bool:
    """Whether a step was written to its end. In a bucket a save that was killed has the step's final name already."""
    return FILES.look(step / MANIFEST) is not None or _is_marked(step)


def _is_marked(step: epath.Path) -> bool:
    """Whether Orbax takes a step for complete: in a bucket by a file, elsewhere by its name alone."""
    return persistently(lambda: ocp.utils.is_checkpoint_finalized(step), step) or FILES.is_file(step / _MARK)


def _move(step: epath.Path, target: epath.Path) -> None:
    """Renames a step's folder. An error may come after the act: then the step is gone, and the target is there."""

    def act() -> None:
        if FILES.look(step) is not None or FILES.look(target) is None:
            step.rename(target)

    persistently(act, step)


def _tidy(folder: epath.Path) -> None:
    """Makes the folder of a run's steps, and removes what killed saves have left.

    Steps in a bucket that have a manifest and lack Orbax's mark are complete, and get it.
    """
    if jax.process_index() == 0:
        storage.make_folder(folder)
        for name in FILES.names(folder) or []:
            step = folder / name
            if name.partition(_TEMPORARY)[0].isdigit() and _TEMPORARY in name:
                complete = False
            elif name.isdigit() and FILES.is_folder(step):
                complete = FILES.look(step / MANIFEST) is not None
                if complete and not _is_marked(step):
                    log.warning("%s is complete, but not marked as such; marked now", step)
                    persistently(functools.partial((step / _MARK).write_text, "the manifest is complete"), step / _MARK)
                complete = complete or "://" not in os.fspath(folder) or _is_marked(step)
            else:
                continue
            if not complete:
                log.info("%s was not written to its end; removed", step)
                persistently(functools.partial(step.rmtree, missing_ok=True), step)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoints tidied")


def find_checkpoints(path: str | os.PathLike) -> tuple[epath.Path, int | None]:
    """Where the steps are, given a run's directory, its `checkpoints` directory or one step's directory.

    Returns:
      (directory of the steps, the step if `path` names one).

    Raises:
      CheckpointNotFound: naming what is there instead.
    """
    root = storage.absolute(path)
    expected = f"expected a run's directory with {FOLDER}/<step>/{MANIFEST}, as written by train.py or finetune.py"
    found = FILES.look(root)
    if found is None:
        raise CheckpointNotFound(f"{root} does not exist; {expected}")
    if not found.is_directory:
        raise CheckpointNotFound(f"{root} is a file; {expected}")
    if root.name.isdigit() and FILES.look(root / MANIFEST) is not None:
        return root.parent, int(root.name)
    for folder in (root / FOLDER, root):
        if _listed_steps(folder):
            return folder, None
    raise CheckpointNotFound(f"{root} is not a checkpoint: it holds {contents(root)}; {expected}")


def _load(folder: epath.Path, names: dict[str, Any], manifest: Manifest, hashed: bool) -> dict[str, jax.Array]:
    """Arrays of a step as they are read; `hashed`: its files have just been compared with their hashes."""
    abstract = {}
    for name, leaf in names.items():
        # As it was saved: what is verified are the saved bits, whatever dtype is wanted in the end.
        data, saved = abstract_data(leaf), data_struct(manifest.leaves[name])
        abstract[name] = jax.ShapeDtypeStruct(data.shape, saved.dtype, sharding=data.sharding)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,  # `load_arrays` reads some of them
            )
            arrays = reader.restore(folder / _STATE, args=arguments)
    except Exception as error:  # damaged storage surfaces as many types: ValueError, OSError, XlaRuntimeError, …
        # Files that have just been found to be those that were saved do not become damaged by an error. Others are
        # damaged when they can be read, and Orbax still finds in them that something is wrong.
        kind = CheckpointUnreadable if hashed or may_pass(error) else CheckpointDamaged
        if kind is CheckpointDamaged:
            _read_through(folder / _STATE)
        raise kind(f"{folder / _STATE} cannot be read: {storage.first_line(error)}") from error
    # What Orbax's own list of arrays does not name (it was damaged), a partial restore leaves as it was asked for.
    absent = [name for name in names if not isinstance(arrays.get(name), jax.Array)]
    if absent:
        raise CheckpointDamaged(f"{folder / _STATE} no longer lists {some(absent)}")
    return {name: arrays[name] for name in names}


def _read_through(folder: epath.Path) -> None:
    """Reads every file below a folder. Raises StorageError when one cannot be read: it may be as good as ever."""
    for name in FILES.names(folder) or []:
        path = folder / name
        if FILES.is_folder(path):
            _read_through(path)
        else:
            FILES.read(path)


def _load_verified(
    folder: epath.Path, names: dict[str, Any], manifest: Manifest, hashed: bool, agree: Callable = storage.alone
) -> dict[str, jax.Array]:
    """The arrays of a step that are named, equal to what was saved; `agree` as in `storage.settled`."""

    def look() -> dict[str, jax.Array]:
        arrays, problem = {}, None
        try:
            arrays = _load(folder, names, manifest, hashed)
        except CheckpointError as error:
            problem = error
        # Before the checksums, which are one program of all processes.
        problem = agree(problem)
        if problem is not None:
            raise problem
        verify_arrays(arrays, manifest)
        return arrays

    return storage.settled(look, folder, agree)
