"""What one instruction computes on one thread, in Python's integers and fractions.

Written from the description of the instruction set, apart from `semantics`. Operands and results
are bit patterns.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import struct
from collections.abc import Callable
from fractions import Fraction

# Bits of exponent and mantissa.
FLOATS = {"f32": (8, 23), "bf16": (8, 7), "f16": (5, 10), "f64": (11, 52)}
NAN = math.nan


def width(kind: str) -> int:
    """Bits of a type."""
    if kind == "pred":
        return 1
    return 32 if kind in ("f16x2", "bf16x2", "tf32") else int(kind.lstrip("usbf"))


def signed(x: int, kind: str) -> int:
    """The integer that a pattern of a type means."""
    bits = width(kind)
    return x - (1 << bits) if kind[0] == "s" and x >> (bits - 1) else x


def wrap(x: int, kind: str) -> int:
    return x % (1 << width(kind))


def decode(x: int, kind: str) -> float:
    """The number that a float's pattern means."""
    exponent, mantissa = FLOATS[kind]
    sign = -1.0 if x >> (exponent + mantissa) else 1.0
    e, m = (x >> mantissa) % (1 << exponent), x % (1 << mantissa)
    bias = (1 << (exponent - 1)) - 1
    if e == (1 << exponent) - 1:
        return NAN if m else sign * math.inf
    if e == 0:
        return sign * math.ldexp(m, 1 - bias - mantissa)
    return sign * math.ldexp(m + (1 << mantissa), e - bias - mantissa)


def encode(x: float | Fraction, kind: str, zero: float = 0.0) -> int:
    """The nearest float's pattern, ties to even; `zero` has the sign of an exact zero."""
    exponent, mantissa = FLOATS[kind]
    top = (1 << exponent) - 1
    if isinstance(x, float) and math.isnan(x):
        return (top << mantissa) | ((1 << mantissa) - 1)
    if x == 0:
        zero = x if isinstance(x, float) else zero
        return int(math.copysign(1, zero) < 0) << (exponent + mantissa)
    sign = int(x < 0) << (exponent + mantissa)
    if isinstance(x, float) and math.isinf(x):
        return sign | (top << mantissa)
    exact, bias = abs(Fraction(x)), (1 << (exponent - 1)) - 1
    power = exact.numerator.bit_length() - exact.denominator.bit_length()
    power -= exact < Fraction(2) ** power
    power = max(power, 1 - bias)
    # round() takes a tie to the even neighbour; a carry runs into the exponent as it should.
    units = round(exact / Fraction(2) ** (power - mantissa))
    pattern = units + ((power + bias - 1) << mantissa)
    return sign | min(pattern, top << mantissa)


def flushed(x: float) -> float:
    """A subnormal float32 as zero."""
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def _ieee(function: Callable[[Fraction, ...], Fraction], *xs: float) -> float | Fraction:
    """A rational function, exact where all operands are finite."""
    if all(map(math.isfinite, xs)):
        return function(*map(Fraction, xs))
    return function(*xs)


@dataclasses.dataclass(frozen=True)
class Near:
    """A result that an approximate instruction may miss by a relative error."""

    value: float
    error: float


def _integer(name: str, kind: str, xs: list[int]) -> int:
    a, b, c = (signed(x, kind) for x in (*xs, 0, 0)[:3])
    bits = width(kind)
    if name in ("div", "rem"):
        # By zero: all ones.
        quotient = abs(a) // abs(b) if b else 1
        quotient = quotient if b and (a < 0) == (b < 0) else -quotient
        return quotient if name == "div" else a - quotient * b
    if name == "shr":
        return a >> min(xs[1], bits)
    if name == "bfe":
        position, length = xs[1] % 256, xs[2] % 256
        end = bits - 1
        sign = (xs[0] >> min(position + length - 1, end)) & 1 if length else 0
        fill = sign if kind[0] == "s" else 0
        return sum(
            ((xs[0] >> (position + i)) & 1 if i < length and position + i <= end else fill) << i
            for i in range(bits)
        )
    return {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul.lo": lambda: a * b,
        "mul.hi": lambda: (a * b) >> bits,
        "mad.lo": lambda: a * b + c,
        "min": lambda: min(a, b),
        "max": lambda: max(a, b),
        "neg": lambda: -a,
        "abs": lambda: abs(a),
    }[name]()


