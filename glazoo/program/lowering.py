"""Lowering: from a spec to the recurrence program that engines run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from glazoo.program.operands import Operand, Role, operands

if TYPE_CHECKING:
    from glazoo.spec import Spec

__all__ = ["Kernel", "Program", "StatePart", "lower"]


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
    """Two linear states G and H, read through (H + Lambda)^-1."""


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of the recurrent state."""

    name: str
    shape: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Program:
    """What an engine runs: the kernel class, the operands it takes, and the state that it
    carries."""

    spec: Spec
    kernel: Kernel
    operands: tuple[Operand, ...]
    state: tuple[StatePart, ...]
    recurrence: tuple[str, ...]
    """The recurrence per head and token, in mathematical notation."""
    lowering: tuple[str, ...]
    """How the kernel's operands follow from the program's."""

    def operand(self, name: str) -> Operand | None:
        """Gives an operand by its name, or None if the program does not take it."""
        return next((o for o in self.operands if o.name == name), None)

    def role(self, role: Role) -> Operand | None:
        """Return the operand with a role, or None if the program takes none."""
        return next((o for o in self.operands if o.role == role), None)

    def state_floats(self, key_size: int, value_size: int) -> int:
        """Counts the numbers of the recurrent state per value head."""
        sizes = {"K": key_size, "V": value_size}
        total = 0
        for part in self.state:
            n = 1
            for d in part.shape:
                n *= sizes.get(d, 1)
            total += n
        return total

    def flops_per_token(self, key_size: int, value_size: int) -> int:
        """Counts multiplications, additions and divisions of the recurrent form per value head and
        token."""
        kv, kk = key_size * value_size, key_size * key_size
        per_step = {
            Kernel.LINEAR: 3 * kv,
            Kernel.DELTA: 5 * kv,
            Kernel.SYNAPSE: 6 * kv,
            Kernel.SYNAPSE_DELTA: 12 * kv,
            Kernel.FULL: 3 * kv + 3 * kk,
        }[self.kernel]
        read = {
            Kernel.SYNAPSE: 4 * kv,
            Kernel.FULL: 2 * kv + key_size**3 // 3 + 2 * kk,
        }.get(self.kernel, 2 * kv)
        importance = (
            4 * key_size
            if self.spec.metaplastic and self.kernel in (Kernel.LINEAR, Kernel.DELTA)
            else 0
        )
        return self.spec.steps.count * (per_step + importance) + read

    def describe(self) -> dict[str, Any]:
        """Gives the program as plain data, for tables and machines."""
        return {
            "name": self.spec.name,
            "kernel": str(self.kernel),
            "operands": [
                {
                    "name": o.name,
                    "role": o.role,
                    "shapes": ["[" + ", ".join(s) + "]" if s else "number" for s in o.shapes],
                    "domain": o.domain,
                    "meaning": o.meaning,
                    "required": o.required,
                    "idle": o.idle,
                    "wide": o.wide,
                }
                for o in self.operands
            ],
            "state": [
                {"name": p.name, "shape": list(p.shape), "meaning": p.meaning} for p in self.state
            ],
            "recurrence": list(self.recurrence),
            "lowering": list(self.lowering),
        }


@functools.lru_cache(maxsize=512)
def lower(spec: Spec) -> Program:
    """Lowers a spec to its program: the operands, the state and one of the kernel classes.

    A pure function of the spec's values; the name plays no part.

    Args:
        spec: any valid spec.

    Returns:
        The program.
    """
    return Program(
        spec=spec,
        kernel=_kernel(spec),
        operands=tuple(operands(spec)),
        state=tuple(_state(spec)),
        recurrence=tuple(_recurrence(spec)),
        lowering=tuple(_lowering(spec)),
    )


def _kernel(spec: Spec) -> Kernel:
    p, per_synapse = spec.posterior, spec.importance_per_synapse
    per_value_rate = spec.write.shape == "value" and spec.erase.strength == "write"
    if p.precision == "full":
        return Kernel.FULL
    if spec.hebbian:
        return Kernel.SYNAPSE if per_synapse else Kernel.LINEAR
    if per_synapse or per_value_rate:
        return Kernel.SYNAPSE_DELTA
    return Kernel.DELTA if p.correction == "full" else Kernel.LINEAR


