"""What no kernel may do is found: each mistake on the smallest kernel that makes it."""

import itertools

import pytest
import torch
from kernel_cases import fill_with_poison

from ptx.assemble import assemble, column, run
from ptx.machine import SCHEDULES
from ptx.text import PtxError

ADDRESSES = """
    mul.wide.u32 %rd9, %r0, 4; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
    shl.b32 %r9, %r0, 2; mov.b32 %r8, 1065353216;
    """


def cells(n, value=0.0):
    return torch.full((n,), value)


def refused(body, message, *, tensors=None, **options):
    if tensors is None:
        tensors = {"x": cells(128), "y": cells(128)}
    with pytest.raises(PtxError, match=message):
        run(ADDRESSES + body, tensors, **options)


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "ld.volatile.global.b32 %r1, [%rd0];",
        "bar.sync 1;",
        "vote.sync.any.pred %p1, %p2, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 3;",
    ],
)
def test_an_unknown_instruction_is_named(instruction):
    with pytest.raises(PtxError) as error:
        assemble(instruction, 1, 32)
    assert instruction.rstrip(";") in str(error.value)
    assert "unknown" in str(error.value)


@pytest.mark.parametrize(
    "text", [".local .align 8 .b8 __local_depot0[64];", ".reg .v4 %x<3>;", "{ .reg .pred %q<2>; }"]
)
def test_an_unknown_directive_is_named(text):
    with pytest.raises(PtxError, match="unknown"):
        assemble(f"{text} add.s32 %r1, %x1, %r0;", 1, 32)


def test_a_register_has_no_value_before_its_first():
    refused("add.s32 %r1, %r2, 1;", r"add\.s32 %r1, %r2, 1; .*has no value")


def test_threads_that_do_not_load_have_no_number():
    y = cells(32)
    body = """setp.lt.u32 %p1, %r0, 5;
        @%p1 ld.global.b32 { %r2 }, [ %rd10 + 0 ]; st.global.b32 [ %rd11 + 0 ], { %r2 };"""
    run(ADDRESSES + body, {"x": cells(5, 2.0), "y": y})
    assert y[:5].tolist() == [2] * 5
    assert y[5:].isnan().all()


@pytest.mark.parametrize("offset", [4, -4, 1 << 20])
@pytest.mark.parametrize(
    "access",
    ["ld.global.b32 {{ %r2 }}, [ %rd10 + {} ];", "st.global.b32 [ %rd10 + {} ], {{ %r8 }};"],
)
def test_an_address_outside_of_a_tensor_names_it(access, offset):
    """Another tensor right behind it in memory changes nothing."""
    whole = cells(96)
    tensors = {"before": whole[:32], "it": whole[32:64], "after": whole[64:]}
    body = f"add.s64 %rd10, %rd1, %rd9; {access.format(offset)}"
    refused(body, "out of bounds: 4 bytes at .* of it, which has 128", tensors=tensors)
    run(ADDRESSES + f"add.s64 %rd10, %rd1, %rd9; {access.format(0)}", tensors)


def test_an_address_of_no_tensor():
    refused("ld.global.b32 { %r2 }, [ %rd9 + 0 ];", "is of no tensor")


def test_masked_threads_may_hold_any_address():
    body = "setp.lt.u32 %p1, %r0, 7; @%p1 ld.global.b32 { %r2 }, [ %rd10 + 0 ];"
    run(ADDRESSES + body, {"x": cells(7), "y": cells(1)})
    refused(body, "of x, which has 24", tensors={"x": cells(6), "y": cells(1)})


def test_shared_memory_has_an_end():
    refused("st.shared.b32 [%r9], %r8;", "124 of shared memory, which has 124", shared=124)
    refused("st.shared.b32 [%r9+-4], %r8;", "of shared memory, which has 128", shared=128)


