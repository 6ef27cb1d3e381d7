"""The engine fla: the functions of flash-linear-attention, in Triton's interpreter."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from budget import assert_within_budget, witnesses
from torch import Tensor

import glazoo
from glazoo.engines.fla import _FUNCTIONS
from glazoo.state import State
from glazoo.theory.instances import Instance

needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None,
    reason="flash-linear-attention is not installed: its own functions are what is tested",
)


class _Index(int):
    """A number that a kernel counts with: fla casts it, which the interpreter's own cannot."""

    def to(self, dtype: Any) -> Any:
        from triton.runtime import interpreter

        return interpreter._implicit_cvt(int(self)).to(dtype)


def _counted(name: str) -> Any:
    of_int = getattr(int, name)

    def method(self: _Index, other: Any) -> Any:
        found = of_int(int(self), other)
        return found if found is NotImplemented else _Index(found)

    return method


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__"):
    setattr(_Index, _name, _counted(_name))


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """Import fla's functions so that they run without a GPU."""
    if torch.cuda.is_available():
        yield
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU, fla runs in Triton's interpreter only")
    from triton.runtime.autotuner import Autotuner

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The choice between configurations is timed, and the interpreter has no clock for it.
        patch.setattr(Autotuner, "_bench", lambda *_args, **_options: [0.0, 0.0, 0.0])
        for module in {f.module for f in _FUNCTIONS.values()}:
            importlib.import_module(f"fla.ops.{module}")
        for name, module in list(sys.modules.items()):
            if name.startswith("fla.ops"):
                counts = lambda *x: map(_Index, builtins.range(*map(int, x)))  # noqa: E731
                patch.setattr(module, "range", counts, raising=False)
        yield


def _call(name: str, impl: str, ops: dict[str, Tensor], state: State | None, **options: Any) -> Any:
    rest = {n: x for n, x in ops.items() if n not in ("q", "k", "v")}
    y, final = glazoo.attention(
        name,
        ops["q"],
        ops["k"],
        ops["v"],
        initial_state=state,
        output_final_state=True,
        impl=impl,
        **rest,
        **options,
    )
    return y, final.memory


# One for each function and shape of its decay; chunk_kda takes a minute in the interpreter.
@needs_fla
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["linear_attention", "mamba2", "retnet", "gla", "deltanet", "gated_deltanet", "kda"]
)
def test_functions_are_the_recurrence(name: str) -> None:
    spec = glazoo.load(name)
    instance = Instance(2, 20, 1, 2, 16, 16, "normal", True, 0)
    ops, state = instance.operands(spec), instance.state(spec)
    assert state is not None
    truth = _call(name, "reference", ops, state)

    def narrow(impl: str, *given: Tensor) -> list[Tensor]:
        *x, memory = (y.float() for y in given)
        return list(_call(name, impl, dict(zip(ops, x, strict=True)), State(memory)))

    given = [*ops.values(), state.memory]
    near = witnesses(lambda *x: narrow("reference", *x), given)
    for i, (actual, exact) in enumerate(zip(narrow("fla", *given), truth, strict=True)):
        assert_within_budget(actual, exact, torch.float32, witness=[run[i] for run in near])


@needs_fla
@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_packed_sequences_some_of_them_empty(name: str) -> None:
    spec = glazoo.load(name)
    ops = Instance(1, 12, 1, 2, 16, 16, "normal", False, 0).operands(spec, torch.float32)
    start = Instance(4, 1, 1, 2, 16, 16, "normal", True, 1).state(spec, torch.float32)
    borders = torch.tensor([0, 5, 5, 12, 12])
    y, memory = _call(name, "fla", ops, start, cu_seqlens=borders)
    expected, last = _call(name, "chunked", ops, start, cu_seqlens=borders)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(memory, last, atol=1e-5)


def test_what_fla_has_not_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("palimpsa", "rwkv6", "comba", "gated_deltaproduct", "efla", "hgrn2", "mlstm"):
        ops = Instance().operands(glazoo.load(name), torch.float32)
        ops.setdefault("k", None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="accepted are Hebbian memories and delta rules"):
            _call(name, "fla", ops, None)
    ops = Instance().operands(glazoo.load("gla"))
    with pytest.raises(ValueError, match="got float64 operands"):
        _call("gla", "fla", ops, None)
    ops = Instance().operands(glazoo.load("gla"), torch.float32)
    with pytest.raises(ValueError, match="gives no uncertainty"):
        glazoo.attention("gla", **ops, output_uncertainty=True, impl="fla")
    monkeypatch.setitem(sys.modules, "fla", None)
    for name in [n for n in sys.modules if n.startswith("fla.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'glazoo\[fla\]'"):
        _call("gla", "fla", ops, None)
