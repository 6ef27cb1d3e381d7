"""Source models that compute in float64 throughout, and conversions of them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from glazoo.errors import ConversionError
from glazoo.families import Family, find_family
from glazoo.families.settings import Settings
from glazoo.layers import gates, layers_of
from glazoo.layers.conversion import update_configurations

__all__ = ["clean_float64_model", "convert_like", "recompute"]


_CLEAN = "_float64"


def _own_model(module: ModuleType, config: Any) -> Any:
    """Builds a configuration's model from the classes of a module."""
    from transformers import PreTrainedModel

    for cls in vars(module).values():
        if (
            isinstance(cls, type)
            and issubclass(cls, PreTrainedModel)
            and cls.__module__ == module.__name__
            and cls.__name__.endswith("Model")
            and not cls.__name__.endswith("PreTrainedModel")
            and cls.config_class is type(config)
        ):
            return cls._from_config(config)
    raise ConversionError(f"{module.__name__} has no model for {type(config).__name__}")


def _clean_module(family: Family) -> ModuleType:
    """Return a copy of a family's modeling code that computes in float64 where the original casts
    to float32."""
    name = family.modeling + _CLEAN
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(family.modeling)
    if spec is None or spec.origin is None:
        raise ConversionError(f"the source code of {family.modeling} is not installed")
    text = Path(spec.origin).read_text("utf-8")
    for old, new in (
        (".float()", ".double()"),
        ("torch.float32", "torch.float64"),
        ("=torch.float,", "=torch.float64,"),
        ("=torch.float)", "=torch.float64)"),
        # By configuration, transformers would give the original's inner models.
        (" AutoModel.from_config(", " _own_model("),
    ):
        text = text.replace(old, new)
    module = ModuleType(name)
    vars(module)["_own_model"] = functools.partial(_own_model, module)
    module.__package__ = family.modeling.rpartition(".")[0]
    module.__file__ = spec.origin
    # Decorators look their module up by name.
    sys.modules[name] = module
    try:
        exec(compile(text, spec.origin, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def clean_float64_model(family: Family | str, architecture: str | None = None) -> type[Any]:
    """Return a copy of a source model's class whose casts to float32 go to float64 instead.

    Cast to float64, the original rounds to float32 in several places: two float64 runs then agree
    to float32 only.

    Args:
        family: a family, or its `model_type`.
        architecture: the model class; default the family's first.

    Returns:
        The class; load or build it with `dtype=torch.float64`.
    """
    if isinstance(family, str):
        family = find_family(family)
    found: type[Any] = getattr(_clean_module(family), architecture or family.architectures[0])
    return found


def recompute(model: nn.Module, family: Family) -> None:
    """Recomputes the fixed numbers of a source model's mixers."""
    if family.quirks.exact is not None:
        for mixer in family.mixers(model).values():
            family.quirks.exact(mixer)


def convert_like(
    model: nn.Module, like: nn.Module, family: Family, settings: Settings | None
) -> None:
    """Converts a source model and gives it the gates of another converted one."""
    from glazoo.models.metaplastic import convert_in_place

    if family.native:
        for layer, theirs in zip(layers_of(model).values(), layers_of(like).values(), strict=True):
            if layer.spec != theirs.spec:
                layer.metaplasticize_(theirs.spec)
        update_configurations(model)
    else:
        assert settings is not None
        convert_in_place(model, family, settings)
    here = dict(gates(model))
    for name, gate in gates(like):
        here[name].load_state_dict(gate.state_dict())
