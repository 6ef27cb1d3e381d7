"""Safetensors files: checked headers, and writing one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from glazoo.errors import ConversionError

__all__ = ["NewTensor", "Shard", "TensorInfo", "read_shard", "write_shard"]

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
_MAX_HEADER = 100_000_000
"""Longest header that the format allows, in bytes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file whose header was read and agrees with the file's size."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def read_shard(path: Path) -> Shard:
    """Reads and checks a file's header; tensors are not read.

    Raises:
        ConversionError: it is missing, truncated, or its header is damaged.
    """
    name = path.name
    if not path.is_file():
        raise ConversionError(f"{name}: the shard is missing from {path.parent}")
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or 8 + length > size:
            if len(head) == 8 and length > _MAX_HEADER:
                raise ConversionError(f"{name}: not a safetensors file")
            raise ConversionError(
                f"{name}: the shard is truncated inside its header ({size} bytes)"
            )
        if length > _MAX_HEADER:
            raise ConversionError(f"{name}: not a safetensors file")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        entries = sorted((_entry(key, e) for key, e in header.items()), key=lambda e: (e[1], e[2]))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConversionError(f"{name}: the header is damaged") from e
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for key, first, last, dtype, shape in entries:
        nbytes = last - first
        bits = _BITS.get(dtype)
        # Offsets must tile the data without holes: anything else is a damaged file, or one that
        # hides something.
        fits = bits is None or nbytes * 8 == bits * math.prod(shape)
        if first != end or nbytes < 0 or min(shape, default=0) < 0 or not fits:
            raise ConversionError(f"{name}: the header is damaged at tensor {key}")
        tensors[key] = TensorInfo(dtype, shape, nbytes)
        end = last
    promised = 8 + length + end
    if size < promised:
        raise ConversionError(
            f"{name}: the shard is truncated, {size} bytes of the {promised} that its header "
            "promises"
        )
    if size > promised:
        raise ConversionError(f"{name}: {size - promised} bytes follow the last tensor")
    return Shard(path, tensors, metadata, size)


def _entry(key: str, e: dict[str, Any]) -> tuple[str, int, int, str, tuple[int, ...]]:
    first, last = map(int, e["data_offsets"])
    return key, first, last, str(e["dtype"]), tuple(int(d) for d in e["shape"])


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A float32 tensor to be written, made only when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return 4 * math.prod(self.shape)


def write_shard(f: BinaryIO, tensors: Iterable[NewTensor]) -> None:
    """Writes float32 tensors as a safetensors file, holding one of them in memory at a time."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        end = offset + t.nbytes
        header[t.name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    f.write(struct.pack("<Q", len(raw)))
    f.write(raw)
    for t in tensors:
        value = t.make()
        assert tuple(value.shape) == t.shape
        f.write(value.contiguous().numpy().astype("<f4", copy=False).tobytes())