def _compare(name: str, a: float, b: float) -> bool:
    return {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }[name]


def _float(name: str, kind: str, xs: list[int]) -> int | Near:
    a, b, c = (decode(x, kind) for x in (*xs, 0, 0)[:3])
    sign = 1 << (width(kind) - 1)
    if name == "neg":
        return xs[0] ^ sign
    if name == "abs":
        return xs[0] & ~sign
    if name in ("min", "max"):
        if math.isnan(a) or math.isnan(b):
            return xs[1] if math.isnan(a) else xs[0]
        # Zeros by sign: ordered as integers are.
        order = [(x, math.copysign(1, x)) for x in (a, b)]
        first = (order[0] < order[1]) == (name == "min")
        return xs[0] if first else xs[1]
    if name == "fma":
        exact = _ieee(lambda x, y, z: x * y + z, a, b, c)
        product_negative = math.copysign(1, a) * math.copysign(1, b)
        zero = 0.0 if product_negative > 0 or math.copysign(1, c) > 0 else -0.0
        return encode(exact, kind, zero)
    exact = _ieee({"add": operator.add, "sub": operator.sub, "mul": operator.mul}[name], a, b)
    zero = {"add": a + b, "sub": a - b, "mul": math.copysign(1, a) * math.copysign(1, b) * 0.0}
    return encode(exact, kind, zero[name])


def _flushed_bits(x: int) -> int:
    """A float32 whose exponent is zero as a zero of its sign."""
    return x if x >> 23 & 255 else x & 1 << 31


def _approximate(name: str, ftz: bool, xs: list[int]) -> Near:
    a, b = (decode(x, "f32") for x in (*xs, 0)[:2])
    a = flushed(a) if ftz else a
    if name == "ex2":
        value = a if math.isnan(a) else 2.0 ** min(max(a, -200.0), 200.0)
        error = 2.0**-22
    elif name == "rcp":
        value, error = (1 / a if a else math.copysign(math.inf, a)), 2.0**-23
    else:
        if b == 0:
            odd = math.isnan(a) or a == 0 or math.isnan(b)
            value = NAN if odd else math.copysign(math.inf, a) * math.copysign(1, b)
        else:
            value = a / b
        error = 2.0**-22
    return Near(flushed(value) if ftz else value, error)


def _convert(rounding: list[str], to: str, source: str, xs: list[int]) -> int:
    if to in ("bf16x2", "f16x2"):
        high, low = (encode(decode(x, "f32"), to[:-2]) for x in xs)
        return high << 16 | low
    x = xs[0]
    if to == "tf32":
        value = decode(x, "f32")
        if not math.isfinite(value):
            return x
        return (x + (1 << 12)) & ~((1 << 13) - 1)
    if source[0] in "us":
        whole = signed(x, source)
        return encode(Fraction(whole), to) if to in FLOATS else wrap(whole, to)
    value = decode(x, source)
    if to in FLOATS:
        whole = {"rmi": math.floor, "rpi": math.ceil, "rni": round, "rzi": math.trunc}
        if to == source and math.isfinite(value):
            value = flushed(value) if "ftz" in rounding else value
            return encode(Fraction(whole[rounding[0]](value)), to, value)
        return encode(value, to)
    bits = width(to)
    low, high = (0, (1 << bits) - 1) if to[0] == "u" else (-(1 << bits - 1), (1 << bits - 1) - 1)
    if math.isnan(value):
        return 0
    return wrap(int(min(max(math.trunc(value) if math.isfinite(value) else value, low), high)), to)


