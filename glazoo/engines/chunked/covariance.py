"""The covariance of a Kalman filter, token by token: no matrix product expresses it."""

from __future__ import annotations

import torch
from torch import Tensor

from glazoo.engines import traceable
from glazoo.kernels import loops

__all__ = ["covariance"]


def covariance(
    q: Tensor,
    k: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    prior: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Kalman filter's covariance: `glazoo.kernels.loops.covariance`, and in an exported graph the
    traceable form of it, which holds for any number of tokens."""
    found = traceable.covariance if torch.compiler.is_exporting() else loops.covariance
    return found(q, k, b, g, noise, prior=prior, initial_state=initial_state, cu_seqlens=cu_seqlens)
