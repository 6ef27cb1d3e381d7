"""Converting a live model in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from glazoo.converters.errors import ConversionError
from glazoo.converters.families import Family, LiveFamily, families, find_family
from glazoo.converters.gate import ImportanceGate
from glazoo.converters.settings import Settings
from glazoo.versions import installed, untested

__all__ = ["gates", "metaplasticize_model", "set_impl", "source_limit"]


def metaplasticize_model(
    model: nn.Module,
    plasticity: float = 0.0,
    *,
    gate: str | None = None,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    gain: str | None = None,
    impl: str = "auto",
) -> nn.Module:
    """Turns a causal language model into its metaplastic counterpart, in place.

        b_t = kappa r_t 2 sigmoid(b_up b_down h_t) ;
        kappa = `plasticity`, b_up = 0, I_p = 1 at the start

    with r_t the write gate or, for the exact gain, the precision whose rate it is.

    At kappa = 0 the model computes what it did before, up to the rounding of the scan, and the
    gates can be trained at once. Parameters keep their identity, tied weights stay tied;
    `save_pretrained` writes a folder that `AutoModelForCausalLM.from_pretrained` loads after
    `import glazoo.models`. A model of a class that is not transformers' own,
    flash-linear-attention's for example, converts in memory only: its `save_pretrained` refuses.

    Args:
        model: a supported model, `transformers.Mamba2ForCausalLM` for example.
        plasticity: kappa, from 0 to 1; sources that subtract no prediction accept more.
        gate: "head", the default, for one importance vector over keys per head; "value" for one
            importance per synapse.
        rank: rank of the importance gate's projection; default a sixteenth of the hidden size, at
            most 128.
        layers: indices of the layers to convert; default all that can be.
        seed: seed of the gate's inner projection.
        gain: learning rate of a delta rule: "first_order", beta k / I, or "exact", that of the
            posterior for the precision beta / (1 - beta k.k). Both are the source at kappa = 0.
            Default: "exact" where the family has it.
        impl: engine of the scan, as in `glazoo.attention`.

    Returns:
        The model itself.

    Raises:
        ConversionError: the model has no mixer that calls a known scan function, is converted
            already, or an argument is out of its domain.

    Reference: arXiv:2602.09075, MetaMamba2.
    """
    from glazoo.models.metaplastic import convert_in_place

    family = _family_of(model)
    config = model.config
    found = family.examine(model)
    settings = Settings.make(
        base_model_type=family.model_type,
        base_architectures=(type(model).__name__,),
        spec=family.source_spec(config, found),
        hidden_size=next(iter(found.values())).hidden,
        convertible=tuple(found),
        plasticity=plasticity,
        gate=gate,
        rank=rank,
        layers=layers,
        seed=seed,
        gain=gain,
        no_exact_gain=family.no_exact_gain(config, found),
    )
    for what in untested(installed(("transformers",))).values():
        warnings.warn(what, stacklevel=2)
    convert_in_place(model, family, settings, found)
    return set_impl(model, impl)


def _family_of(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    if config is None:
        raise ConversionError(f"model: got {type(model).__name__}, expected a transformers model")
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


def gates(model: nn.Module) -> Iterator[tuple[str, ImportanceGate]]:
    """Gives the importance gates of a converted model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, ImportanceGate):
            yield name, module


def set_impl(model: nn.Module, impl: str) -> nn.Module:
    """Chooses the engine of a converted model's scans, as `impl` of `glazoo.attention`; gives the
    model back."""
    for module in model.modules():
        if isinstance(getattr(module, "metaplastic", None), ImportanceGate):
            module.metaplastic_impl = impl  # type: ignore[assignment]
    return model


@contextmanager
def source_limit(model: nn.Module) -> Iterator[None]:
    """Holds a converted model at its source inside a `with` block: kappa = 0 and I_p = 1, restored
    afterwards."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for _, gate in gates(model):
            for held in (gate.b_scale, gate.ip_log):
                kept.append((held, held.detach().clone()))
                held.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
