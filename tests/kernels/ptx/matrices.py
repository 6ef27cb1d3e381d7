"""Where the numbers of a matrix are: in the registers of a warp, or in shared memory.

wgmma reads shared memory by a descriptor of 64 bits: where a matrix begins, two strides, and by how
many bytes its rows are swizzled. `places` says where the 16 bytes are that it describes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .memory import Array
from .text import PtxError

# Of a descriptor's last two bits, the bytes of a swizzled row; 0 is no swizzle.
SWIZZLES = (0, 128, 64, 32)
# Bits that have to be zero, among them the offset of patterns that begin at no multiple of theirs.
RESERVED = 0x3FFFC000C000C000
CHUNK = 16


def fragments(registers: list[Array], rows: int, columns: int, each: int) -> Array:
    """Matrices [warps, rows, columns] of registers that hold `each` columns of a row.

    Lane 4 i + j holds row i and columns j * each ..; registers go down by 8 rows, then right by
    4 * each columns.
    """
    down, right = rows // 8, columns // (4 * each)
    whole = np.stack(registers).reshape(right, down, -1, 8, 4, each)
    return whole.transpose(2, 1, 3, 0, 4, 5).reshape(-1, rows, columns)


def sums(registers: list[Array]) -> Array:
    """Matrices [warps, 16, columns] of the registers of an accumulator, each a float32."""
    whole = np.stack(registers).reshape(-1, 2, 2, registers[0].size // 32, 8, 4)
    return whole.transpose(3, 1, 4, 0, 5, 2).reshape(whole.shape[3], 16, -1)


def split(matrices: Array) -> Array:
    """The registers of accumulators, of their matrices: what `sums` takes."""
    whole = matrices.reshape(-1, 2, 8, matrices.shape[2] // 8, 4, 2)
    found = whole.transpose(3, 1, 5, 0, 2, 4).reshape(matrices.shape[2] // 2, -1)
    return np.ascontiguousarray(found)


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """Where a matrix begins, how far apart parts of it are, and bytes of a swizzled row."""

    start: Array
    leading: Array
    stride: Array
    swizzle: Array


def decode(bits: Array) -> Descriptor:
    """The parts of descriptors."""
    if (bits & bits.dtype.type(RESERVED)).any():
        raise PtxError("unknown descriptor: bits that must be zero are not")

    def field(at: int) -> Array:
        return ((bits >> bits.dtype.type(at)) & bits.dtype.type(0x3FFF)).astype(np.int64) * CHUNK

    swizzle = np.array(SWIZZLES)[(bits >> bits.dtype.type(62)).astype(np.int64)]
    return Descriptor(field(0), field(16), field(32), swizzle)


def places(bits: Array, rows: int, *, major: bool) -> Array:
    """Addresses of the chunks of 16 bytes of matrices of 32 bytes a row, [matrices, chunks].

    The canonical layouts of wgmma: swizzled ones repeat every 8 rows of `swizzle` bytes.

    Args:
        bits: descriptors.
        rows: of the matrix, M or N.
        major: whether entries of one row lie side by side (K-major), two chunks a row; otherwise
            those of 8 rows do, of 16-bit numbers, and the chunks are those of all rows for one
            column after the other.
    """
    of = decode(bits)
    start, leading, stride, width = (
        x[:, None, None] for x in (of.start, of.leading, of.stride, of.swizzle)
    )
    plain = width == 0
    if major:
        row, part = np.arange(rows)[:, None], np.arange(2)
        found = np.where(plain, part * leading + row % 8 * CHUNK, part * CHUNK + row % 8 * width)
        found = start + found + row // 8 * stride
    else:
        column, part = np.arange(16)[:, None], np.arange(rows // 8)
        across = np.maximum(width // CHUNK, 1)
        found = np.where(
            plain,
            part * stride + column % 8 * CHUNK + column // 8 * leading,
            part % across * CHUNK
            + part // across * leading
            + column % 8 * width
            + column // 8 * stride,
        )
        found = start + found
    # The bits from 7 on, as many as a row has chunks, turn those from 4 on.
    turn = (found >> 7) & np.maximum(width // CHUNK - 1, 0)
    return (found ^ turn * CHUNK).reshape(bits.size, -1)
