"""Keeping weight decay off parameters whose zero means something else than nothing.

Decay pulls a parameter to zero. For gates, priors and decay rates that is a particular memory, not
a smaller one: `A_log` = 0 forgets at a fixed rate, `ip_log` = 0 is the prior 1, and a plasticity of
0 is the source.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn

__all__ = ["no_weight_decay", "teach_trainer"]

_RATES = ("A_log",)
"""What mixers of other packages call their own parameters of that kind."""


def no_weight_decay(model: nn.Module) -> Iterator[str]:
    """Return the names of the parameters that no weight decay should act on, beside the biases and
    norms that every trainer knows: those that a module's `no_weight_decay` claims as a whole, and
    the decay rates of converted mixers."""
    for prefix, module in model.named_modules():
        where = f"{prefix}." if prefix else ""
        if getattr(module, "no_weight_decay", False):
            for name, _ in module.named_parameters(recurse=False):
                yield where + name
        if getattr(getattr(module, "metaplastic", None), "no_weight_decay", False):
            for name, _ in module.named_parameters():
                if name.rpartition(".")[2] in _RATES:
                    yield where + name


@functools.cache
def teach_trainer() -> None:
    """Makes transformers' `Trainer` leave these parameters out of weight decay.

    It decides by name: everything decays but what is called a bias or a norm, and neither models
    nor parameters are asked. Its one method that names what decays is wrapped; for models without
    such modules it gives what it gave.
    """
    try:
        from transformers.trainer import Trainer
    except ImportError:
        # Then nobody trains with it.
        return
    original = Trainer.get_decay_parameter_names

    @functools.wraps(original)
    def get_decay_parameter_names(self: Trainer, model: nn.Module) -> list[str]:
        spared = set(no_weight_decay(model))
        return [name for name in original(self, model) if name not in spared]

    Trainer.get_decay_parameter_names = get_decay_parameter_names  # type: ignore[method-assign]
