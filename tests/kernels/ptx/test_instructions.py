"""Every instruction that the machine knows, against its description."""

import itertools
import math
import random
import struct

import pytest
import torch

from ptx import oracle
from ptx.assemble import column, run
from ptx.machine import SPECIAL
from ptx.semantics import OPERATIONS
from ptx.text import PtxError

THREADS = 256
PREFIX = {1: "p", 8: "rs", 16: "rs", 32: "r", 64: "rd"}
# Patterns at which something happens: ends of ranges, zeros, infinities, subnormal numbers, ties.
EDGES = {
    bits: [int(x, 16) for x in text.split()]
    for bits, text in {
        1: "0 1",
        16: "0 1 2 F 10 1F 7F 80 3F80 BF80 7FFF 8000 8001 7F80 FF80 7F81 FFFF 3C00 7C00",
        32: "0 1 2 7 1F 20 21 3F 40 7FFFFFFF 80000000 80000001 FFFFFFFF 3F800000 BF800000 3F000000"
        " 40200000 C0200000 7F800000 FF800000 7FC00000 007FFFFF 00800000 7F7FFFFF 3F808000"
        " 3F818000 3F801000 7E800000 7F000000 4F000000 CF000000 4F800000 477FF000",
        64: "0 1 3 7FFFFFFF 80000000 FFFFFFFF 100000000 7FFFFFFFFFFFFFFF 8000000000000000"
        " FFFFFFFFFFFFFFFF",
    }.items()
}


def patterns(kind: str, draw: random.Random) -> list[int]:
    """One operand a thread: edges, small numbers, any bits, and floats near one."""
    bits = oracle.width(kind)
    choices = [lambda: draw.choice(EDGES[bits]), lambda: draw.getrandbits(bits)]
    if bits > 1:
        choices.append(lambda: draw.randrange(80) % (1 << bits))
    if kind in ("f32", "bf16"):
        near = lambda: struct.unpack("<I", struct.pack("<f", draw.gauss(0, 4)))[0]  # noqa: E731
        choices.append(near if kind == "f32" else lambda: near() >> 16)
    return [draw.choice(choices)() for _ in range(THREADS)]


def as_signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def assert_matches(kind: str, found: int, expected: int | oracle.Near, where: object) -> None:
    """The same bits, any NaN for a NaN, and approximations within their error."""
    halves = {"bf16x2": "bf16", "f16x2": "f16"}
    if kind in halves:
        for shift in (0, 16):
            part = (x >> shift & 0xFFFF for x in (found, expected))
            assert_matches(halves[kind], *part, where)
        return
    if isinstance(expected, oracle.Near):
        x = oracle.decode(found, "f32")
        if math.isnan(expected.value):
            assert math.isnan(x), where
        elif abs(expected.value) >= 2.0**128:
            assert x == math.copysign(math.inf, expected.value), where
        elif expected.value == 0:
            assert x == 0, where
            assert math.copysign(1, x) == math.copysign(1, expected.value), where
        else:
            # Below the smallest normal number, a unit of the last place.
            allowed = max(expected.error * abs(expected.value), 2.0**-149)
            assert abs(x - expected.value) <= allowed, where
        return
    if kind in oracle.FLOATS and math.isnan(oracle.decode(expected, kind)):
        assert math.isnan(oracle.decode(found, kind)), where
        return
    assert found == expected, where


