"""Running a mixer's own forward pass with another scan in it.

The source's code runs as it is. Only the functions that it calls for its recurrence and its
convolution, which it finds by their names in its module, are others: the methods that call them are
copied, and the copies look names up in a *twin* of the source's module, a copy of its namespace
with these names replaced. Nothing of the source's module changes, and models that are not converted
go on as before.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn

from glazoo.families.calls import CALLS, Call
from glazoo.families.packing import Packed, convolve_apart

if TYPE_CHECKING:
    from glazoo.families.mixer import MetaplasticMixer

__all__ = [
    "absent_calls",
    "calls_of",
    "current_packing",
    "once",
    "packing",
    "running",
    "twin_methods",
]

_CONVOLUTION = "causal_conv1d_fn"
_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined")
"""Everything in one kernel, scan included. Mixers go on without it where it gives None."""


class _Running(threading.local):
    """What the intercepted functions of this thread belong to. Backward passes recompute layers in
    threads of their own."""

    mixer: MetaplasticMixer | None = None
    hidden: Tensor | None = None
    mask: Tensor | None = None
    packed: Packed | None = None
    scans: int = 0


_running = _Running()


@contextmanager
def running(mixer: MetaplasticMixer, hidden: Tensor, mask: Tensor | None) -> Iterator[None]:
    """Make every intercepted call inside the block that of a mixer.

    Args:
        mixer: the mixer.
        hidden: its input, [B, T, D], which the importance gate reads.
        mask: [B, T], 0 at padding, or None.

    Raises:
        RuntimeError: the block ends without having called a scan.
    """
    # Mixers may stand inside others.
    kept = _running.mixer, _running.hidden, _running.mask, _running.scans
    _running.mixer, _running.hidden, _running.mask, _running.scans = mixer, hidden, mask, 0
    try:
        yield
        if not _running.scans:
            raise RuntimeError(
                f"{type(mixer).__name__} did not call its scan on this path: with this device or "
                "these options the source computes its recurrence in another way, and the "
                "importance gate would have been left out. Calls that are known: "
                f"{', '.join(CALLS)}"
            )
    finally:
        _running.mixer, _running.hidden, _running.mask, _running.scans = kept


@contextmanager
def packing(packed: Packed | None) -> Iterator[None]:
    """Make the mixers inside the block keep packed sequences apart."""
    kept, _running.packed = _running.packed, packed
    try:
        yield
    finally:
        _running.packed = kept


def current_packing() -> Packed | None:
    """Return the bounds of packed sequences that hold here."""
    return _running.packed


def _scan(call: Call) -> Callable[..., Any]:
    def scan(*args: Any, **kwargs: Any) -> Any:
        assert _running.mixer is not None
        assert _running.hidden is not None
        _running.scans += 1
        if _running.scans > 1:
            raise RuntimeError(
                f"{type(_running.mixer).__name__} calls its scan more than once for one input; a "
                "converted mixer has one recurrence"
            )
        mask, packed = _running.mask, _running.packed
        return _running.mixer.scan(call.bind(args, kwargs), _running.hidden, mask, packed)

    scan.__name__ = scan.__qualname__ = call.name
    return scan


def _convolution(source: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(source)
    def convolution(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        packed = _running.packed
        if packed is None:
            return source(hidden_states, *args, **kwargs)
        # The bounds are in `packed`; the source's function refuses them or mixes over them.
        options = {k: v for k, v in kwargs.items() if k in ("weight", "bias", "activation")}
        return convolve_apart(functools.partial(source, **options), packed, hidden_states, *args)

    return convolution


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a kernel that has scan and projections in one piece."""


def _names(code: CodeType) -> set[str]:
    """Return the names that a function looks up, those of functions inside it included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _methods(cls: type) -> Iterator[tuple[str, Any, FunctionType]]:
    """Return every method of a class and its bases, as it is found there and as it was written;
    what is overridden comes first."""
    for base in reversed(cls.__mro__):
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            plain = inspect.unwrap(value) if inspect.isfunction(value) else None
            if isinstance(plain, FunctionType):
                yield name, value, plain


Made = TypeVar("Made", bound=Callable[..., Any])


def once(make: Made) -> Made:
    """Keep what a function of classes gives: there is one result only for each of them."""
    return cast(Made, functools.cache(make))


def _named(cls: type) -> Iterator[tuple[Call, bool]]:
    for _, _, plain in _methods(cls):
        for name in sorted(_names(plain.__code__) & CALLS.keys()):
            # What an import did not find is None there.
            yield CALLS[name], plain.__globals__.get(name) is not None


@once
def calls_of(cls: type) -> tuple[Call, ...]:
    """Return the known scan functions that the methods of a class call."""
    return tuple({call.name: call for call, there in _named(cls) if there}.values())


def absent_calls(cls: type) -> tuple[str, ...]:
    """Return the names of known scan functions that a class would call, but whose package is not
    installed."""
    return tuple(dict.fromkeys(call.name for call, there in _named(cls) if not there))


_TWIN = f"{__name__}.twins"


@functools.cache
def _twin(name: str) -> ModuleType:
    source = sys.modules[name]
    # Importable by its name, which is how compilers find a function's globals again.
    twin = ModuleType(f"{_TWIN}.{name.replace('.', '_')}", source.__doc__)
    # `__builtins__` is the source's: only imports give a module its own, and compilers look there.
    kept = ("__name__", "__spec__", "__loader__")
    space = vars(twin)
    space.update({k: v for k, v in vars(source).items() if k not in kept})
    space.update({k: _scan(call) for k, call in CALLS.items() if space.get(k) is not None})
    if callable(convolution := space.get(_CONVOLUTION)):
        space[_CONVOLUTION] = _convolution(convolution)
    space.update(dict.fromkeys((k for k in _FUSED if k in space), _nothing))
    sys.modules[twin.__name__] = twin
    return twin


def _copy(function: FunctionType, space: Mapping[str, Any], closure: Any) -> FunctionType:
    made = FunctionType(
        function.__code__,
        cast(dict[str, Any], space),
        function.__name__,
        function.__defaults__,
        closure,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__doc__, made.__qualname__ = function.__doc__, function.__qualname__
    made.__annotations__ = function.__annotations__
    return made


def _intercepted(function: FunctionType) -> FunctionType:
    """Copy a method onto the twin of its module, with the decorators around it."""
    inner = function.__dict__.get("__wrapped__")
    if inner is None:
        return _copy(function, vars(_twin(function.__globals__["__name__"])), function.__closure__)
    new = _intercepted(inner)
    cells = function.__closure__ or ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise RuntimeError(
            f"{function.__qualname__} has a decorator that does not hold what it decorates, so "
            "that its scan cannot be replaced"
        )
    closure = tuple(CellType(new) if cell.cell_contents is inner else cell for cell in cells)
    outer = _copy(function, function.__globals__, closure)
    outer.__dict__["__wrapped__"] = new
    return outer


def twin_methods(cls: type) -> dict[str, FunctionType]:
    """Return the methods of a class that call a known function, copied so that they call ours."""
    wanted = CALLS.keys() | {_CONVOLUTION, *_FUSED}
    last = {name: (value, plain) for name, value, plain in _methods(cls)}
    return {
        name: _intercepted(value)
        for name, (value, plain) in last.items()
        if _names(plain.__code__) & wanted
    }
