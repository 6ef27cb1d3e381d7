"""The exact posterior over memories: dense Gaussian regression, solved anew at every token.

No recurrence and no engine is involved, so that it can judge them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Posterior", "posterior"]


class Posterior(NamedTuple):
    """Gaussian posterior over the rows of a memory after every token, in float64."""

    mean: Float[Tensor, "*B T K V"]
    precision: Float[Tensor, "*B T V K K"]
    """One matrix over keys per value row."""

    def predict(self, q: Float[Tensor, "*B T K"]) -> Float[Tensor, "*B T V"]:
        """Return the posterior mean of the value at a query."""
        return torch.einsum("...tkv,...tk->...tv", self.mean, q.to(self.mean.dtype))

    def variance(self, q: Float[Tensor, "*B T K"]) -> Float[Tensor, "*B T V"]:
        """Return the posterior variance of the noiseless value at a query."""
        x = q.to(self.mean.dtype)[..., None, :, None]
        solved: Tensor = torch.linalg.solve(self.precision, x)
        return (x * solved).sum((-1, -2))


def posterior(
    k: Float[Tensor, "*B T K"],
    v: Float[Tensor, "*B T V"],
    beta: Float[Tensor, "*B T *V"],
    *,
    g: Float[Tensor, "*B T"] | None = None,
    prior: Float[Tensor, "K"] | float = 1.0,
    start: Float[Tensor, "*B K V"] | None = None,
    discount: bool = False,
) -> Posterior:
    """Return the exact posterior of online Bayesian linear regression that forgets toward its
    prior.

    Values are observed as v_s = M^T k_s + noise of precision beta_s per value row; the likelihood
    of token s is tempered by all decays after it, and with `discount` the prior by all decays; the
    prior of each row is N(m_0, diag(I_p)^-1):

        w_ts = beta_s prod_{r = s+1..t} exp(g_r)
        Lambda_t = diag(I_p) + sum_s w_ts k_s k_s^T
        mean_t = Lambda_t^-1 (I_p m_0 + sum_s w_ts k_s v_s^T)

    Args:
        k: [..., T, K], keys.
        v: [..., T, V], values.
        beta: [..., T] or [..., T, V], noise precision, >= 0.
        g: [..., T], natural logarithm of the decay, <= 0; default: nothing is forgotten.
        prior: I_p > 0, a number or [K].
        start: [..., K, V], prior mean m_0; default: zero.
        discount: whether the prior is forgotten as the observations are.

    Returns:
        Mean and precision after every token, in float64.

    Raises:
        ValueError: a shape does not fit.

    Reference: Bayesian linear regression with a tempered likelihood; arXiv:2602.09075, section 2.
    """
    k, v, beta = k.double(), v.double(), beta.double()
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v: got {list(v.shape)}, accepted is [..., T, V] for k {list(k.shape)}")
    if beta.shape == v.shape[:-1]:
        beta = beta[..., None].expand(v.shape)
    if beta.shape != v.shape:
        raise ValueError(
            f"beta: got {list(beta.shape)}, "
            f"accepted is [..., T] or [..., T, V] for v {list(v.shape)}"
        )
    count, size = k.shape[-2:]
    decay = k.new_ones(k.shape[:-1]) if g is None else g.double().exp()
    kept = torch.zeros(*k.shape[:-2], count, count, dtype=k.dtype)
    for s in range(count):
        # Products rather than differences of sums of logarithms: a decay may be exactly zero.
        kept[..., s:, s] = torch.cat(
            [decay.new_ones(*decay.shape[:-1], 1), decay[..., s + 1 :].cumprod(-1)], -1
        )
    prior = torch.as_tensor(prior, dtype=k.dtype).expand(size)
    precision = torch.einsum("...ts,...sv,...sk,...sj->...tvkj", kept, beta, k, k)
    left = decay.cumprod(-1) if discount else torch.ones_like(decay)
    precision = precision + left[..., None, None, None] * torch.diag(prior)
    evidence = torch.einsum("...ts,...sv,...sk,...sv->...tvk", kept, beta, k, v)
    if start is not None:
        pulled = (prior[:, None] * start.double()).mT[..., None, :, :]
        evidence = evidence + left[..., None, None] * pulled
    mean = torch.linalg.solve(precision, evidence[..., None])[..., 0].mT
    return Posterior(mean, precision)