def test_wide_accesses_are_aligned():
    body = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd0 + 0 ];"
    whole = cells(9)
    run(body, {"x": whole[4:]})
    refused(body, "misaligned: 16 bytes of x", tensors={"x": whole[1:], "y": cells(1)})
    refused("st.shared.v2.b32 [%r9], {%r8, %r8};", "misaligned: 8 bytes", shared=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_host_left_unwritten_is_not_read(dtype):
    x = torch.zeros(64, dtype=dtype)
    body = "ld.global.b32 { %r2 }, [ %rd10 + 0 ];"
    tensors = {"x": x.view(-1), "y": cells(1)}
    run(ADDRESSES + body, tensors)
    fill_with_poison(x[37:38])
    if dtype == torch.float32:
        run(ADDRESSES + body, tensors)
        fill_with_poison(x[31:32])
    refused(body, "reads what nobody wrote to x", tensors=tensors)


def test_shared_memory_that_nobody_wrote_is_not_read():
    body = "setp.ne.b32 %p1, %r0, 9; @%p1 st.shared.b32 [%r9], %r8; ld.shared.b32 %r2, [%r9];"
    refused(body, "reads shared memory that nobody wrote", shared=128)


EXCHANGE = """
    st.shared.b32 [%r9], %r0;
    {}
    xor.b32 %r1, %r9, {};
    ld.shared.b32 %r2, [%r1];
    {}
    st.shared.b32 [%r9], %r2;
    {}
    ld.shared.b32 %r3, [%r1];
    st.global.b32 [ %rd10 + 0 ], {{ %r3 }};
    """


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("distance", "barrier"), [(4, "bar.warp.sync -1;"), (4, "bar.sync 0;"), (128, "bar.sync 0;")]
)
def test_threads_exchange_values_across_barriers(distance, barrier, schedule):
    """Between lanes of a warp a barrier of the warp is enough, between warps it is not."""
    x = torch.zeros(64, dtype=torch.int32)
    arguments = {"threads": 64, "shared": 256, "schedule": schedule}
    body = ADDRESSES + EXCHANGE
    run(body.format(barrier, distance, barrier, barrier), {"x": x, "y": cells(64)}, **arguments)
    assert x.tolist() == list(range(64))
    kind = "warp" if distance == 128 else "thread"
    messages = (
        rf"a {kind} reads .* wrote",
        rf"a {kind} writes .* read",
        rf"a {kind} reads .* wrote",
    )
    for i, message in enumerate(messages):
        barriers = [barrier] * 3
        barriers[i] = ""
        # Warp after warp, what the next one writes is not there, or there before it is read over.
        wrong = f"race: {message if schedule == 'lockstep' else ''}|that nobody wrote"
        refused(EXCHANGE.format(barriers[0], distance, *barriers[1:]), wrong, **arguments)
    if distance == 128:
        short = ["bar.warp.sync -1;"] * 3
        refused(EXCHANGE.format(short[0], distance, *short[1:]), "race|nobody wrote", **arguments)


def test_a_later_reader_does_not_hide_an_earlier_one():
    """Warps 0, 1 and 2 read a number that one of them then writes."""
    body = """
        st.shared.b32 [%r9], %r0; bar.sync 0;
        ld.shared.b32 %r2, [{}];
        shr.u32 %r3, %r0, 5; setp.eq.b32 %p1, %r3, {};
        mov.b32 %r4, {}; bar.warp.sync -1;
        @%p1 st.shared.b32 [%r4], %r0;"""
    for writer, schedule in itertools.product(range(3), SCHEDULES):
        arguments = {"threads": 96, "shared": 384, "schedule": schedule}
        refused(body.format(0, writer, 0), "race", **arguments)
        refused(body.format("%r9", writer, 128 if writer != 1 else 0), "race", **arguments)
        # The warp that writes alone reads what it writes.
        run(
            ADDRESSES + body.format("%r9", writer, 128 * writer),
            {"x": cells(1), "y": cells(1)},
            **arguments,
        )


def test_warps_write_the_same_or_not_at_all():
    body = "mov.b32 %r1, 0; st.shared.b32 [%r1], {};"
    tensors = {"x": cells(1), "y": cells(1)}
    run(ADDRESSES + body.format("%r8"), tensors, threads=64, shared=16)
    refused(body.format("%r0"), "writes other values than were written", threads=64, shared=16)


