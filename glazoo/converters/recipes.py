"""Named settings of `glazoo tune`, as benchmarks/conversion.py found them."""

from __future__ import annotations

from dataclasses import dataclass

from glazoo.errors import ConversionError

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained of a metaplastic model, at which rates, and for how long."""

    everything: bool
    """Whether every parameter is trained, or gates and priors only."""
    learning_rate: float | None
    """Peak rate of AdamW; None: that of the source's own training, which nothing but the user
    knows."""
    plasticity_rate: float
    """Share of it that the plasticity gets."""
    steps: int
    """Optimiser steps."""
    schedule: str
    """How the rate falls to zero, "linear" or "cosine"."""
    warmup: float
    """Share of the steps over which it rises before."""

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Return a recipe.

        Raises:
            ConversionError: there is none of this name.
        """
        if name not in RECIPES:
            raise ConversionError(f"recipe: got {name!r}, accepted are {', '.join(RECIPES)}")
        return RECIPES[name]


RECIPES = {
    "gates": Recipe(False, 1e-2, 1.0, 200, "linear", 0.0),
    "whole": Recipe(True, None, 10.0, 200, "cosine", 0.05),
}
"""`gates`: the source's weights stay as they are. `whole`: what every form was tuned with in
benchmarks/conversion.py; no candidate was better for forms of
Mamba2 on `records`, on a seed that is not reported."""
