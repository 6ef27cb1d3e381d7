"""Per-token loops of the kernels with an importance per synapse, and the comparison their tests
share."""

from collections.abc import Callable

import torch
from budget import assert_within_budget, witnesses
from kernel_cases import decay, make_gate, per_head, segments
from torch import Tensor

Operands = dict[str, Tensor | None]
Function = Callable[..., dict[str, Tensor]]
# What a caller gives in float32 whatever the dtype of the others.
WIDE = ("g", "prior", "h", "j", "a", "c", "d", "u")


def walk_two(like, shape, h, j, cu_seqlens, step):
    """Stacked results of step(batch entry, token, h, j) -> (h, j, results) over every sequence."""
    rows, finals = [], []
    for n, (i, start, end) in enumerate(segments(like, cu_seqlens)):
        a, b = (like.new_zeros(shape),) * 2 if h is None else (h[n], j[n])
        for t in range(start, end):
            a, b, row = step(i, t, a, b)
            rows.append(row)
        finals.append((a, b))
    results = [torch.stack(x).reshape(like.shape) for x in zip(*rows, strict=True)]
    return results, *(torch.stack(x) for x in zip(*finals, strict=True))


def spread_prior(prior: Tensor) -> Tensor:
    return prior.reshape(prior.shape[0], -1, 1)


def synapse_loop(
    q, k, w, b, prior, g=None, h=None, j=None, *, read="post", uncertainty=False, cu_seqlens=None
):
    """h = Diag(exp g) h + k w^T, J = Diag(exp g) J + k^2 b^T, o = (h / (J + prior))^T q."""
    HV, V = w.shape[2:]
    q, k, prior = per_head(q, HV), per_head(k, HV), spread_prior(prior)

    def step(i, t, h, j):
        key, query = k[i, t][..., None], q[i, t][..., None]
        a = decay(g, i, t, h)
        new_h = a * h + key * w[i, t][:, None]
        new_j = a * j + key**2 * b[i, t][:, None]
        x, y = (new_h, new_j) if read == "post" else (h, j)
        o = (query * x / (y + prior)).sum(1)
        return new_h, new_j, (o, (query**2 / (y + prior)).sum(1))

    (o, u), h, j = walk_two(w, (HV, k.shape[3], V), h, j, cu_seqlens, step)
    found = {"output": o, "final h": h, "final J": j}
    return found | {"uncertainty": u} if uncertainty else found


def synapse_operands(
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    *,
    gate: str = "head",
    resets: bool = False,
    state: bool = True,
    sequences: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Operands:
    """Random float64 operands; importances are of the order of `scale`."""
    torch.manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def positive(*shape):
        return scale * (0.1 + torch.rand(*shape, dtype=torch.float64))

    found: Operands = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "w": normal(B, T, HV, V),
        "b": positive(B, T, HV, V),
        "prior": positive(HV, K),
        "g": make_gate(gate, (B, T, HV, K), resets, False),
    }
    shape = (sequences or B, HV, K, V)
    found["h"] = normal(*shape) if state else None
    found["j"] = positive(*shape) if state else None
    return found


def values_and_gradients(function, operands, weights=None):
    """Results, then gradients of every operand, by name; and the weights of the results in the
    loss."""
    leaves = {
        k: None if x is None else x.detach().clone().requires_grad_() for k, x in operands.items()
    }
    found = function(**leaves)
    if weights is None:
        torch.manual_seed(1)
        weights = [torch.randn(x.shape, dtype=torch.float64) for x in found.values()]
    loss = sum((x * y.to(x)).sum() for x, y in zip(found.values(), weights, strict=True))
    wanted = {k: x for k, x in leaves.items() if x is not None}
    # A frozen importance has no state, a diagonal correction no erase key: zero gradients.
    gradients = torch.autograd.grad(loss, [*wanted.values()], materialize_grads=True)
    named = {f"gradient of {k}": x for k, x in zip(wanted, gradients, strict=True)}
    return {k: x.detach() for k, x in found.items()} | named, weights


