"""The one operation that users call: any variant's recurrence on activated operands."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glazoo.engines import Engine, pick, prepare
from glazoo.engines.call import Call, Given, TokenRun
from glazoo.program import Operand, Program, lower
from glazoo.spec import Gate, Spec
from glazoo.state import Output, OutputWithUncertainty, State
from glazoo.zoo import load

__all__ = ["attention", "schedule", "warned"]


Operation = TypeVar("Operation", bound=Callable[..., Any])


@overload
def attention(
    spec: str | Path | Spec,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    b: Tensor | None = None,
    prior: Tensor | float | None = None,
    erase: Tensor | None = None,
    p: Tensor | None = None,
    removal: Tensor | None = None,
    u: Tensor | None = None,
    trap: Tensor | None = None,
    g_importance: Tensor | None = None,
    noise: Tensor | None = None,
    basis: Tensor | None = None,
    mix: Tensor | None = None,
    center: Tensor | float | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    output_uncertainty: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Output: ...
@overload
def attention(
    spec: str | Path | Spec,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    b: Tensor | None = None,
    prior: Tensor | float | None = None,
    erase: Tensor | None = None,
    p: Tensor | None = None,
    removal: Tensor | None = None,
    u: Tensor | None = None,
    trap: Tensor | None = None,
    g_importance: Tensor | None = None,
    noise: Tensor | None = None,
    basis: Tensor | None = None,
    mix: Tensor | None = None,
    center: Tensor | float | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    output_uncertainty: Literal[True],
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> OutputWithUncertainty: ...
def attention(
    spec: str | Path | Spec,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B nT H K"] | None,
    v: Float[Tensor, "B nT HV V"],
    *,
    g: Float[Tensor, "..."] | None = None,
    beta: Float[Tensor, "B nT HV *V"] | None = None,
    b: Float[Tensor, "B nT HV *V"] | None = None,
    prior: Float[Tensor, "..."] | float | None = None,
    erase: Float[Tensor, "B T HV K"] | None = None,
    p: Float[Tensor, "B nT H K"] | None = None,
    removal: Float[Tensor, "B T HV K"] | None = None,
    u: Float[Tensor, "HV K"] | None = None,
    trap: Float[Tensor, "B T HV"] | None = None,
    g_importance: Float[Tensor, "B T HV"] | None = None,
    noise: Float[Tensor, "B T HV *K"] | None = None,
    basis: Float[Tensor, "H K K"] | None = None,
    mix: Float[Tensor, "B T HV"] | None = None,
    center: Float[Tensor, "..."] | float | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    output_uncertainty: bool = False,
    cu_seqlens: Int[Tensor, "N1"] | None = None,
    impl: str = "auto",
) -> Output | OutputWithUncertainty:
    """Runs the recurrence of a spec on activated operands.

        decay     a  = exp(g)
        predict   J' = a J                   mu' = (a I_prev / (J' + I_p)) mu_prev
        observe   J  = J' + b k^2            I = J + I_p
        correct   mu = mu' + write - erase
        read      y  = mu^T (scale q)        uncertainty = sum_k (scale q)_k^2 / I_k

    `glazoo show NAME` (or `glazoo.lower(spec)`) prints the recurrence of a variant and the operands
    that it takes. An operand that it does not take is an error. q and k come normalised and mapped
    as the variant's layer does; the operation applies no norm. Value head j reads query/key head j
    // (HV / H).

    Args:
        spec: name of a variant, path of a spec file, or a `Spec`.
        q: [B, T, H, K], queries; any floating dtype.
        k: [B, T, H, K], keys; None where the spec ties them to the decay. Specs with n writes per
            token take n T keys, values and gates, a token's writes side by side.
        v: [B, T, HV, V], values; the output has this dtype.
        g: natural logarithm of the decay, <= 0, -inf allowed: [B, T, HV], [B, T, HV, K], or [HV]
            for fixed schedules (default: the schedule at the first layer).
        beta: write gate, >= 0, activated: [B, T, HV] or [B, T, HV, V].
        b: importance gate, >= 0, activated: [B, T, HV], or [B, T, HV, V] for one importance per
            synapse.
        prior: prior importance I_p > 0: a number, [HV] or [HV, K]. Default: the spec's.
        erase: erase gate on the predicting key, [B, T, HV, K].
        p: erase key, [B, T, H, K].
        removal: removal gate (r in formulas), [B, T, HV, K].
        u: same-token bonus, [HV, K].
        trap: weight of the current tap in [0, 1], [B, T, HV].
        g_importance: importance's own log decay, <= 0, [B, T, HV].
        noise: variance >= 0 that a token adds to that of every key, [B, T, HV] or [B, T, HV, K];
            > 0 where exp(g) is 0.
        basis: orthogonal matrices R, [H, K, K], whose columns are the axes of the importance.
            Default: the identity.
        mix: share of the solved query in [0, 1], [B, T, HV]; the rest is the query itself.
        center: center of the preconditioner, a number or [HV].
        scale: factor on q. Default: the spec's.
        initial_state: state of the N sequences before the first token; default: nothing written.
        output_final_state: whether to give the state after the last token.
        output_uncertainty: whether to give the posterior variance of the output.
        cu_seqlens: [N + 1], int: packed sequences, B = 1; sequence n has tokens cu_seqlens[n] to
            cu_seqlens[n + 1] - 1 and may be empty.
        impl: "reference" (token by token, the definition), "chunked" (matrix products, any device),
            "compiled" (a CPU with numba, `pip install 'glazoo[cpu]'`: chunked, with compiled loops
            for what no matrix product expresses), "traceable" (plain ATen operations, one scan
            over tokens in a captured graph: for ONNX and other programs that run graphs), "triton"
            (GPU kernels), "fla" (the kernels of flash-linear-attention, for the recurrences that it
            has), or "auto": compiled where it runs, else chunked, which serves every spec and
            device.

    Returns:
        `Output(output, final_state)`, with a third field `uncertainty` if asked for. Arithmetic and
        state are float64 if any operand is float64, float32 otherwise.

    Raises:
        ValueError: an operand is missing, not taken by the spec, or has a wrong shape, dtype,
            device or domain; the engine does not serve the call.
        TypeError: an operand is not a tensor.

    Reference: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based Models,
    arXiv:2602.09075.
    """
    compiling = torch.compiler.is_compiling()
    program = _PROGRAMS[_captured(spec)] if compiling else lower(load(spec))
    given = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "b": b,
        "prior": prior,
        "erase": erase,
        "p": p,
        "removal": removal,
        "u": u,
        "trap": trap,
        "g_importance": g_importance,
        "noise": noise,
        "basis": basis,
        "mix": mix,
        "center": center,
    }
    options = (scale, initial_state, cu_seqlens, output_uncertainty)
    key = None
    if not compiling and cu_seqlens is None:
        key = _like(program, given, scale, initial_state, output_uncertainty, impl)
    known = None if key is None else _known(key, program, given, options, impl)
    result = None
    if known is not None and known.token is not None:
        result = known.token(given, initial_state)
    if result is None:
        if known is None:
            call = validated(program, given, *options)
        else:
            call = known.call_of(given, initial_state)
        engine: Engine = pick(impl, call)
        result = engine(call)
    output = result.output.to(v.dtype)
    final = result.state if output_final_state else None
    if output_uncertainty:
        assert result.uncertainty is not None
        return OutputWithUncertainty(output, final, result.uncertainty)
    return Output(output, final)


# Graph capture follows the properties and methods of an object that it finds in a list, but not
# those of one that a function gave it: so the function gives the place in the list.
_PROGRAMS: list[Program] = []


def _for_people(function: Operation) -> Operation:
    """Return the operation with a look at what only people get wrong, and layers do not: gates out
    of their domain, and a layout with heads before tokens, of which it warns.

    Both layouts have four axes, and gates may follow the same mistake, so that nothing else shows
    it. A few tokens and many heads are no mistake, though: layers, which know their layout, call
    the operation without it, and continuations and single tokens are not looked at.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        q = args[1] if len(args) > 1 else kwargs.get("q")
        fresh = kwargs.get("initial_state") is None and kwargs.get("cu_seqlens") is None
        # A warning breaks a compiled graph.
        looked_at = fresh and not torch.compiler.is_compiling()
        if looked_at and isinstance(q, Tensor) and q.ndim == 4 and 1 < q.shape[1] < q.shape[2]:
            _, tokens, heads, _ = q.shape
            warnings.warn(
                f"q: got shape {list(q.shape)}, that is {tokens} tokens and {heads} heads: fewer "
                "tokens than heads. The layout is [B, T, H, K]; if yours is [B, H, T, K], "
                "transpose(1, 2) every operand",
                stacklevel=2,
            )
        spec = args[0] if args else kwargs.get("spec")
        if spec is not None and not torch.compiler.is_compiling():
            check_domains(lower(load(spec)), kwargs)
        return function(*args, **kwargs)

    return cast(Operation, call)


warned = _for_people(attention)
"""What `glazoo.attention` is."""


def _captured(spec: str | Path | Spec) -> int:
    program = lower(load(spec))
    if program not in _PROGRAMS:
        _PROGRAMS.append(program)
    return _PROGRAMS.index(program)


# What `torch.compiler.assume_constant_result` does, which first imports the whole compiler: most of
# the time that `import glazoo` took.
_captured._dynamo_marked_constant = True  # type: ignore[attr-defined]


def schedule(gate: Gate, heads: int, *, layer: int = 0, layers: int = 1) -> Float[Tensor, "HV"]:
    """Return the log decays of a fixed schedule.

        one_minus_power_of_two   g_h = log(1 - 2^(-5 - h))
        alibi_depth              g_h = -2^(-8 (h + 1) / H) (1 - layer / (layers - 1 + 1e-5) + 1e-5)

    Args:
        gate: a gate with `source = "fixed"`.
        heads: number of value heads H.
        layer: index of the layer, from 0.
        layers: number of layers.

    Returns:
        [HV], float64, <= 0.

    Raises:
        ValueError: the gate has no schedule.
    """
    h = torch.arange(heads, dtype=torch.float64)
    if gate.schedule == "one_minus_power_of_two":
        return torch.log1p(-torch.exp2(-5 - h))
    if gate.schedule == "alibi_depth":
        return -torch.exp2(-8 * (h + 1) / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    raise ValueError(f"gate: its source is {gate.source!r}, and only a fixed gate has a schedule")


def validated(
    program: Program,
    given: Given,
    scale: float | None,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    uncertainty: bool,
) -> Call:
    """Return the call of operands by name, None where they are not given, once it is valid."""
    spec = program.spec
    taken = ", ".join(o.name for o in program.operands)
    for name, x in given.items():
        operand = program.operand(name)
        if operand is None and x is not None:
            raise ValueError(f"{name}: {spec.name!r} does not take it; it takes {taken}")
        if operand is not None and operand.required and x is None:
            raise ValueError(
                f"{name}: {spec.name!r} needs it ({operand.meaning}, {operand.shown()}, "
                f"{operand.domain}); it takes {taken}"
            )
    q, v = given["q"], given["v"]
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, accepted is a torch.Tensor")
        if x.ndim != 4:
            raise ValueError(
                f"{name}: got {x.ndim} dimensions {list(x.shape)}, "
                "accepted is [B, T, heads, channels]"
            )
    assert isinstance(q, Tensor)
    assert isinstance(v, Tensor)
    (batch, tokens, heads, key_size), (value_heads, value_size) = q.shape, v.shape[2:]
    if heads == 0 or value_heads % heads:
        raise ValueError(
            f"v: its {value_heads} heads are not a multiple of the {heads} heads of q; "
            "value head j reads key head j // (HV / H)"
        )
    sizes = {
        "B": batch,
        "T": tokens,
        "nT": spec.substeps * tokens,
        "H": heads,
        "HV": value_heads,
        "K": key_size,
        "V": value_size,
        "1": 1,
    }
    operands: dict[str, Tensor] = {}
    for operand in program.operands:
        x = given[operand.name]
        if x is not None:
            operands[operand.name] = _checked(operand, x, sizes, q)
    compute_dtype = torch.float32
    for x in operands.values():
        compute_dtype = torch.promote_types(compute_dtype, x.dtype)
    for operand in program.operands:
        if not operand.per_token:
            x = operands.get(operand.name)
            if x is None:
                x = _default(operand, spec, sizes).to(q.device, compute_dtype)
            operands[operand.name] = _per_head(operand, x, sizes[operand.shapes[-1][0]])
    if uncertainty and not spec.has_variance:
        raise ValueError(
            f"output_uncertainty: {spec.name!r} uses importance to rescale its write key, "
            "which defines no posterior variance"
        )
    sequences = count_sequences(cu_seqlens, batch, tokens)
    _check_state(program, initial_state, sizes | {"N": sequences}, q)
    if scale is None:
        scale = spec.scale(key_size)
    elif not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}, accepted is a finite number")
    if initial_state is not None:
        compute_dtype = torch.promote_types(compute_dtype, initial_state.memory.dtype)
    return Call(
        program, operands, float(scale), initial_state, cu_seqlens, uncertainty, compute_dtype
    )


def _per_head(operand: Operand, x: Tensor, heads: int) -> Tensor:
    """A number per head, and on the right whatever broadcasts over channels."""
    trailing = (2 if operand.role == "prior" else len(operand.shapes[-1])) - x.ndim
    if trailing:
        x = x.reshape(*x.shape, *[1] * trailing)
    return x if x.shape[0] == heads else x.expand(heads, *x.shape[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """A call that was valid: what calls like it do not find out again."""

    call: Call
    """Of its tensors only what every call has alike: defaults and numbers, as small as heads are
    many."""
    token: TokenRun | None
    """What runs a token of decoding, where the engine has it in one piece."""

    def call_of(self, given: Given, state: State | None) -> Call:
        """Return the call of other operands."""
        known, operands = self.call, dict(self.call.operands)
        for operand in known.program.operands:
            x = given[operand.name]
            if isinstance(x, Tensor):
                if not operand.per_token:
                    heads = cast(Tensor, given["v" if operand.shapes[-1][0] == "HV" else "q"])
                    x = _per_head(operand, x, heads.shape[2])
                operands[operand.name] = x
        return Call(
            known.program,
            operands,
            known.scale,
            state,
            None,
            known.uncertainty,
            known.compute_dtype,
        )


# Calls that were valid, by all that validity depends on: a token of decoding is the call before it.
_KNOWN: dict[tuple[Any, ...], _Known] = {}
_MOST = 256


def _known(key: tuple[Any, ...], program: Program, given: Given, options: Any, impl: str) -> _Known:
    """Validate a call, or find that one like it was valid."""
    known = _KNOWN.get(key)
    if known is None:
        call = validated(program, given, *options)
        alike = {n: x for n, x in call.operands.items() if not isinstance(given[n], Tensor)}
        kept = dataclasses.replace(call, operands=alike, initial_state=None)
        known = _Known(kept, prepare(impl, call, given))
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = known
    return known


def _like(
    program: Program, given: Given, scale: Any, state: Any, uncertainty: bool, impl: Any
) -> tuple[Any, ...] | None:
    """Return what the validity of a call depends on besides values, None where it is too much."""
    if not isinstance(impl, str) or not (scale is None or type(scale) in (int, float)):
        return None
    if not (state is None or isinstance(state, State)):
        return None
    parts: list[Any] = [id(program), scale, uncertainty, impl, state is None]
    for x in given.values() if state is None else (*given.values(), *state):
        if x is None:
            parts.append(None)
        elif isinstance(x, Tensor):
            parts += (x.shape, x.dtype, x.device)
        elif type(x) is float or type(x) is int:
            parts.append(x)
        else:
            return None
    return tuple(parts)


def _default(operand: Operand, spec: Spec, sizes: Mapping[str, int]) -> Tensor:
    if operand.default == "schedule":
        return schedule(spec.decay, sizes["HV"])
    if operand.default == "identity":
        return torch.eye(sizes["K"], dtype=torch.float64).expand(sizes["H"], -1, -1)
    assert operand.default is not None
    return torch.tensor(operand.default, dtype=torch.float64)


def _checked(operand: Operand, x: Tensor | float, sizes: Mapping[str, int], q: Tensor) -> Tensor:
    name = operand.name
    if isinstance(x, int | float) and () in operand.shapes:
        x = torch.tensor(
            float(x), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
        )
        _check_domain(operand, x)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, accepted is a torch.Tensor")
    if not x.is_floating_point():
        raise ValueError(f"{name}: got dtype {x.dtype}, accepted are floating point dtypes")
    if x.device != q.device:
        raise ValueError(f"{name}: it is on {x.device}, but q is on {q.device}")
    wanted = [tuple(sizes[d] for d in s) for s in operand.shapes]
    if tuple(x.shape) not in wanted:
        raise ValueError(
            f"{name}: got shape {list(x.shape)}, accepted is {operand.shown()} = "
            + " or ".join(str(list(w)) for w in wanted)
        )
    return x


def check_domains(program: Program, given: Mapping[str, Any]) -> None:
    """Checks the values of operands where looking at them is cheap."""
    for operand in program.operands:
        x = given.get(operand.name)
        if isinstance(x, Tensor) and x.is_floating_point():
            _check_domain(operand, x)


# Largest entry of R^T R - 1 that passes for rounding, of a basis in bfloat16 as well.
_ORTHOGONAL = 0.02


def _check_domain(operand: Operand, x: Tensor) -> None:
    """Checks values where looking at them is cheap: on a CPU, outside of graph capture."""
    bounded = operand.low > -math.inf or operand.high < math.inf or operand.role == "basis"
    if not bounded or x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return
    if operand.role == "basis":
        if x.ndim != 3 or x.shape[1] != x.shape[2]:
            return  # which is another error
        turn = x.detach().double()
        far = (turn.mT @ turn - torch.eye(x.shape[-1], dtype=turn.dtype)).abs().max().item()
        if not far < _ORTHOGONAL:
            raise ValueError(
                f"{operand.name}: its columns are not orthogonal and of length 1 (R^T R differs "
                f"from the identity by up to {far:.2g}, accepted is {_ORTHOGONAL})"
            )
        return
    low, high = (y.item() for y in (x.detach() if x.requires_grad else x).aminmax())
    if low < operand.low or high > operand.high or (operand.open and low == operand.low):
        raise ValueError(
            f"{operand.name}: got values from {low:.4g} to {high:.4g}, "
            f"accepted are {operand.domain}"
        )


def count_sequences(cu_seqlens: Tensor | None, batch: int, tokens: int) -> int:
    """Checks the bounds of packed sequences and gives the number of sequences."""
    if cu_seqlens is None:
        return batch
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError("cu_seqlens: accepted is a tensor [N + 1] with N >= 1 sequences")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, accepted are int32 and int64")
    if batch != 1:
        raise ValueError(f"cu_seqlens: packed sequences have B = 1, but q has B = {batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"cu_seqlens: got {bounds}, accepted is 0 = c_0 <= c_1 <= ... <= c_N = T = {tokens}"
            )
    return len(cu_seqlens) - 1


def _check_state(
    program: Program, state: State | None, sizes: Mapping[str, int], q: Tensor
) -> None:
    if state is None:
        return
    if not isinstance(state, State):
        raise TypeError(f"initial_state: got {type(state).__name__}, accepted is a glazoo.State")
    parts = {p.name: p for p in program.state}
    for name, x in state._asdict().items():
        if name not in parts:
            if x is not None:
                raise ValueError(
                    f"initial_state.{name}: {program.spec.name!r} has no such part; "
                    f"it has {', '.join(parts)}"
                )
            continue
        wanted = tuple(sizes[d] for d in parts[name].shape)
        if x is None:
            raise ValueError(
                f"initial_state.{name}: missing; {program.spec.name!r} needs it "
                f"with shape {list(wanted)}"
            )
        if tuple(x.shape) != wanted:
            shape = "[" + ", ".join(parts[name].shape) + "]"
            raise ValueError(
                f"initial_state.{name}: got shape {list(x.shape)}, "
                f"accepted is {shape} = {list(wanted)}"
            )
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"initial_state.{name}: got dtype {x.dtype}, accepted are float32 and float64"
            )
        if x.device != q.device:
            raise ValueError(f"initial_state.{name}: it is on {x.device}, but q is on {q.device}")
