"""The ahead-of-time proof: compiles a config's programs for TPUs that are not there, and says what they need.

What is compiled is the very step that `train.py` runs (`program.py` builds both), by the very compiler that a TPU host
has (the package libtpu). Memory, collectives and FLOPs are the compiler's; times are calculated from them.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from octo_like.aot import hlo, hlo_cost
from octo_like.aot.chips import Topology
from octo_like.aot.report import GIB, Report
from octo_like.common.config import ConfigDict, freeze, to_dict
from octo_like.common.lanes import check_lanes
from octo_like.common.schema import flatten, unflatten
from octo_like.model.octo import build_model
from octo_like.policy.describe import matmul_flops
from octo_like.policy.policy import Policy
from octo_like.training import sharding
from octo_like.training.program import Network, Program, build_program, network_from_config

# One compilation per process and no TPU beside it: libtpu need not look for one, nor lock out other processes.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class NoCompiler(RuntimeError):
    """libtpu is not installed."""


def find_compiler() -> None:
    """Makes importable the libtpu that `make aot` keeps in the folder `aot` of the environment.

    Where one is installed, that one is taken. The other is not in the environment itself, because every start of JAX
    would then look for a TPU. For commands whose purpose is to compile.
    """
    folder = pathlib.Path(sys.prefix, "aot")
    if not has_compiler() and (folder / "libtpu").is_dir():
        sys.path.append(str(folder))


def has_compiler() -> bool:
    """Whether programs for TPUs can be compiled here."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: Topology) -> list[jax.Device]:
    """Devices to compile for. Arrays cannot be put on them.

    Raises:
      NoCompiler: libtpu is missing.
      ValueError: the compiler does not know the topology.
    """
    if not has_compiler():
        raise NoCompiler("compiling for TPUs needs libtpu: `make aot` in a checkout, or pip install 'octo_like[aot]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as JAX uses them
    if topology.host_bounds is not None:
        options["chips_per_host_bounds"] = topology.host_bounds
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        valid = ", ".join(topology.chip.layouts)
        raise ValueError(
            f"the compiler does not accept the topology {topology.name}; common ones of {topology.chip.name}: {valid} "
            f"({str(error).splitlines()[0]})"
        ) from error
    if len(found) != topology.chips:
        raise ValueError(f"{topology.name}: expected {topology.chips} devices, the compiler makes {len(found)}")
    return list(found)


# ---------------------------------------------------------------------------------------------------------- compilation


def training_program(config: Any, devices: Sequence[jax.Device]) -> tuple[Network, Program, Any]:
    """(network, program, abstract batch) of a config on devices: the objects that `train.py` makes of it."""
    network = network_from_config(config, load_weights=False)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    program = build_program(
        config,
        network.model,
        mesh,
        init_params=network.init_params,
        init_from=jax.random.key(config.seed),
        frozen=network.frozen,
    )
    return network, program, sharding.abstract_batch(network.spec, config.batch_size, mesh)


def prove_training(config: Any, topology: Topology, *, name: str = "config") -> Report:
    """Compiles the training step of a config for a topology.

    A program that does not fit gives a report whose `fits` is False.

    Raises:
      ValueError: the topology's hosts cannot share the lanes of the input stream.
    """
    try:
        devices = devices_of(topology)  # a topology that is none is named before its hosts are
    except NoCompiler:
        check_lanes(config.data.num_lanes, config.batch_size, topology.hosts)  # this much can be said without it
        raise
    check_lanes(config.data.num_lanes, config.batch_size, topology.hosts)
    network, program, batch = training_program(config, devices)
    jitted, arguments = program.step, (program.state, batch)
    params = {**program.state.trained, **program.state.frozen}
    traced = _Traced(
        jitted.trace(*arguments),
        program="train",
        mesh=dict(program.mesh.shape),
        batch_size=config.batch_size,
        model_flops=_model_flops(config, network, program, batch),
        params=params,
        trained=sum(math.prod(leaf.shape) for leaf in program.state.trained.values()),
        inputs=arguments,
    )
    return _report(traced, config, topology, name)


def prove_sampling(config: Any, topology: Topology, *, name: str = "config", batch_size: int = 1) -> Report:
    """Compiles what `Policy.sample_actions` runs for each observation, for one chip of a topology."""
    network = network_from_config(config, load_weights=False)
    place = SingleDeviceSharding(devices_of(topology)[0])
    params = _placed(jax.eval_shape(network.init_params, jax.random.key(0)), place)
    policy = Policy(
        {"model": to_dict(config)["model"], "batch_spec": network.spec.to_json()}, params, {}, network.tokenizer
    )
    rows = unflatten(
        {
            path: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype, sharding=place)
            for path, leaf in flatten({"observation": network.spec.observation(), "task": network.spec.task()})
        }
    )
    task = rows["task"]
    if network.spec.language_length is not None:
        # As create_tasks does: a frozen language encoder has run before.
        encoded = jax.eval_shape(policy.language_program, params, task)
        if encoded:
            task["language_instruction"]["encoded"] = _placed(encoded, place)
    keys = _placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size)), place)
    head = next(iter(policy.model.heads))
    valid = np.ones(policy.model.heads[head].action_dim, bool)

    def arguments(values):
        return values, rows["observation"], task, keys, valid

    def sample(*args):
        return policy.sample_program(*args, head=head, sample_shape=())

    traced = _Traced(
        policy.sample_program.trace(*arguments(params), head=head, sample_shape=()),
        program="sample",
        mesh={},
        batch_size=batch_size,
        model_flops=matmul_flops(sample, *arguments(params)),
        params=params,
        trained=0,
        inputs=arguments(params),
    )
    report = _report(traced, config, dataclasses.replace(topology, slices=1), name)
    return dataclasses.replace(report, chips=1, hosts=1)


