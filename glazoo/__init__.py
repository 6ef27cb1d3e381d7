"""A zoo of gated linear attention: every variant is a spec, and every spec has a metaplastic
form."""

from importlib.metadata import PackageNotFoundError, version

from glazoo.api import attention as _attention
from glazoo.api import warn_of_layout
from glazoo.metaplastic import metaplasticize
from glazoo.program import Kernel, Program, lower
from glazoo.spec import Spec, SpecError, freeze
from glazoo.state import Output, OutputWithUncertainty, State
from glazoo.zoo import load, names, schema

attention = warn_of_layout(_attention)

try:
    __version__ = version("glazoo")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

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


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
