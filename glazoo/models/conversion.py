"""Converting a live model in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack

import torch
from torch import nn

from glazoo.errors import ConversionError
from glazoo.families import Family, LiveFamily, families, find_family
from glazoo.families.mixer import MetaplasticMixer
from glazoo.layers import GatedLinearAttention, gates
from glazoo.models.metaplastic import convert_in_place
from glazoo.spec import Counterpart
from glazoo.versions import installed, untested

__all__ = ["metaplasticize_mixers", "set_impl", "source_limit"]

M = TypeVar("M", bound=nn.Module)


def metaplasticize_mixers(
    model: M,
    *,
    plasticity: float = 0.0,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    impl: str = "auto",
    **form: Unpack[Counterpart],
) -> M:
    """Turns a model whose mixers call a known scan function into its metaplastic form, in place:
    what `glazoo.metaplasticize`, which says more, does with models that are not built from specs.

    Args:
        model: a supported model.
        plasticity: kappa.
        rank: rank of the gate's projection.
        layers: indices of the layers to convert; default all that can be.
        seed: seed of the gate's inner projection.
        impl: engine of the scan, as in `glazoo.attention`.
        form: which metaplastic form, as `glazoo.metaplasticize` names it.

    Returns:
        The model itself.

    Raises:
        ConversionError: the model has no mixer that calls a known scan function, is converted
            already, or an argument is out of its domain.
    """
    family = _family_of(model)
    config: Any = model.config
    found = family.examine(model)
    settings = family.settings(
        config,
        type(model).__name__,
        found,
        plasticity=plasticity,
        rank=rank,
        layers=layers,
        seed=seed,
        **form,
    )
    for what in untested(installed(("transformers",))).values():
        warnings.warn(what, stacklevel=2)
    convert_in_place(model, family, settings, found)
    return set_impl(model, impl)


def _family_of(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    if config is None:
        raise ConversionError(
            f"model: got {type(model).__name__}, expected a layer of any spec, or a model in "
            "transformers' conventions"
        )
    if next(gates(model), None) is not None:
        raise ConversionError(f"model: this {type(model).__name__} is converted already")
    cls, model_type = type(model), getattr(config, "model_type", None)
    # Copies that compute in float64 have a longer name than the family's module, and are no others.
    known = families().get(model_type) if isinstance(model_type, str) else None
    if known is not None and cls.__module__.startswith(known.modeling):
        return known
    if cls.__module__.startswith("transformers.models."):
        family = find_family(model_type)
        raise ConversionError(
            f"model: this {cls.__name__} comes from {cls.__module__}, and its model_type "
            f"{model_type!r} is that of {family.modeling}"
        )
    return LiveFamily(model)


def set_impl(model: M, impl: str) -> M:
    """Chooses the engine of a metaplastic model's recurrences, as `impl` of `glazoo.attention`;
    gives the model back."""
    for module in model.modules():
        if isinstance(module, MetaplasticMixer):
            module.metaplastic_impl = impl
        elif isinstance(module, GatedLinearAttention):
            module.impl = impl
    return model


@contextmanager
def source_limit(model: nn.Module) -> Iterator[None]:
    """Holds a converted model at its source inside a `with` block: kappa = 0 and I_p = 1, restored
    afterwards."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for gate in (gate for _, gate in gates(model) if gate.added):
            for held in (gate.b_scale, gate.ip_log):
                assert held is not None
                kept.append((held, held.detach().clone()))
                held.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
