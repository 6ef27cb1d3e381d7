"""Operands of the operations on their way to the kernels: checks, defaults and room for results."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .common import interpreting, recording

Record = TypeVar("Record", bound=Any)


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Refuse an option that is not one of the accepted ones."""
    if value not in accepted:
        *most, last = map(repr, accepted)
        raise ValueError(f"{name}: got {value!r}; accepted are {', '.join(most)} and {last}")


def check_device(name: str, x: Tensor) -> None:
    """Refuse what the kernels cannot run: float64, bf16 in the interpreter, CPU without it."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name}: got dtype {x.dtype}; the kernels accept float32, float16 and bfloat16"
        )
    if recording() or x.device.type == "meta":
        return
    if interpreting():
        if x.dtype == torch.bfloat16:
            raise TypeError(
                f"{name}: got bfloat16, which Triton's interpreter computes wrongly; "
                "use float16 or float32"
            )
    elif x.device.type != "cuda":
        raise ValueError(
            f"{name}: got a tensor on {x.device}; "
            "the kernels run on a GPU (or with TRITON_INTERPRET=1)"
        )


def _check_packing(batch: int, cu_seqlens: Tensor | None) -> int:
    """Number of sequences."""
    if cu_seqlens is None:
        return batch
    if batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int64:
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} with B = {batch}; "
            "expected int64 [N + 1] with B = 1"
        )
    return cu_seqlens.shape[0] - 1


def check_keys(name: str, x: Tensor, B: int, T: int, HV: int, K: int) -> None:
    """Refuse keys or queries of another shape."""
    if x.ndim != 4 or x.shape[:2] != (B, T) or HV % x.shape[2] or x.shape[3] != K:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}; "
            f"expected [{B}, {T}, H, {K}] with H a divisor of {HV}"
        )
    if not 1 <= K <= 256:
        raise ValueError(f"{name}: got key size {K}; the kernels accept 1 to 256")


def _check_gate(g: Tensor | None, B: int, T: int, HV: int, K: int) -> None:
    if g is not None and tuple(g.shape) not in ((B, T, HV), (B, T, HV, K)):
        raise ValueError(f"g: got shape {tuple(g.shape)}; expected {(B, T, HV)} or {(B, T, HV, K)}")


def check_operands(
    w: Tensor,
    keys: Mapping[str, Tensor],
    g: Tensor | None,
    states: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse operands whose shapes do not fit w [B, T, HV, V], naming the first that does not."""
    if w.ndim != 4:
        raise ValueError(f"w: got shape {tuple(w.shape)}; expected [B, T, HV, V]")
    B, T, HV, V = w.shape
    check_device("w", w)
    if not 1 <= V <= 256:
        raise ValueError(f"w: got value size {V}; the kernels accept 1 to 256")
    K = next(iter(keys.values())).shape[-1]
    for name, x in keys.items():
        check_keys(name, x, B, T, HV, K)
    _check_gate(g, B, T, HV, K)
    shape = (_check_packing(B, cu_seqlens), HV, K, V)
    for state in states:
        check_state(state, shape)


def check_factors(w: Tensor, **factors: Tensor | None) -> None:
    """Refuse what multiplies tokens and is not one number for each of w's [B, T, HV]."""
    for name, x in factors.items():
        if x is not None:
            if x.shape != w.shape[:3]:
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}; expected {tuple(w.shape[:3])}"
                )
            check_device(name, x)


def check_importance(
    k: Tensor, b: Tensor, g: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Refuse operands whose shapes do not fit b [B, T, HV], naming the first that does not."""
    if b.ndim != 3:
        raise ValueError(f"b: got shape {tuple(b.shape)}; expected [B, T, HV]")
    B, T, HV = b.shape
    check_device("k", k)
    K = k.shape[-1]
    check_keys("k", k, B, T, HV, K)
    _check_gate(g, B, T, HV, K)
    check_state(initial_state, (_check_packing(B, cu_seqlens), HV, K))


def check_riccati(
    a: Tensor,
    c: Tensor,
    d: Tensor,
    u: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse operands whose shapes do not fit u [B, T, HV, K], naming the first that does not."""
    check_device("u", u)
    if u.ndim != 4:
        raise ValueError(f"u: got shape {tuple(u.shape)}; expected [B, T, HV, K]")
    B, T, HV, K = u.shape
    check_keys("u", u, B, T, HV, K)
    for name, x in (("a", a), ("c", c), ("d", d)):
        check_device(name, x)
        if tuple(x.shape) not in ((B, T, HV, 1), (B, T, HV, K)):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; expected that of u, {tuple(u.shape)}, or "
                "that with one key"
            )
    check_state(initial_state, (_check_packing(B, cu_seqlens), HV, K))