def _state(spec: Spec) -> list[StatePart]:
    p, imp = spec.posterior, spec.importance
    if p.precision == "full":
        memory = "G, decayed sum of k (beta v)^T"
    elif imp is None:
        memory = "S, mean"
    else:
        memory = "mu, mean" if spec.memory_is_mean else "h, importance times mean"
    parts = [StatePart("memory", ("N", "HV", "K", "V"), memory)]
    if imp is not None and p.precision == "full":
        parts.append(
            StatePart("importance", ("N", "HV", "K", "K"), "H, importance above the prior")
        )
    elif imp is not None:
        per_synapse = spec.importance_per_synapse
        shape = ("N", "HV", "K", "V") if per_synapse else ("N", "HV", "K")
        parts.append(
            StatePart(
                "importance",
                shape,
                "z, log of importance" if spec.log_evidence else "J, importance above the prior",
            )
        )
    if spec.read.normalizer != "none":
        parts.append(StatePart("normalizer", ("N", "HV", "K"), "n, decayed sum of written keys"))
    if spec.steps.source == "lagged":
        parts.append(StatePart("lag_key", ("N", "H", "K"), "key of the last token"))
        parts.append(StatePart("lag_value", ("N", "HV", "V"), "value of the last token"))
    return parts


_QUERY = "(scale q_t)"


def _recurrence(spec: Spec) -> list[str]:
    """Writes the recurrence of a spec, one line per assignment."""
    p, imp, steps = spec.posterior, spec.importance, spec.steps
    a = {"none": "", "head": "a_t ", "key": "Diag(a_t) "}[spec.decay.shape]
    lines: list[str] = []
    if spec.decay.source == "fixed":
        lines.append("a_t = exp(g), fixed per head")
    elif a and spec.decay.source != "derived":
        lines.append("a_t = exp(g_t)")
    if spec.key == "one_minus_decay":
        lines.append("k_t = 1 - a_t")
    beta = {"none": "", "head": "beta_t ", "value": "beta_t (.) "}.get(spec.write.shape, "")
    if steps.source == "lagged":
        lines += [
            "two writes per token: (k_{t-1}, v_{t-1}) with beta_t (1 - trap_t), then the decay,",
            "                      then (k_t, v_t) with beta_t trap_t",
        ]
    elif steps.count > 1:
        lines.append(
            f"{steps.count} writes per token; the decay acts at the first, "
            "the read follows the last"
        )
    write = f"{beta}v_t"
    if spec.log_evidence:
        return [
            *lines,
            "z_t = log(exp(z_{t-1}) + exp(k_t));   I_t = exp(z_t)",
            "mu_t = Diag(exp(z_{t-1} - z_t)) mu_{t-1} + exp(k_t - z_t) v_t^T",
            f"y_t = mu_t^T {_QUERY}",
        ]
    if p.precision == "full":
        return [
            *lines,
            f"H_t = {a}H_{{t-1}} + beta_t k_t k_t^T",
            f"G_t = {a}G_{{t-1}} + k_t ({write})^T",
            f"y_t = G_t^T (H_t + Lambda)^-1 {_QUERY}",
        ]
    if imp is not None and imp.preconditioner is not None:
        x = imp.preconditioner
        lines.append("J_t = exp(g_importance_t) J_{t-1} + b_t k_t^2")
        lines.append(f"m_t = {x.base} ^ -softsign(log(J_t + {x.eps:g}) - center)")
    elif imp is not None:
        evidence = "b_t k_t^2" if imp.gate.shape == "head" else "k_t^2 b_t^T"
        before = "" if spec.hebbian else f";   I'_t = {a}J_{{t-1}} + I_p"
        lines.append(f"J_t = {a}J_{{t-1}} + {evidence};   I_t = J_t + I_p{before}")
    return lines + (
        _hebbian_lines(spec, a, beta, write)
        if spec.hebbian
        else _corrected_lines(spec, a, beta, write)
    )


def _hebbian_lines(spec: Spec, a: str, beta: str, write: str) -> list[str]:
    read, metaplastic = spec.read, spec.metaplastic
    at = "{t-1}" if read.when == "pre" else "t"
    s = "h" if metaplastic else "S"
    y = f"(h_{at} / I_{at})^T {_QUERY}" if metaplastic else f"S_{at}^T {_QUERY}"
    if read.bonus:
        y += f" + ((u (.) k_t) . {_QUERY}) {write}"
    lines = [f"{s}_t = {a}{s}_{{t-1}} + k_t ({write})^T"]
    if read.normalizer == "sum":
        y = f"({y}) / (n_t . {_QUERY} + {read.eps:g})"
    elif read.normalizer == "max_abs_one":
        y = f"({y}) / max(|n_t . {_QUERY}|, 1)"
    if read.normalizer != "none":
        lines.append(f"n_t = {a}n_{{t-1}} + {beta}k_t")
    return [*lines, f"y_t = {y}"]


