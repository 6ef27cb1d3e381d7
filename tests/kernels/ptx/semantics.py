"""What the instructions compute that work on each thread alone, on arrays of one entry a thread.

`OPERATIONS` holds every opcode in full: what it does not hold is unknown. Integers wrap. bfloat16
is uint16 here, and a pair of 16-bit floats uint32. Approximate instructions (rcp, ex2, div.full)
are computed to the last bit of float32, with the flushes of subnormal numbers that they document.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "pred": np.bool_,
        "b8": np.uint8,
        **dict.fromkeys(("b16", "u16", "bf16"), np.uint16),
        **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2", "tf32"), np.uint32),
        **dict.fromkeys(("b64", "u64"), np.uint64),
        "s16": np.int16,
        "s32": np.int32,
        "s64": np.int64,
        "f16": np.float16,
        "f32": np.float32,
        "f64": np.float64,
    }.items()
}
U16, U32, U64 = (DTYPES[x] for x in ("u16", "u32", "u64"))
F16, F32, F64 = (DTYPES[x] for x in ("f16", "f32", "f64"))
SIGNED = {"u16": "s16", "u32": "s32", "u64": "s64"}
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@dataclasses.dataclass(frozen=True)
class Operation:
    """Types of the result and of the operands, and the function between them."""

    result: str
    operands: tuple[str, ...]
    function: Callable[..., Array]


OPERATIONS: dict[str, Operation] = {}


def _add(opcode: str, result: str, operands: str, function: Callable[..., Array]) -> None:
    OPERATIONS[opcode] = Operation(result, tuple(operands.split()), function)


# Conversions between floats.


def from_bf16(x: Array) -> Array:
    """bfloat16 as float32."""
    return (x.astype(U32) << 16).view(F32)


def _round(x: Array, bits: int) -> Array:
    """The bits of a float, rounded to nearest even at `bits` from its end, which become zero."""
    one = x.dtype.itemsize * 8
    u = x.view(f"u{one // 8}")
    half = u.dtype.type(1 << (bits - 1))
    odd = (u >> u.dtype.type(bits)) & u.dtype.type(1)
    rounded = (u + (half - u.dtype.type(1)) + odd) & u.dtype.type((1 << one) - (1 << bits))
    return np.where(np.isnan(x), u, rounded)


def to_bf16(x: Array) -> Array:
    """float32 rounded to bfloat16; any NaN becomes the canonical one."""
    return np.where(np.isnan(x), U16.type(0x7FFF), (_round(x, 16) >> 16).astype(U16))


def to_tf32(x: Array) -> Array:
    """float32 rounded to tf32, ties away from zero."""
    u = x.view(U32)
    return np.where(np.isfinite(x), (u + U32.type(0x1000)) & U32.type(0xFFFFE000), u)


def _halves(x: Array) -> tuple[Array, Array]:
    return (x & U32.type(0xFFFF)).astype(U16), (x >> 16).astype(U16)


def _pack(low: Array, high: Array) -> Array:
    return low.view(U16).astype(U32) | (high.view(U16).astype(U32) << 16)


def flush(x: Array) -> Array:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


# Integers.


def _quotient(a: Array, b: Array) -> Array:
    """Toward zero; all ones where the divisor is zero, as hardware has it."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    up = (a % safe != 0) & ((a < 0) != (safe < 0))
    return np.where(b == 0, ~b, floor + up.astype(b.dtype))


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _high(wide: np.dtype[Any], bits: int) -> Callable[[Array, Array], Array]:
    def function(a: Array, b: Array) -> Array:
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)

    return function


def _wide(wide: np.dtype[Any]) -> Callable[..., Array]:
    def function(a: Array, b: Array, c: Array | None = None) -> Array:
        product = a.astype(wide) * b.astype(wide)
        return product if c is None else product + c

    return function


def _shift_left(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a << np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by < bits, shifted, a.dtype.type(0))