def _placed(tree: Any, place: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def _model_flops(config: Any, network: Network, program: Program, batch: Any) -> int:
    """FLOPs of the step without recomputation: those of the same step whose model keeps everything."""
    if _remat(config) == "none":
        return matmul_flops(program.step, program.state, batch)
    plain = ConfigDict(to_dict(config))
    plain.model.transformer.remat = "none"
    network = dataclasses.replace(
        network,
        model=build_model(plain.model, vocab_size=network.tokenizer.vocab_size if network.tokenizer else 0),
    )
    program = build_program(
        config,
        network.model,
        program.mesh,
        init_params=network.init_params,
        init_from=jax.random.key(config.seed),
        frozen=network.frozen,
    )
    return matmul_flops(program.step, program.state, batch)


def _remat(config: Any) -> str:
    value = config.model.transformer.get("remat", "none")
    return {None: "none", False: "none", True: "full"}.get(value, value)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A traced program (`jax.stages.Traced`) that the compiler has not seen, and what a report says of it already.

    Attributes:
      program: "train" or "sample". mesh: sizes by axis.
      params: tree of abstract parameters. trained: how many of their numbers are trained.
      inputs: placed abstract arguments.
    """

    traced: Any
    program: str
    mesh: dict[str, int]
    batch_size: int
    model_flops: int
    params: Any
    trained: int
    inputs: tuple


def _report(one: _Traced, config: Any, topology: Topology, name: str) -> Report:
    lowered, start = one.traced.lower(), time.perf_counter()
    compiled, error = _compiled(lowered)
    seconds = time.perf_counter() - start
    found = _refused(one, error) if compiled is None else _measured(one, compiled, topology)
    return Report(
        program=one.program,
        config=name,
        topology=topology.name,
        slices=topology.slices,
        accelerator=topology.accelerator,
        chips=topology.chips,
        hosts=topology.hosts,
        mesh=one.mesh,
        batch_size=one.batch_size,
        accumulate=config.accumulate if one.program == "train" else 1,
        remat=_remat(config),
        attention=config.model.transformer.get("attention", "xla"),
        capacity=round(topology.chip.hbm_gib * GIB),
        model_flops=one.model_flops,
        compile_seconds=round(seconds, 1),
        fingerprint=jaxpr_fingerprint(one.traced.jaxpr),
        versions={"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
        parameters=sum(math.prod(leaf.shape) for _, leaf in flatten(one.params)),
        trained_parameters=one.trained,
        **found,
    )


def _compiled(lowered: Any) -> tuple[Any, str]:
    """(the compiled program, "") or (None, what the compiler says) when the program needs more memory than there is."""
    try:
        with _quiet_stdout():
            return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        return None, str(failure)


def _refused(one: _Traced, error: str) -> dict[str, Any]:
    """What a report says of a program that does not fit."""
    arguments, needed = _argument_bytes(one.inputs), _needed_bytes(error)
    return dict(
        arguments=arguments,
        outputs=0,
        temporaries=max(0, needed - arguments),
        code=0,
        total=needed,
        loops=[],
        compiled_flops=0.0,
        memory_traffic=0.0,
        collectives={},
        activation_gathers=[],
        error=error.splitlines()[0],
    )


def _measured(one: _Traced, compiled: Any, topology: Topology) -> dict[str, Any]:
    """What a report says of a compiled program: its memory, work and communication."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    module = hlo.parse(compiled.as_text())
    work = hlo_cost.work_of(module)
    found = hlo.collectives(module, work.times, topology.slices)
    parts = dict(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )
    by_kind: dict[str, dict[str, float]] = {}
    for collective in found:
        part = by_kind.setdefault(collective.kind, {"count": 0, "bytes": 0, "wire_bytes": 0})
        part["count"] += collective.times
        part["bytes"] += collective.times * collective.bytes
        part["wire_bytes"] += round(collective.wire_bytes(topology.chips))
    gathers = hlo.activation_gathers(found, [leaf.shape for _, leaf in flatten(one.params)], one.batch_size)
    return dict(
        **parts,
        total=sum(parts.values()),
        loops=list(work.trips),
        compiled_flops=round(work.weigh_flops(cost.get("flops", 0.0))),
        memory_traffic=round(work.weigh_bytes(cost.get("bytes accessed", 0.0))),
        collectives=by_kind,
        activation_gathers=[
            f"{g.kind} {', '.join(f'{dtype}{list(shape)}' for dtype, shape in g.shapes)} of {g.source or '?'}"
            for g in gathers
        ],
    )


def _argument_bytes(inputs: Any) -> int:
    """Bytes of placed abstract arrays on one chip; keys are two words."""

    def size(leaf):
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(inputs) if hasattr(leaf, "sharding"))


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _needed_bytes(message: str) -> int:
    """What the compiler says a program would need; it words this in several ways."""
    for pattern in (r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"\(([\d.]+)([KMGT]?)\) exceeds available"):
        if match := re.search(pattern, message):
            return round(float(match[1]) * _UNITS[match[2]])
    raise ValueError(f"the compiler ran out of memory and does not say how much it needs: {message[:500]}")


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Sends what a library writes to file descriptor 1 to 2: our last line has to stay the last."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def jaxpr_fingerprint(jaxpr: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of a traced program, without addresses and kinds of devices."""
    return hashlib.sha256(jaxpr_text(jaxpr).encode()).hexdigest()[:12]