def _corrected_lines(spec: Spec, a: str, beta: str, write: str) -> list[str]:
    p, imp, erase = spec.posterior, spec.importance, spec.erase
    reciprocal = imp is not None and imp.preconditioner is None
    mu = "mu" if imp is not None else "S"
    prev = f"{mu}_{{t-1}}"
    lines: list[str] = []
    if a:
        forget = "(a_t I_{t-1} / I'_t) (.) " if reciprocal else a
        lines.append(f"{mu}' = {forget}{prev}")
        prev = f"{mu}'"
    if p.gain == "exact":
        k, k2 = ("(k_t / I'_t)", "k_t^2 / I'_t") if reciprocal else ("k_t", "k_t^2")
        lines.append(f"G_t = {beta}{k} / (1 + {beta}sum {k2})")
        if p.correction == "diagonal":
            lines.append(f"{mu}_t = {prev} (.) (1 - k_t (.) G_t) + G_t v_t^T")
        else:
            lines.append(f"{mu}_t = {prev} + G_t (v_t - {prev}^T k_t)^T")
        return [*lines, f"y_t = {mu}_t^T {_QUERY}"]
    over = " / I_t" if reciprocal else ""
    k = "(m_t (.) k_t)" if imp is not None and not reciprocal else f"(k_t{over})" if over else "k_t"
    e = "p_t" if erase.key == "free" else "k_t"
    x = prev if erase.base == "decayed" else f"{mu}_{{t-1}}"
    if erase.strength == "write":
        update = f"{k} ({write} - {beta}{x}^T {e})^T"
    elif erase.side == "prediction":
        update = f"{k} ({write} - {x}^T (erase_t (.) {e}))^T"
    else:
        update = f"{k} ({write})^T - (a^r_t (.) {e}{over}) ({x}^T {e})^T"
    return [*lines, f"{mu}_t = {prev} + {update}", f"y_t = {mu}_t^T {_QUERY}"]


def _lowering(spec: Spec) -> list[str]:
    """Says how the operands of the kernel class follow from the program's."""
    kernel, imp, steps = _kernel(spec), spec.importance, spec.steps
    lines: list[str] = []
    if steps.source == "lagged":
        lines.append(
            "tokens -> 2 sub-tokens: the previous (k, v), then this one; the decay acts in between"
        )
    elif steps.count > 1:
        lines.append(f"tokens -> {steps.count} sub-tokens; decay on the first, read after the last")
    if spec.erase.side == "removal" and spec.erase.strength == "own":
        lines.append("token -> 2 sub-tokens: remove along a (.) p, then write along k")
    if spec.log_evidence:
        lines.append("log-importance scan z_t;  g <- z_{t-1} - z_t;  k <- exp(k_t - z_t)")
    elif imp is not None and imp.preconditioner is not None:
        lines.append("importance scan J_t with its own decay;  write key <- m(J_t) (.) k")
    elif imp is not None and kernel in (Kernel.LINEAR, Kernel.DELTA):
        lines.append("importance scan J_t over keys, I = J + I_p")
        if spec.hebbian:
            lines.append("query <- q / I_t")
        else:
            lines.append("decay <- a I_{t-1} / I'_t;  write key <- k / I_t (exact gain: k / I'_t)")
    if (
        spec.posterior.gain == "exact"
        and spec.posterior.correction == "full"
        and kernel is Kernel.DELTA
    ):
        lines.append("rate <- beta / (1 + beta sum k^2 / I')")
    if spec.posterior.correction == "diagonal" and kernel is Kernel.LINEAR and not spec.hebbian:
        lines.append("decay <- a (1 - k G) per key;  key <- G")
    if spec.read.normalizer != "none":
        lines.append("normaliser: the same linear program with the one value channel 1")
    lines.append(f"kernel class {kernel}: {_KERNEL_LINES[kernel]}")
    return lines


_KERNEL_LINES = {
    Kernel.LINEAR: "S = Diag(a) S + k w^T, y = S^T q",
    Kernel.DELTA: "S = Diag(a) S; S = S + k (w - S^T e)^T; y = S^T q",
    Kernel.SYNAPSE: "h = Diag(a) h + k w^T; J = Diag(a) J + k^2 b^T; y = (h / (J + I_p))^T q",
    Kernel.SYNAPSE_DELTA: "mean and importance per synapse, token by token",
    Kernel.FULL: "G = a G + k w^T; H = a H + beta k k^T; y = G^T (H + Lambda)^-1 q",
}