def evaluate(opcode: str, operands: tuple[str, ...], result: str, xs: list[int]) -> int | Near:
    """The result of an opcode on bit patterns of the operands' types."""
    name, *modifiers, kind = opcode.split(".")
    if name in ("mul", "mad") and modifiers and modifiers[0] in ("lo", "hi", "wide"):
        name = f"{name}.{modifiers[0]}"
    if name in ("mul.wide", "mad.wide"):
        product = signed(xs[0], kind) * signed(xs[1], kind)
        return wrap(product + (xs[2] if len(xs) > 2 else 0), result)
    if name == "setp":
        compare = modifiers[0]
        if kind == "f32":
            a, b = (decode(x, kind) for x in xs)
            nan = math.isnan(a) or math.isnan(b)
            if compare in ("nan", "num"):
                return int(nan == (compare == "nan"))
            if nan:
                return int(len(compare) == 3)
            return int(_compare(compare[:2], a, b))
        return int(_compare(compare, signed(xs[0], kind), signed(xs[1], kind)))
    if name == "selp":
        return xs[0] if xs[2] else xs[1]
    if name == "mov":
        return xs[0]
    if name == "shl":
        return wrap(xs[0] << min(xs[1], width(kind)), kind)
    if name in ("and", "or", "xor"):
        return {"and": xs[0] & xs[1], "or": xs[0] | xs[1], "xor": xs[0] ^ xs[1]}[name]
    if name == "not":
        return wrap(~xs[0], kind)
    if name == "prmt":
        eight = struct.pack("<II", xs[0], xs[1])
        found = []
        for i in range(4):
            digit = xs[2] >> (4 * i) & 15
            byte = eight[digit & 7]
            found.append((255 if byte >> 7 else 0) if digit & 8 else byte)
        return int.from_bytes(bytes(found), "little")
    if name == "cvt":
        # cvt(.rounding)(.ftz).to.from
        *rounding, to = modifiers
        return _convert(rounding, to, kind, xs)
    if name in ("ex2", "rcp") or (name == "div" and kind == "f32"):
        return _approximate(name, "ftz" in modifiers, xs)
    if kind in ("bf16x2", "f16x2"):
        half = kind.removesuffix("x2")
        pairs = [_float(name, half, [x >> shift & 0xFFFF for x in xs]) for shift in (0, 16)]
        return pairs[1] << 16 | pairs[0]
    if kind in FLOATS and "ftz" in modifiers:
        found = _float(name, kind, [_flushed_bits(x) for x in xs])
        assert isinstance(found, int)
        return _flushed_bits(found)
    if kind in FLOATS:
        return _float(name, kind, xs)
    return wrap(_integer(name, kind, xs), result)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What a matrix descriptor of wgmma says, in bytes."""

    start: int
    leading: int
    stride: int
    swizzle: int

    def encoded(self) -> int:
        """The 64 bits."""
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        return self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | mode << 62


def place(matrix: Matrix, row: int, column: int, item: int, transposed: bool) -> int:
    """Where an entry of a matrix is whose rows, or columns if transposed, lie along memory.

    Matrices are made of cores of 8 lines of 16 bytes. Without a swizzle a core's lines follow each
    other; with one, lines are as long as the swizzle and hold several cores' side by side.
    """
    along, across = (row, column) if transposed else (column, row)
    core, byte = divmod(along * item, 16)
    line, group = across % 8, across // 8
    if not matrix.swizzle:
        # The strides change places: leading is always that along K.
        steps = (matrix.stride, matrix.leading) if transposed else (matrix.leading, matrix.stride)
        return matrix.start + core * steps[0] + group * steps[1] + line * 16 + byte
    block, core = divmod(core, matrix.swizzle // 16)
    assert transposed or not block
    at = matrix.start + block * matrix.leading + group * matrix.stride
    at += line * matrix.swizzle + core * 16
    # Of 128 bytes, bits 7 to 9 turn bits 4 to 6; of 64, two bits; of 32, one.
    for i in range({128: 3, 64: 2, 32: 1}[matrix.swizzle]):
        at ^= (at >> (7 + i) & 1) << (4 + i)
    return at + byte
