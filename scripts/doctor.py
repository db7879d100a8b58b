"""Checks a machine, or all hosts of a pod together, before a run.

    python scripts/doctor.py                                              # this machine
    python scripts/doctor.py --workdir gs://bucket/runs/base --data_dir gs://bucket/oxe
    python scripts/doctor.py --config configs/octo_base.py --workdir gs://bucket/runs/base --config.data.data_dir=gs://...
    bash scripts/tpu_pod.sh exec -- python scripts/doctor.py --devices 64 --workdir gs://bucket/runs/base

It takes the arguments of train.py: with --config the run's own input stream is measured. Every line is OK, WARN or
FAIL, with what to do about it. On several hosts they are gathered, and process 0 prints them. Works without TensorFlow,
except for what reads data. Exit status: 0 when training can start, 1 when a check failed.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time

from doctor_devices import check_collectives, check_devices, check_speed, check_step
from doctor_machine import check_data, check_machine, check_versions, check_workdir
from doctor_report import Report, gather, show


def check_parts(report: Report, config) -> None:
    """Whether parts of the user's own can be imported here, and are what they have to be."""
    from octo_like.training.program import own_parts

    report.ok(
        "own parts", ", ".join(f"{name} (source {digest})" for name, digest in own_parts(config).items()) or "none"
    )


def check_loader(report: Report, config, seconds: float) -> None:
    """Samples per second of this host: of made-up datasets, and of the run's own data."""
    if importlib.util.find_spec("tensorflow") is None:
        report.warn("loader", "not measured: TensorFlow is missing", "pip install -e '.[data]'")
        return
    import bench_input

    from octo_like.common.defaults import batch_spec
    from octo_like.common.text import TextTokenizer
    from octo_like.common.vocabularies import targets_of
    from octo_like.data import bench
    from octo_like.data.inputs import inputs_from_config
    from octo_like.data.prepare import prepare_datasets
    from octo_like.data.spec import specs_from_config

    def rate(config, spec, **processes) -> tuple[float, float]:
        tokenizer = TextTokenizer.load(config.text.model, config.text.max_length) if config.text.model else None
        begin = time.perf_counter()
        stream = inputs_from_config(config, spec, tokenizer, targets=targets_of(config.model), **processes).stream
        next(stream)
        first = time.perf_counter() - begin
        samples, taken = bench.timed(lambda: len(next(stream)["sample_id"]), seconds)
        stream.close()
        return samples / taken, first

    with tempfile.TemporaryDirectory() as folder:
        names = bench.make_datasets(folder, 1, size=(256, 256), episodes=8, steps=20)
        specs = specs_from_config({name: bench.bench_fields(name) for name in names})
        arguments = argparse.Namespace(
            config=None, data_dir=folder, cache_dir=None, window=2, sizes=["primary=256x256"], batch_size=32,
            decode="fast", threads=os.cpu_count() or 2, memory_gb=0.5,
        )  # fmt: skip
        made_up, spec = bench_input.run_config(arguments, specs, prepare_datasets(specs, folder, None))
        samples, _ = rate(made_up, spec)
    report.ok(
        "loader, made-up", f"{samples:.0f} samples/s (one camera of 256x256, fast decoding, {os.cpu_count()} cores)"
    )
    if config is None:
        return
    import jax

    samples, first = rate(
        config, batch_spec(config), process_index=jax.process_index(), process_count=jax.process_count()
    )
    together = samples * jax.process_count()
    report.ok(
        "loader, your data",
        f"{samples:.0f} samples/s here, first batch after {first:.1f} s; {jax.process_count()} process(es) feed "
        f"{together / config.batch_size:.2g} steps of {config.batch_size} per second",
    )


def check_hosts(report: Report, config, processes: int) -> None:
    """Whether this number of processes can begin or continue the run that a config describes."""
    from octo_like.common.lanes import check_lanes

    lanes = check_lanes(config.data.num_lanes, config.batch_size, processes)
    report.ok("lanes", f"{lanes}; each of {processes} process(es) makes the rows of {lanes // processes}")


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, object]:
    """Flags, and the config when one is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs", help="where runs will be written; gs://... too")
    parser.add_argument("--data_dir", help="folder of the TFDS datasets; default: that of the config")
    parser.add_argument("--devices", type=int, help="how many there have to be, all hosts together")
    parser.add_argument("--quick", action="store_true", help="leave out the training step and the loader")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement of the loader")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    try:
        from octo_like.common.config import parse_command_line
        from octo_like.training.arguments import add_arguments
    except ImportError:  # reported by check_versions
        return parser.parse_known_args(argv)[0], None
    add_arguments(parser)
    if any(word.split("=")[0].split(".")[0] == "--config" for word in argv):
        return parse_command_line(parser, argv)
    parser.add_argument("--config", help="experiment file and overrides, as for train.py: measures its input stream")
    return parser.parse_args(argv), None


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    flags, config = parse_arguments(sys.argv[1:] if argv is None else argv)
    report = Report()
    report.attempt("packages", check_versions)
    importable = all(importlib.util.find_spec(name) for name in ("jax", "flax", "optax", "octo_like"))
    rows = report.rows
    if importable:
        from octo_like.training import distributed

        # Before anything touches a device, as train.py does.
        report.attempt("processes", lambda _: distributed.initialize_from_flags(flags) and None)
    report.attempt("machine", check_machine, config)
    report.attempt("workdir", check_workdir, flags.workdir)
    if importable and config is not None:
        report.attempt("own parts", check_parts, config)
    data_dir = flags.data_dir or (config.data.data_dir if config is not None and config.data.kind == "rlds" else None)
    if data_dir:
        report.attempt("data", check_data, data_dir)
    if importable and check_devices(report, flags.devices):
        import jax

        if config is not None:
            report.attempt("lanes", check_hosts, config, jax.process_count())
        report.attempt("collectives", check_collectives)
        report.attempt("matrix product", check_speed)
        if not flags.quick:
            report.attempt("training step", check_step)
            report.attempt("loader", check_loader, config, flags.seconds)
        rows = gather(report.rows)
        if jax.process_index() != 0:
            return int(any(row.status == "FAIL" for row in rows))
    if flags.json:
        failed = any(row.status == "FAIL" for row in rows)
        print(json.dumps({"ready": not failed, "rows": [dataclasses.asdict(row) for row in rows]}))
    else:
        show(rows)
    return int(any(row.status == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