def jaxpr_text(jaxpr: Any) -> str:
    """A traced program as text that is the same in every process and for every kind of device."""
    return re.sub(r" at 0x[0-9a-f]+|, device_kind=[^,]*, num_cores=\w*, platform=\w*", "", str(jaxpr))


# ---------------------------------------------------------------------------------------------------------------- sweep


def variants(
    config: Any,
    *,
    batch_sizes: Sequence[int] = (),
    accumulates: Sequence[int] = (),
    remats: Sequence[str] = (),
    fsdps: Sequence[int] = (),
) -> list[ConfigDict]:
    """Every combination of the given values (none: the config's own): large batches first, then those that recompute
    and communicate least."""
    order = ["none", "dots", "full"]
    out = []
    for batch, remat, accumulate, fsdp in itertools.product(
        sorted(batch_sizes, reverse=True) or [config.batch_size],
        sorted(remats, key=order.index) or [_remat(config)],
        sorted(accumulates) or [config.accumulate],
        sorted(fsdps) or [config.mesh.fsdp],
    ):
        one = ConfigDict(to_dict(config))
        with one.ignore_type():
            one.batch_size, one.accumulate, one.mesh.fsdp = batch, accumulate, fsdp
            one.model.transformer.remat = remat
        out.append(freeze(one))
    return out
