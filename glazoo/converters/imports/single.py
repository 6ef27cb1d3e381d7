"""Checkpoints that are one file: pickled state dicts, and files of rwkv.cpp."""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glazoo.errors import ConversionError, one_line

__all__ = ["read_pickle", "read_single"]

_GGMF = struct.pack("<i", 0x67676D66)
_PICKLES = (b"PK\x03\x04", b"\x80")


class _Form(NamedTuple):
    """How rwkv.cpp stores the numbers of a tensor: blocks of so many in so many bytes."""

    name: str
    numbers: int
    size: int
    read: Callable[[Tensor], Tensor]


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.view(dtype).float()


def _q5_1(blocks: Tensor) -> Tensor:
    """x = d q + m, with the low four bits of q in nibbles, of the first half first, and the fifth
    in a word of its own."""
    scales: Tensor = blocks[:, :4].contiguous().view(torch.float16).float()
    d, m = scales[:, :1], scales[:, 1:]
    place = torch.arange(32, dtype=torch.int64)
    word = blocks[:, 4:8].to(torch.int64) << torch.tensor([0, 8, 16, 24])
    fifth = (word.sum(1, keepdim=True) >> place) & 1
    low = torch.cat([blocks[:, 8:] & 15, blocks[:, 8:] >> 4], 1)
    return d * (low + 16 * fifth).float() + m


def _q8_0(blocks: Tensor) -> Tensor:
    """x = d q."""
    d: Tensor = blocks[:, :2].contiguous().view(torch.float16).float()
    return d * blocks[:, 2:].contiguous().view(torch.int8).float()


_FORMS = {
    0: _Form("float32", 1, 4, _plain(torch.float32)),
    1: _Form("float16", 1, 2, _plain(torch.float16)),
    8: _Form("Q5_1", 32, 24, _q5_1),
    9: _Form("Q8_0", 32, 34, _q8_0),
}


def read_single(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Reads the tensors of a file.

    Args:
        path: a state dict that `torch.save` wrote, or a file of rwkv.cpp.

    Returns:
        "pth" or "bin", and the tensors; those of rwkv.cpp, which computes in float32, as such.

    Raises:
        ConversionError: it is neither, cut off, or holds something else.
    """
    try:
        with path.open("rb") as f:
            start = f.read(4)
        if start == _GGMF:
            return "bin", _read_ggmf(path.name, path.read_bytes())
    except OSError as e:
        raise ConversionError(f"cannot read {one_line(e)}") from e
    if not start.startswith(_PICKLES):
        raise ConversionError(
            f"{path.name} is neither a PyTorch checkpoint nor a file of rwkv.cpp: it begins with "
            f"{start!r}. Accepted are files of torch.save (.pth) and of rwkv.cpp (.bin, magic ggmf)"
        )
    return "pth", read_pickle(path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Reads a pickled state dict, tensors only: a pickle may run code otherwise.

    Raises:
        ConversionError: it is cut off or damaged, or holds something else than tensors.
    """
    try:
        # Mapped: memory does not hold a copy. The form before zip files cannot be.
        with path.open("rb") as f:
            mapped = f.read(2) == b"PK"
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as e:
        named = re.search(r"GLOBAL (\S+)", str(e))
        raise ConversionError(
            f"cannot read {path.name}: it is damaged, or holds other objects than tensors"
            f"{f' ({named[1]})' if named else ''}, which are not loaded because they may run code. "
            "Accepted is a state dict: torch.save(model.state_dict(), FILE)"
        ) from e
    except Exception as e:
        raise ConversionError(
            f"cannot read {path.name}: it is cut off or damaged, fetch it again "
            f"({' '.join(str(e).split())})"
        ) from e
    if not isinstance(state, dict):
        raise ConversionError(
            f"{path.name} holds {type(state).__name__}, expected a state dict of tensors"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{path.name}: {key} holds {type(value).__name__}, expected a tensor; accepted is "
                "a state dict: torch.save(model.state_dict(), FILE)"
            )
    return state


def _read_ggmf(name: str, data: bytes) -> dict[str, Tensor]:
    at = 0

    def take(count: int, what: str) -> memoryview:
        nonlocal at
        if at + count > len(data):
            raise ConversionError(
                f"{name} is cut off: {what} needs {count:,} bytes, and {len(data) - at:,} are "
                "left; fetch it again"
            )
        at += count
        return memoryview(data)[at - count : at]

    def integers(count: int, what: str) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", take(4 * count, what))

    _, version, *_, kind = integers(6, "the header")
    if version not in (100, 101):
        raise ConversionError(f"{name} has version {version}, accepted are 100 and 101")
    accepted = ", ".join(f.name for f in _FORMS.values())
    out: dict[str, Tensor] = {}
    while at < len(data):
        dimensions, length, kind = integers(3, "the next tensor's header")
        if not (0 < dimensions <= 4 and 0 < length <= 4096):
            raise ConversionError(
                f"{name} is damaged: a tensor with {dimensions} dimensions and a name of {length} "
                "bytes; fetch it again"
            )
        sizes = integers(dimensions, "the next tensor's shape")
        key = bytes(take(length, "the next tensor's name")).decode("utf-8", "replace")
        if kind not in _FORMS:
            raise ConversionError(
                f"{name}: {key} is stored in rwkv.cpp's form {kind}, accepted are {accepted}; "
                "convert the model again in one of them"
            )
        form, count = _FORMS[kind], math.prod(sizes)
        if min(sizes) < 1 or count % form.numbers:
            raise ConversionError(f"{name} is damaged: {key} has shape {list(sizes[::-1])}")
        stored = take(count // form.numbers * form.size, key)
        blocks = torch.frombuffer(bytearray(stored), dtype=torch.uint8).view(-1, form.size)
        out[key] = form.read(blocks).reshape(sizes[::-1])
    return out
