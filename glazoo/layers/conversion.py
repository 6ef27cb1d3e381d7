"""Metaplastic forms of live modules, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from glazoo.layers.attention import GatedLinearAttention
from glazoo.layers.plasticity import refused_plasticity
from glazoo.spec import SpecError

__all__ = ["layers_of", "metaplasticize", "set_plasticity"]

M = TypeVar("M", bound=nn.Module)


def layers_of(module: nn.Module) -> dict[str, GatedLinearAttention]:
    """Gives the gated linear attention layers of a module by name; the module may be one itself."""
    return {n: m for n, m in module.named_modules() if isinstance(m, GatedLinearAttention)}


def metaplasticize(
    module: M,
    *,
    plasticity: float = 0.0,
    gate: Literal["head", "value"] | None = None,
    gain: Literal["first_order", "exact"] | None = None,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
) -> M:
    """Turns a layer, or the layers of a model, into their metaplastic form, in place.

        J_t = a_t J_{t-1} + b_t k_t^2 ;   b_t = kappa r_t 2 sigmoid(b_up b_down x_t)

    with r_t the write gate or, for the exact gain, the precision whose rate it is. With kappa = 0
    and the prior at one the module computes what it did before; the gradient of kappa is alive
    there. Checkpoints of other families: `glazoo.converters`.

    Args:
        module: a `GatedLinearAttention`, or a module that holds some, such as `GlazooForCausalLM`,
            whose configuration then names the new specs.
        plasticity: kappa, from 0 to 1; a Hebbian layer accepts more.
        gate: shape of the importance gate, as in `glazoo.metaplasticize`.
        gain: learning rate of a delta rule, as in `glazoo.metaplasticize`.
        rank: rank of the gate's projection. Default: a sixteenth of the width, at most 128.
        layers: indices of the layers to convert. Default: all that are not metaplastic.

    Returns:
        The module itself.

    Raises:
        SpecError: no layer can be converted, or a chosen one is metaplastic already.
        ValueError: an argument is out of its domain.

    Reference: arXiv:2602.09075.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank}, accepted are integers >= 1")
    found = list(layers_of(module).values())
    if not found:
        raise SpecError(f"module: this {type(module).__name__} has no GatedLinearAttention layer")
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
    _check_plasticity(chosen, plasticity)
    for layer in chosen:
        layer.metaplasticize_(plasticity=plasticity, gate=gate, gain=gain, rank=rank)
    for m in module.modules():
        # Models keep the specs of their layers in their configuration.
        update = getattr(m, "update_specs", None)
        if callable(update):
            update()
    return module


def set_plasticity(module: M, plasticity: float) -> M:
    """Sets kappa of every layer that was made metaplastic, in place; gives the module back.

    Args:
        module: a layer or a model.
        plasticity: kappa, from 0, the source, to 1, the full Bayesian form; Hebbian layers accept
            more.

    Raises:
        SpecError: no layer has the factor.
        ValueError: `plasticity` is out of its domain.
    """
    chosen = [
        m
        for m in layers_of(module).values()
        if m.importance is not None
        and m.importance.scale is not None
        and m.importance.spec.scale.parameterization == "clamp"
    ]
    if not chosen:
        raise SpecError("module: no layer was made metaplastic from another")
    _check_plasticity(chosen, plasticity)
    with torch.no_grad():
        for layer in chosen:
            assert layer.importance is not None
            assert layer.importance.scale is not None
            layer.importance.scale.fill_(plasticity)
    return module


def _check_plasticity(layers: Sequence[GatedLinearAttention], plasticity: float) -> None:
    for layer in layers:
        if reason := refused_plasticity(layer.spec, plasticity):
            raise ValueError(reason)
