"""What steps run on: tensors by name, and what is done with them beside the core operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from glazoo.kernels.register import wants_derivative
from glazoo.program import elementwise, sequences
from glazoo.program.core import Core

__all__ = ["Env", "Product", "Values"]


class Product(NamedTuple):
    """Tokens times a gate per head [B, T, HV], or times a number."""

    of: Float[Tensor, "B T H D"]
    gate: Float[Tensor, "B T HV"] | None = None
    scale: float = 1.0


class Values:
    """Tensors by name, some of which are computed when somebody asks for them: products, which an
    engine may take by their factors, and what functions give."""

    # No subclass of dict: the compiler follows none with methods of its own.
    def __init__(self, given: dict[str, Tensor]) -> None:
        self.made = dict(given)
        self.products: dict[str, Product] = {}
        self.functions: dict[str, Callable[[], Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.made:
            return self.made[name]
        if name in self.functions:
            x = self.functions[name]()
        else:
            of, gate, scale = self.products[name]
            x = of * scale if gate is None else Env.times(gate, of)
        self.made[name] = x
        return x

    def __setitem__(self, name: str, x: Tensor) -> None:
        self.made[name] = x

    def __contains__(self, name: str) -> bool:
        return name in self.made

    def get(self, name: str) -> Tensor | None:
        """Return a tensor that is there, not one that would be computed."""
        return self.made.get(name)

    def postpone(
        self, name: str, of: Tensor, gate: Tensor | None = None, scale: float = 1.0
    ) -> None:
        """Let a name stand for a product."""
        self.made.pop(name, None)
        self.products[name] = Product(of, gate, scale)

    def factors(self, name: str) -> Product:
        """Return what a name stands for as a product, multiplied or not."""
        if name in self.made or name not in self.products:
            return Product(self[name])
        return self.products[name]


@dataclass(slots=True)
class Env:
    """What the names of a program stand for while it runs."""

    x: Values
    """Operands, parts of the state, and what steps make: q is scaled, g is per token. A part of the
    state is the initial one until the step that carries it has run, and then the final one."""
    core: Core
    narrow: torch.dtype
    """Dtype in which core operations take tokens: what follows from several operands is computed in
    the wide dtype and rounded once, where it is handed over."""
    wide: torch.dtype
    """Dtype of gates, states and normalisers, which are never rounded."""
    cu_seqlens: Tensor | None
    uncertainty: bool
    """Whether the call asks for it."""

    exact_strength = staticmethod(elementwise.exact_strength)
    flow_strength = staticmethod(elementwise.flow_strength)
    forgetting = staticmethod(elementwise.forgetting)
    over = staticmethod(elementwise.over)
    whitened = staticmethod(elementwise.whitened)
    interleave = staticmethod(sequences.interleave)

    @property
    def queries(self) -> Tensor:
        """The queries, scaled or not, for their shape."""
        return self.x.factors("q").of

    @property
    def tiny(self) -> float:
        """The smallest normal number of the wide dtype."""
        return torch.finfo(self.wide).tiny

    def gate(self, name: str | None) -> Tensor | None:
        """Return a tensor as it is, or None."""
        return None if name is None else self.x[name]

    def channels(self, name: str | None) -> Tensor | None:
        """Return a gate with an axis of channels, [B, T, HV, K] or [B, T, HV, 1], or None."""
        gate = self.gate(name)
        return gate if gate is None or gate.ndim == 4 else gate[..., None]

    def token(self, name: str) -> Tensor:
        """Return a tensor in the dtype of tokens."""
        return self.narrowed(self.x[name])

    def narrowed(self, x: Tensor) -> Tensor:
        """Round to the dtype of tokens."""
        return x if x.dtype == self.narrow else x.to(self.narrow)

    @staticmethod
    def spread(x: Float[Tensor, "B T H D"], heads: int) -> Float[Tensor, "B T HV D"]:
        """Repeat query/key heads for the value heads that read them."""
        return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)

    def heads(self, name: str) -> Float[Tensor, "B T HV D"]:
        """Return a tensor with a head per value head."""
        return self.spread(self.x[name], self.x["v"].shape[2])

    @staticmethod
    def times(gate: Tensor | None, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T HV D"]:
        """Multiply by a gate [B, T, HV] or [B, T, HV, D]."""
        if gate is None:
            return x
        x = Env.spread(x, gate.shape[2])
        return x * (gate if gate.ndim == x.ndim else gate[..., None])

    @staticmethod
    def turned(
        x: Float[Tensor, "B T HV K"], basis: Float[Tensor, "H K K"], *, back: bool = False
    ) -> Float[Tensor, "B T HV K"]:
        """Multiply by the transposed basis of the head that reads, or, `back`, by the basis."""
        basis = basis.repeat_interleave(x.shape[2] // basis.shape[0], 0)
        return torch.einsum("bthk,hjk->bthj" if back else "bthk,hkj->bthj", x, basis)

    def prior(self) -> Float[Tensor, "HV K"]:
        """Return the prior of every key channel."""
        return self.x["prior"].expand(-1, self.queries.shape[-1])

    def rate(self, beta: str | None, v: str) -> Tensor:
        """Return the write gate of values, [B, T, HV] or as it is; without one it is one."""
        if beta is not None:
            return self.x[beta]
        return self.x[v].new_ones(self.x[v].shape[:3], dtype=self.wide)

    def previous(self, x: Tensor, first: Tensor | None) -> Tensor:
        """Shift tokens by one; `first` (default zeros) stands before each sequence."""
        return sequences.previous(x, first, self.cu_seqlens)

    def last(self, x: Tensor, first: Tensor | None) -> Tensor:
        """Return each sequence's last token, as a state, or `first` where it has none."""
        return sequences.last(x, first, self.cu_seqlens, self.wide)

    def log_sums(self, x: Tensor, first: Tensor) -> Tensor:
        """Sum exponentials over the tokens of each sequence so far, in logarithms."""
        return sequences.log_sums(x, first, self.cu_seqlens)

    def over_keys(self, x: Tensor) -> Tensor:
        """Repeat what is one for all keys for each of them."""
        return x.expand(*x.shape[:-1], self.queries.shape[-1])

    def sequences(self) -> int:
        """Return the number of sequences."""
        return self.queries.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def take(self, result: tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]) -> None:
        """Keep output, memory, importance and variance of a class that gives them together."""
        self.x["y"], (self.x["memory"], self.x["importance"]), doubt = result
        if doubt is not None:
            self.x["uncertainty"] = doubt

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return memory and importance at the start, for classes that keep both together."""
        if "memory" not in self.x:
            return None
        return self.x["memory"], self.x["importance"]

    def wants_derivative(self) -> bool:
        """Return whether a derivative with respect to anything here may be asked for."""
        products = self.x.products.values()
        return wants_derivative(*self.x.made.values(), *(y for x in products for y in x[:2]))
