"""The reader of compiled programs: FLOPs, bytes, loops and collectives against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from middo_jax.planning.chips import CHIPS, Slices
from middo_jax.planning.hlo import HloError, parse, trip_count
from middo_jax.planning.network import Network
from middo_jax.planning.roofline import Cost, Loop, Machine, cost

AXES = ("data", "fsdp", "tensor")
# 10 outer iterations; in each, 6 inner ones with a matmul and a planted all-reduce along tensor.
NESTED = """
HloModule jit_planted, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[64,256], bf16[256,256])) -> (s32[], bf16[64,256], bf16[256,256]) {
  %p = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[256,256]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[64,256]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[256,256]{1,0} get-tuple-element(%p), index=2
  %dot = bf16[64,256]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %planted = bf16[64,256]{1,0} all-reduce(%dot), replica_groups=[8,2]<=[16], to_apply=%sum
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], bf16[64,256], bf16[256,256]) tuple(%next, %planted, %w)
}

%inner_condition (p.1: (s32[], bf16[64,256], bf16[256,256])) -> pred[] {
  %p.1 = (s32[], bf16[64,256], bf16[256,256]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %end = s32[] constant(12)
  ROOT %lt = pred[] compare(%i.1, %end), direction=LT
}

%step (s: s32[]) -> s32[] {
  %s = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %minus = s32[] subtract(%s, %one)
}

%at_least (c: s32[], d: s32[]) -> pred[] {
  %c = s32[] parameter(0)
  %d = s32[] parameter(1)
  ROOT %gt = pred[] compare(%d, %c), direction=LE
}

%outer_body (q: (s32[], bf16[64,256], bf16[256,256])) -> (s32[], bf16[64,256], bf16[256,256]) {
  %q = (s32[], bf16[64,256], bf16[256,256]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %y = bf16[64,256] get-tuple-element(%q), index=1
  %v = bf16[256,256] get-tuple-element(%q), index=2
  %zero = s32[] constant(0)
  %inside = (s32[], bf16[64,256], bf16[256,256]) tuple(%zero, %y, %v)
  %inner = (s32[], bf16[64,256], bf16[256,256]) while(%inside), condition=%inner_condition, body=%inner_body
  %z = bf16[64,256] get-tuple-element(%inner), index=1
  %fewer = s32[] fusion(%j), kind=kLoop, calls=%step
  ROOT %u = (s32[], bf16[64,256], bf16[256,256]) tuple(%fewer, %z, %v)
}

%outer_condition (r: (s32[], bf16[64,256], bf16[256,256])) -> pred[] {
  %r = (s32[], bf16[64,256], bf16[256,256]) parameter(0)
  %k = s32[] get-tuple-element(%r), index=0
  %least = s32[] constant(1)
  ROOT %go = pred[] fusion(%k, %least), kind=kLoop, calls=%at_least
}

ENTRY %main (x0: bf16[64,256], w0: bf16[256,256]) -> bf16[64,256] {
  %x0 = bf16[64,256]{1,0} parameter(0)
  %w0 = bf16[256,256]{1,0} parameter(1)
  %ten = s32[] constant(10)
  %start = (s32[], bf16[64,256], bf16[256,256]) tuple(%ten, %x0, %w0)
  %outer = (s32[], bf16[64,256], bf16[256,256]) while(%start), condition=%outer_condition, body=%outer_body
  ROOT %out = bf16[64,256] get-tuple-element(%outer), index=1
}
"""


def machine(shape: tuple[int, int, int] = (1, 8, 2), loops: tuple[Loop, ...] = ()) -> Machine:
    """A v5e of 4 x 4 whose devices are in the order of their coordinates."""
    places = [(i // 4, i % 4, 0) for i in range(16)]
    network = Network(AXES, shape, Slices.parse("v5e:4x4"), np.asarray(places).reshape(*shape, 3))
    return Machine(CHIPS["v5e"], network, loops)


def entry(text: str) -> Cost:
    """The cost of instructions; `text` is the body of the entry computation."""
    return cost(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{text}\n}}\n", machine())


def test_nested_loops_multiply_and_a_planted_collective_is_counted() -> None:
    found = cost(NESTED, machine())
    assert found.flops == 60 * 2 * 64 * 256 * 256
    [(kind, axes)] = found.network_by()
    assert (kind, axes) == ("all-reduce", ("tensor",))
    runs, size, seconds = found.network_by()[kind, axes]
    assert (runs, size) == (60, 60 * 64 * 256 * 2)
    # Two neighbours: 32 KiB over one link in one direction take less than the latency of a hop.
    assert seconds == pytest.approx(60e-6)
    assert found.network_s == pytest.approx(60e-6)
    assert not found.notes


def test_a_loop_of_unknown_length_has_the_given_one_or_is_named() -> None:
    text = NESTED.replace("%end = s32[] constant(12)", "%end = s32[] get-tuple-element(%p.1), index=0")
    text = text.replace("body=%inner_body", 'body=%inner_body, metadata={op_name="jit(f)/head/while"}')
    module = parse(text)
    outer = module.computations["outer_body"]
    assert trip_count(module, outer, outer.instructions["inner"]) is None
    assert cost(text, machine(loops=(Loop("head", 7.0),))).flops == 70 * 2 * 64 * 256 * 256
    once = cost(text, machine())
    assert once.flops == 10 * 2 * 64 * 256 * 256
    assert once.notes == ("a loop of unknown length counts once: jit(f)/head/while",)


def test_a_computation_of_another_thread_ends_where_it_ends() -> None:
    text = NESTED.replace("}\n\n%inner_body", '}, execution_thread="sparsecore"\n\n%inner_body')
    assert text != NESTED
    assert cost(text, machine()).flops == cost(NESTED, machine()).flops


def test_a_bound_that_is_carried_unchanged_is_known() -> None:
    text = NESTED.replace("%end = s32[] constant(12)", "%end = s32[] get-tuple-element(%p.1), index=3")
    text = text.replace("tuple(%next, %planted, %w)", "tuple(%next, %planted, %w, %bound)")
    text = text.replace(
        "%two = s32[] constant(2)",
        "%two = s32[] constant(2)\n  %bound = s32[] get-tuple-element(%p), index=3",
    )
    text = text.replace("tuple(%zero, %y, %v)", "tuple(%zero, %y, %v, %twelve)")
    text = text.replace(
        "%zero = s32[] constant(0)", "%zero = s32[] constant(0)\n  %twelve = s32[] constant(12)"
    )
    assert cost(text, machine()).flops == 60 * 2 * 64 * 256 * 256


@pytest.mark.parametrize(
    ("direction", "start", "bound", "step", "count"),
    [("LT", 0, 12, 5, 3), ("LE", 0, 12, 4, 4), ("NE", 0, 12, 4, 3), ("LT", 5, 5, 1, 0)],
)
def test_trip_counts(direction: str, start: int, bound: int, step: int, count: int) -> None:
    text = NESTED.replace("constant(12)\n  ROOT %lt", f"constant({bound})\n  ROOT %lt")
    text = text.replace("direction=LT", f"direction={direction}").replace("constant(2)", f"constant({step})")
    module = parse(text.replace("%zero = s32[] constant(0)", f"%zero = s32[] constant({start})"))
    outer = module.computations["outer_body"]
    assert trip_count(module, outer, outer.instructions["inner"]) == count


def test_matmuls_as_convolutions_count_as_by_hand() -> None:
    # [512, 4096] x [4096, 1024] as the TPU compiler writes it.
    plain = entry(
        "  %x = bf16[512,4096]{1,0} parameter(0)\n  %w = bf16[4096,1024]{1,0} parameter(1)\n"
        "  ROOT %c = bf16[512,1024]{1,0} convolution(%x, %w), dim_labels=bf_io->bf"
    )
    assert plain.flops == 2 * 512 * 4096 * 1024
    # 8 independent products [64, 128] x [128, 32]: a batch axis is a window that never overlaps itself.
    batched = entry(
        "  %x = bf16[8,64,128]{2,1,0} parameter(0)\n  %w = bf16[8,128,32]{2,1,0} parameter(1)\n"
        "  ROOT %c = f32[8,64,32]{2,1,0} convolution(%x, %w), "
        "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    )
    assert batched.flops == pytest.approx(8 * 2 * 64 * 128 * 32)


def test_float32_at_highest_precision_takes_six_passes() -> None:
    text = (
        "  %x = f32[512,4096]{{1,0}} parameter(0)\n  %w = f32[4096,1024]{{1,0}} parameter(1)\n"
        "  ROOT %c = f32[512,1024]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, "
        "rhs_contracting_dims={{0}}{}"
    )
    fast, exact = entry(text.format("")), entry(text.format(", operand_precision={highest,highest}"))
    assert exact.flops == fast.flops
    assert exact.matmul_s == pytest.approx(6 * 2 * 512 * 4096 * 1024 / CHIPS["v5e"].matmul_rate)


def test_slices_and_updates_in_place_count_their_own_size() -> None:
    text = """
HloModule m

%one_layer (stack: bf16[32,1024,1024], at: s32[], x: bf16[1024,1024]) -> bf16[32,1024,1024] {
  %stack = bf16[32,1024,1024]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %x = bf16[1024,1024]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %layer = bf16[1,1024,1024] dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  %shaped = bf16[1,1024,1024]{2,1,0} bitcast(%x)
  %moved = bf16[1,1024,1024]{2,1,0} add(%layer, %shaped)
  ROOT %u = bf16[32,1024,1024]{2,1,0} dynamic-update-slice(%stack, %moved, %at, %zero, %zero)
}

ENTRY %main (s: bf16[32,1024,1024], i: s32[], y: bf16[1024,1024]) -> bf16[32,1024,1024] {
  %s = bf16[32,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %f = bf16[32,1024,1024]{2,1,0} fusion(%s, %i, %y), kind=kLoop, calls=%one_layer
}
"""
    found = cost(text, machine())
    # One layer read and written, and the index; %y is on the chip.
    assert found.bytes == 2 * 2 * 1024 * 1024 + 4


def test_asynchronous_work_runs_beside_what_follows() -> None:
    text = (
        "  %x = bf16[4096,4096]{{1,0}} parameter(0)\n  %s = bf16[1024,4096]{{1,0}} parameter(1)\n"
        "  %g = (bf16[1024,4096], bf16[8192,4096]) all-gather-start(%s), dimensions={{0}}, "
        "replica_groups=[2,8]<=[8,2]T(1,0)\n{}"
        "  ROOT %d = bf16[8192,4096]{{1,0}} all-gather-done(%g)"
    )
    product = "  %p = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
    alone, beside = entry(text.format("")), entry(text.format(product))
    [((kind, axes), (runs, size, seconds))] = beside.network_by().items()
    assert (kind, axes, runs, size) == ("all-gather", ("fsdp",), 1, 1024 * 4096 * 2)
    assert alone.seconds == alone.network_s == pytest.approx(seconds)
    assert beside.seconds == pytest.approx(max(seconds, beside.matmul_s))
    assert beside.network_s == pytest.approx(max(0.0, seconds - beside.matmul_s))


def test_a_collective_of_the_sparse_cores_runs_beside_what_follows() -> None:
    text = """
HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%offloaded (p: bf16[1024,4096], t: token[]) -> bf16[1024,4096] {
  %t = token[] parameter(1)
  %p = bf16[1024,4096]{1,0} parameter(0)
  ROOT %all-reduce = bf16[1024,4096]{1,0} all-reduce(%p), replica_groups=[2,8]<=[8,2]T(1,0), to_apply=%sum
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[4096,4096], s: bf16[1024,4096]) -> bf16[1024,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %s = bf16[1024,4096]{1,0} parameter(1)
  %begin = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %end = token[] custom-call(%begin), custom_call_target="PrepareAsyncCallDone"
  %start = ((bf16[1024,4096], token[]), bf16[1024,4096]) call-start(%s, %end), async_execution_thread="sparsecore", to_apply=%offloaded
  %p = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %done = bf16[1024,4096]{1,0} call-done(%start)
}
"""  # noqa: E501
    found = cost(text, machine())
    [((kind, axes), (runs, size, seconds))] = found.network_by().items()
    assert (kind, axes, runs, size) == ("all-reduce", ("fsdp",), 1, 1024 * 4096 * 2)
    assert found.seconds == pytest.approx(max(seconds, found.matmul_s))
    assert found.network_s == pytest.approx(max(0.0, seconds - found.matmul_s))
    assert not found.notes


def test_permutes_find_their_axis_and_direction() -> None:
    ring = ",".join(f"{{{2 * i + t},{2 * ((i - 1) % 8) + t}}}" for i in range(8) for t in range(2))
    found = entry(
        "  %x = bf16[1024,4096]{1,0} parameter(0)\n"
        f"  ROOT %p = bf16[1024,4096]{{1,0}} collective-permute(%x), source_target_pairs={{{ring}}}"
    )
    [collective] = found.collectives
    assert (collective.axes, collective.direction, collective.size) == (("fsdp",), -1, 8)


@pytest.mark.parametrize(("topology", "factor"), [("v5e:4x16", 1), ("v5e:4x8", 2)])
def test_a_ring_needs_a_wrap_around_link(topology: str, factor: int) -> None:
    slices = Slices.parse(topology)
    length = slices.shape[1]
    places = np.asarray([(i, j, 0) for i in range(4) for j in range(length)]).reshape(4, length, 1, 3)
    network = Network(AXES, (4, length, 1), slices, places)
    text = (
        "HloModule m\n\nENTRY %main () -> f32[] {\n  %x = bf16[1024,4096]{1,0} parameter(0)\n"
        f"  ROOT %g = bf16[1024,4096]{{1,0}} all-gather(%x), replica_groups="
        f"[4,{length}]<=[{4 * length}]\n}}\n"
    )
    found = cost(text, Machine(slices.chip, network))
    bytes_ = 1024 * 4096 * 2 * (length - 1)
    assert found.network_s == pytest.approx(factor * bytes_ / (2 * 0.9 * 50e9))


def test_splash_has_the_formula_of_its_blocks() -> None:
    text = (
        "  %q = bf16[2,32,2048,128]{3,2,1,0} parameter(0)\n  %k = bf16[2,8,2048,128]{3,2,1,0} parameter(1)\n"
        "  ROOT %a = bf16[2,32,2048,128]{3,2,1,0} custom-call(%q, %k, %k), "
        'custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/attention/splash_mha_fwd_segmented/pallas_call"}'
    )
    found = entry(text)
    blocks = 1 + 2 + 3 + 4  # 512 x 512, on and below the diagonal
    assert found.flops == 2 * 2 * (2 * 32) * blocks * 512 * 512 * 128
    near = cost(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{text}\n}}\n", machine()._replace(window=512))
    assert near.flops == 2 * 2 * (2 * 32) * (1 + 2 + 2 + 2) * 512 * 512 * 128


def test_the_kernel_for_trees_has_the_formula_of_its_blocks() -> None:
    text = (
        "  %q = bf16[2,8,4,2048,128]{4,3,2,1,0} parameter(0)\n"
        "  %k = bf16[2,8,2048,128]{3,2,1,0} parameter(1)\n"
        "  ROOT %a = bf16[2,8,4,2048,128]{4,3,2,1,0} custom-call(%q, %k, %k), "
        'custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/attention/tree_attention_p1_r3_b512/pallas_call"}'
    )
    assert entry(text).flops == 2 * 2 * (2 * 32) * (1 + 2 + 3 + 3) * 512 * 512 * 128


def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(HloError, match="no ENTRY"):
        parse("HloModule m")
    with pytest.raises(HloError, match="no formula for this kernel"):
        entry(
            "  %q = bf16[2,32]{1,0} parameter(0)\n"
            '  ROOT %a = bf16[2,32]{1,0} custom-call(%q), custom_call_target="tpu_custom_call"'
        )


def test_between_slices_the_hosts_network_is_used() -> None:
    slices = Slices.parse("v5e:4x4x2")
    places = np.asarray([(i // 4, i % 4, s) for s in range(2) for i in range(16)]).reshape(2, 16, 1, 3)
    network = Network(AXES, (2, 16, 1), slices, places)
    text = (
        "HloModule m\n\nENTRY %main () -> f32[] {\n  %x = f32[1024,4096]{1,0} parameter(0)\n"
        "  ROOT %g = f32[1024,4096]{1,0} all-reduce(%x), "
        "replica_groups=[16,2]<=[2,16]T(1,0), to_apply=%s\n}\n"
    )
    found = cost(text, Machine(slices.chip, network))
    [collective] = found.collectives
    assert collective.axes == ("data",)
    # Of two devices each sends and receives all bytes once, as a reduce-scatter and an all-gather.
    assert found.network_s == pytest.approx(4 * 1024 * 4096 / slices.chip.dcn_bytes)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", ("fsdp",)),
        ("mesh['axis_0'=16] {'axis_0':(8)2}", ("tensor",)),
        ("mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_0'}", ("tensor",)),
        (
            "mesh['axis_0'=2,'axis_1'=8], device_ids=(0,2,4,6,8,10,12,14,1,3,5,7,9,11,13,15) {'axis_0'}",
            ("tensor",),
        ),
        ("mesh['axis_0'=16] {'axis_0'}", ("fsdp", "tensor")),
        ("{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",)),
        ("{}", ("fsdp", "tensor")),
    ],
)
def test_groups_in_all_their_notations(groups: str, axes: tuple[str, ...]) -> None:
    found = entry(
        "  %x = bf16[1024,4096]{1,0} parameter(0)\n"
        f"  ROOT %r = bf16[1024,4096]{{1,0}} all-reduce(%x), replica_groups={groups}, to_apply=%s"
    )
    assert [collective.axes for collective in found.collectives] == [axes]