@pytest.mark.parametrize("opcode", OPERATIONS)
def test_elementwise(opcode):
    operation = OPERATIONS[opcode]
    draw = random.Random(opcode)
    given = [patterns(kind, draw) for kind in operation.operands]
    tensors = {f"x{i}": column([as_signed(x) for x in xs]) for i, xs in enumerate(given)}
    tensors["result"] = torch.full((THREADS,), -1, dtype=torch.int64)
    lines, registers = ["mul.wide.u32 %rd90, %r0, 8;"], []
    for i, kind in enumerate(operation.operands):
        bits = oracle.width(kind)
        lines.append(f"add.s64 %rd{50 + i}, %rd{i}, %rd90;")
        registers.append(f"%{PREFIX[bits]}{10 + i}")
        if bits == 1:
            lines.append(f"ld.global.b32 {{ %r{30 + i} }}, [ %rd{50 + i} + 0 ];")
            lines.append(f"setp.ne.b32 {registers[-1]}, %r{30 + i}, 0;")
        else:
            lines.append(f"ld.global.b{bits} {{ {registers[-1]} }}, [ %rd{50 + i} + 0 ];")
    bits = oracle.width(operation.result)
    result = f"%{PREFIX[bits]}20"
    lines.append(f"{opcode} {', '.join([result, *registers])};")
    lines.append(f"add.s64 %rd60, %rd{len(given)}, %rd90;")
    if bits == 1:
        lines.append("selp.b32 %r21, 1, 0, %p20;")
        result, bits = "%r21", 32
    lines.append(f"st.global.b{bits} [ %rd60 + 0 ], {{ {result} }};")
    run("\n".join(lines), tensors, threads=THREADS)
    for xs, y in zip(zip(*given, strict=True), tensors["result"].tolist(), strict=True):
        expected = oracle.evaluate(opcode, operation.operands, operation.result, list(xs))
        where = (opcode, [hex(x) for x in xs], hex(y % (1 << bits)), expected)
        assert_matches(operation.result, y % (1 << bits), expected, where)


# Instructions that are more than a function of each thread's operands: the test of each.


def lanes(body, *tensors, threads=32, **options):
    """Run a body in which %rd10 + i is this thread's place, 4 bytes each, in tensor i."""
    head = ["mul.wide.u32 %rd9, %r0, 4;"]
    head += [f"add.s64 %rd{10 + i}, %rd{i}, %rd9;" for i in range(len(tensors))]
    named = {f"x{i}": x for i, x in enumerate(tensors)}
    return run("\n".join([*head, body]), named, threads=threads, **options)


def int32(values):
    return column(values, torch.int32)


def test_parameters():
    for opcode in (x for x in SPECIAL if x.startswith("ld.param")):
        kind = opcode.split(".")[-1]
        wide = oracle.width(kind) == 64
        register = "%rd40" if wide else "%r40"
        x = torch.zeros(32, dtype=torch.int64)
        body = f"""
            {opcode} {register}, [tested_param_0];
            mul.wide.u32 %rd9, %r0, 8; add.s64 %rd10, %rd0, %rd9;
            st.global.b{oracle.width(kind)} [ %rd10 + 0 ], {{ {register} }};"""
        run(body, {"x": x})
        expected = (1 << 40) + x.data_ptr() % 256
        assert set(x.tolist()) == {expected if wide else expected % (1 << 32)}, opcode


def test_a_signed_parameter_is_extended():
    x = torch.zeros(32, dtype=torch.int64)
    from ptx.assemble import assemble
    from ptx.memory import Global

    body = """ld.param.s32 %rd40, [tested_param_1];
        mul.wide.u32 %rd9, %r0, 8; add.s64 %rd10, %rd0, %rd9;
        st.global.b64 [ %rd10 + 0 ], { %rd40 };"""
    memory = Global({"x": x})
    assemble(body, 2, 32).run((1,), [memory.addresses["x"], -5], memory, 0)
    assert set(x.tolist()) == {-5}


ACCESSES = [x for x in SPECIAL if x.startswith(("ld.global", "ld.shared"))]


@pytest.mark.parametrize("load", ACCESSES)
def test_loads_and_stores(load):
    """Bytes go to a memory and back, in the order of the registers and of the threads."""
    space, *vector, kind = load.split(".")[1:]
    store = load.replace("ld.", "st.")
    parts, bits = int(vector[0][1:]) if vector else 1, oracle.width(kind)
    size = parts * bits // 8
    x = torch.arange(32 * size, dtype=torch.int32).to(torch.uint8)
    y = torch.zeros_like(x)
    names = ", ".join(f"%{PREFIX[bits]}{40 + i}" for i in range(parts))
    held = f"{{ {names} }}"
    body = f"""
        mul.wide.u32 %rd9, %r0, {size}; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
        ld.global{"." + vector[0] if vector else ""}.{kind} {held}, [ %rd10 + 0 ];"""
    if space != "global":
        forget = "".join(f"mov.b{max(bits, 16)} %{PREFIX[bits]}{40 + i}, 0;" for i in range(parts))
        body += f"""mul.lo.u32 %r9, %r0, {size};
            {store} [%r9+{size}], {held}; {forget} {load} {held}, [%r9+{size}];"""
    body += f"st.global{'.' + vector[0] if vector else ''}.{kind} [ %rd11 + 0 ], {held};"
    run(body, {"x": x, "y": y}, shared=33 * size)
    assert torch.equal(x, y)
    assert store in SPECIAL


