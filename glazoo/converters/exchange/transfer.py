"""Moving weights through key maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.converters.exchange.maps import KINDS, Entry, KeyMap, Live, Options, read
from glazoo.errors import ConversionError
from glazoo.layers import GatedLinearAttention
from glazoo.layers.parts import TokenShift, rotated_size, wide_dtype
from glazoo.spec import Spec
from glazoo.zoo import load as load_spec

__all__ = [
    "apart",
    "dump",
    "from_mixer",
    "joined",
    "kind_of",
    "load",
    "spec_of",
    "split",
    "translated",
]


def kind_of(mixer: nn.Module) -> str:
    """Return the kind of a mixer by its class.

    Raises:
        ConversionError: there is no map for it.
    """
    cls = type(mixer)
    for base in cls.__mro__:
        for m in KINDS.values():
            package, _, name = m.table.get("mixer", ".").rpartition(".")
            if base.__name__ == name and f"{base.__module__}.".startswith(f"{package}."):
                return m.kind
    raise ConversionError(
        f"mixer: got {cls.__module__}.{cls.__name__}, accepted are the mixers of {', '.join(KINDS)}"
    )


def from_mixer(
    mixer: nn.Module, *, kind: str | None = None, **options: Any
) -> GatedLinearAttention:
    """Builds our layer with the weights and options of a mixer of another package.

    Args:
        mixer: a live mixer, such as transformers' `Mamba2Mixer`.
        kind: which map to use. Default: by the mixer's class.
        **options: further arguments of `GatedLinearAttention`, such as `layer_idx` or `impl`.

    Returns:
        A `GatedLinearAttention` that computes what the mixer computes, in the mixer's dtype.

    Raises:
        ConversionError: there is no map, the mixer has an option that our layer does not, or a
            tensor has no place on the other side.
    """
    m = _map(kind_of(mixer) if kind is None else kind)
    found = read(m.table, Live(mixer))
    index = getattr(mixer, "layer_idx", None)
    given: dict[str, Any] = {"layer_idx": index or 0} | found.sizes | options
    layer = GatedLinearAttention(spec_of(m, found), **given)
    first = next(mixer.parameters())
    matrix = next((p for p in mixer.parameters() if p.ndim == 2), first)
    layer.to(device=matrix.device, dtype=matrix.dtype)
    load(layer, mixer.state_dict(), m.kind)
    return layer.train(mixer.training)


def load(layer: GatedLinearAttention, state: Mapping[str, Tensor], kind: str) -> None:
    """Copies the tensors of a mixer of another package into our layer.

    Args:
        layer: a layer of the sizes of the mixer.
        state: the mixer's state dict.
        kind: which map to use; `KINDS` lists them.

    Raises:
        ConversionError: a tensor of either side has no place on the other, or a wrong shape.
    """
    ours = layer.state_dict()
    with torch.no_grad():
        for key, value in translated(layer, state, kind).items():
            ours[key].copy_(value)


def translated(
    layer: GatedLinearAttention, state: Mapping[str, Tensor], kind: str, *, where: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a mixer of another package under our layer's names.

    Args:
        layer: a layer of the sizes of the mixer; its tensors may have no data.
        state: the mixer's state dict.
        kind: which map to use; `KINDS` lists them.
        where: what messages put in front of the mixer's names.

    Returns:
        One tensor for each of the layer's, as views where possible, in the dtype that it came in.

    Raises:
        ConversionError: a tensor of either side has no place on the other, or a wrong shape.
    """
    m = _map(kind)
    ours = apart(layer)
    unmapped = sorted(set(state) - {e.theirs for e in m.entries})
    if unmapped:
        raise ConversionError(f"{kind}: no place for {', '.join(where + n for n in unmapped)}")
    found: dict[str, Tensor] = {}
    for entry in m.entries:
        if entry.theirs in state:
            if again := sorted(set(entry.ours) & set(found)):
                raise ConversionError(
                    f"{kind}: {where}{entry.theirs} is a second tensor for our {again[0]}"
                )
            if entry.spare and not set(entry.ours) & set(ours):
                continue
            n = _groups(entry, layer)
            found |= split(entry, state[entry.theirs], ours, f"{kind}: {where}", n)
        elif not entry.optional:
            raise ConversionError(f"{kind}: {where}{entry.theirs} is missing")
    found |= _starts(m, layer, wide_dtype(*state.values()))
    if absent := sorted(set(ours) - set(found)):
        wanted = [e for e in m.entries if set(e.ours) & set(absent)]
        if not wanted:
            raise ConversionError(f"{kind}: nothing for our {', '.join(absent)}")
        raise ConversionError(f"{kind}: {where}{wanted[0].theirs} is missing")
    for name in m.table.get("pairs", "").split():
        found[name] = _in_halves(found[name], name, layer)
    return joined(layer, found)


def dump(layer: GatedLinearAttention, kind: str) -> dict[str, Tensor]:
    """Return our layer's tensors as the state dict of a mixer of another package.

    Args:
        layer: a layer.
        kind: which map to use.

    Returns:
        Tensors by their names, in the dtypes that our layer keeps.

    Raises:
        ConversionError: a tensor of ours has no place on the other side.
    """
    m = _map(kind)
    if "pairs" in m.table or any(e.flat or e.map for e in m.entries):
        raise ConversionError(f"{kind}: tensors of ours cannot be given back in its layout")
    ours = apart(layer)
    for key, start in _starts(m, layer, torch.float64).items():
        if torch.equal(ours[key], start.to(ours[key])):
            del ours[key]
    unmapped = sorted(set(ours) - {key for e in m.entries for key in e.ours})
    if unmapped:
        raise ConversionError(f"{kind}: no place for our {', '.join(unmapped)}")
    state: dict[str, Tensor] = {}
    given: set[str] = set()
    for entry in m.entries:
        if given.issuperset(entry.ours) or not (entry.beside is None or entry.beside in ours):
            continue
        missing = [key for key in entry.ours if key not in ours]
        if missing and not entry.optional:
            raise ConversionError(f"{kind}: our layer has no {', '.join(missing)}")
        if not missing:
            given |= set(entry.ours)
            state[entry.theirs] = _stack(entry, [ours[key] for key in entry.ours], layer)
    return state


