"""Trips of loops and the work in them: against closed forms, written-out text, and the same program unrolled."""

import jax
import jax.numpy as jnp
import pytest

from octo_like.aot import hlo, hlo_cost

# ruff: noqa: E501
# A counter as the TPU compiler leaves it: no known trip count, the limit either in the condition or carried along.
LOOPS = """HloModule jit_f, is_scheduled=true

%less (p: s32[], q: s32[]) -> pred[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt = pred[] compare(%p, %q), direction={direction}
}}

%inner_cond (c: (s32[], f32[8,128])) -> pred[] {{
  %c = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  %three = s32[]{{:T(128)}} constant(3)
  ROOT %less = pred[] fusion(%i, %three), kind=kLoop, calls=%less_than
}}

%less_than (p: s32[], q: s32[]) -> pred[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt = pred[] compare(%p, %q), direction=LT
}}

%inner (c: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %c = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,128] get-tuple-element(%c), index=1
  %y = f32[8,128] negate(%x)
  ROOT %t = (s32[], f32[8,128]) tuple(%next, %y)
}}

%outer_cond (c: (s32[], s32[], f32[8,128])) -> pred[] {{
  %c = (s32[], s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=1
  ROOT %test = pred[] fusion(%i, %limit), kind=kLoop, calls=%less
}}

%outer (c: (s32[], s32[], f32[8,128])) -> (s32[], s32[], f32[8,128]) {{
  %c = (s32[], s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %limit = s32[] get-tuple-element(%c), index=1
  %x = f32[8,128] get-tuple-element(%c), index=2
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %init = (s32[], f32[8,128]) tuple(%start, %x)
  %loop = (s32[], f32[8,128]) while(%init), condition=%inner_cond, body=%inner
  %y = f32[8,128] get-tuple-element(%loop), index=1
  ROOT %t = (s32[], s32[], f32[8,128]) tuple(%next, %limit, %y)
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128] parameter(0)
  %first = s32[] {first}
  %last = s32[] constant({last})
  %init = (s32[], s32[], f32[8,128]) tuple(%first, %last, %x)
  %loop = (s32[], s32[], f32[8,128]) while(%init), condition=%outer_cond, body=%outer
  ROOT %y = f32[8,128] get-tuple-element(%loop), index=2
}}
"""


def loops(first="constant(0)", last=5, step=1, direction="LT"):
    return hlo.parse(LOOPS.format(first=first, last=last, step=step, direction=direction))


@pytest.mark.parametrize(
    ("settings", "trips"),
    [
        (dict(), 5),
        (dict(last=0), 0),
        (dict(direction="LE"), 6),
        (dict(first="constant(10)", last=0, step=-2, direction="GT"), 5),
        (dict(last=7, step=3), 3),
        (dict(last=6, step=2, direction="NE"), 3),
        (dict(first="parameter(1)"), None),  # begins where the caller says
        (dict(step=0), None),  # never ends
    ],
)
def test_counters_are_run(settings, trips, monkeypatch):
    monkeypatch.setattr(hlo_cost, "MOST_TRIPS", 1000)
    work = hlo_cost.work_of(loops(**settings))
    assert sorted(work.trips, key=str) == sorted([trips, 3], key=str)
    outer = 1 if trips is None else trips
    assert work.times["outer"] == outer and work.times["inner"] == 3 * outer and work.times["main"] == 1
    # One negation of 4 KB read and 4 KB written per inner trip, and three integers that are added and copied.
    negations = work.bytes - sum(work.times[name] * n for name, n in (("inner", 12), ("outer", 12 + 8)))
    tests = {"inner_cond": 9, "outer_cond": 9}  # a fusion reads two integers and writes a byte
    negations -= sum(work.times[name] * n for name, n in tests.items())
    assert negations == 8192 * 3 * outer
    assert work.times["outer_cond"] == outer + 1


def test_a_limit_that_surrounding_loops_hand_through():
    """The inner loop's limit comes with the outer carry, which does not change it: known. When it is changed: not."""
    text = LOOPS.format(first="constant(0)", last=5, step=1, direction="LT")
    text = text.replace("%start = s32[] copy(%zero)", "%start = s32[] subtract(%limit, %limit)")
    assert sorted(hlo_cost.work_of(hlo.parse(text)).trips) == [3, 5]
    text = text.replace("subtract(%limit, %limit)", "subtract(%i, %i)")
    assert sorted(hlo_cost.work_of(hlo.parse(text)).trips, key=str) == [5, None]


def test_the_word_of_the_compiler_is_taken():
    text = LOOPS.format(first="parameter(1)", last=5, step=1, direction="LT")
    known = 'body=%outer, backend_config={"known_trip_count":{"n":"11"}}'
    work = hlo_cost.work_of(hlo.parse(text.replace("body=%outer", known)))
    assert sorted(work.trips) == [3, 11] and work.times["inner"] == 33


