"""What sm_90 adds: wgmma, its fences and the stores of matrices, and mistakes with them."""

import itertools
import re

import pytest
import torch

from ptx import oracle
from ptx.assemble import run
from ptx.machine import SCHEDULES, SPECIAL
from ptx.text import PtxError

KINDS = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
START_B = 16 << 10


def image_of(matrix, descriptor, transposed, size):
    """Shared memory in which a matrix lies as its descriptor says, as bytes."""
    image = torch.zeros(size, dtype=torch.uint8)
    item = matrix.element_size()
    flat = matrix.contiguous().view(torch.uint8).view(*matrix.shape, item)
    for r, c in itertools.product(*map(range, matrix.shape)):
        at = oracle.place(descriptor, r, c, item, transposed)
        image[at : at + item] = flat[r, c]
    return image


def descriptor(start, rows, width, transposed, first=0):
    """A matrix of `rows` rows packed as tightly as a swizzle of `width` bytes lets it be."""
    if transposed:
        leading, stride = (16 * width, 8 * width) if width else (rows * 16, 128)
    else:
        leading, stride = (0, 8 * width) if width else (rows * 16, 128)
    return oracle.Matrix(start + first, leading, stride, width)


def thread_order(warps):
    """Thread, row and column of every entry of an accumulator, and its register, of n columns."""
    for thread, i in itertools.product(range(32 * warps), range(8)):
        lane = thread % 32
        yield thread, i, 16 * (thread // 32) + lane // 4 + 8 * (i // 2 % 2), lane % 4 * 2 + i % 2


def accumulators(matrix):
    """Registers [columns / 2, 128] of an accumulator [64, columns]."""
    found = torch.zeros(matrix.shape[1] // 2, 128)
    for j in range(matrix.shape[1] // 8):
        for thread, i, row, column in thread_order(4):
            if i < 4:
                found[4 * j + i, thread] = matrix[row, 8 * j + column]
    return found


def operand_registers(matrix):
    """Registers [4, 128] of A: for each thread two 16-bit numbers or one tf32."""
    each = 4 // matrix.element_size()
    found = torch.zeros(4, 128, each, dtype=matrix.dtype)
    for thread, i, j in itertools.product(range(128), range(4), range(each)):
        g, t = thread % 32 // 4, thread % 4
        row = 16 * (thread // 32) + g + 8 * (i % 2)
        found[i, thread, j] = matrix[row, t * each + j + 4 * each * (i // 2)]
    return found


PARTS = {
    # Between the copy of the image to shared memory and the product, and behind it.
    "copied": "fence.proxy.async.shared::cta; bar.sync 0;",
    "arrive": "wgmma.fence.sync.aligned;",
    "commit": "wgmma.commit_group.sync.aligned;",
    "wait": "wgmma.wait_group.sync.aligned 0;",
}
ADDRESSES = """
    and.b32 %r5, %r0, 127; shl.b32 %r9, %r5, 4;
    mul.wide.u32 %rd9, %r5, 16; add.s64 %rd10, %rd0, %rd9;
    mul.wide.u32 %rd9, %r5, 4; add.s64 %rd11, %rd1, %rd9; add.s64 %rd12, %rd2, %rd9;"""


def moved(names, register, verb):
    """Loads or stores of registers, one of each thread after the other."""
    form = {
        "ld": "ld.global.b32 {{ {} }}, [ {} + {} ];",
        "st": "st.global.b32 [ {1} + {2} ], {{ {0} }};",
    }
    return [form[verb].format(x, register, 512 * i) for i, x in enumerate(names)]


def body_of(opcode, n, a, b, flags, further, parts, size):
    """PTX that copies an image to shared memory, multiplies once and stores the sums."""
    parts = PARTS | parts
    sums, left = (
        [f"%r{first + i}" for i in range(count)] for first, count in ((1000, n // 2), (900, 4))
    )
    lines = [ADDRESSES]
    for i in range(0, size, 2048):
        held = "{ %r1, %r2, %r3, %r4 }"
        lines.append(
            f"setp.lt.u32 %p2, %r9, {size - i}; @%p2 ld.global.v4.b32 {held}, [ %rd10 + {i} ];"
        )
        lines.append(f"@%p2 st.shared.v4.b32 [%r9+{i}], {held};")
    lines += moved(sums, "%rd12", "ld") + moved(left, "%rd11", "ld")
    lines.append(
        f"mov.b64 %rd40, {a or 0:#x}; mov.b64 %rd41, {b:#x}; setp.eq.b32 %p1, {further}, 1;"
    )
    held = "%rd40" if a is not None else f"{{{', '.join(left)}}}"
    lines += [parts["copied"], parts["arrive"]]
    lines.append(f"{opcode} {{{', '.join(sums)}}}, {held}, %rd41, %p1, 1, 1{flags};")
    lines += [parts["commit"], parts["wait"], *moved(sums, "%rd12", "st")]
    return "\n".join(lines)


def multiply(
    kind,
    n,
    width_a,
    width_b,
    transposed_a=False,
    transposed_b=False,
    *,
    further=1,
    first=0,
    in_registers=False,
    parts=None,
    size=None,
    wrong=0,
    **options,
):
    """The sums that a product leaves, and the right ones: whole numbers over four, all exact."""
    dtype, depth = KINDS[kind], 8 if kind == "tf32" else 16
    torch.manual_seed(n)
    a, b, c = (torch.randint(-8, 9, x) / 2 for x in ((64, depth), (n, depth), (64, n)))
    of_a = descriptor(0, 64, width_a, transposed_a, first)
    of_b = descriptor(START_B, n, width_b, transposed_b, first)
    whole = START_B + max(n * max(width_b, 32), 16 * n * 2)
    image = image_of(b.to(dtype), of_b, transposed_b, whole)
    if not in_registers:
        image |= image_of(a.to(dtype), of_a, transposed_a, whole)
    sums = accumulators(c)
    given = {"image": image, "left": operand_registers(a.to(dtype)), "sums": sums}
    flags = ""
    if kind != "tf32":
        flags = f", {int(transposed_b)}"
        flags = flags if in_registers else f", {int(transposed_a)}{flags}"
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind}"
    left = None if in_registers else of_a.encoded()
    size = size or whole
    body = body_of(opcode, n, left, of_b.encoded() | wrong, flags, further, parts or {}, size)
    run(body, given, **{"threads": 128, "shared": whole} | options)
    return sums, accumulators(a @ b.T + c * further)


PRODUCTS = [x for x in SPECIAL if x.startswith("wgmma.mma")]


@pytest.mark.parametrize(
    "opcode",
    [
        pytest.param(x, marks=() if "n8k" in x or "n32k" in x else pytest.mark.slow)
        for x in PRODUCTS
    ],
)
def test_products(opcode):
    n = re.search(r"m64n(\d+)k", opcode)[1]
    found, expected = multiply(opcode.split(".")[-1], int(n), 32, 32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize(("a", "b"), [*itertools.product((False, True), repeat=2)])
def test_layouts_of_operands(width, a, b):
    found, expected = multiply("bf16", 16, width, width, a, b, further=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [64, 128])
def test_columns_further_on_in_swizzled_rows(width):
    """A descriptor may begin at any 32 bytes of a row: the swizzle is of addresses."""
    found, expected = multiply("f16", 32, width, width, first=width - 32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_operand_in_registers(kind):
    found, expected = multiply(kind, 8, 0, 128, in_registers=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warpgroups_multiply_each_for_itself(schedule):
    """Of two, both leave the same sums: each holds all rows."""
    parts = {"wait": f"{PARTS['wait']} bar.sync 0;"}
    found, expected = multiply("bf16", 8, 32, 32, threads=256, schedule=schedule, parts=parts)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("opcode", [x for x in SPECIAL if x.startswith("stmatrix")])
def test_stores_of_matrices(opcode):
    """Lane 4 r + c holds columns 2 c and 2 c + 1 of row r of a matrix, or of its transpose."""
    parts, transposed = int(opcode.split(".x")[1][0]), "trans" in opcode
    x = torch.arange(4 * 64, dtype=torch.int16).view(4, 32, 2)
    y = torch.zeros(4, 8, 8, dtype=torch.int16)
    names = [f"%r{40 + i}" for i in range(parts)]
    loads = "".join(f"ld.global.b32 {{ {r} }}, [ %rd8 + {128 * i} ];" for i, r in enumerate(names))
    body = f"""
        mul.wide.u32 %rd9, %r0, 4; add.s64 %rd8, %rd0, %rd9; {loads}
        mul.wide.u32 %rd9, %r0, 16; add.s64 %rd10, %rd1, %rd9;
        shl.b32 %r8, %r0, 4; xor.b32 %r9, %r8, 80; mov.b32 %r1, 0;
        st.shared.v4.b32 [%r8], {{ %r1, %r1, %r1, %r1 }};
        bar.warp.sync -1;
        {opcode} [%r9], {{{", ".join(names)}}};
        bar.warp.sync -1;
        ld.shared.v4.b32 {{ %r50, %r51, %r52, %r53 }}, [%r9];
        st.global.v4.b32 [ %rd10 + 0 ], {{ %r50, %r51, %r52, %r53 }};"""
    run(body, {"x": x, "y": y}, shared=512)
    for m, lane, i in itertools.product(range(4), range(32), range(2)):
        r, c = lane // 4, 2 * (lane % 4) + i
        found = y[m, c, r] if transposed else y[m, r, c]
        assert found == (x[m, lane, i] if m < parts else 0)


MISTAKES = [
    ({"copied": "bar.sync 0;"}, "no fence.proxy.async lies between"),
    ({"copied": "fence.proxy.async.shared::cta;"}, "race: a warp reads what another warp wrote"),
    ({"arrive": ""}, "no wgmma.fence after a register was computed that wgmma uses"),
    ({"arrive": "wgmma.fence.sync.aligned; add.f32 %r1000, %r1001, %r1001;"}, "no wgmma.fence"),
    ({"wait": ""}, "reads a register that wgmma still writes"),
    ({"commit": ""}, "reads a register that wgmma still writes"),
    ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "reads a register that wgmma still writes"),
    ({"commit": "wgmma.commit_group.sync.aligned; mov.b32 %r1000, 0;"}, "was written that wgmma"),
    ({"commit": "wgmma.commit_group.sync.aligned; mov.b32 %r901, 0;"}, "that wgmma still reads"),
    (
        {"commit": "wgmma.commit_group.sync.aligned; st.shared.b32 [16384], %r0;"},
        "writes what wgmma still reads",
    ),
    (
        {
            "commit": "wgmma.commit_group.sync.aligned;"
            "cp.async.ca.shared.global [ 16384 + 0 ], [ %rd10 + 0 ], 0x4;"
        },
        "writes what wgmma still reads",
    ),
]


@pytest.mark.parametrize(("parts", "message"), MISTAKES)
def test_mistakes(parts, message):
    with pytest.raises(PtxError, match=message):
        multiply("bf16", 8, 32, 32, in_registers="%r901" in str(parts), parts=parts)


def test_a_store_after_the_wait_and_a_barrier_is_none():
    wait = "wgmma.wait_group.sync.aligned 0; bar.sync 0; st.shared.b32 [%r9], %r0;"
    multiply("bf16", 8, 32, 32, parts={"wait": wait})
    with pytest.raises(PtxError, match="a warp writes what another warp read"):
        multiply("bf16", 8, 32, 32, parts={"wait": wait.replace("bar.sync 0;", "")})


def test_every_byte_that_is_read_is_in_shared_memory_and_was_written():
    needed = START_B + 8 * 32
    multiply("bf16", 8, 32, 32, size=needed)
    with pytest.raises(PtxError, match=f"of shared memory, which has {needed - 16}"):
        multiply("bf16", 8, 32, 32, size=needed, shared=needed - 16)
    with pytest.raises(PtxError, match="shared memory that nobody wrote"):
        multiply("bf16", 8, 32, 32, size=needed - 16, shared=needed)


def test_what_is_unknown_is_named():
    with pytest.raises(PtxError, match="unknown descriptor"):
        multiply("bf16", 8, 32, 32, wrong=1 << 49)
    with pytest.raises(PtxError, match="differ in what they multiply"):
        multiply(
            "bf16", 8, 32, 32, parts={"arrive": PARTS["arrive"] + "add.s64 %rd41, %rd41, %rd9;"}
        )
    with pytest.raises(PtxError, match="without all four warps"):
        multiply("bf16", 8, 32, 32, threads=64)