def _shift_right(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _extract(a: Array, position: Array, length: Array) -> Array:
    """A field of bits; beyond the last bit of `a` there are copies of its sign."""
    bits = a.dtype.itemsize * 8
    position, length = (np.minimum(x & U32.type(255), bits) for x in (position, length))
    # Up to the left end, which loses what is above, and back, which extends the sign.
    kept = np.minimum(position + length, bits) - position
    up, back = bits - (position + kept), bits - kept
    field = _shift_right(_shift_left(a, up), back)
    if a.dtype.kind == "i":
        # A field that begins beyond the end is all sign.
        field = np.where(position >= bits, a >> (bits - 1), field)
    return np.where(length == 0, a.dtype.type(0), field)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of the eight in b:a by four digits of the selector; digit + 8 copies the sign."""
    eight = a.astype(U64) | (b.astype(U64) << 32)
    found = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), U32)
    for i in range(4):
        digit = (selector >> (4 * i)) & U32.type(15)
        byte = ((eight >> ((digit & U32.type(7)).astype(U64) * 8)) & U64.type(255)).astype(U32)
        sign = (byte >> 7) * U32.type(255)
        found |= np.where(digit >= 8, sign, byte) << (8 * i)
    return found


# Floats.


def _fma(a: Array, b: Array, c: Array) -> Array:
    # A product of two float32 is exact in float64, so that only the sum is rounded twice.
    return np.add(np.multiply(a, b, dtype=F64), c, dtype=F64).astype(a.dtype)


def _fma_bf16(a: Array, b: Array, c: Array) -> Array:
    product, c = from_bf16(a).astype(F64) * from_bf16(b), from_bf16(c).astype(F64)
    total = product + c
    # What the sum lost decides ties: an even last bit becomes odd on the side of the loss.
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = (total.view(U64) & U64.type(1)) == 0
    odd = np.nextafter(total, np.copysign(np.inf, lost))
    exact = np.where(np.isfinite(total) & (lost != 0) & even, odd, total)
    # To whole units of the last place, which below the smallest normal number is always the same.
    place = np.maximum(np.frexp(exact)[1] - 1, -126) - 7
    return to_bf16(np.ldexp(np.rint(np.ldexp(exact, -place)), place).astype(F32))


def _pairwise(function: Callable[..., Array], view: np.dtype[Any]) -> Callable[..., Array]:
    """A function of 16-bit floats on pairs of them."""

    def of_pairs(*pairs: Array) -> Array:
        low, high = zip(*map(_halves, pairs), strict=True)
        return _pack(*(function(*(x.view(view) for x in half)) for half in (low, high)))

    return of_pairs


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _float_to(kind: np.dtype[Any], rounding: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """To an integer: NaN is 0, what is out of range its nearest end."""
    ends = np.iinfo(kind)

    def function(x: Array) -> Array:
        whole = rounding(x.astype(F64))
        inside = np.where((whole > ends.min) & (whole < ends.max), whole, 0).astype(kind)
        low = np.where(whole <= ends.min, kind.type(ends.min), inside)
        return np.where(whole >= ends.max, kind.type(ends.max), low)

    return function


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "rmi": np.floor,
    "rpi": np.ceil,
    "rni": np.rint,
    "rzi": np.trunc,
}

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
for kind in INTEGERS:
    bits = DTYPES[kind].itemsize * 8
    for name, function in {
        "add": np.add,
        "sub": np.subtract,
        "mul.lo": np.multiply,
        "min": np.minimum,
        "max": np.maximum,
        "div": _quotient,
        "rem": _remainder,
    }.items():
        _add(f"{name}.{kind}", kind, f"{kind} {kind}", function)
    _add(f"mad.lo.{kind}", kind, f"{kind} {kind} {kind}", lambda a, b, c: a * b + c)
    _add(f"shr.{kind}", kind, f"{kind} u32", _shift_right)
    if kind in WIDE:
        wide = WIDE[kind]
        _add(f"mul.wide.{kind}", wide, f"{kind} {kind}", _wide(DTYPES[wide]))
        _add(f"mad.wide.{kind}", wide, f"{kind} {kind} {wide}", _wide(DTYPES[wide]))
        _add(f"mul.hi.{kind}", kind, f"{kind} {kind}", _high(DTYPES[wide], bits))
    if kind in SIGNED.values():
        _add(f"neg.{kind}", kind, kind, np.negative)
        _add(f"abs.{kind}", kind, kind, np.abs)
    if bits > 16:
        _add(f"bfe.{kind}", kind, f"{kind} u32 u32", _extract)
for kind in ("b16", "b32", "b64", "pred"):
    for name, function in {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }.items():
        _add(f"{name}.{kind}", kind, f"{kind} {kind}", function)
    _add(f"not.{kind}", kind, kind, np.invert)
    if kind != "pred":
        _add(f"shl.{kind}", kind, f"{kind} u32", _shift_left)
for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "pred"):
    _add(f"mov.{kind}", kind, kind, lambda a: a)
    if kind != "pred":
        _add(f"selp.{kind}", kind, f"{kind} {kind} pred", _select)
_add("prmt.b32", "b32", "b32 b32 b32", _permute)

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for kind, (name, function) in itertools.product(
    (*INTEGERS, "b16", "b32", "b64"), COMPARISONS.items()
):
    if kind[0] != "b" or name in ("eq", "ne"):
        _add(f"setp.{name}.{kind}", "pred", f"{kind} {kind}", function)


def _unordered(compare: Callable[..., Array], if_nan: bool) -> Callable[[Array, Array], Array]:
    def function(a: Array, b: Array) -> Array:
        nan = np.isnan(a) | np.isnan(b)
        return compare(a, b) | nan if if_nan else compare(a, b) & ~nan

    return function


for name, function in COMPARISONS.items():
    _add(f"setp.{name}.f32", "pred", "f32 f32", _unordered(function, False))
    _add(f"setp.{name}u.f32", "pred", "f32 f32", _unordered(function, True))
_add("setp.nan.f32", "pred", "f32 f32", lambda a, b: np.isnan(a) | np.isnan(b))
_add("setp.num.f32", "pred", "f32 f32", lambda a, b: ~(np.isnan(a) | np.isnan(b)))

for rounding in ("", ".rn"):
    _add(f"add{rounding}.f32", "f32", "f32 f32", np.add)
    _add(f"sub{rounding}.f32", "f32", "f32 f32", np.subtract)
    _add(f"mul{rounding}.f32", "f32", "f32 f32", np.multiply)
_add("fma.rn.f32", "f32", "f32 f32 f32", _fma)
_add("fma.rn.ftz.f32", "f32", "f32 f32 f32", lambda *x: flush(_fma(*map(flush, x))))


def _least(a: Array, b: Array) -> Array:
    """Of a number and a NaN the number, of two zeros the negative one."""
    least = np.fmin(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), least)


_add("min.f32", "f32", "f32 f32", _least)
_add("max.f32", "f32", "f32 f32", lambda a, b: -_least(-a, -b))
_add("neg.f32", "f32", "f32", np.negative)
_add("abs.f32", "f32", "f32", np.abs)
_add("neg.bf16", "bf16", "bf16", lambda a: a ^ U16.type(0x8000))
_add("neg.f16", "f16", "f16", np.negative)
_add("neg.bf16x2", "bf16x2", "bf16x2", lambda a: a ^ np.uint32(0x80008000))
# In bfloat16 too, and with its signs of zeros: 1, -1, -0.
for name, function in {
    "add": lambda a, b: _fma_bf16(a, np.full_like(a, 0x3F80), b),
    "sub": lambda a, b: _fma_bf16(b, np.full_like(b, 0xBF80), a),
    "mul": lambda a, b: _fma_bf16(a, b, np.full_like(a, 0x8000)),
}.items():
    _add(f"{name}.bf16", "bf16", "bf16 bf16", function)
    _add(f"{name}.bf16x2", "bf16x2", "bf16x2 bf16x2", _pairwise(function, U16))
_add("fma.rn.bf16", "bf16", "bf16 bf16 bf16", _fma_bf16)
_add("fma.rn.bf16x2", "bf16x2", "bf16x2 bf16x2 bf16x2", _pairwise(_fma_bf16, U16))
for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
    _add(f"{name}.f16", "f16", "f16 f16", function)
    _add(f"{name}.f16x2", "f16x2", "f16x2 f16x2", _pairwise(function, F16))
_add("div.full.f32", "f32", "f32 f32", np.divide)
_add("div.rn.f32", "f32", "f32 f32", np.divide)
_add("ex2.approx.f32", "f32", "f32", np.exp2)
_add("ex2.approx.ftz.f32", "f32", "f32", lambda a: flush(np.exp2(flush(a))))
_add("rcp.approx.ftz.f32", "f32", "f32", lambda a: flush(F32.type(1) / flush(a)))

for source, kind in itertools.product(INTEGERS, INTEGERS):
    if source != kind:
        _add(f"cvt.{kind}.{source}", kind, source, lambda a, to=DTYPES[kind]: a.astype(to))
for kind in INTEGERS:
    _add(f"cvt.rn.f32.{kind}", "f32", kind, lambda a: a.astype(F32))
    _add(f"cvt.rzi.{kind}.f32", kind, "f32", _float_to(DTYPES[kind], np.trunc))
for name, function in ROUNDINGS.items():
    _add(f"cvt.{name}.f32.f32", "f32", "f32", function)
    _add(f"cvt.{name}.ftz.f32.f32", "f32", "f32", lambda a, f=function: f(flush(a)))
_add("cvt.f32.bf16", "f32", "bf16", from_bf16)
_add("cvt.f32.f16", "f32", "f16", lambda a: a.astype(F32))
_add("cvt.rn.bf16.f32", "bf16", "f32", to_bf16)
_add("cvt.rn.f16.f32", "f16", "f32", lambda a: a.astype(F16))
_add("cvt.rna.tf32.f32", "tf32", "f32", to_tf32)
# The first operand is the upper half.
_add("cvt.rn.bf16x2.f32", "bf16x2", "f32 f32", lambda a, b: _pack(to_bf16(b), to_bf16(a)))
_add("cvt.rn.f16x2.f32", "f16x2", "f32 f32", lambda a, b: _pack(b.astype(F16), a.astype(F16)))