@pytest.mark.parametrize(
    ("line", "shapes", "flops"),
    [
        # As a matrix product, with and without batch.
        ("dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", ("f32[4,8]", "f32[8,16]", "f32[4,16]"), 2 * 4 * 8 * 16),
        ("dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}", ("f32[3,4,8]", "f32[3,8,16]", "f32[3,4,16]"), 2 * 3 * 4 * 8 * 16),
        ("convolution(%a, %b), dim_labels=bf_io->bf", ("bf16[4,8]", "bf16[8,16]", "f32[4,16]"), 2 * 4 * 8 * 16),
        # An image of 8x8 in patches of 4x4.
        ("convolution(%a, %b), window={size=4x4 stride=4x4}, dim_labels=b01f_01io->b01f", ("f32[2,8,8,3]", "f32[4,4,3,5]", "f32[2,2,2,5]"), 2 * 2 * 4 * 5 * 48),
        # 3 taps over 6 entries with a zero on either side: 3 * 6 less the two that meet zeros.
        ("convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", ("f32[1,6,2]", "f32[3,2,1]", "f32[1,6,1]"), 2 * 2 * (18 - 2)),
        # A batch of 8 products written as a window over an image spread out by zeros: each meets its own entry alone.
        ("convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf", ("bf16[8,4,16]", "bf16[8,16,32]", "bf16[8,4,32]"), 2 * 8 * 4 * 16 * 32),
    ],
)  # fmt: skip
def test_products_by_hand(line, shapes, flops):
    left, right, out = shapes
    text = f"ENTRY %m (a: {left}) -> {out} {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n  ROOT %c = {out} {line}\n}}"
    assert hlo_cost.computation_flops(hlo.parse(text), "m") == flops


def test_bytes_by_hand():
    text = """%cut (p: f32[100,10], i: s32[]) -> f32[1,10] {
  %p = f32[100,10] parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,10] dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,10}
}

%put (p: f32[100,10], u: f32[1,10], i: s32[]) -> f32[100,10] {
  %p = f32[100,10] parameter(0)
  %u = f32[1,10] parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[100,10] dynamic-update-slice(%p, %u, %i, %i)
}

ENTRY %m (x: f32[100,10], i: s32[]) -> f32[100,10] {
  %x = f32[100,10] parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,10] fusion(%x, %i), kind=kLoop, calls=%cut
  %tiled = bf16[3,5]{1,0:T(8,128)(2,1)} convert(%row)
  ROOT %y = f32[100,10] fusion(%x, %row, %i), kind=kLoop, calls=%put
}
"""
    # The cut reads its row and the index and writes the row; the update reads and writes a row. Tiles are whole.
    expected = (40 + 4 + 40) + (40 + 8 * 128 * 2) + (40 + 4 + 40)
    assert hlo_cost.computation_bytes(hlo.parse(text), "m") == expected


def compiled_work(function, *args):
    """(work, compiler's FLOPs) of a function as this machine's compiler makes it."""
    compiled = jax.jit(function).lower(*args).compile()
    return hlo_cost.work_of(hlo.parse(compiled.as_text())), compiled.cost_analysis()["flops"]


def test_a_matmul_in_a_scan():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def scan(x, w, length):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=length)[0]

    once, counted = compiled_work(lambda x, w: jnp.sin(x @ w), x, x)
    assert once.flops == 2 * 64**3 and once.trips == ()
    for length in (2, 7):
        work, counted = compiled_work(lambda x, w: scan(x, w, length), x, x)  # noqa: B023
        assert work.trips == (length,) and work.flops_once == 2 * 64**3 and work.flops == length * 2 * 64**3
        # The compiler counts one trip; weighed, it is what it counts for the same program without a loop.
        assert counted == pytest.approx(2 * 64**3, rel=0.05)
        assert work.weigh_flops(counted) == pytest.approx(length * 2 * 64**3, rel=0.05)


def test_nested_scans_and_a_loop_with_a_computed_end():
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)

    def nested(x, w):
        inner = lambda x, _: (x @ w, None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x @ w, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0]

    work, counted = compiled_work(nested, x, x)
    assert sorted(work.trips) == [3, 5] and work.flops == 5 * (1 + 3) * 2 * 32**3
    assert work.weigh_flops(counted) == pytest.approx(work.flops, rel=0.05)

    def until(x, w, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    work, counted = compiled_work(until, x, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert work.trips == (None,) and work.flops == work.flops_once == 2 * 32**3


def test_micro_batches_against_the_same_program_unrolled():
    """A gradient summed over four micro-batches in a scan, and in a Python loop: the same products; about the same
    bytes, which the compiler of the loop alone counts to a third or so."""
    w = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    batch = jax.ShapeDtypeStruct((4, 128, 256), jnp.float32)

    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

    def scanned(w, batch):
        add = lambda total, x: (total + jax.grad(loss)(w, x), None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros_like(w), batch)[0]

    def unrolled(w, batch):
        return sum(jax.grad(loss)(w, batch[i]) for i in range(4))

    loop, loop_flops = compiled_work(scanned, w, batch)
    plain, plain_flops = compiled_work(unrolled, w, batch)
    assert loop.trips == (4,) and plain.trips == ()
    assert loop.flops == plain.flops == 4 * loop.flops_once
    assert loop.weigh_flops(loop_flops) == pytest.approx(plain_flops, rel=0.05)
    assert loop_flops < 0.3 * plain_flops
    assert loop.bytes == pytest.approx(plain.bytes, rel=0.35) and loop.bytes_once < 0.5 * plain.bytes


def test_text_without_a_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")
