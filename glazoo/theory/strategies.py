"""Hypothesis strategies for instances, operands and states of any spec.

They cover what goes wrong at the edges: no token and one token, grouped heads, packed sequences
with empty ones among them, a state to start from, decays of 0, minus infinity and close to it,
gates of zero. Hypothesis is imported when a strategy is asked for, not before.

    from hypothesis import given
    import glazoo
    from glazoo.theory import strategies

    spec = glazoo.load("my_variant.toml")

    @given(strategies.inputs(spec))
    def test_output_is_finite(x):
        assert x.run(glazoo.attention).output.isfinite().all()
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glazoo.errors import extra
from glazoo.spec import Spec
from glazoo.state import State
from glazoo.theory.entry import Domain
from glazoo.theory.forms import Form, forms
from glazoo.theory.instances import Instance, Operands, run, state

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Inputs", "inputs", "instances", "operands", "specs", "states"]


def _hypothesis() -> Any:
    with extra("verify"):
        import hypothesis.strategies
    return hypothesis.strategies


@dataclass(frozen=True)
class Inputs:
    """Everything that one call takes."""

    spec: Spec
    instance: Instance
    operands: Operands
    initial_state: State | None
    cu_seqlens: Tensor | None

    def run(self, op: Callable[..., Any], **options: Any) -> Any:
        """Calls an implementation of `glazoo.attention` on them."""
        given = {"initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens} | options
        return run(op, self.spec, self.operands, **given)


def instances(domain: Domain | None = None) -> SearchStrategy[Instance]:
    """Draws sizes, regime and seed; shrinks to one token of one head and the plain regime.

    Args:
        domain: the sizes and regimes to draw from.
    """
    st = _hypothesis()
    d = Domain() if domain is None else domain
    start = st.booleans() if d.start is None else st.just(d.start)
    spans = (d.batch, d.tokens, d.heads, d.groups, d.keys, d.values)
    sizes = [st.integers(low, high) for low, high in spans]
    regime = st.sampled_from(d.regimes)
    strategy: SearchStrategy[Instance] = st.builds(
        Instance, *sizes, regime, start, st.integers(0, 2**16)
    )
    return strategy


def operands(
    spec: Spec, *, domain: Domain | None = None, dtype: torch.dtype = torch.float64
) -> SearchStrategy[Operands]:
    """Draws the operands of a spec by name.

    Args:
        spec: any spec.
        domain: the sizes and regimes to draw from.
        dtype: of all operands.
    """
    return instances(domain).map(lambda i: i.operands(spec, dtype))


def states(
    spec: Spec, *, domain: Domain | None = None, dtype: torch.dtype = torch.float64
) -> SearchStrategy[State]:
    """Draws a recurrent state of a spec.

    Args:
        spec: any spec.
        domain: the sizes to draw from.
        dtype: float32 or float64.
    """
    return instances(domain).map(
        lambda i: state(spec, i.generator(1), i.B, i.H, i.HV, i.K, i.V, dtype)
    )


def inputs(
    spec: Spec,
    *,
    domain: Domain | None = None,
    dtype: torch.dtype = torch.float64,
    packed: bool | None = None,
) -> SearchStrategy[Inputs]:
    """Draws everything that one call takes, packed sequences included.

    Args:
        spec: any spec.
        domain: the sizes and regimes to draw from.
        dtype: of all operands; the state has at least float32.
        packed: whether sequences are packed in one row; default: both.
    """
    st = _hypothesis()
    state_dtype = torch.promote_types(dtype, torch.float32)

    def build(instance: Instance, lengths: list[int] | None) -> Inputs:
        i, count, bounds = instance, instance.B, None
        if lengths is not None:
            count = len(lengths)
            bounds = torch.tensor([0, *itertools.accumulate(lengths)])
            i = Instance(1, sum(lengths), i.H, i.G, i.K, i.V, i.regime, i.start, i.seed)
        start = None
        if i.start:
            start = state(spec, i.generator(1), count, i.H, i.HV, i.K, i.V, state_dtype)
        return Inputs(spec, i, i.operands(spec, dtype), start, bounds)

    lengths = st.lists(st.integers(0, 5), min_size=1, max_size=4)
    packing = {True: lengths, False: st.none(), None: st.none() | lengths}[packed]
    strategy: SearchStrategy[Inputs] = st.builds(build, instances(domain), packing)
    return strategy


def specs() -> SearchStrategy[Form]:
    """Draws a shipped variant or one of the metaplastic forms."""
    strategy: SearchStrategy[Form] = _hypothesis().sampled_from(forms())
    return strategy
