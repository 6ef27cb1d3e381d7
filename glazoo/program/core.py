"""What a program runs on: the core operations of an engine, one per kernel class."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Core", "Kernel", "PosteriorStep", "Whiten", "WhitenedLinear", "automatic"]


class Kernel(StrEnum):
    """The kernel classes that all programs compile onto."""

    LINEAR = "linear"
    """S = Diag(a) S + k w^T, read by q or q / I."""
    DELTA = "delta"
    """S = Diag(a) S; S += k (w - S^T e)^T."""
    SYNAPSE = "synapse"
    """Two linear states h and J, read through h / (J + I_p) per synapse."""
    SYNAPSE_DELTA = "synapse_delta"
    """Gain or decay per synapse that does not factor over keys and values."""
    FULL = "full"
    """A linear or delta state h and a precision matrix H, read through (H + Lambda)^-1."""
    COVARIANCE = "covariance"
    """A covariance matrix, token by token, and the class delta."""


def automatic(device: str, *, numba: bool) -> str:
    """Return the name of the engine that `impl="auto"` is on a device, with or without numba."""
    return "compiled" if device == "cpu" and numba else "chunked"


class PosteriorStep(Protocol):
    """One token of a memory with an importance over keys, without gradients."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        b: Tensor,
        g: Tensor | None = None,
        *,
        prior: Tensor,
        e: Tensor | None = None,
        initial_state: tuple[Tensor, Tensor] | None = None,
        correction: str = "none",
        gain: str = "first_order",
        read: str = "post",
        base: str = "decayed",
        own: bool = False,
        uncertainty: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]: ...


class Whiten(Protocol):
    """A key or query over the importance of keys, the importance at the end, and how the mean is
    forgotten that it belongs to."""

    def __call__(
        self,
        x: Tensor | None,
        k: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        *,
        prior: Tensor,
        initial_state: Tensor | None = None,
        at: str = "written",
        forgets: bool = False,
        sums: bool = False,
        keeps: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...


class WhitenedLinear(Protocol):
    """The class linear, read by queries over the importance of keys."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        *,
        prior: Tensor,
        beta: Tensor | None = None,
        scale: float = 1.0,
        initial_state: tuple[Tensor, Tensor] | None = None,
        read: str = "post",
        keeps: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]: ...


class Core(Protocol):
    """The core operations of an engine; their modules say what each one computes.

    Gates per head [B, T, HV] of what linear and delta write and erase, and the scale of their
    queries, are operands of their own, so that an engine can multiply where it has both at hand.

    Tokens q, k, v, w, e are [B, T, heads, channels] in any one dtype, gates and states are float32
    or float64.
    """

    @property
    def whiten(self) -> Whiten | None:
        """The scan of an importance and what it makes of keys and of a memory, where the engine has
        them in one operation."""

    @property
    def whitened_linear(self) -> WhitenedLinear | None:
        """The scan of an importance and the class linear that it reads, likewise."""

    @property
    def posterior_step(self) -> PosteriorStep | None:
        """A token of decoding in one piece, where the engine has it."""

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        g: Tensor | None = None,
        *,
        beta: Tensor | None = None,
        scale: float = 1.0,
        initial_state: Tensor | None = None,
        read: str = "post",
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def delta(
        self,
        q: Tensor,
        e: Tensor | None,
        k: Tensor,
        w: Tensor,
        g: Tensor | None = None,
        *,
        beta: Tensor | None = None,
        erase: Tensor | None = None,
        scale: float = 1.0,
        initial_state: Tensor | None = None,
        base: str = "decayed",
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def importance(
        self,
        k: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def synapse(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        *,
        prior: Tensor,
        initial_state: tuple[Tensor, Tensor] | None = None,
        read: str = "post",
        uncertainty: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]: ...

    def synapse_delta(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        b: Tensor | None,
        g: Tensor | None = None,
        *,
        e: Tensor | None = None,
        evidence: Tensor | None = None,
        prior: Tensor,
        gain: str = "first_order",
        correction: str = "full",
        initial_state: tuple[Tensor, Tensor] | None = None,
        base: str = "decayed",
        uncertainty: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]: ...

    def solve(
        self,
        q: Tensor,
        k: Tensor,
        beta: Tensor,
        g: Tensor | None = None,
        *,
        prior: Tensor,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def riccati(
        self,
        a: Tensor,
        c: Tensor,
        d: Tensor,
        u: Tensor,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def covariance(
        self,
        q: Tensor,
        k: Tensor,
        b: Tensor,
        g: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        prior: Tensor,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
