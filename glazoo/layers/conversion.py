"""Metaplastic forms of layers of any spec, in place, and the gates that they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar, Unpack, cast

import torch
from torch import nn

from glazoo.layers.attention import GatedLinearAttention
from glazoo.layers.plasticity import ImportanceGate, default_rank, refused_plasticity
from glazoo.spec import Counterpart, Spec, SpecError, metaplasticize

__all__ = [
    "gates",
    "layers_of",
    "metaplastic_layers",
    "metaplasticize_layers",
    "set_plasticity",
    "update_configurations",
]

M = TypeVar("M", bound=nn.Module)


def layers_of(module: nn.Module) -> dict[str, GatedLinearAttention]:
    """Return the gated linear attention layers of a module by name; the module may be one
    itself."""
    return {n: m for n, m in module.named_modules() if isinstance(m, GatedLinearAttention)}


def gates(module: nn.Module) -> Iterator[tuple[str, ImportanceGate]]:
    """Return the importance gates of a metaplastic layer or model with their names."""
    for name, m in module.named_modules():
        if isinstance(m, ImportanceGate):
            yield name, m


def metaplastic_layers(module: nn.Module) -> Iterator[tuple[nn.Module, ImportanceGate, Spec]]:
    """Return the metaplastic layers of a model, our own or converted, each with gate and spec."""
    for m in module.modules():
        gate = getattr(m, "metaplastic", None)
        if isinstance(gate, ImportanceGate):
            spec = m.spec if isinstance(m, GatedLinearAttention) else m.metaplastic_spec
            yield m, gate, cast(Spec, spec)


def metaplasticize_layers(
    module: M,
    *,
    plasticity: float = 0.0,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    impl: str | None = None,
    **form: Unpack[Counterpart],
) -> M:
    """Turns the layers of a module into their metaplastic form, in place: what
    `glazoo.metaplasticize`, which says more, does with modules that hold layers of any spec.

    Args:
        module: a `GatedLinearAttention`, or a module that holds some.
        plasticity: kappa.
        rank: rank of the gate's projection.
        layers: indices of the layers to convert. Default: all that are not metaplastic.
        seed: seed of the gate's inner projection.
        impl: engine of the chosen layers. Default: as it is.
        form: which metaplastic form, as `glazoo.metaplasticize` names it.

    Returns:
        The module itself.

    Raises:
        SpecError: no layer can be converted, or a chosen one is metaplastic already.
        ValueError: an argument is out of its domain.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank}, accepted are integers >= 1")
    found = list(layers_of(module).values())
    if layers is None:
        chosen = [m for m in found if not m.spec.metaplastic]
        if not chosen:
            raise SpecError("module: all its layers are metaplastic already")
    else:
        known = {m.layer_idx for m in found}
        if strangers := sorted(set(layers) - known):
            raise ValueError(f"layers: got {strangers}, recurrent layers are {sorted(known)}")
        chosen = [m for m in found if m.layer_idx in set(layers)]
        if done := [m.layer_idx for m in chosen if m.spec.metaplastic]:
            raise SpecError(f"layers: {done} are metaplastic already")
    specs = [
        metaplasticize(m.spec, rank=rank or default_rank(m.sizes.hidden), **form) for m in chosen
    ]
    _check_plasticity(specs, plasticity)
    for layer, spec in zip(chosen, specs, strict=True):
        layer.metaplasticize_(spec, plasticity=plasticity, seed=seed)
        layer.impl = layer.impl if impl is None else impl
    update_configurations(module)
    return module


def update_configurations(module: nn.Module) -> None:
    """Takes the specs of layers that changed in place into the configurations of their models."""
    for m in module.modules():
        update = getattr(m, "update_specs", None)
        if callable(update):
            update()


def set_plasticity(module: M, plasticity: float) -> M:
    """Sets kappa of every layer that was made metaplastic, in place; gives the module back.

    Args:
        module: a layer or a model that `glazoo.metaplasticize` gave gates to.
        plasticity: kappa, from 0, the source, to 1, the full Bayesian form; Hebbian layers accept
            more.

    Raises:
        SpecError: no layer has the factor.
        ValueError: `plasticity` is out of its domain.
    """
    chosen = [(gate, spec) for _, gate, spec in metaplastic_layers(module) if gate.added]
    if not chosen:
        raise SpecError("module: no layer was made metaplastic from another")
    _check_plasticity([spec for _, spec in chosen], plasticity)
    with torch.no_grad():
        for gate, _ in chosen:
            assert gate.b_scale is not None
            gate.b_scale.fill_(plasticity)
    return module


def _check_plasticity(specs: Sequence[Spec], plasticity: float) -> None:
    for spec in specs:
        if reason := refused_plasticity(spec, plasticity):
            raise ValueError(reason)
