"""Mutation testing: would some test notice if the code were different?

    make mutate                                                        the sample that docs/testing.md reports
    python scripts/mutate.py octo_like/model/flow.py --per_file 0      every mutant of one file
    python scripts/mutate.py --list                                    what would be run

Places of the chosen files are drawn with a fixed seed and changed one at a time in a copy of the tree (runs/mutation):
an operator, a comparison, a constant, a condition, a keyword left out, two arguments swapped, a statement gone. The
tests that TARGETS names for the file then run until one fails. A mutant that none notices has survived; what no test
could notice is listed, with the reason, in tests/equivalent_mutants.txt.

Every result is kept in runs/mutation/results.json: a run that is stopped goes on where it was. A caught mutant is run
again when its file has changed, a survivor also when its tests have.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import ast
import collections
import copy
import hashlib
import json
import os
import pathlib
import random
import resource
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.txt"
SPARE_SECONDS = 30  # of processor time, beside four times what the tests take without a mutant
MARKERS = "not slow and not multiprocess and not sim and not aot"


# Which tests are asked about a file, those that answer soonest first.
def _tests(room: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{room}/test_{name}.py" for name in names)


PLAIN = ("defaults", "small_print_heads", "small_print")
GENERATIVE = (*PLAIN, "heads_generative", "randomness", "continuing", "calibration", "guidance", "heads")
UPDATE = ("update", "step", "optimizer")
ORDER = ("order_edges", "order")
TARGETS = {
    "octo_like/model/tokens.py": _tests("model", "small_print", "small_print_heads", "masks"),
    "octo_like/model/flow.py": _tests("model", "small_print_heads", "small_print", "heads_generative", "guidance"),
    "octo_like/model/diffusion.py": _tests("model", "components", *GENERATIVE),
    "octo_like/model/generative.py": _tests("model", *GENERATIVE),
    "octo_like/model/guidance.py": _tests("model", "continuing", "guidance"),
    "octo_like/model/heads.py": _tests("model", *PLAIN, "own_parts", "randomness", "heads", "heads_embodiments"),
    "octo_like/model/discrete.py": _tests("model", *PLAIN, "heads", "heads_bimodal"),
    "octo_like/model/decoder.py": _tests("model", "small_print_heads", "decoder"),
    "octo_like/model/sequence.py": _tests("model", *PLAIN, "decoder", "fast_head", "heads_bimodal"),
    "octo_like/model/text_head.py": _tests("model", *PLAIN, "text_head"),
    "octo_like/model/points.py": _tests("model", "points"),
    "octo_like/model/t5.py": _tests("model", *PLAIN, "components"),
    "octo_like/model/stems.py": _tests("model", *PLAIN, "components", "stems"),
    "octo_like/model/attention.py": _tests("model", *PLAIN, "components", "randomness", "attention", "masks"),
    "octo_like/model/transformer.py": _tests("model", *PLAIN, "randomness", "components", "numerics", "masks"),
    "octo_like/model/backbone.py": _tests(
        "model", *PLAIN, "own_parts", "masks", "padding", "components", "heads", "octo_release"
    ),
    "octo_like/model/tokenizers.py": _tests("model", *PLAIN, "components", "stems", "heads", "masks", "padding"),
    "octo_like/model/octo.py": _tests(
        "model", *PLAIN, "own_parts", "randomness", "heads", "heads_embodiments", "octo_release", "loading"
    ),
    "octo_like/training/optimizer.py": _tests("training", *UPDATE),
    "octo_like/training/state.py": _tests("training", *UPDATE),
    "octo_like/training/step.py": _tests("training", *UPDATE),
    "octo_like/data/order/order.py": _tests("data", *ORDER),
    "octo_like/data/order/walk.py": (*_tests("data", *ORDER), "tests/test_behaviour.py"),
    "octo_like/data/order/mixture.py": _tests("data", *ORDER),
    "octo_like/data/order/windows.py": _tests("data", "windows", "references", *ORDER),
    "octo_like/data/order/keys.py": _tests("data", *ORDER),
}


class Mutant(NamedTuple):
    """One change: bytes [start, end) of a file become `after`; `key` names it whatever its line."""

    path: str
    key: str
    start: int
    end: int
    after: str


# ---------------------------------------------------------------- what can be changed

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
# Functions of one array that can be left out without changing shapes.
ELEMENTWISE = {"sqrt", "abs", "exp", "log", "clip", "maximum", "minimum", "square", "tanh", "stop_gradient", "cos"}
ELEMENTWISE |= {"relu", "swish", "gelu", "asarray", "sorted", "dropout", "cumsum", "rsqrt"}
COMMUTATIVE = {"maximum", "minimum", "max", "min"}


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Changed copies of a node (never of what is within it, which has its own turn)."""

    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield changed(op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield changed(ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield changed(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield changed(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield changed(value=node.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield changed(value=node.value * 1.5 if node.value else 1.0)
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "name"):
                yield changed(keywords=node.keywords[:i] + node.keywords[i + 1 :])
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        # Two of a kind: others would not be taken for each other, and fail at once.
        alike = len(node.args) >= 2 and type(node.args[0]) is type(node.args[1]) is not ast.Starred
        alike = alike and ast.dump(node.args[0]) != ast.dump(node.args[1])
        if alike and called not in COMMUTATIVE:
            yield changed(args=[node.args[1], node.args[0], *node.args[2:]])
        if called in ELEMENTWISE and node.args:
            yield node.args[0]
    elif isinstance(node, ast.If):
        yield ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """(node, name of the function or class it is in); what is said (messages, annotations, docstrings) is left out."""

    def walk(node, where):
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                    continue
                if isinstance(child, ast.Import | ast.ImportFrom):
                    continue
                named = isinstance(child, ast.FunctionDef | ast.ClassDef)
                inner = f"{where}.{child.name}".lstrip(".") if named else where
                yield child, inner
                yield from walk(child, inner)

    yield from walk(tree, "")


def mutants(path: str) -> list[Mutant]:
    """All that can be changed in a file, in its order."""
    source = (ROOT / path).read_bytes()
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found, counts = [], collections.Counter()
    for node, where in places(ast.parse(source)):
        for new in variants(node):
            old = node.test if isinstance(node, ast.If) else node
            start, end = lines[old.lineno - 1] + old.col_offset, lines[old.end_lineno - 1] + old.end_col_offset
            after = "pass" if isinstance(new, ast.Pass) else f"({ast.unparse(new)})"
            key = f"{path}::{where or 'module'}: {ast.unparse(old)} -> {after}"
            counts[key] += 1
            found.append(Mutant(path, key if counts[key] == 1 else f"{key} #{counts[key]}", start, end, after))
    return found


def mutated(mutant: Mutant) -> bytes:
    """The file with the change.

    Raises:
      SyntaxError: that is no program; a mutant must fail by what it does.
    """
    source = (ROOT / mutant.path).read_bytes()
    source = source[: mutant.start] + mutant.after.encode() + source[mutant.end :]
    compile(source, mutant.path, "exec")
    return source


def equivalents() -> dict[str, str]:
    """{key: reason} of the committed list: a line with the key, an indented line with the reason."""
    keys: dict[str, str] = {}
    last = None
    for number, line in enumerate(EQUIVALENT.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            last = line.strip()
        elif last is None:
            raise ValueError(f"{EQUIVALENT.name}:{number}: a reason without a mutant before it")
        else:
            keys[last], last = line.strip(), None
    if last is not None:
        raise ValueError(f"{EQUIVALENT.name}: no reason is given for {last}")
    return keys


# ---------------------------------------------------------------- running them


def digest(*names: str) -> str:
    """Of the contents of files."""
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in names)).hexdigest()[:16]


def copy_tree(folder: pathlib.Path) -> None:
    """The files that git knows or would add."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    # Compiled files are checked by content: a mutant has its file's size and may have its time.
    compileall = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "octo_like", "tests", "configs"]
    subprocess.run([sys.executable, *compileall], cwd=folder, check=True)


def preload(work: pathlib.Path) -> None:
    """What every test imports is imported once; a mutant's process is a fork of this one. What JAX has compiled for one
    mutant is found again by the next."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ.setdefault("OCTO_SHARED", str(ROOT.parent / "shared"))
    sys.dont_write_bytecode = True
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))  # the tests' environment, before JAX is imported
    import flax.linen  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
    import pytest  # noqa: F401

    # What handles Ctrl-C was imported from here, and comes again from the copy that is mutated.
    ours = [name for name in sys.modules if name.split(".")[0] == "octo_like"]
    assert set(ours) <= {"octo_like", "octo_like.common", "octo_like.common.interrupts"}, (
        "imported before it is mutated"
    )
    for name in ours:
        del sys.modules[name]


def start(folder: pathlib.Path, tests: tuple[str, ...], log: pathlib.Path, cpu_seconds: float) -> int:
    """Starts the tests in a process of their own and returns its id; it ends when one fails."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        # Processor time: however busy the machine is, a loop without end is found and a slow test is not.
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 10))
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0", "-m", MARKERS]
        code = int(pytest.main([*options, *dict.fromkeys(tests)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait() -> tuple[int, int, float]:
    """(process id, exit code, processor seconds) of the next that ends; -n is signal n."""
    pid, status, usage = os.wait4(-1, 0)
    return pid, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def baseline(folder: pathlib.Path, path: str, log: pathlib.Path) -> float:
    """Processor seconds of a file's tests without any change.

    Raises:
      SystemExit: they fail.
    """
    start(folder, TARGETS[path], log, 3600)
    _, code, seconds = wait()
    if code:
        raise SystemExit(f"{path}: its tests fail without any mutation (exit code {code}), see {log}")
    return seconds


def run(chosen: list[Mutant], work: pathlib.Path, jobs: int, minutes: float | None) -> dict[str, dict]:
    """{key: {"verdict": "caught" or "survived", ...}}; those not reached in time are missing."""
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # no thread beside the forks
    store = work / "results.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    hashes = {path: (digest(path), digest(*TARGETS[path])) for path in {m.path for m in chosen}}

    def is_known(mutant):
        entry, (source, tests) = known.get(mutant.key), hashes[mutant.path]
        return entry and entry["source"] == source and (entry["verdict"] == "caught" or entry["tests"] == tests)

    queue = [mutant for mutant in chosen if not is_known(mutant)]
    results = {mutant.key: known[mutant.key] for mutant in chosen if is_known(mutant)}
    if not queue:
        return results
    preload(work)
    folders = [work / f"tree{i}" for i in range(jobs)]
    for folder in folders:
        copy_tree(folder)
    deadline = time.monotonic() + 60 * (minutes or 1e6)
    limits: dict[str, float] = {}
    running: dict[int, tuple[Mutant, pathlib.Path]] = {}
    with tqdm.tqdm(total=len(chosen), initial=len(results), unit="mutant") as bar:
        while queue or running:
            while queue and len(running) < jobs and time.monotonic() < deadline:
                mutant = queue.pop(0)
                if mutant.path not in limits and not running:
                    log = work / "baseline.log"
                    limits[mutant.path] = SPARE_SECONDS + 4 * baseline(folders[0], mutant.path, log)
                elif mutant.path not in limits:  # a baseline is taken alone
                    queue.insert(0, mutant)
                    break
                folder = next(f for f in folders if f not in [used for _, used in running.values()])
                (folder / mutant.path).write_bytes(mutated(mutant))
                log = work / f"{folder.name}.log"
                running[start(folder, TARGETS[mutant.path], log, limits[mutant.path])] = mutant, folder
            if not running:
                break
            pid, code, seconds = wait()
            mutant, folder = running.pop(pid)
            shutil.copy(ROOT / mutant.path, folder / mutant.path)
            if code in (4, 5, 70):
                raise SystemExit(f"{mutant.key}: no tests were run (exit code {code}), see {work / folder.name}.log")
            source, tests = hashes[mutant.path]
            verdict = "caught" if code else "survived"
            entry = dict(verdict=verdict, source=source, tests=tests, seconds=round(seconds, 1))
            known[mutant.key] = results[mutant.key] = entry
            part = store.with_suffix(".part")
            part.write_text(json.dumps(known, indent=1))
            part.replace(store)
            bar.update()
            if verdict == "survived":
                bar.write(f"survived: {mutant.key}")
    return results


def report(chosen: list[Mutant], results: dict[str, dict], excused: dict[str, str]) -> float:
    """Prints a table and the survivors; returns the share that was caught of those that can be."""
    rows, totals = {}, collections.Counter()
    for mutant in chosen:
        row = rows.setdefault(mutant.path, collections.Counter())
        verdict = "equivalent" if mutant.key in excused else results.get(mutant.key, {}).get("verdict", "not run")
        row[verdict] += 1
        totals[verdict] += 1

    def share(row):
        decided = row["caught"] + row["survived"]
        return f"{row['caught'] / decided:.0%}" if decided else ""

    print(f"\n| {'file':35} | mutants | equivalent | not run | caught | survived | score |\n|{'-' * 37}|" + "---|" * 6)
    for name, row in [*rows.items(), ("all", totals)]:
        cells = (sum(row.values()), row["equivalent"], row["not run"], row["caught"], row["survived"], share(row))
        print(f"| {name:35} | " + " | ".join(map(str, cells)) + " |")
    survivors = [m.key for m in chosen if m.key not in excused and results.get(m.key, {}).get("verdict") == "survived"]
    if survivors:
        print("\nSurvived:\n" + "\n".join(survivors))
    return totals["caught"] / max(totals["caught"] + totals["survived"], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", choices=[[], *TARGETS], metavar="FILE", help="all by default")
    parser.add_argument("--per_file", type=int, default=10, help="mutants drawn per file; 0: all (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no mutant after this long; the next run goes on")
    parser.add_argument(
        "--at_least", type=float, default=0.9, help="exit code 1 below this score (default %(default)s)"
    )
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "mutation", help="results and copies")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    args = parser.parse_args()
    excused, chosen = equivalents(), []
    for path in args.files or TARGETS:
        found = mutants(path)
        if args.per_file and len(found) > args.per_file:
            places = random.Random(f"{args.seed} {path}").sample(range(len(found)), args.per_file)
            found = [found[i] for i in sorted(places)]
        chosen += found
    if args.list:
        print("\n".join(mutant.key for mutant in chosen))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    results = run([m for m in chosen if m.key not in excused], args.work.resolve(), args.jobs, args.minutes)
    sys.exit(report(chosen, results, excused) < args.at_least)


if __name__ == "__main__":
    main()
