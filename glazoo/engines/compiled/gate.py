"""The importance gate of a token of decoding in one compiled piece, whose tensors are so small that
an operation of PyTorch costs many times what it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glazoo.engines.compiled import loops
from glazoo.engines.compiled.host import NUMBERS, SMALL, lies_flat
from glazoo.spec import Importance

_TIES = {"write": 1, "precision": 2}
_CLAMPS = {"clamp": 1, "softplus": 2}


def importance_gate(
    spec: Importance,
    x: Tensor,
    write: Tensor | None,
    k: Tensor | None,
    parameters: Sequence[Tensor | None],
    most: float,
) -> Tensor | None:
    """Compute the gate of one token, [B, 1, HV] or [B, 1, HV, V].

    Args:
        spec: the importance.
        x: [B, 1, D], the layer's input.
        write: [B, 1, HV], or None for one.
        k: [B, 1, H, K].
        parameters: b_down, b_up, b_bias, b_scale.
        most: the largest precision.

    Returns:
        b; None for what the loop does not have: other devices, dtypes, gates or sizes.
    """
    down, up, bias, scale = parameters
    gate, dtype, tokens, width = spec.gate, x.dtype, x.shape[0], x.shape[2]
    tie = 0 if write is None else _TIES.get(gate.tie, 0)
    seen, keyed = write if tie else None, k if tie == 2 else None
    given = (x, down, up, bias, scale, seen, keyed)
    if up is None or scale is None or gate.source != "data" or dtype not in NUMBERS:
        return None
    for y in given:
        if y is not None and (y.dtype is not dtype or not y.is_cpu):
            return None
    heads, rank = scale.shape[0], 0 if down is None else down.shape[0]
    channels = up.shape[0] // heads
    if not 0 < tokens * (width * rank + up.numel()) <= SMALL:
        return None
    # Of an address the loop reads what these sizes say, whatever lies there.
    lead, read = (tokens, 1), up if down is None else down
    if read.shape[1] != width or (seen is not None and seen.shape != (*lead, heads)):
        return None
    if tie == 2 and (k is None or k.dim() != 4 or k.shape[:2] != lead or heads % k.shape[2]):
        return None
    heads_k, keys = (1, 0) if keyed is None else keyed.shape[2:]
    flat = [None if y is None else lies_flat(y, dtype) for y in given]
    value = (channels,) if gate.shape == "value" else ()
    b = torch.empty((tokens, 1, heads, *value), dtype=dtype, device="cpu")
    loops.importance_gate(
        *(0, tokens),
        tuple([0 if y is None else y.data_ptr() for y in (*flat, b)]),
        (tokens, width, rank, heads, channels, heads_k, keys),
        (tie, int(gate.parameterization == "softplus"), _CLAMPS[spec.scale.parameterization]),
        NUMBERS[dtype](gate.factor),
        NUMBERS[dtype](most),
    )
    return b
