"""Names of topologies, against the sizes Google Cloud documents."""

import pytest

from octo_like.aot import proof
from octo_like.aot.chips import CHIPS, parse_topology
from octo_like.common.config import load_config


@pytest.mark.parametrize(
    ("text", "name", "chips", "hosts", "accelerator"),
    [
        ("v4-128", "v4:4x4x4", 64, 16, "v4-128"),
        ("v4:4x4x4", "v4:4x4x4", 64, 16, "v4-128"),
        ("v5e-64", "v5e:8x8", 64, 16, "v5e-64"),
        ("v5e-256", "v5e:16x16", 256, 64, "v5e-256"),
        ("v5p-64", "v5p:2x4x4", 32, 8, "v5p-64"),
        ("v5p:4x4x4", "v5p:4x4x4", 64, 16, "v5p-128"),
        ("v6e-64", "v6e:8x8", 64, 16, "v6e-64"),
        ("v5e:1x1", "v5e:1x1", 1, 1, "v5e-1"),
        ("v5e-4", "v5e:2x2", 4, 1, "v5e-4"),
        ("v5e-8", "v5e:2x4", 8, 1, "v5e-8"),
        ("v5e-16", "v5e:4x4", 16, 4, "v5e-16"),
        ("v6e-8", "v6e:2x4", 8, 1, "v6e-8"),
        ("v6e:4x8", "v6e:4x8", 32, 8, "v6e-32"),
        ("v4-16", "v4:2x2x2", 8, 2, "v4-16"),
        ("v5p:2x2x2", "v5p:2x2x2", 8, 2, "v5p-16"),
    ],
)
def test_names(text, name, chips, hosts, accelerator):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.hosts, topology.accelerator) == (name, chips, hosts, accelerator)


def test_slices():
    topology = parse_topology("v5e:4x4", 2)
    assert (topology.chips, topology.chips_per_slice, topology.hosts) == (32, 16, 8)
    assert (topology.accelerator, topology.accelerator_of_slice) == ("2 x v5e-16", "v5e-16")
    assert parse_topology("v5e-8", 2).hosts == 2


@pytest.mark.parametrize(
    ("text", "vcpus", "memory_gb", "bounds"),
    [
        ("v5e:1x1", 24, 48, [1, 1, 1]),
        ("v5e-8", 224, 384, [2, 4, 1]),
        ("v5e-64", 112, 192, None),
        ("v6e-8", 180, 1440, [2, 4, 1]),
        ("v6e-64", 180, 720, None),
        ("v5p-16", 208, 448, None),
        ("v4-8", 240, 407, None),
    ],
)
def test_hosts(text, vcpus, memory_gb, bounds):
    topology = parse_topology(text)
    assert (topology.host_vcpus, topology.host_memory_gb, topology.host_bounds) == (vcpus, memory_gb, bounds)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_layouts_have_names_of_their_own(chip):
    topologies = [parse_topology(f"{chip.name}:{layout}") for layout in chip.layouts]
    assert len({one.accelerator for one in topologies}) == len(topologies)
    for one in topologies:
        assert parse_topology(one.accelerator) == one


@pytest.mark.parametrize(
    ("text", "slices", "words"),
    [
        ("v9:4x4", 1, ["v9:4x4", "v4, v5e, v5p, v6e", "v5e-64"]),
        ("v5e", 1, ["v5e:8x8"]),
        ("v5e-63", 1, ["v5e-63", "valid: v5e-4", "v5e-256"]),
        ("v5e:4x4x4", 1, ["v5e has 2 axes", "8x8"]),
        ("v4:8x8", 1, ["v4 has 3 axes", "4x4x4"]),
        ("v5e:8x8", 0, ["at least 1"]),
    ],
)
def test_unknown_topologies(text, slices, words):
    with pytest.raises(ValueError) as caught:
        parse_topology(text, slices)
    for word in words:
        assert word in str(caught.value)


def test_hosts_that_cannot_share_the_lanes_are_refused_before_compiling():
    config = load_config("tests/training/tiny_config.py:synthetic", [("batch_size", "256")])
    with pytest.raises(ValueError, match="3 processes do not divide 256 lanes; possible numbers of processes: 1, 2, 4"):
        proof.prove_training(config, parse_topology("v4:2x2x3"))