@pytest.mark.parametrize("opcode", [x for x in SPECIAL if "add.f32" in x])
def test_atomic_addition(opcode):
    """Every thread adds to one of four numbers; before each is what others had added."""
    x = torch.tensor([0.5, 1.0, 0.0, 0.0])
    before = torch.zeros(64)
    result = "" if opcode.startswith("red") else "%r20, "
    body = f"""
        and.b32 %r8, %r0, 3; mul.wide.u32 %rd20, %r8, 4; add.s64 %rd20, %rd0, %rd20;
        mov.f32 %r9, 0f40000000; mov.b32 %r20, 0; setp.lt.u32 %p1, %r8, 2;
        @%p1 {opcode} {result}[ %rd20 + 0 ], %r9;
        st.global.b32 [ %rd11 + 0 ], {{ %r20 }};"""
    lanes(body, x, before, threads=64)
    assert x.tolist() == [32.5, 33.0, 0, 0]
    if result:
        seen = before.view(16, 4)
        assert seen[:, 0].sort().values.tolist() == [0.5 + 2 * i for i in range(16)]
        assert not seen[:, 2:].any()


def shuffled(mode, b, c, lane):
    """Source lane and whether it is inside, as the instruction set describes."""
    segment, end = c >> 8 & 31, c & 31
    low = lane & segment
    high = low | (end & ~segment & 31)
    if mode == "up":
        j = lane - b
        valid = j >= high
    elif mode == "down":
        j, valid = lane + b, lane + b <= high
    elif mode == "bfly":
        j, valid = lane ^ b, lane ^ b <= high
    else:
        j = low | (b & ~segment & 31)
        valid = j <= high
    return (j if valid else lane), valid


