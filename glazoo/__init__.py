"""A zoo of gated linear attention: every variant is a spec, and every spec has a metaplastic
form."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glazoo.api import warned as attention
    from glazoo.metaplastic import metaplasticize
    from glazoo.program import Kernel, Program, lower
    from glazoo.spec import Spec, SpecError, freeze
    from glazoo.state import Output, OutputWithUncertainty, State
    from glazoo.zoo import load, names, schema

    __version__: str

__all__ = [
    "Kernel",
    "Output",
    "OutputWithUncertainty",
    "Program",
    "Spec",
    "SpecError",
    "State",
    "attention",
    "freeze",
    "load",
    "lower",
    "metaplasticize",
    "names",
    "schema",
]

_HOMES = {
    "Kernel": "glazoo.program",
    "Output": "glazoo.state",
    "OutputWithUncertainty": "glazoo.state",
    "Program": "glazoo.program",
    "Spec": "glazoo.spec",
    "SpecError": "glazoo.spec",
    "State": "glazoo.state",
    "attention": "glazoo.api",
    "freeze": "glazoo.spec",
    "load": "glazoo.zoo",
    "lower": "glazoo.program",
    "metaplasticize": "glazoo.metaplastic",
    "names": "glazoo.zoo",
    "schema": "glazoo.zoo",
}


def __getattr__(name: str) -> Any:
    # On first use: looking variants up is no reason to wait for torch.
    value: Any
    if name == "__version__":
        try:
            value = version("glazoo")
        except PackageNotFoundError:  # run from a source tree that is not installed
            value = "0+unknown"
    elif name in _HOMES:
        # `attention` of layers, which know their layout, does not warn.
        value = getattr(import_module(_HOMES[name]), "warned" if name == "attention" else name)
    elif not name.startswith("_") and find_spec(f"glazoo.{name}") is not None:
        value = import_module(f"glazoo.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
