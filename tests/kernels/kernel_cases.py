"""Per-token loops in plain torch, operands, and the comparison that kernel tests share."""

import itertools
from collections.abc import Callable, Sequence

import torch
from budget import assert_within_budget, witnesses
from torch import Tensor

Loop = Callable[..., tuple[Tensor, Tensor]]
# A not-a-number that no arithmetic makes, in every type of float: all bits are one.
POISON = -1


def fill_with_poison(x: Tensor) -> Tensor:
    """Fill a tensor of floats with what must not be read."""
    if x.is_floating_point() and x.device.type != "meta":
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        x.view(bits[x.element_size()]).fill_(POISON)
    return x


def segments(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """(batch entry, first token, last token + 1) of every sequence."""
    if cu_seqlens is None:
        return [(i, 0, x.shape[1]) for i in range(x.shape[0])]
    ends = cu_seqlens.tolist()
    return [(0, a, b) for a, b in itertools.pairwise(ends)]


def per_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, K] as the HV value heads see it."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def decay(g: Tensor | None, i: int, t: int, like: Tensor) -> Tensor:
    """exp(g) of a token, shaped to multiply a state [HV, K, ..]."""
    if g is None:
        return like.new_ones(())
    a = g[i, t].exp()
    return a.reshape(*a.shape, *(1,) * (like.ndim - a.ndim))


