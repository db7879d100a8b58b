"""Estimates against figures worked out by hand, and the table that feeds them."""

import json
import shutil
import subprocess
import sys

import pytest

from octo_like.aot.chips import parse_topology
from octo_like.aot.scaling import PROCESS_GB, Assumptions, Facts, estimate
from octo_like.aot.scaling import markdown as scaling_markdown
from octo_like.aot.table import Row, markdown, read, replace_between, report_of
from tests.training.test_program import fake_report

# 64 v5e chips at an MFU of 50% do 64 * 197e12 * 0.5 FLOP/s.
FACTS = Facts(flops_per_sample=64 * 197e12 * 0.5 / 2048 * 0.1, trained=100_000_000, frozen=10, frozen_bytes=40)
V5E = parse_topology("v5e-64")


def test_by_hand():
    one = estimate(FACTS, V5E, 2048, Assumptions(mfu=0.5, goodput=0.9, steps=1000, loader_rate=100, loader_share=0.5))
    assert one.seconds["compute"] == pytest.approx(0.1)
    # 200 MB of gradients, all-reduced over 64 chips with 200 GB/s each.
    assert one.seconds["interconnect"] == pytest.approx(2 * 63 / 64 * 2e8 / 200e9)
    # 16 hosts of 112 CPUs, half of them loading.
    assert one.seconds["input"] == pytest.approx(2048 / (16 * 56 * 100))
    assert one.binds == "compute" and one.step_seconds == pytest.approx(0.1)
    assert one.hours == pytest.approx(1000 * 0.1 / 3600 / 0.9)
    assert one.cost == pytest.approx(one.hours * 64 * 1.20)
    assert one.samples_per_second == pytest.approx(20480) and one.loader_cpus == pytest.approx(12.8)


def test_what_binds():
    slow_loader = Assumptions(mfu=0.5, loader_rate=1.0)
    assert estimate(FACTS, V5E, 2048, slow_loader).binds == "input"
    # The report's second of memory traffic is more than anything else here.
    assert estimate(FACTS, V5E, 2048, Assumptions(), fake_report(collectives={})).binds == "memory"
    assert estimate(FACTS, V5E, 2048, Assumptions(), fake_report(memory_traffic=0)).binds == "interconnect"


def test_slices_pay_for_the_network_between_them():
    one, two = (estimate(FACTS, parse_topology("v5e-16", n), 2048, Assumptions()) for n in (1, 2))
    # 2 (s-1)/s of 400 MB over the four hosts of a slice with 100 Gbit/s each; the chips' links carry the rest.
    assert two.seconds["network"] == pytest.approx(4e8 / (4 * 12.5e9)) and "network" not in one.seconds
    assert two.seconds["interconnect"] == pytest.approx(2 * 31 / 32 * 2e8 / 200e9)
    sent = {"between-slices": {"count": 1, "bytes": 1e9, "wire_bytes": 3.125e9}}
    compiled = fake_report(topology="v5e:4x4", slices=2, chips=32, collectives=sent)
    three = estimate(FACTS, parse_topology("v5e-16", 2), 2048, Assumptions(), compiled)
    assert three.seconds["network"] == pytest.approx(1.0) and three.seconds["interconnect"] == 0
    assert two.seconds["compute"] == pytest.approx(one.seconds["compute"] / 2)


def test_what_a_host_gives():
    facts = Facts(FACTS.flops_per_sample, 100_000_000, 0, 0, sample_bytes=1e6)
    given = Assumptions(mfu=0.5, step_kb=50, episode_steps=25, visits=2, host_memory_gb=16)
    one = estimate(facts, V5E, 2048, given)
    # 20480 samples/s of 16 hosts; every step is read twice per pass, 25 of them with each episode.
    assert one.host_reads == pytest.approx(1280 * 50e3 * 2) and one.host_episodes == pytest.approx(1280 * 2 / 25)
    # Four batches of 128 rows of 1 MB fit into the stream's 16 GB; the state is held once while it is saved.
    assert one.batches_gb == pytest.approx(0.512) and one.host_gb == pytest.approx(PROCESS_GB + 16 + 1.6)
    assert estimate(facts, parse_topology("v5e-8"), 2048 * 100, given).host_gb > 800  # batches alone: 819 GB


def test_states_that_do_not_fit_are_split():
    billion = Facts(1e12, 1_000_000_000, 0, 0)  # 14.9 GiB of state
    sizes = {name: estimate(billion, parse_topology(name), 2048, Assumptions()).fsdp for name in ("v5e-64", "v5p-64")}
    assert sizes == {"v5e-64": 4, "v5p-64": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mfu=0), "mfu must be in"),
        (dict(goodput=1.5), "goodput must be in"),
        (dict(loader_rate=0), "loader_rate must be positive"),
        (dict(step_kb=0), "step_kb must be positive"),
        (dict(prices={"v9": 1.0}), "no chip 'v9'.*v4, v5e, v5p, v6e"),
    ],
)
def test_impossible_assumptions(fields, message):
    with pytest.raises(ValueError, match=message):
        Assumptions(**fields)


def test_tables(tmp_path):
    rows = [Row("configs/octo_base.py:1b", "v5e-64", 1, (("accumulate", "2"),)), Row("configs/octo_small.py", "v4-128")]
    kept = {rows[0].key: {"row": json.loads(json.dumps(vars(rows[0]))), "report": fake_report().to_dict()}}
    (tmp_path / "aot.json").write_text(json.dumps(kept))
    kept = read(tmp_path / "aot.json")
    assert report_of(kept, rows[0]) == fake_report()
    # Other settings are another program.
    assert report_of(kept, Row(rows[0].config, "v5e-64")) is None and read(tmp_path / "none.json") == {}
    table = markdown(rows, kept).splitlines()
    assert "octo_base:1b | v5e-64 (8x8) | 64, 16 | 32 |" in table[2] and "`--config.accumulate=2`" in table[2]
    assert "not compiled yet" in table[3]
    assert len({line.count("|") for line in table}) == 1
    page = replace_between("a\n<!-- aot-table begin -->\nold\n<!-- aot-table end -->\nb", "new")
    assert page == "a\n<!-- aot-table begin -->\nnew\n<!-- aot-table end -->\nb"
    with pytest.raises(ValueError, match="has no <!-- x begin -->"):
        replace_between(page, "new", "x")
    lines = scaling_markdown(
        [("c", FACTS, estimate(FACTS, V5E, 2048, Assumptions()), False)], Assumptions()
    ).splitlines()
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(tables[:3])) == len(set(tables[3:])) == 1 and len(tables) == 6 and "| compute |" in lines[4]


def test_the_pages_show_what_was_compiled(repository, tmp_path):
    """docs/aot.md and docs/tpu.md hold the table that docs/aot.json gives, and every row of it fits."""
    pages = [tmp_path / name for name in ("aot.md", "tpu.md")]
    for page in pages:
        shutil.copy(repository / "docs" / page.name, page)
    command = [sys.executable, "scripts/aot_table.py", "--render", "--pages", *map(str, pages)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in pages:
        assert page.read_text() == (repository / "docs" / page.name).read_text(), f"run {' '.join(command[1:3])}"
