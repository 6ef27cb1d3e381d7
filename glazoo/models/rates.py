"""A learning rate of its own for the plasticity of importance gates."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import Trainer

from glazoo.layers.plasticity import PLASTICITY

__all__ = ["RateTrainer", "apart", "check_rate"]


def check_rate(rate: float) -> None:
    """Checks a plasticity rate.

    Raises:
        ValueError: it is not a number in [0, 1000].
    """
    if not (math.isfinite(rate) and 0 <= rate <= 1000):
        raise ValueError(f"plasticity_rate: got {rate}, accepted are numbers in [0, 1000]")


def apart(model: nn.Module, groups: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """Moves the plasticities out of an optimizer's parameter groups into groups of their own, which
    are like those that they come from but for the learning rate, times `rate`.

    Args:
        model: whose parameters are in the groups.
        groups: parameter groups with their learning rates.
        rate: share of the learning rate.

    Returns:
        The groups, those of the plasticities last.
    """
    own = {id(p) for n, p in model.named_parameters() if n.endswith(PLASTICITY)}
    rest: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    for group in groups:
        for chosen, out in ((False, rest), (True, moved)):
            params = [p for p in group["params"] if (id(p) in own) is chosen]
            changes = {"lr": group["lr"] * rate} if chosen else {}
            if params:
                out.append(group | changes | {"params": params})
    return [*rest, *moved]


class RateTrainer(Trainer):
    """A Trainer that gives the plasticity a share of the learning rate, `plasticity_rate`."""

    plasticity_rate = 1.0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the optimizer."""
        fresh = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if fresh and self.plasticity_rate != 1:
            assert self.model is not None
            groups = apart(self.model, optimizer.param_groups, self.plasticity_rate)
            optimizer.param_groups[:] = groups
        return optimizer