def walk(
    like: Tensor,
    shape: tuple[int, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    step: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Outputs of step(batch entry, token, state) -> (state, output) over every sequence."""
    outputs, finals = [], []
    for n, (i, start, end) in enumerate(segments(like, cu_seqlens)):
        state = like.new_zeros(shape) if initial_state is None else initial_state[n]
        for t in range(start, end):
            state, y = step(i, t, state)
            outputs.append(y)
        finals.append(state)
    y = torch.stack(outputs) if outputs else None
    return y, torch.stack(finals)


def times(factor: Tensor | None, x: Tensor) -> Tensor:
    """A gate [B, T, HV], or none, times tokens."""
    return x if factor is None else factor[..., None] * per_head(x, factor.shape[2])


def linear_loop(
    q, k, w, g=None, beta=None, initial_state=None, *, scale=1.0, read="post", cu_seqlens=None
):
    """S = Diag(exp g) S + k (beta w)^T, o = scale S^T q."""
    B, T, HV, V = w.shape
    q, k, w = per_head(q, HV) * scale, per_head(k, HV), times(beta, w)

    def step(i, t, s):
        new = decay(g, i, t, s) * s + k[i, t][..., None] * w[i, t][:, None, :]
        return new, torch.einsum("hkv,hk->hv", new if read == "post" else s, q[i, t])

    o, final = walk(w, (HV, k.shape[3], V), initial_state, cu_seqlens, step)
    return (w * 0 if o is None else o.reshape(B, T, HV, V)), final


def delta_loop(
    q,
    e,
    k,
    w,
    g=None,
    beta=None,
    erase=None,
    initial_state=None,
    *,
    scale=1.0,
    base="decayed",
    cu_seqlens=None,
):
    """S' = Diag(exp g) S, S = S' + k (beta w - erase X^T e)^T, o = scale S^T q; e is k if None."""
    B, T, HV, V = w.shape
    q, k, w = per_head(q, HV) * scale, per_head(k, HV), times(beta, w)
    e = per_head(times(erase, k if e is None else e), HV)

    def step(i, t, s):
        decayed = decay(g, i, t, s) * s
        x = decayed if base == "decayed" else s
        u = w[i, t] - torch.einsum("hkv,hk->hv", x, e[i, t])
        new = decayed + k[i, t][..., None] * u[:, None, :]
        return new, torch.einsum("hkv,hk->hv", new, q[i, t])

    o, final = walk(w, (HV, k.shape[3], V), initial_state, cu_seqlens, step)
    return (w * 0 if o is None else o.reshape(B, T, HV, V)), final


def importance_loop(k, b, g=None, initial_state=None, *, cu_seqlens=None):
    """J = exp(g) J + b k^2."""
    B, T, HV = b.shape
    k = per_head(k, HV)

    def step(i, t, j):
        new = decay(g, i, t, j) * j + b[i, t][:, None] * k[i, t] ** 2
        return new, new

    j, final = walk(k, (HV, k.shape[3]), initial_state, cu_seqlens, step)
    return (k * 0 if j is None else j.reshape(B, T, HV, -1)), final


def riccati_loop(a, c, d, u, initial_state=None, *, cu_seqlens=None):
    """z = a z / (c z + d) + u."""

    def step(i, t, z):
        new = a[i, t] * z / (c[i, t] * z + d[i, t]) + u[i, t]
        return new, new

    z, final = walk(u, u.shape[2:], initial_state, cu_seqlens, step)
    return (u * 0 if z is None else z.reshape(u.shape)), final


def riccati_operands(
    B: int,
    T: int,
    HV: int,
    K: int,
    *,
    gate: str = "head",
    resets: bool = False,
    strong: bool = False,
    state: bool = True,
    sequences: int | None = None,
) -> dict[str, Tensor | None]:
    """A fraction of the state that keeps the prior, or, without a gate, what adds a noise."""
    torch.manual_seed(0)
    g = make_gate("head" if gate == "none" else gate, (B, T, HV, K), resets, strong)
    keep = g.exp() if gate == "key" else g.exp().unsqueeze(3)
    one = torch.ones_like(keep)
    added = 0.1 + torch.rand(B, T, HV, 1 if gate == "none" else K, dtype=torch.float64)
    found: dict[str, Tensor | None] = {"a": keep, "c": (1 - keep) * added, "d": one}
    if gate == "none":
        found = {"a": one, "c": added, "d": keep}
    found["u"] = torch.rand(B, T, HV, K, dtype=torch.float64)
    shape = sequences or B, HV, K
    found["initial_state"] = torch.rand(shape, dtype=torch.float64) if state else None
    return found


def solve_loop(q, k, beta, prior, g=None, initial_state=None, *, cu_seqlens=None):
    """H = a H + beta k k^T, x = (H + Lambda)^-1 q."""
    HV, K = beta.shape[2], k.shape[3]
    q, k = per_head(q, HV), per_head(k, HV)
    floor = torch.diag_embed(prior.reshape(HV, -1).expand(HV, K))

    def step(i, t, matrix):
        key = k[i, t][..., None]
        new = decay(g, i, t, matrix) * matrix + beta[i, t][:, None, None] * key * key.mT
        return new, torch.linalg.solve(new + floor, q[i, t])

    x, final = walk(beta, (HV, K, K), initial_state, cu_seqlens, step)
    return (q * 0 if x is None else x.reshape(q.shape)), final


def solve_operands(
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    *,
    gate: str = "head",
    resets: bool = False,
    state: bool = True,
    sequences: int | None = None,
) -> dict[str, Tensor | None]:
    """Keys of about length one and a well-conditioned matrix."""
    torch.manual_seed(0)
    q, k = torch.randn(2, B, T, H, K, dtype=torch.float64)
    found: dict[str, Tensor | None] = {"q": q, "k": k / K**0.5}
    found["beta"] = torch.rand(B, T, HV, dtype=torch.float64)
    found["prior"] = 0.5 + torch.rand(HV, K, dtype=torch.float64)
    found["g"] = make_gate(gate, (B, T, HV, K), resets, False)
    root = torch.randn(sequences or B, HV, K, K, dtype=torch.float64)
    found["initial_state"] = root @ root.mT / K if state else None
    return found


def symmetric(function: Callable) -> Callable:
    """The initial matrix as a symmetric function of a leaf: only then do its gradients mean the
    same."""

    def of_leaf(initial_state: Tensor | None = None, **x: Tensor | None) -> object:
        m = initial_state
        return function(initial_state=None if m is None else (m + m.mT) / 2, **x)

    return of_leaf


def make_gate(kind: str, shape: Sequence[int], resets: bool, strong: bool) -> Tensor | None:
    """A log decay "none", "head" or "key"; about one in six exactly zero with `resets`."""
    if kind == "none":
        return None
    g = -torch.rand(shape if kind == "key" else shape[:3], dtype=torch.float64)
    g = g * (30 if strong else 0.5)
    return g.masked_fill(torch.rand(g.shape) < 0.17, -torch.inf) if resets else g


def make_operands(
    names: str,
    B: int,
    T: int,
    heads: dict[str, int],
    K: int,
    V: int,
    *,
    gate: str = "head",
    resets: bool = False,
    strong: bool = False,
    state: bool = True,
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random float64 operands by name: of "qekwb", with g and initial_state; with w and a gate of
    decays also the gates of w and e.

    Every length of a key is about one, and e is shorter than k, so that a delta rule is stable.
    """
    torch.manual_seed(seed)
    HV = heads["w"]
    found: dict[str, Tensor | None] = {}
    for name in names:
        if name == "b":
            found[name] = torch.rand(B, T, HV, dtype=torch.float64)
        elif name == "w":
            found[name] = torch.randn(B, T, HV, V, dtype=torch.float64)
        else:
            x = torch.randn(B, T, heads.get(name, HV), K, dtype=torch.float64)
            x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            found[name] = x * torch.rand(*x.shape[:3], 1, dtype=torch.float64) if name == "e" else x
    found["g"] = make_gate(gate, (B, T, HV, K), resets, strong)
    for name, of in (("beta", "w"), ("erase", "e")):
        if of in names:
            factor = torch.rand(B, T, HV, dtype=torch.float64)
            found[name] = None if gate == "none" else factor
    shape = (sequences or B, HV, K) if "b" in names else (sequences or B, HV, K, V)
    found["initial_state"] = torch.randn(shape, dtype=torch.float64) if state else None
    return found


FACTORS = ("beta", "erase", "prior", "initial_state")
"""Names of operands that are float32 whatever the dtype of tokens, longer than a letter."""


def in_dtype(operands: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Operands as a caller has them: gates and states float32, the others in dtype."""
    return {
        name: None
        if x is None
        else x.to(torch.float32 if name in (*"gbacduj", *FACTORS) else dtype)
        for name, x in operands.items()
    }


def values_and_gradients(
    function: Loop, operands: dict[str, Tensor | None], weights: Sequence[Tensor] | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Output, final state, the gradient of every operand, and the outputs' weights in the loss."""
    leaves = {
        k: None if x is None else x.detach().clone().requires_grad_() for k, x in operands.items()
    }
    o, final = function(**leaves)
    if weights is None:
        weights = [torch.randn(x.shape, dtype=torch.float64, device=x.device) for x in (o, final)]
    loss = sum((x * y.to(x.dtype)).sum() for x, y in zip((o, final), weights, strict=True))
    wanted = {k: x for k, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    found = {"output": o.detach(), "final state": final.detach()}
    return found | {f"gradient of {k}": x for k, x in zip(wanted, grads, strict=True)}, list(
        weights
    )


def assert_matches_loop(
    kernel: Loop,
    loop: Loop,
    operands: dict[str, Tensor | None],
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """Forward and every gradient of a kernel against its float64 loop, within budget.

    The outputs' weights in the loss are rounded to what the kernel's outputs can hold, so that both
    sides differentiate the same function. A gate of -inf must get a gradient of exactly zero.
    """
    given = {k: None if x is None else x.to(device) for k, x in in_dtype(operands, dtype).items()}
    exact = {k: None if x is None else x.double() for k, x in given.items()}
    _, weights = values_and_gradients(loop, exact)
    weights = [weights[0].to(dtype).double(), weights[1].float().double()]
    truth, _ = values_and_gradients(loop, exact, weights)

    names = [k for k, x in exact.items() if x is not None]

    def plain(*xs: Tensor) -> list[Tensor]:
        absent = {k: None for k in exact if k not in names}
        low = [x.to(torch.float32) for x in weights]
        given = dict(zip(names, (x.to(device) for x in xs), strict=True)) | absent
        return list(values_and_gradients(loop, given, low)[0].values())

    runs = witnesses(plain, [exact[k].cpu() for k in names])
    seen = [dict(zip(truth, run, strict=True)) for run in runs]
    found, _ = values_and_gradients(kernel, given, weights)
    for name, x in found.items():
        if name == "gradient of g":
            reset = torch.isinf(exact["g"])
            assert (x[reset] == 0).all(), "a decay of exactly zero has a gradient"
        witness = [run[name] for run in seen]
        assert_within_budget(x, truth[name], dtype, witness=witness, name=name)
