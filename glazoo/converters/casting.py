"""Writing a checkpoint's tensors in another floating dtype, in blocks."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, get_args

import torch
from torch import Tensor

from glazoo.converters.spelling import as_stored, without_text_prefix
from glazoo.converters.tensors import Shard, TensorInfo
from glazoo.errors import ConversionError
from glazoo.families import Family

__all__ = ["Cast", "Dtype", "is_cast_of", "plan_cast", "with_dtype"]

Dtype = Literal["float32", "bfloat16", "float16"]

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_BLOCK = 1 << 19
"""Bytes that are read at a time."""


@dataclass(slots=True)
class Cast:
    """Which tensors become which dtype; and, once they are written, what that did."""

    dtype: Dtype
    targets: Mapping[str, str]
    """dtype of every tensor in the new files, as safetensors spell it."""
    kept: tuple[str, ...]
    """Floating tensors that stay wider than `dtype`."""
    largest: float = field(default=0.0)
    """Largest difference of a number from what it was."""

    def changes(self, shard: Shard) -> bool:
        """Return whether any tensor of a file gets another dtype."""
        return any(self.targets[key] != info.dtype for key, info in shard.tensors.items())

    def tensors(self, shard: Shard) -> dict[str, TensorInfo]:
        """Return the new header's entries, in the old order."""
        found = {}
        for key, info in shard.tensors.items():
            code = self.targets[key]
            size = info.nbytes
            if code != info.dtype:
                size = math.prod(info.shape) * _TORCH[code].itemsize
            found[key] = TensorInfo(code, info.shape, size)
        return found

    def header(self, shard: Shard) -> bytes:
        """Return the first bytes of the new file, up to its data."""
        entries: dict[str, object] = {}
        if shard.metadata:
            entries["__metadata__"] = dict(shard.metadata)
        offset = 0
        for key, info in self.tensors(shard).items():
            end = offset + info.nbytes
            entries[key] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        raw = json.dumps(entries, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    def size(self, shard: Shard) -> int:
        """Return the new file's length."""
        return len(self.header(shard)) + sum(t.nbytes for t in self.tensors(shard).values())

    def write(self, f: BinaryIO, shard: Shard) -> None:
        """Writes the new file.

        Raises:
            ConversionError: a number is too large for the dtype.
        """
        f.write(self.header(shard))
        with _one_thread():
            for key, info, block in _blocks(shard):
                code = self.targets[key]
                if code == info.dtype:
                    f.write(block)
                    continue
                old = _read(block, info.dtype)
                new = old.to(_TORCH[code])
                # In which both are exact, and so is what a number lost by rounding.
                wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
                change = new.to(wide) - old
                least, most = (float(x) for x in change.aminmax())
                worst_change = max(most, -least)
                if not math.isfinite(worst_change):
                    # Infinities and NaN stay what they are; what was finite has to stay so.
                    lost = old.isfinite() & ~new.isfinite()
                    worst_change = float(change.nan_to_num_(0.0, 0.0, 0.0).abs_().max())
                    if bool(lost.any()):
                        worst = float(old[lost].double().abs().max())
                        raise ConversionError(
                            f"{key} holds {worst:.4g}, which {self.dtype} cannot hold: the "
                            f"largest is {torch.finfo(_TORCH[code]).max:.4g}"
                        )
                self.largest = max(self.largest, worst_change)
                f.write(new.view(torch.uint8).numpy().data)


@contextmanager
def _one_thread() -> Iterator[None]:
    """On cores that other work has, threads that wait for each other take several times as long as
    one, which keeps up with the disk."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _blocks(shard: Shard) -> Iterator[tuple[str, TensorInfo, bytes]]:
    """Return the data of a file in order, in blocks of whole numbers."""
    with shard.path.open("rb") as f:
        f.seek(shard.size - shard.data_bytes)
        for key, info in shard.tensors.items():
            left = info.nbytes
            while left:
                block = f.read(min(left, _BLOCK))
                if not block:
                    raise ConversionError(f"{shard.path.name} changed while it was being read")
                left -= len(block)
                yield key, info, block


def _read(block: bytes, code: str) -> Tensor:
    return torch.frombuffer(bytearray(block), dtype=_TORCH[code])


def plan_cast(
    dtype: Dtype, shards: Sequence[Shard], family: Family, architecture: str, config: Any
) -> Cast:
    """Chooses the dtype of every tensor.

    A narrower dtype leaves alone what the family's own code keeps in float32, and what the
    checkpoint holds wider than most of it: somebody had a reason.

    Args:
        dtype: what is asked for.
        shards: the checkpoint's files.
        family: its family.
        architecture: the family's model class.
        config: the checkpoint's configuration.

    Raises:
        ConversionError: the dtype is unknown.
    """

    if dtype not in get_args(Dtype):
        raise ConversionError(
            f"dtype: got {dtype!r}, accepted are {', '.join(map(repr, get_args(Dtype)))}"
        )
    code = _CODES[dtype]
    wanted = _TORCH[code].itemsize
    names = _kept_by_family(dtype, family, architecture, config)
    held: dict[str, int] = {}
    for shard in shards:
        for info in shard.tensors.values():
            if info.dtype in _TORCH:
                held[info.dtype] = held.get(info.dtype, 0) + math.prod(info.shape)
    usual = _TORCH[max(held, key=lambda k: held[k])].itemsize if held else wanted
    targets: dict[str, str] = {}
    kept = []
    for shard in shards:
        for key, info in shard.tensors.items():
            targets[key] = info.dtype
            if info.dtype not in _TORCH:
                continue
            here = _TORCH[info.dtype].itemsize
            special = here > usual or without_text_prefix(family, key) in names
            if wanted < here and special:
                kept.append(key)
            else:
                targets[key] = code
    return Cast(dtype, targets, tuple(kept))


def _kept_by_family(dtype: Dtype, family: Family, architecture: str, config: Any) -> set[str]:
    """Return the tensors, by their names in files, that transformers keeps in float32 when it loads
    the model in a narrower dtype."""
    # Late, since that module imports this one.

    model: Any = family.build(architecture, config)
    patterns = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == "float16":
        patterns |= {*(model._keep_in_fp32_modules or ())}
    # As loaders match them: anywhere in a name of the model, which files may spell otherwise.
    kept = [re.compile(re.escape(n).replace(r"\*", ".*")) for n in patterns]
    state = {
        key: t.to(torch.float64 if any(n.search(key) for n in kept) else torch.float32)
        for key, t in model.state_dict().items()
    }
    found, _ = as_stored(model, state)
    marked = {key for key, t in found.items() if t.dtype == torch.float64}
    return {without_text_prefix(family, key) for key in marked}


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a configuration that names another dtype, in its parts too."""
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and (value is None or isinstance(value, str)):
            changed[key] = dtype
        elif key.endswith("_config") and isinstance(value, Mapping):
            parts = with_dtype(value, dtype)
            # Parts without a dtype follow the whole.
            changed[key] = {k: v for k, v in parts.items() if k in value}
    if "dtype" not in changed and "torch_dtype" not in changed:
        changed["dtype"] = dtype
    return changed


def is_cast_of(old: Sequence[Shard], new: Sequence[Shard], dtype: str) -> tuple[str | None, int]:
    """Compares two sets of files: every tensor of the first must be in the second, as it is or
    rounded once to `dtype`, bit for bit.

    Returns:
        The first tensor that differs, None if there is none; and how many were rounded.
    """
    homes = {key: shard for shard in new for key in shard.tensors}
    rounded = 0
    for shard in old:
        if strange := next((key for key in shard.tensors if key not in homes), None):
            return strange, rounded
        others: dict[str, Iterator[bytes]] = {}
        for key, info, block in _blocks(shard):
            home = homes[key]
            there = home.tensors[key]
            if there.shape != info.shape or there.dtype not in (info.dtype, _CODES[dtype]):
                return key, rounded
            if key not in others:
                rounded += there.dtype != info.dtype
                ratio = info.nbytes // max(1, there.nbytes), there.nbytes // max(1, info.nbytes)
                others[key] = _tensor(home, key, _BLOCK * max(1, ratio[1]) // max(1, ratio[0]))
            got = next(others[key], b"")
            if there.dtype != info.dtype:
                block = bytes(
                    _read(block, info.dtype).to(_TORCH[there.dtype]).view(torch.uint8).numpy()
                )
            if got != block:
                return key, rounded
    return None, rounded


def _tensor(shard: Shard, key: str, step: int) -> Iterator[bytes]:
    """Return one tensor's data in pieces."""
    start = shard.size - shard.data_bytes
    for name, info in shard.tensors.items():
        if name == key:
            break
        start += info.nbytes
    left = shard.tensors[key].nbytes
    with shard.path.open("rb") as f:
        f.seek(start)
        while left:
            block = f.read(min(left, step))
            if not block:
                return
            left -= len(block)
            yield block