@pytest.mark.parametrize(
    ("b", "c"), [(1, 31), (16, 31), (31, 31), (3, 0), (5, 0x181F), (2, 0x1800)]
)
@pytest.mark.parametrize("opcode", [x for x in SPECIAL if x.startswith("shfl")])
def test_shuffle(opcode, b, c):
    x, y, inside = int32(range(100, 164)), int32([0] * 64), int32([0] * 64)
    body = f"""
        ld.global.b32 {{ %r20 }}, [ %rd10 + 0 ];
        {opcode} %r21|%p1, %r20, {b}, {c}, -1;
        selp.b32 %r22, 1, 0, %p1;
        st.global.b32 [ %rd11 + 0 ], {{ %r21 }}; st.global.b32 [ %rd12 + 0 ], {{ %r22 }};"""
    lanes(body, x, y, inside, threads=64)
    expected = [shuffled(opcode.split(".")[2], b, c, i % 32) for i in range(64)]
    assert inside.tolist() == [int(valid) for _, valid in expected]
    assert y.tolist() == [100 + i // 32 * 32 + j for i, (j, _) in enumerate(expected)]


@pytest.mark.parametrize("opcode", [x for x in SPECIAL if x.startswith("redux")])
def test_reduction(opcode):
    draw = random.Random(opcode)
    given = [draw.randrange(-(1 << 31), 1 << 31) for _ in range(64)]
    name, kind = opcode.split(".")[2:]
    y = int32([0] * 64)
    body = f"""ld.global.b32 {{ %r20 }}, [ %rd10 + 0 ];
        {opcode} %r21, %r20, -1; st.global.b32 [ %rd11 + 0 ], {{ %r21 }};"""
    lanes(body, int32(given), y, threads=64)
    for i in (0, 32):
        xs = [oracle.signed(x % (1 << 32), kind) for x in given[i : i + 32]]
        expected = {"add": sum, "min": min, "max": max}[name](xs) % (1 << 32)
        assert {x % (1 << 32) for x in y[i : i + 32].tolist()} == {expected}


@pytest.mark.parametrize("opcode", [x for x in SPECIAL if x.startswith("ldmatrix")])
def test_matrices(opcode):
    """Lane 4 r + c gets columns 2 c and 2 c + 1 of row r of a matrix, or of its transpose."""
    parts, transposed = int(opcode.split(".x")[1][0]), "trans" in opcode
    x = torch.arange(32 * 8, dtype=torch.int16)
    y = torch.zeros(4, 32, 2, dtype=torch.int16)
    names = ", ".join(f"%r{40 + i}" for i in range(parts))
    stores = "".join(
        f"st.global.b32 [ %rd11 + {128 * i} ], {{ %r{40 + i} }};" for i in range(parts)
    )
    body = f"""
        mul.wide.u32 %rd20, %r0, 16; add.s64 %rd20, %rd0, %rd20;
        ld.global.v4.b32 {{ %r50, %r51, %r52, %r53 }}, [ %rd20 + 0 ];
        xor.b32 %r8, %r0, 5; shl.b32 %r8, %r8, 4;
        st.shared.v4.b32 [%r8], {{ %r50, %r51, %r52, %r53 }};
        bar.warp.sync -1;
        {opcode} {{{names}}}, [%r8];
        {stores}"""
    lanes(body, x, y, shared=512)
    rows = x.view(4, 8, 8)
    for m, lane, i in itertools.product(range(parts), range(32), range(2)):
        r, c = lane // 4, 2 * (lane % 4) + i
        assert y[m, lane, i] == (rows[m, c, r] if transposed else rows[m, r, c])


@pytest.mark.parametrize("opcode", [x for x in SPECIAL if x.startswith("mma")])
def test_matrix_product(opcode):
    """D = A B + C with the fragments that the instruction set describes, exact in small numbers."""
    kind = opcode.split(".")[-2]
    depth = int(opcode.split("k")[1].split(".")[0])
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    each = 4 // dtype.itemsize
    torch.manual_seed(0)
    a, b, c = (
        torch.randint(-8, 9, shape).float() / 4
        for shape in ((2, 16, depth), (2, depth, 8), (2, 16, 8))
    )
    of_a, of_b = torch.zeros(8, 64, each, dtype=dtype), torch.zeros(4, 64, each, dtype=dtype)
    of_c, of_d = torch.zeros(4, 64), torch.zeros(4, 64)
    width = depth // 2
    for warp, lane in itertools.product(range(2), range(32)):
        g, t, at = lane // 4, lane % 4, 32 * warp + lane
        for i, j in itertools.product(range(4), range(each)):
            of_a[i, at, j] = a[warp, g + 8 * (i % 2), t * each + j + width * (i // 2)]
        for i, j in itertools.product(range(2), range(each)):
            of_b[i, at, j] = b[warp, t * each + j + width * i, g]
        for i in range(4):
            of_c[i, at] = c[warp, g + 8 * (i // 2), 2 * t + i % 2]
    loads = "".join(
        f"ld.global.b32 {{ %r{base + i} }}, [ %rd{10 + n} + {256 * i} ];"
        for n, (base, count) in enumerate(((20, 4), (30, 2), (40, 4)))
        for i in range(count)
    )
    stores = "".join(f"st.global.b32 [ %rd13 + {256 * i} ], {{ %r{50 + i} }};" for i in range(4))
    body = f"""{loads}
        {opcode} {{ %r50, %r51, %r52, %r53 }}, {{ %r20, %r21, %r22, %r23 }}, {{ %r30, %r31 }},
            {{ %r40, %r41, %r42, %r43 }};
        {stores}"""
    if kind == "tf32":
        # Bits that tf32 does not have mean nothing.
        of_a.view(torch.int32).bitwise_or_(0x1FFF)
    lanes(body, of_a, of_b, of_c, of_d, threads=64)
    d = a @ b + c
    for warp, lane, i in itertools.product(range(2), range(32), range(4)):
        g, t = lane // 4, lane % 4
        assert of_d[i, 32 * warp + lane] == d[warp, g + 8 * (i // 2), 2 * t + i % 2]


@pytest.mark.parametrize(
    ("kind", "parts"), [("b32", ("rs", "rs")), ("b64", ("r", "r")), ("b64", ("rs",) * 4)]
)
def test_parts_of_registers(kind, parts):
    """mov with braces: the first part is the lowest."""
    whole = "%r20" if kind == "b32" else "%rd20"
    bits = oracle.width(kind)
    names = [f"%{p}{40 + i}" for i, p in enumerate(parts)]
    x, y = (torch.arange(32 * bits // 8, dtype=torch.uint8) for _ in range(2))
    y.zero_()
    body = f"""
        mul.wide.u32 %rd9, %r0, {bits // 8}; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
        ld.global.{kind} {{ {whole} }}, [ %rd10 + 0 ];
        mov.{kind} {{{", ".join(names)}}}, {whole};
        mov.{kind} {{_, {", ".join(x.replace("4", "5") for x in names[1:])}}}, {whole};
        mov.{kind} {whole}, {{{", ".join(names[::-1])}}};
        st.global.{kind} [ %rd11 + 0 ], {{ {whole} }};"""
    run(body, {"x": x, "y": y})
    assert torch.equal(y.view(32, len(parts), -1), x.view(32, len(parts), -1).flip(1))


@pytest.mark.parametrize(
    "opcode", [x for x in SPECIAL if x.startswith("cp.async.c") and "shared" in x]
)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies(opcode, size):
    """What was waited for is there; a thread that copies zero bytes gets zeros."""
    x = torch.arange(32 * size, dtype=torch.int32).to(torch.uint8)
    y = torch.zeros_like(x)
    vector, held = {
        4: ("", "%r40"),
        8: (".v2", "%r40, %r41"),
        16: (".v4", "%r40, %r41, %r42, %r43"),
    }[size]
    body = f"""
        mul.wide.u32 %rd9, %r0, {size}; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
        cvt.u32.u64 %r9, %rd9; setp.ne.b32 %p1, %r0, 3; selp.b32 %r8, {size}, 0, %p1;
        {opcode} [ %r9 + 0 ], [ %rd10 + 0 ], {size:#x}, %r8;
        cp.async.commit_group;
        cp.async.wait_group 0;
        ld.shared{vector}.b32 {{ {held} }}, [%r9];
        st.global{vector}.b32 [ %rd11 + 0 ], {{ {held} }};"""
    run(body, {"x": x, "y": y}, shared=32 * size)
    x.view(32, size)[3] = 0
    assert torch.equal(x, y)


def test_waiting_leaves_later_copies_pending():
    body = """
        shl.b32 %r9, %r0, 2;
        cp.async.ca.shared.global [ %r9 + 0 ], [ %rd10 + 0 ], 0x4;
        cp.async.commit_group;
        cp.async.ca.shared.global [ %r9 + 128 ], [ %rd10 + 0 ], 0x4;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r20, [%r9+{}];
        st.global.b32 [ %rd11 + 0 ], {{ %r20 }};"""
    y = int32([0] * 32)
    lanes(body.format(0), int32(range(32)), y, shared=256)
    assert y.tolist() == list(range(32))
    with pytest.raises(
        PtxError, match=r"ld\.shared\.b32 %r20, \[%r9\+128\].*cp\.async still copies"
    ):
        lanes(body.format(128), int32(range(32)), y, shared=256)


def test_branches():
    """Warps may go different ways, each its own number of times."""
    x = int32([0] * 128)
    body = """
        shr.u32 %r20, %r0, 5; mov.b32 %r21, 0;
        setp.eq.b32 %p1, %r20, 0;
        @%p1 bra $L_end;
        $L_loop:
        add.s32 %r21, %r21, 10; sub.s32 %r20, %r20, 1;
        setp.gt.s32 %p2, %r20, 0;
        @%p2 bra $L_loop;
        bra.uni $L_end;
        $L_end:
        st.global.b32 [ %rd10 + 0 ], { %r21 };
        setp.lt.u32 %p3, %r0, 64;
        @%p3 ret;
        st.global.b32 [ %rd10 + 0 ], { 7 };"""
    body = body.replace("{ 7 }", "{ %r0 }")
    lanes(body, x, threads=128)
    assert x.view(4, 32)[:2].tolist() == [[0] * 32, [10] * 32]
    assert x[64:].tolist() == list(range(64, 128))


def test_every_special_instruction_has_a_test():
    tested = {
        x for x in SPECIAL if x.startswith(("ld.", "st.", "shfl", "redux", "ldmatrix", "mma"))
    }
    tested |= {"bra", "bra.uni", "ret", "bar.sync", "bar.warp.sync", "mov.b32", "mov.b64"}
    tested |= {x for x in SPECIAL if x.startswith("cp.async") or "add.f32" in x}
    # In test_warpgroups.
    tested |= {x for x in SPECIAL if x.startswith(("stmatrix", "wgmma", "fence.proxy"))}
    assert tested == set(SPECIAL)
