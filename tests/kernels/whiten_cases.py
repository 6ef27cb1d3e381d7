"""Keys over an importance: the loop per token, operands, and the comparison that tests share."""

import torch
from kernel_cases import assert_matches_loop, decay, make_gate, per_head, segments

from glazoo.kernels import whiten


def whiten_loop(
    x, j, g=None, prior=None, initial_state=None, *, at, forgets, sums, cu_seqlens=None
):
    HV = j.shape[2]
    x = per_head(x, HV)
    rows = []
    for n, (i, start, end) in enumerate(segments(j, cu_seqlens)):
        last = torch.zeros_like(prior) if initial_state is None else initial_state[n]
        for t in range(start, end):
            a = decay(g, i, t, last)
            before = a * last + prior
            total = before if at == "found" else j[i, t] + prior
            log = torch.zeros_like(last) if g is None else per_key(g[i, t], last)
            f = log + ((last + prior) / before).log()
            rows.append(
                (x[i, t] / total, f, (x[i, t] ** 2 / total).sum(-1), (x[i, t] ** 2).sum(-1))
            )
            last = j[i, t]
    scaled, f, *found = (torch.stack(y) for y in zip(*rows, strict=True))
    return scaled.reshape(j.shape), *([f] if forgets else []), *(found if sums else [])


def per_key(g, like):
    return (g if g.ndim == like.ndim else g[:, None]).expand(like.shape)


def operands(B, T, HX, HV, K, gate, *, resets=True, state=True, sequences=None):
    torch.manual_seed(0)
    shape = sequences or B, HV, K
    return {
        "x": torch.randn(B, T, HX, K, dtype=torch.float64),
        "j": torch.rand(B, T, HV, K, dtype=torch.float64),
        "g": make_gate(gate, (B, T, HV, K), resets, False),
        "prior": 0.5 + torch.rand(HV, K, dtype=torch.float64),
        "initial_state": torch.rand(shape, dtype=torch.float64) if state else None,
    }


def paired(function, **options):
    """The function's first result, and the others in a row."""

    def run(**x):
        scaled, *others = (y for y in function(**x, **options) if y is not None)
        return scaled, torch.cat([y.flatten() for y in (*others, scaled.new_zeros(1).float())])

    return run


def compare(given, dtype=torch.float32, **options):
    assert_matches_loop(paired(whiten, **options), paired(whiten_loop, **options), given, dtype)