def assert_matches(
    kernel: Function, loop: Function, operands: Operands, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Results and every gradient of a kernel against its float64 loop, within the budget of a
    witness.

    Both are differentiated with the same weights, rounded to what the kernel's results can hold.
    """
    given = {
        k: None if x is None else x.to(device, torch.float32 if k in WIDE else dtype)
        for k, x in operands.items()
    }
    exact = {k: None if x is None else x.double() for k, x in given.items()}
    _, weights = values_and_gradients(loop, exact)
    weights = [x.to(dtype).double() for x in weights]
    truth, _ = values_and_gradients(loop, exact, weights)
    names = [k for k, x in exact.items() if x is not None]

    def plain(*xs: Tensor) -> list[Tensor]:
        low = dict.fromkeys(exact) | dict(zip(names, (x.to(device) for x in xs), strict=True))
        return list(values_and_gradients(loop, low, weights)[0].values())

    runs = witnesses(plain, [exact[k].cpu() for k in names])
    seen = [dict(zip(truth, run, strict=True)) for run in runs]
    found, _ = values_and_gradients(kernel, given, weights)
    for name, x in found.items():
        if name == "gradient of g":
            assert (x[torch.isinf(exact["g"])] == 0).all(), "a decay of zero has a gradient"
        witness = [run[name] for run in seen]
        assert_within_budget(x, truth[name], dtype, witness=witness, name=name)


def synapse_delta_loop(
    q,
    k,
    v,
    prior,
    beta=None,
    b=None,
    g=None,
    e=None,
    evidence=None,
    h=None,
    j=None,
    *,
    gain="first_order",
    correction="full",
    base="decayed",
    uncertainty=False,
    cu_seqlens=None,
):
    """The delta rule with an importance per synapse; h is the mean mu."""
    HV, V = v.shape[2:]
    e, evidence = (k if x is None else x for x in (e, evidence))
    q, k, e, evidence = (per_head(x, HV) for x in (q, k, e, evidence))
    prior = spread_prior(prior)
    beta = torch.ones_like(v) if beta is None else beta

    def step(i, t, mu, j):
        key, query, eraser, seen = (x[i, t][..., None] for x in (k, q, e, evidence))
        a, rate, value = decay(g, i, t, mu), beta[i, t][:, None], v[i, t][:, None]
        predicted = a * j
        if b is None:
            new_j, before = j * 0, a * mu
            predicted = new_j
        else:
            new_j = predicted + seen**2 * b[i, t][:, None]
            before = a * (j + prior) / (predicted + prior) * mu
        source = before if base == "decayed" else mu
        error = value - (source * eraser).sum(1, keepdim=True)
        if gain == "first_order":
            new = before + key / (new_j + prior) * rate * error
        else:
            certain = predicted + prior
            total = 1 + rate * (key**2 / certain).sum(1, keepdim=True)
            if gain == "exact_rate":
                length = key.square().sum(1, keepdim=True)
                s = rate * length
                # No 0 / 0 where a key is zero, nor its gradient.
                unit = length.where(s >= 1, torch.ones_like(length))
                total = torch.where(
                    s < 1, total - s, (key**2 / certain).sum(1, keepdim=True) / unit
                )
            strength = key / certain * rate / total
            if correction == "full":
                new = before + strength * error
            else:
                new = before * (1 - key * strength) + strength * value
        o = (query * new).sum(1)
        return new, new_j, (o, (query**2 / (new_j + prior)).sum(1))

    (o, u), mu, j = walk_two(v, (HV, k.shape[3], V), h, j, cu_seqlens, step)
    found = {"output": o, "final mu": mu, "final J": j}
    return found | {"uncertainty": u} if uncertainty else found


def synapse_delta_operands(
    *sizes: int, frozen: bool = False, own_keys: bool = False, **options
) -> Operands:
    """Random float64 operands with keys of about length one, so that the delta rule is stable."""
    found = synapse_operands(*sizes, **options)
    K = sizes[4]
    found["k"] = found["k"] / K**0.5
    found["v"] = found.pop("w")
    found["beta"] = torch.rand_like(found["v"])
    found["e"] = found["k"] * torch.rand_like(found["k"]) if own_keys else None
    found["evidence"] = torch.randn_like(found["k"]) if own_keys else None
    found["prior"] = found["prior"] + 1
    if frozen:
        found["b"] = None
        if found["j"] is not None:
            found["j"] = found["j"] * 0
    return found
