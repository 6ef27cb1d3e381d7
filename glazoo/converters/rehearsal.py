"""Trying a conversion on one mixer of each kind, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glazoo.errors import ConversionError
from glazoo.families import Family, Found
from glazoo.families.settings import Settings
from glazoo.models.conversion import source_limit
from glazoo.models.metaplastic import convert_mixer

__all__ = ["rehearse"]

_TOKENS = 37


def rehearse(
    model: nn.Module, family: Family, settings: Settings, found: Mapping[int, Found]
) -> None:
    """Run one mixer of each kind with random weights, as it is and converted with kappa = 0.

    What a scan function is said to compute is what mixers expect of it: nobody has to have tried
    the model before. It takes the memory of one mixer.

    Args:
        model: the source, without data.
        family: its family.
        settings: what to convert.
        found: its mixers by layer.

    Raises:
        ConversionError: the two differ by more than rounding.
    """
    spec = settings.metaplastic_spec(family.source_spec(model.config, found))
    mixers, seen = family.mixers(model), set()
    for layer in settings.layers:
        mixer, sizes = mixers[layer], found[layer]
        kind = replace(sizes, path="", layer=0)
        # Mixers without a known call have a forward pass of ours, and tests of their own.
        if kind in seen or not family.calls(mixer):
            continue
        seen.add(kind)
        source = _with_data(mixer)
        converted = copy.deepcopy(source)
        convert_mixer(converted, family, settings, spec, sizes)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, _TOKENS, sizes.hidden, generator=generator)
        expected = _output(source, x)
        who = f"{sizes.mixer} (layer {layer})"
        try:
            with source_limit(converted):
                got = _output(converted, x)
        except (ValueError, RuntimeError) as e:
            raise ConversionError(f"{who} does not run when it is converted: {e}") from e
        # Both are sums over tokens and key channels, in any order.
        budget = torch.finfo(x.dtype).eps * _TOKENS * sizes.key * float(expected.abs().max())
        off = float((got - expected).abs().max())
        if not off <= budget:
            raise ConversionError(
                f"{who} does with {', '.join(sizes.calls)} what glazoo does not know: converted, "
                f"with random weights, its output is off by {off:.3g}, where rounding allows "
                f"{budget:.3g}; nothing was written"
            )


def _with_data(mixer: nn.Module) -> nn.Module:
    made = copy.deepcopy(mixer).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
            else:
                p.uniform_(0.1, 1, generator=generator)
        for buffer in made.buffers():
            buffer.fill_(0.5 if buffer.is_floating_point() else 0)
    return made


@torch.no_grad()
def _output(mixer: nn.Module, x: Tensor) -> Tensor:
    output: Any = mixer(x)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