def _map(kind: str) -> KeyMap:
    if kind not in KINDS:
        raise ConversionError(f"kind: got {kind!r}, accepted are {', '.join(KINDS)}")
    return KINDS[kind]


def _starts(m: KeyMap, layer: GatedLinearAttention, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is an option on their side, which the spec has taken, as our tensors."""
    gate, names = layer.metaplastic, m.table.get("starts", "").split()
    if gate is None:
        return {}
    return {name: gate.start(name.rpartition(".")[2], dtype) for name in names}


def _in_halves(x: Tensor, name: str, layer: GatedLinearAttention) -> Tensor:
    """Moves rotated key channels from neighbouring pairs to half a rotation apart."""
    size, axis = layer.keys, 0 if name.endswith("proj.weight") else -1
    turned = rotated_size(layer.spec.layer.q, size)
    order = [*range(0, turned, 2), *range(1, turned, 2), *range(turned, size)]
    parts = x.unflatten(axis, (-1, size))
    at = torch.tensor(order, device=x.device)
    turned_parts: Tensor = parts.index_select(axis + 1 if axis == 0 else -1, at)
    return turned_parts.reshape(x.shape)


def _log_minus_log(decay: Tensor) -> Tensor:
    # In float64, and away from 0 and 1, whose logarithms would be infinite.
    exact = decay.double().clamp(min=1e-30, max=1 - 2**-25)
    return exact.log().neg().log().to(decay.dtype)


_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    # In float32 or wider, as those weights are kept.
    "one_minus": lambda x: 1 - x.to(wide_dtype(x)),
    "log_minus_log": _log_minus_log,
}


def _groups(entry: Entry, layer: GatedLinearAttention) -> int:
    return layer.sizes.key_heads if entry.groups == "key_heads" else 1


def _stack(entry: Entry, parts: list[Tensor], layer: GatedLinearAttention) -> Tensor:
    n = _groups(entry, layer)
    stacked = torch.cat([p.unflatten(0, (n, -1)) for p in parts], 1).flatten(0, 1)
    return stacked if entry.shape is None else stacked.reshape(entry.shape)


def apart(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors by name; what a token shift keeps in one, apart for every use."""
    state: dict[str, Tensor] = module.state_dict()
    for name, uses in _shared(module):
        if name in state:
            parts = state.pop(name).chunk(len(uses))
            state |= {f"{name}.{use}": x for use, x in zip(uses, parts, strict=True)}
    return state


def joined(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names of a module, of those that `apart` gives."""
    out = dict(found)
    for name, uses in _shared(module):
        parts = [out.pop(f"{name}.{use}", None) for use in uses]
        if all(x is not None for x in parts) and parts:
            out[name] = torch.cat([x for x in parts if x is not None])
    return out


def _shared(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    for path, shift in module.named_modules():
        if isinstance(shift, TokenShift):
            for name in ("mix", "down.weight", "mix_up"):
                yield f"{path}.{name}", shift.uses


def split(
    entry: Entry, theirs: Tensor, ours: Mapping[str, Tensor], where: str, groups: int = 1
) -> dict[str, Tensor]:
    """Return a tensor of theirs as ours, by their names.

    Args:
        entry: its row of a table.
        theirs: their tensor.
        ours: shapes of ours, as `apart` gives them.
        where: what messages put in front of their name.
        groups: groups of rows, within which it is stacked.

    Raises:
        ConversionError: it has no place, or a wrong shape.
    """
    if missing := [key for key in entry.ours if key not in ours]:
        raise ConversionError(f"{where}{entry.theirs} goes to our {', '.join(missing)}, absent")
    shapes = [ours[key].shape for key in entry.ours]
    rows = sum(s[0] for s in shapes)
    expected = torch.Size((rows, *shapes[0][1:]))
    flat = theirs.mT if entry.transposed and theirs.ndim > 1 else theirs
    free = entry.flat or (entry.shape is not None and theirs.ndim == len(entry.shape))
    if free and theirs.numel() == expected.numel():
        flat = flat.reshape(expected)
    if flat.shape != expected:
        wanted = expected[::-1] if entry.transposed and len(expected) == 2 else expected
        raise ConversionError(
            f"{where}{entry.theirs} has shape {list(theirs.shape)}, expected {list(wanted)}"
        )
    if entry.map is not None:
        flat = _MAPS[entry.map](flat)
    parts = flat.unflatten(0, (groups, -1)).split([s[0] // groups for s in shapes], 1)
    return {key: part.flatten(0, 1) for key, part in zip(entry.ours, parts, strict=True)}


def spec_of(m: KeyMap, found: Options) -> Spec:
    """Return the spec that a mixer follows: that of its map, with the values that its options
    change."""
    data = load_spec(m.table["spec"]).model_dump()
    for path, value in found.changes.items():
        *parents, leaf = path.split(".")
        at = data
        for part in parents:
            at = at[part]
        at[leaf] = value
    return Spec.model_validate(data)