def check_precision(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[int, int]:
    """Refuse operands of a precision matrix whose shapes do not fit beta [B, T, HV], naming the
    first that does not; give value heads and key size."""
    if beta.ndim != 3:
        raise ValueError(f"beta: got shape {tuple(beta.shape)}; expected [B, T, HV]")
    (B, T, HV), K = beta.shape, k.shape[-1]
    for name, x in (("k", k), ("beta", beta)):
        check_device(name, x)
    for name, x in (("q", q), ("k", k)):
        check_keys(name, x, B, T, HV, K)
    if g is not None and g.ndim != 3:
        raise ValueError(f"g: got shape {tuple(g.shape)}; expected {(B, T, HV)}")
    _check_gate(g, B, T, HV, K)
    _check_packing(B, cu_seqlens)
    return HV, K


def check_state(state: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse an initial state of another shape."""
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"initial_state: got shape {tuple(state.shape)}; expected {shape}")


def check_step(name: str, x: Tensor, keys: int, *states: Tensor) -> None:
    """Refuse more than one token x, and states that a step cannot update in place."""
    if x.ndim < 2 or x.shape[1] != 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; a step takes one token, T = 1")
    shape = (x.shape[0], *x.shape[2:3], keys, *x.shape[3:])
    for state in states:
        if state.dtype != torch.float32 or not state.is_contiguous() or tuple(state.shape) != shape:
            raise ValueError(
                f"state: got {state.dtype} {tuple(state.shape)}, contiguous "
                f"{state.is_contiguous()}; a step updates contiguous float32 {shape} in place"
            )


def full_prior(prior: Tensor, HV: int, K: int) -> Tensor:
    """A prior [HV] or [HV, K] as float32 [HV, K]."""
    if tuple(prior.shape) not in ((HV,), (HV, K)):
        raise ValueError(f"prior: got shape {tuple(prior.shape)}; expected {(HV,)} or {(HV, K)}")
    prior = prior.to(torch.float32)
    return prior if prior.ndim == 2 else prior.unsqueeze(1).expand(HV, K)


def spread(name: str, x: Tensor | None, v: Tensor) -> Tensor:
    """A gate [B, T, HV] or [B, T, HV, 1 or V] as v's shape; ones if None."""
    if x is None:
        return v.new_ones(()).expand(v.shape)
    if x.ndim == 3:
        x = x.unsqueeze(3)
    if x.shape[:3] != v.shape[:3] or x.shape[3] not in (1, v.shape[3]):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}; expected {tuple(v.shape[:3])}, or that with 1 or "
            f"{v.shape[3]} values"
        )
    check_device(name, x)
    return x.expand(v.shape)


def prepare(
    x: Record, dtype: torch.dtype | None = None, low: Sequence[str] = (), wide: Sequence[str] = ()
) -> Record:
    """A record whose tensors are contiguous, those named in `low` of dtype, in `wide` float32."""
    names = x._fields
    values = [y.contiguous() if isinstance(y, Tensor) else y for y in x]
    for name in (*low, *wide):
        i = names.index(name)
        if values[i] is not None:
            values[i] = values[i].to(dtype if name in low else torch.float32)
    return type(x)._make(values)


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences tokens x [B, T, ..] are."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def as_result(x: Tensor) -> Tensor:
    """Room for a result of x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def final_state(w: Tensor, keys: int, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the final state [N, HV, K, V], or [N, HV, K] without values in w."""
    shape = (sequences(w, cu_seqlens), w.shape[2], keys, *w.shape[3:])
    return w.new_empty(shape, dtype=torch.float32)


def given_or_zeros(x: Tensor | None, room: Tensor) -> Tensor:
    """A gradient, zeros in `room` where nothing depends on what it is of."""
    return room.zero_() if x is None else x.contiguous()


def is_step(w: Tensor, cu_seqlens: Tensor | None, keep: bool) -> bool:
    """Return whether a call is one token of decoding, of which nobody wants a gradient."""
    return w.shape[1] == 1 and cu_seqlens is None and not keep


def own_state(initial: Tensor | None, w: Tensor, keys: int) -> Tensor:
    """A state of its own for a step to update: a copy of `initial`, or zeros."""
    if initial is None:
        return final_state(w, keys, None).zero_()
    return initial.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