BLOCKS = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd20, %r1, 4; add.s64 %rd21, %rd0, %rd20;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [ %rd10 + 0 ], { %r8 };", "a block writes what another block wrote"),
        (
            "ld.global.b32 { %r2 }, [ %rd0 + 0 ]; setp.eq.b32 %p1, %r0, 0;"
            "@%p1 st.global.b32 [ %rd21 + 0 ], { %r8 };",
            "a block writes what another block read",
        ),
        (
            "setp.eq.b32 %p1, %r0, 0; @%p1 st.global.b32 [ %rd21 + 0 ], { %r8 };"
            "ld.global.b32 { %r2 }, [ %rd0 + 4 ];",
            "a block reads what another block wrote",
        ),
        (
            "setp.eq.b32 %p1, %r0, 0; @%p1 st.global.b32 [ %rd21 + 0 ], { %r8 };"
            "@%p1 red.global.gpu.relaxed.add.f32 [ %rd0 + 4 ], %r8;",
            "a block writes what another block wrote",
        ),
    ],
)
def test_nothing_orders_blocks(body, message):
    for blocks in (2, 600):
        tensors = {"x": cells(600), "y": cells(1)}
        refused(BLOCKS + body, f"race: {message}", tensors=tensors, blocks=blocks)


def test_blocks_share_no_memory_and_warps_of_one_may_exchange_through_tensors():
    body = """
        mul.wide.u32 %rd20, %r1, 256; add.s64 %rd10, %rd0, %rd20; add.s64 %rd12, %rd10, %rd9;
        add.s32 %r2, %r0, %r1;
        st.global.b32 [ %rd12 + 0 ], { %r2 };
        bar.sync 0;
        xor.b32 %r3, %r9, 128; cvt.u64.u32 %rd13, %r3; add.s64 %rd13, %rd10, %rd13;
        ld.global.b32 { %r4 }, [ %rd13 + 0 ];
        bar.sync 0;
        st.global.b32 [ %rd12 + 0 ], { %r4 };"""
    x = torch.zeros(300, 64, dtype=torch.int32)
    given = {"x": x, "y": cells(1)}
    run(ADDRESSES + BLOCKS + body, given, threads=64, blocks=300)
    expected = torch.arange(300)[:, None] + (torch.arange(64) ^ 32)
    assert torch.equal(x, expected.int())
    for part in (1, 2):
        first, second, third = body.split("bar.sync 0;")
        broken = (
            first + second + "bar.sync 0;" + third
            if part == 1
            else first + "bar.sync 0;" + second + third
        )
        refused(BLOCKS + broken, "race: a warp", tensors=given, threads=64, blocks=3)


def test_threads_of_a_warp_go_one_way():
    body = "setp.lt.u32 %p1, %r0, 3; @%p1 bra $L_end; mov.b32 %r1, 0; $L_end: ret;"
    refused(body, "threads of one warp go different ways")


def test_a_loop_without_end_ends(monkeypatch):
    monkeypatch.setattr("ptx.machine.LIMIT", 1000)
    refused("$L_loop: bra $L_loop;", "more than 1000 instructions")


def test_the_line_of_the_source_is_named():
    place = ".loc\t1 75 16                         // linear.py:75:16\n"
    refused(place + "add.s32 %r1, %r2, 1;", r"\(linear\.py:75\)")


def test_tensors_that_overlap_are_one():
    whole = torch.arange(64, dtype=torch.float32)
    tensors = {"left": whole[:40], "right": whole[32:]}
    body = "ld.global.b32 { %r2 }, [ %rd1 + 0 ]; bar.sync 0; st.global.b32 [ %rd0 + 128 ], { %r2 };"
    run(ADDRESSES + body, tensors)
    refused(
        "ld.global.b32 { %r2 }, [ %rd0 + 256 ];", "of left, right, which has 256", tensors=tensors
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_empty_tensor_is_out_of_bounds(schedule):
    tensors = {"x": column([], torch.float32), "y": cells(4)}
    refused(
        "ld.global.b32 { %r2 }, [ %rd0 + 0 ];", "out of bounds", tensors=tensors, schedule=schedule
    )
