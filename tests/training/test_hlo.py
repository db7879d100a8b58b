"""Reading collectives off compiled programs: hand-written text in the compilers' notations, and real programs."""

import pytest

from octo_like.aot import hlo, hlo_cost

# ruff: noqa: E501
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[128,16]) -> bf16[32,16] {
  %ar = bf16[128,16]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[32,16]{1,0} dynamic-slice(%ar, %i, %z)
}

%async_collective_fusion.1 (p: bf16[8,4]) -> bf16[32,4] {
  ROOT %g.1 = bf16[32,4]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, metadata={op_name="jit(step)/gather"}
}

%async_collective_fusion.2 (p: bf16[8,4]) -> bf16[32,4] {
  ROOT %g.2 = bf16[32,4]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%body (carry: (f32[10], s32[])) -> (f32[10], s32[]) {
  %permuted = f32[10]{0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %inner = (f32[10], s32[]) while(%t), condition=%cond2, body=%body2, backend_config={"known_trip_count":{"n":"3"}}
}

%body2 (carry: (f32[10], s32[])) -> (f32[10], s32[]) {
  %reduced = (f32[10]{0}, f32[6]{0}, /*index=2*/f32[2]{0}) all-reduce(%a, %b, %c), channel_id=11, replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %rs = bf16[32,16]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %f1 = bf16[32,4] fusion(%v), calls=%async_collective_fusion.1
  %f2 = bf16[32,4] fusion(%f1), calls=%async_collective_fusion.2
  %loop = (f32[10], s32[]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%p0), channel_id=13, replica_groups={}, dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  ROOT %out = f32[4] add(%p0, %p0)
}
"""


def collectives(text, slices=1):
    module = hlo.parse(text)
    return hlo.collectives(module, hlo_cost.work_of(module).times, slices)


def by_kind(text):
    found = {}
    for one in collectives(text):
        found.setdefault(one.kind, []).append(one)
    return found


def test_every_notation():
    found = by_kind(TEXT)
    assert {kind: len(ones) for kind, ones in found.items()} == {
        "reduce-scatter": 1,
        "all-gather": 2,
        "collective-permute": 1,
        "all-reduce": 1,
    }
    (scattered,) = found["reduce-scatter"]
    assert (scattered.bytes, scattered.group, scattered.times) == (128 * 16 * 2, 4, 1)
    assert scattered.wire_bytes(8) == 128 * 16 * 2 * 3 / 4
    gathered, asynchronous = found["all-gather"]
    # The steps of one asynchronous gather count once; its group is one axis of the mesh.
    assert (gathered.bytes, gathered.group, gathered.source) == (32 * 4 * 2, 4, "jit(step)/gather")
    # A start gives what went in and what comes out; empty groups are all chips.
    assert (asynchronous.bytes, asynchronous.group) == (16 * 4, 0)
    assert asynchronous.wire_bytes(8) == 64 * 7 / 8
    (reduced,) = found["all-reduce"]
    assert reduced.bytes == (10 + 6 + 2) * 4 and reduced.group == 4
    assert reduced.times == 15 and reduced.wire_bytes(8) == 15 * 72 * 2 * 3 / 4
    assert found["collective-permute"][0].times == 5


@pytest.mark.parametrize(
    ("shape", "is_activation"),
    [
        ("bf16[384,1536]", False),  # a parameter
        ("bf16[1536,384]", False),  # transposed
        ("bf16[384,6,256]", False),  # reshaped
        ("bf16[1,2,256,384]", False),  # a window of position embeddings
        ("bf16[256,16,768]", True),
        ("f32[32,10,256,384]", True),
        ("bf16[64,384]", True),  # as long as the batch: no slice of a vocabulary
        ("bf16[63,384]", False),
    ],
)
def test_what_is_not_a_parameter_is_an_activation(shape, is_activation):
    parameters = [(384, 1536), (1, 10, 256, 384), (32000, 384)]
    line = (
        f"ENTRY %m (p: f32[1]) -> f32[1] {{\n  %g = {shape}{{0}} all-gather(%p), channel_id=1, replica_groups={{}}\n}}"
    )
    found = hlo.activation_gathers(collectives(line), parameters, batch_size=32)
    assert bool(found) == is_activation


@pytest.mark.parametrize(
    ("shape", "source", "is_activation"),
    [
        ("f32[48,8,128]", "", False),  # small gradients of two slices, packed in tiles
        ("f32[48,8,128]", ', metadata={op_name="jit(step)/attention"}', True),
        ("bf16[48,8,128]", "", True),
        ("f32[48,16,128]", "", True),
    ],
)
def test_packed_gradients_between_slices_are_no_activations(shape, source, is_activation):
    line = f"ENTRY %m (p: f32[1]) -> f32[1] {{\n  %g = {shape}{{0}} all-gather(%p), channel_id=1{source}\n}}"
    found = hlo.activation_gathers(collectives(line), [(384, 1536)], batch_size=32)
    assert bool(found) == is_activation


def test_what_runs_twice_counts_twice():
    text = """%exchange (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8] all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
}

%later (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8] all-reduce(%p), channel_id=2, replica_groups={}, to_apply=%add
}

ENTRY %m (p: f32[8]) -> f32[8] {
  %a = f32[8] call(%p), to_apply=%exchange
  %b = f32[8] call(%a), to_apply=%exchange
  %s = ((f32[8]), f32[8], u32[]) async-start(%b), calls=%later
  %u = ((f32[8]), f32[8], u32[]) async-update(%s), calls=%later
  ROOT %d = f32[8] async-done(%u), calls=%later
}
"""
    assert [one.times for one in collectives(text)] == [2, 1]


def test_a_reduce_scatter_is_as_large_as_what_goes_in():
    text = """ENTRY %m (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8] parameter(0)
  ROOT %r = f32[16,8] reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""
    (one,) = collectives(text)
    assert (one.kind, one.bytes) == ("reduce-scatter", 64 * 8 * 4) and one.wire_bytes(4) == 64 * 8 * 4 * 3 / 4


def test_between_slices():
    """As the compiler hands it to the hosts: a sum of what each slice has, and a part that every slice gets."""
    send = '{name} = (f32[{size}]{{0:T(128)}}, u32[], token[]) send(%p, %t), channel_id={channel}, is_host_transfer=true, frontend_attributes={{{kind}_xla_megascale_target="{{1,2}}x{{0:7}}"}}'
    summed = send.format(name="%s", size=1000, channel=1, kind='_xla_megascale_reduce_operation="SUM",')
    whole = send.format(name="%w", size=10, channel=3, kind='_xla_megascale_transfer_type="ALL_GATHER",')
    own = "%h = (f32[10], u32[], token[]) send(%p, %t), channel_id=5, is_host_transfer=true"  # to this chip's host
    text = f"""%body (c: (s32[], f32[10])) -> (s32[], f32[10]) {{
  {summed}
}}

ENTRY %m (p: f32[8]) -> f32[8] {{
  %loop = (s32[], f32[10]) while(%init), condition=%cond, body=%body, backend_config={{"known_trip_count":{{"n":"4"}}}}
  {whole}
  {own}
}}
"""
    for slices in (2, 4):
        reduced, gathered = collectives(text, slices)
        assert {reduced.kind, gathered.kind} == {hlo.BETWEEN_SLICES} and reduced.times == 4
        assert reduced.wire_bytes(32) == 4 * 4000 * 2 * (slices - 1) / slices
        assert gathered.wire_bytes(32) == 40 * (slices - 1)
