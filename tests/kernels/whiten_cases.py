"""Keys over an importance: the loop per token, operands, and the comparison that tests share."""

import torch
from kernel_cases import assert_matches_loop, decay, linear_loop, make_gate, per_head, walk

from glazoo.kernels import whiten

# Of a decay without a gate of its own: what stands for minus infinity has no gradient.
LEAST = -50.0


def whiten_loop(
    x, k, b, g=None, prior=None, initial_state=None, *, at, forgets, sums, keeps, cu_seqlens=None
):
    HV, K = b.shape[2], k.shape[3]
    k = per_head(k, HV)
    x = k if x is None else per_head(x, HV)

    def step(i, t, last):
        a = decay(g, i, t, last)
        before = a * last + prior
        j = a * last + b[i, t][:, None] * k[i, t] ** 2
        total = {"written": j + prior, "found": before, "previous": last + prior}[at]
        log = torch.zeros_like(last) if g is None else per_key(g[i, t], last)
        f = log + ((last + prior) / before).log()
        totals = torch.stack([(x[i, t] ** 2 / total).sum(-1), (x[i, t] ** 2).sum(-1)], -1)
        return j, torch.cat([x[i, t] / total, f, totals, j], -1)

    rows, final = walk(k, (HV, K), initial_state, cu_seqlens, step)
    rows = k.new_empty(0, HV, 3 * K + 2) if rows is None else rows
    rows = rows.reshape(*b.shape, 3 * K + 2)
    scaled, f, reached, square, j = rows.split([K, K, 1, 1, K], -1)
    f, j = (y if asked else None for y, asked in ((f, forgets), (j, keeps)))
    reached, square = (y[..., 0] if sums else None for y in (reached, square))
    return scaled, final, f, reached, square, j


def whitened_linear_loop(
    q,
    k,
    w,
    b,
    prior,
    g=None,
    beta=None,
    h=None,
    j=None,
    *,
    read="post",
    scale=1.0,
    keeps=False,
    cu_seqlens=None,
):
    """`linear_loop` of queries over the importance."""
    at = "written" if read == "post" else "previous"
    divided, final, *_, every = whiten_loop(
        q, k, b, g, prior, j, at=at, forgets=False, sums=False, keeps=True, cu_seqlens=cu_seqlens
    )
    o, state = linear_loop(divided, k, w, g, beta, h, scale=scale, read=read, cu_seqlens=cu_seqlens)
    found = {"output": o, "final h": state, "final J": final}
    return found | {"J": every} if keeps else found


def whitened_linear_operands(B, T, H, HV, K, V, *, state=True, sequences=None, **options):
    found = operands(B, T, H, HV, K, state=state, sequences=sequences, **options)
    j, q = found.pop("initial_state"), found.pop("x")
    found |= {"q": q, "w": torch.randn(B, T, HV, V, dtype=torch.float64)}
    found["beta"] = torch.rand(B, T, HV, dtype=torch.float64)
    h = torch.randn(sequences or B, HV, K, V, dtype=torch.float64) if state else None
    return found | {"h": h, "j": j}


def per_key(g, like):
    return (g if g.ndim == like.ndim else g[:, None]).expand(like.shape)


def operands(
    B, T, HX, HV, K, gate, *, resets=True, strong=False, state=True, sequences=None, own=False
):
    """own: keys that are divided themselves."""
    torch.manual_seed(0)
    shape = sequences or B, HV, K
    return {
        "x": None if own else torch.randn(B, T, HX, K, dtype=torch.float64),
        "k": torch.randn(B, T, HX, K, dtype=torch.float64),
        "b": torch.rand(B, T, HV, dtype=torch.float64),
        "g": make_gate(gate, (B, T, HV, K), resets, strong),
        "prior": 0.5 + torch.rand(HV, K, dtype=torch.float64),
        "initial_state": torch.rand(shape, dtype=torch.float64) if state else None,
    }


def chosen(function):
    """All results that there are, by the importance that divides; the final one second."""

    def run(at="found", g=None, **x):
        sums = at == "found"
        return function(g=g, at=at, forgets=g is not None, sums=sums, keeps=not sums, **x)

    return run


def paired(function):
    """The function's first result, and the others in a row."""

    def run(**x):
        scaled, final, f, *others = chosen(function)(**x)
        decays = None if f is None else f.clamp(min=LEAST)
        found = (y.flatten().to(final.dtype) for y in (final, decays, *others) if y is not None)
        return scaled, torch.cat([*found])

    return run


def compare(given, dtype=torch.float32, **options):
    def bound(function):
        return lambda **x: paired(function)(**x, **options)

    assert_matches_loop(bound(whiten), bound(whiten_loop), given, dtype)
