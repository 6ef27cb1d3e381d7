"""Axes of importance from a text: the directions that the keys of a model live on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glazoo.converters.files import Progress
from glazoo.errors import ConversionError
from glazoo.layers import ImportanceGate
from glazoo.layers.conversion import metaplastic_layers
from glazoo.layers.plasticity import Observation

__all__ = [
    "Axes",
    "calibrate",
    "directions",
    "key_moments",
    "neglected",
    "observed",
    "save_keys",
    "turn",
]

LENGTH = 512
"""Tokens that a model reads at once."""


@dataclass(frozen=True, slots=True)
class Axes:
    """What a change of axes does to the keys of one layer, means over its key heads."""

    layer: int
    before: float
    """Share of |E[k k^T]|^2 off the diagonal, which an importance per key neglects, along the keys'
    own axes."""
    after: float
    """The same along the new axes, on the part of the text that these do not come from."""
    directions: float
    """Participation ratio (tr M)^2 / |M|^2 of M = E[k k^T]: how many directions keys live on."""
    keys: int
    """Key channels, K."""


def observed(model: nn.Module, ids: Int[Tensor, "T"]) -> Iterator[Observation]:
    """Run a metaplastic model over a text, piece by piece, and give what each layer did."""
    layers: list[Any] = [layer for layer, _, _ in metaplastic_layers(model)]
    seen: list[Observation] = []
    training, device = model.training, next(model.parameters()).device
    model.eval()
    for layer in layers:
        layer.observer = seen.append
    try:
        for piece in ids.split(LENGTH):
            with torch.no_grad():
                model(piece[None].to(device), use_cache=False)
            yield from seen
            seen.clear()
    finally:
        for layer in layers:
            layer.observer = None
        model.train(training)


def key_moments(
    model: nn.Module, ids: Int[Tensor, "T"], read: Callable[[int], object] = int
) -> dict[int, Float[Tensor, "H K K"]]:
    """Return E[k k^T] of every layer and key head, in float64, keys as the recurrence takes them.

    Args:
        model: a metaplastic model, in memory.
        ids: token ids of a text, read once, 512 at a time.
        read: called with the number of tokens that each layer has read.
    """
    total: dict[int, Tensor] = {}
    count: dict[int, int] = {}
    for seen in observed(model, ids):
        k = seen.keys.double().flatten(0, 1)
        moment = torch.einsum("thi,thj->hij", k, k).cpu()
        total[seen.layer] = total.get(seen.layer, 0) + moment
        count[seen.layer] = count.get(seen.layer, 0) + len(k)
        read(count[seen.layer])
    return {layer: x / count[layer] for layer, x in total.items()}


def save_keys(model: nn.Module, ids: Int[Tensor, "T"], file: Path) -> None:
    """Writes the keys of every metaplastic layer over a text, for `glazoo capacity --keys FILE`.

    Args:
        model: a metaplastic model, in memory.
        ids: token ids of a text, read 512 at a time.
        file: an .npz file of `layer_N`, [T, H, K], float16, keys as the recurrence takes them, in
            the axes of the model's source.
    """
    found: dict[str, list[Tensor]] = {}
    for seen in observed(model, ids):
        found.setdefault(f"layer_{seen.layer}", []).append(seen.keys[0].half().cpu())
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            arrays: dict[str, Any] = {n: torch.cat(x).numpy() for n, x in found.items()}
            np.savez_compressed(handle, **arrays)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def calibrate(
    model: nn.Module, ids: Int[Tensor, "T"], progress: Progress | None = None
) -> tuple[Axes, ...]:
    """Turns the axes of every rotated importance to the eigenvectors of E[k k^T], in place.

    Along them, the off-diagonal part of sum b k k^T that one importance per key neglects is as
    small as it can be where keys live on few directions that all texts share. Where they fill the
    space, and what they share changes from context to context, the keys' own axes may be better:
    measure. At kappa = 0 no axes change what a model computes.

    Args:
        model: a metaplastic model with `basis = "rotated"`, in memory.
        ids: token ids of a text; its first half gives the axes, its second half measures them.
        progress: called as `progress("axes of importance", done_bytes, total_bytes)`, of the ids.

    Returns:
        What the axes do to the keys, by layer.

    Raises:
        ConversionError: no layer has axes, or the text is shorter than two tokens.
    """
    gates = {gate.layer: gate for _, gate, _ in metaplastic_layers(model) if gate.axes is not None}
    if not gates:
        raise ConversionError(
            'model: no layer has axes of importance; convert with basis="rotated"'
        )
    if len(ids) < 2:
        raise ConversionError(f"ids: got {len(ids)} tokens, expected at least 2")
    half = len(ids) // 2

    def read(before: int) -> Callable[[int], object]:
        size = ids.element_size()
        if progress is None:
            return int
        return lambda n: progress("axes of importance", size * (before + n), size * len(ids))

    found = key_moments(model, ids[:half], read(0))
    held_out = key_moments(model, ids[half:], read(half))
    return tuple(_turned(gates[layer], found[layer], held_out[layer]) for layer in sorted(gates))


@torch.no_grad()
def turn(gate: ImportanceGate, moment: Float[Tensor, "H K K"]) -> Float[Tensor, "H K K"]:
    """Turns the axes of a rotated importance to the eigenvectors of a moment of its keys, in place.

    Args:
        gate: of a layer with `basis = "rotated"`.
        moment: E[k k^T] of every key head.

    Returns:
        The axes, columns, the largest eigenvalue first.
    """
    assert gate.axes is not None
    assert gate.turn is not None
    basis: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(-1)
    gate.axes.copy_(basis)
    gate.turn.zero_()
    return basis


def _turned(gate: ImportanceGate, moment: Tensor, held_out: Tensor) -> Axes:
    basis = turn(gate, moment).cpu()
    return Axes(
        layer=gate.layer,
        before=float(neglected(held_out).mean()),
        after=float(neglected(basis.mT @ held_out @ basis).mean()),
        directions=float(directions(held_out).mean()),
        keys=moment.shape[-1],
    )


def directions(moment: Float[Tensor, "*H K K"]) -> Float[Tensor, "*H"]:
    """Return the participation ratio (tr M)^2 / |M|^2 of M = E[k k^T]: how many directions keys
    live on."""
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.square() / moment.square().sum((-2, -1)).clamp(min=1e-300)


def neglected(moment: Float[Tensor, "*H K K"]) -> Float[Tensor, "*H"]:
    """Return the share of |M|^2 off the diagonal, which an importance per key neglects."""
    kept = moment.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    return 1 - kept / moment.square().sum((-2, -1)).clamp(min=1e-300)
