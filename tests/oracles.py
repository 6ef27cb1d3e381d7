"""Truth for every variant: one plain numpy loop per recurrence, in float64, one head at a time.

Nothing here shares code or structure with the package. Each variant is written in the notation of
its paper, with the state ``S`` as a [V, K] matrix (value rows, key columns), token after token. The
only shared machinery cuts the operands into heads, scales the query and stacks the results.

    ORACLES[name](operands, scale=None, initial_state=None)              -> OracleResult
    METAPLASTIC_ORACLES[name](operands, scale=None, initial_state=None)  -> OracleResult

``operands`` maps operand names (``q``, ``k``, ``v``, ``g``, ``beta``, ...) to arrays in the public
layout [B, T, H, D]; an operand that a variant does not know is refused. In a metaplastic form the
gate ``b`` decides the shape of the importance: [B, T, HV] shares one vector over keys between all
value rows, [B, T, HV, V] gives every synapse its own. States come back as the package lays them
out, [B, HV, K, V].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Operands = dict[str, Array | None]

outer = np.outer


class OracleState(NamedTuple):
    """State after the last token; the fields mean what they mean in the public state."""

    memory: Array
    importance: Array | None = None
    normalizer: Array | None = None
    lag: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class OracleResult:
    """Output [B, T, HV, V] and final state; fields that a variant does not have are None."""

    output: Array
    memory: Array
    importance: Array | None = None
    normalizer: Array | None = None
    lag: tuple[Array, Array] | None = None
    uncertainty: Array | None = None

    @property
    def state(self) -> OracleState:
        return OracleState(self.memory, self.importance, self.normalizer, self.lag)


class Oracle(Protocol):
    def __call__(
        self, operands: Mapping[str, Any], scale: float | None = None, initial_state: Any = None
    ) -> OracleResult: ...


@dataclass(frozen=True)
class Signature:
    """What a variant takes: its gates and their shapes, the kind of its keys, its default scale.

    g, beta: "" none, "head" [B, T, HV], "key" [B, T, HV, K], "value" [B, T, HV, V]; g "fixed" is an
    optional [HV] that replaces the variant's own schedule.
    keys: "normal" free, "unit" l2-normalised, "positive" a feature map, "raw" logits, "tied" to the
    decay. importance: "" none, "metaplastic" gate b and prior (per value row), "own" gate b only,
    "full" prior only (a K x K matrix), "log" evidence e^k without a gate; of Kalman filters
    "vector" and "number" gate b and prior, "covariance" prior only; "posterior" gate b per head and
    prior, of any precision.
    """

    g: str = ""
    beta: str = ""
    keys: str = "normal"
    extra: tuple[str, ...] = ()
    importance: str = ""
    scale: float | None = None  # None is K ** -0.5
    steps: int = 1  # sub-steps per token: k, v, beta, b carry steps * T tokens
    beta_max: float = 1.0  # domain of beta in the random operands
    normalized: bool = False  # keeps n, the running sum of keys
    lagged: bool = False  # keeps the last key and value
    relative: bool = False  # the prior is a share of a norm

    @property
    def operands(self) -> tuple[str, ...]:
        names = ["q", "k", "v"]
        names += ["g"] if self.g else []
        names += ["beta"] if self.beta else []
        filters = ("vector", "number", "posterior")
        names += ["b"] if self.importance in ("metaplastic", "own", *filters) else []
        prior = ("metaplastic", "full", "covariance", *filters)
        names += ["prior"] if self.importance in prior else []
        return (*names, *self.extra)

    @property
    def uncertainty(self) -> bool:
        return self.importance not in ("", "own")


EMPTY: Array = np.zeros(0)


@dataclass
class Head:
    """One value head of one sequence, one row per token; the loops read it and write y, S, J, n."""

    T: int  # tokens of the query; k, v, beta, b may have more (steps per token)
    K: int
    V: int
    head: int  # index of the value head, and how many there are
    heads: int
    sq: Array  # [T, K], already multiplied by the scale: "s q"
    k: Array
    v: Array
    scheduled: bool = False  # no decay was given: a fixed schedule applies
    al: Array = field(default_factory=lambda: EMPTY)  # decay exp(g), [T, 1] or [T, K]
    beta: Array = field(default_factory=lambda: EMPTY)
    b: Array = field(default_factory=lambda: EMPTY)  # [T, V] in a metaplastic form, else [T]
    prior: Array = field(default_factory=lambda: EMPTY)  # [K]
    erase: Array = field(default_factory=lambda: EMPTY)
    p: Array = field(default_factory=lambda: EMPTY)
    a: Array = field(default_factory=lambda: EMPTY)
    u: Array = field(default_factory=lambda: EMPTY)
    trap: Array = field(default_factory=lambda: EMPTY)
    al_importance: Array = field(default_factory=lambda: EMPTY)
    noise: Array = field(default_factory=lambda: EMPTY)  # [T] or [T, K]
    mix: Array = field(default_factory=lambda: EMPTY)
    basis: Array = field(default_factory=lambda: EMPTY)  # [K, K], its columns are axes
    center: float = 0.0
    S: Array = field(default_factory=lambda: EMPTY)  # [V, K]
    J: Array = field(
        default_factory=lambda: EMPTY
    )  # [V, K] in a metaplastic form, [K] or [K, K] else
    n: Array = field(default_factory=lambda: EMPTY)  # [K]
    k_last: Array = field(default_factory=lambda: EMPTY)
    v_last: Array = field(default_factory=lambda: EMPTY)
    y: Array = field(default_factory=lambda: EMPTY)  # [T, V]
    unc: Array = field(default_factory=lambda: EMPTY)  # [T, V]


SIGNATURES: dict[str, Signature] = {}
METAPLASTIC_SIGNATURES: dict[str, Signature] = {}
ORACLES: dict[str, Oracle] = {}
METAPLASTIC_ORACLES: dict[str, Oracle] = {}
FIRST_ORDER_ORACLES: dict[str, Oracle] = {}  # the other gain of those whose default is exact

Loop = Callable[[Head], None]


def oracle(name: str, **signature: Any) -> Callable[[Loop], Loop]:
    """Register a loop over one head as the truth of a variant."""

    def register(loop: Loop) -> Loop:
        SIGNATURES[name] = sig = Signature(**signature)
        ORACLES[name] = _over_heads(name, sig, loop)
        return loop

    return register


def metaplastic(name: str, zoo: dict[str, Oracle] = METAPLASTIC_ORACLES) -> Callable[[Loop], Loop]:
    """Register a loop as the metaplastic form of a variant: same operands, and b and prior."""

    def register(loop: Loop) -> Loop:
        sig = Signature(**{**vars(SIGNATURES[name]), "importance": "metaplastic"})
        METAPLASTIC_SIGNATURES[name] = sig
        zoo[name] = _over_heads(f"metaplastic {name}", sig, loop)
        return loop

    return register


def _over_heads(name: str, sig: Signature, loop: Loop) -> Oracle:
    def run(
        operands: Mapping[str, Any], scale: float | None = None, initial_state: Any = None
    ) -> OracleResult:
        ops = {n: np.asarray(x, np.float64) for n, x in operands.items() if x is not None}
        if unknown := set(ops) - set(sig.operands):
            raise ValueError(f"{name} takes {sig.operands}, got also {sorted(unknown)}")
        optional = {"prior"} | ({"k"} if sig.keys == "tied" else set())
        optional |= {"g"} if sig.g == "fixed" else set()
        if missing := set(sig.operands) - set(ops) - optional:
            raise ValueError(f"{name} takes {sig.operands}, {sorted(missing)} missing")

        q, v = ops["q"], ops["v"]
        (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
        s = scale if scale is not None else sig.scale if sig.scale is not None else K**-0.5
        prior = ops.get("prior", np.ones(1))  # a number, [HV] or [HV, K]
        prior = np.ones((HV, K)) * (prior[:, None] if prior.ndim == 1 else prior)
        shared = "b" not in ops or ops["b"].ndim == 3

        result: dict[str, list[Array]] = {}
        for i in range(B):
            for j in range(HV):
                jq = j // (HV // H)  # the query/key head that value head j reads
                x = Head(T, K, V, j, HV, sq=s * q[i, :, jq], k=EMPTY, v=v[i, :, j], prior=prior[j])
                if "k" in ops:
                    x.k = ops["k"][i, :, jq]
                if "p" in ops:
                    x.p = ops["p"][i, :, jq]
                x.scheduled = "g" not in ops
                x.al = np.ones((T, 1))
                if "g" in ops:
                    g = ops["g"]
                    if g.ndim == 1:  # [HV]
                        x.al = np.exp(g[j]) * x.al
                    else:  # [B, T, HV] or [B, T, HV, K]
                        x.al = np.exp(g[i, :, j, None] if g.ndim == 3 else g[i, :, j])
                for n in ("beta", "erase", "removal", "trap", "noise", "mix"):
                    if n in ops:
                        setattr(x, n, ops[n][i, :, j])
                if "b" in ops:
                    x.b = ops["b"][i, :, j]
                    if sig.importance == "metaplastic":  # one column per value row, shared or not
                        x.b = (x.b[:, None] if shared else x.b) * np.ones(V)
                if "u" in ops:
                    x.u = ops["u"][j]
                if "basis" in ops:
                    x.basis = ops["basis"][jq]
                if "center" in ops:
                    x.center = float(ops["center"][j])
                if "g_importance" in ops:
                    x.al_importance = np.exp(ops["g_importance"][i, :, j])

                _begin(x, sig, initial_state, i, j, jq)
                loop(x)

                store = {"output": x.y, "memory": x.S.T, "normalizer": x.n}
                store |= {"k_last": x.k_last, "v_last": x.v_last}
                if sig.importance == "metaplastic":
                    store["importance"] = x.J[0] if shared else x.J.T
                else:
                    store["importance"] = x.J
                store["uncertainty"] = x.unc[:, 0] if shared else x.unc
                for n, value in store.items():
                    result.setdefault(n, []).append(value)

        def stack(n: str, token_axis: bool = False) -> Array:
            stacked = np.stack(result[n])
            stacked = stacked.reshape(B, HV, *stacked.shape[1:])
            return np.moveaxis(stacked, 1, 2) if token_axis else stacked

        return OracleResult(
            output=stack("output", token_axis=True),
            memory=stack("memory"),
            importance=stack("importance") if sig.importance else None,
            normalizer=stack("normalizer") if sig.normalized else None,
            # every value head of a group saw the same last key: keep one per query/key head
            lag=(stack("k_last")[:, :: HV // H], stack("v_last")) if sig.lagged else None,
            uncertainty=stack("uncertainty", token_axis=True) if sig.uncertainty else None,
        )

    return run


def _begin(x: Head, sig: Signature, state: Any, i: int, j: int, jq: int) -> None:
    """Set S, J, n and the lagged pair of one head to the initial state, or to zeros."""

    def pick(part: str) -> Array | None:
        whole = getattr(state, part, None)
        return None if whole is None else np.asarray(whole, np.float64)[i, j]

    S, J, n = pick("memory"), pick("importance"), pick("normalizer")
    lag = getattr(state, "lag", None)
    x.y, x.unc = np.zeros((x.T, x.V)), np.zeros((x.T, x.V))
    x.S = np.zeros((x.V, x.K)) if S is None else S.T.copy()
    x.n = np.zeros(x.K) if n is None else n.copy()
    x.k_last = np.zeros(x.K) if lag is None else np.asarray(lag[0], np.float64)[i, jq]
    x.v_last = np.zeros(x.V) if lag is None else np.asarray(lag[1], np.float64)[i, j]
    if sig.importance == "metaplastic":
        x.J = np.zeros((x.V, x.K))
        if J is not None:
            x.J = x.J + (J if J.ndim == 1 else J.T)
    elif sig.importance in ("full", "covariance"):
        x.J = np.zeros((x.K, x.K)) if J is None else J.copy()
    elif sig.importance == "number":
        x.J = np.zeros(1) if J is None else J.copy()
    elif sig.importance == "log":
        x.J = np.full(x.K, -np.inf) if J is None else J.copy()
    elif sig.importance in ("own", "vector"):
        x.J = np.zeros(x.K) if J is None else J.copy()


# Hebbian variants: decay, write, read; nothing is subtracted before the write.


@oracle("linear_attention")
def linear_attention(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        S = S + outer(x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
    x.S = S


def retnet_decay(x: Head, t: int) -> Any:
    return 1 - 2.0 ** (-5 - x.head) if x.scheduled else x.al[t]


@oracle("retnet", g="fixed")
def retnet(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        S = retnet_decay(x, t) * S + outer(x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
    x.S = S


def lightning_decay(x: Head, t: int) -> Any:
    slope = 2.0 ** (-8 * (x.head + 1) / x.heads)
    return np.exp(-slope * (1 + 1e-5)) if x.scheduled else x.al[t]  # the slope of layer 0


@oracle("lightning", g="fixed", scale=1.0)
def lightning(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        S = lightning_decay(x, t) * S + outer(x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("simple_gla", g="head")
def simple_gla(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        S = x.al[t] * S + outer(x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("mamba2", g="head", beta="head", beta_max=2.0, scale=1.0)
def mamba2(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        dt, B, C = x.beta[t], x.k[t], x.sq[t]
        S = x.al[t] * S + dt * outer(x.v[t], B)
        x.y[t] = S @ C
    x.S = S


@oracle("gla", g="key")
def gla(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        S = S @ np.diag(x.al[t]) + outer(x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("hgrn2", g="key", keys="tied")
def hgrn2(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        f = x.al[t]
        S = S @ np.diag(f) + outer(x.v[t], 1 - f)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("lightnet", keys="raw", importance="log")
def lightnet(x: Head) -> None:
    S, z = x.S, x.J  # S is the weighted mean of the values per slot, z the log of its weight
    for t in range(x.T):
        z_last, z = z, np.logaddexp(z, x.k[t])
        S = S @ np.diag(np.exp(z_last - z)) + outer(x.v[t], np.exp(x.k[t] - z))
        x.y[t] = S @ x.sq[t]
        x.unc[t] = sum(x.sq[t] ** 2 * np.exp(-z))
    x.S, x.J = S, z


@oracle("rodimus", g="key", beta="value")
def rodimus(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        S = S @ np.diag(x.al[t]) + outer(x.beta[t] * x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("rwkv6", g="key", extra=("u",), scale=1.0)
def rwkv6(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        x.y[t] = S @ x.sq[t] + ((x.u * x.k[t]) @ x.sq[t]) * x.v[t]
        S = S @ np.diag(x.al[t]) + outer(x.v[t], x.k[t])
    x.S = S


@oracle("mlstm", g="head", beta="head", beta_max=4.0, normalized=True)
def mlstm(x: Head) -> None:
    S, n = x.S, x.n
    for t in range(x.T):
        f, exp_i = x.al[t], x.beta[t]
        S = f * S + exp_i * outer(x.v[t], x.k[t])
        n = f * n + exp_i * x.k[t]
        x.y[t] = S @ x.sq[t] / max(abs(n @ x.sq[t]), 1.0)
    x.S, x.n = S, n


@oracle("based", keys="positive", scale=1.0, normalized=True)
@oracle("rebased", keys="positive", scale=1.0, normalized=True)
def based(x: Head) -> None:
    S, z = x.S, x.n
    for t in range(x.T):
        S = S + outer(x.v[t], x.k[t])
        z = z + x.k[t]
        x.y[t] = S @ x.sq[t] / (z @ x.sq[t] + 1e-6)
    x.S, x.n = S, z


@oracle("mamba3", g="head", beta="head", beta_max=2.0, extra=("trap",), scale=1.0, lagged=True)
def mamba3(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        a, lam, D = x.al[t], x.trap[t], x.beta[t]
        S = a * S + a * (1 - lam) * D * outer(x.v_last, x.k_last) + lam * D * outer(x.v[t], x.k[t])
        x.y[t] = S @ x.sq[t]
        x.k_last, x.v_last = x.k[t], x.v[t]
    x.S = S


# Delta variants: the state is multiplied by a transition matrix, here written out.


@oracle("deltanet", beta="head", keys="unit")
def deltanet(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        k, v, b = x.k[t], x.v[t], x.beta[t]
        S = S @ (eye - b * outer(k, k)) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("gated_deltanet", g="head", beta="head", keys="unit")
def gated_deltanet(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        k, v, b, al = x.k[t], x.v[t], x.beta[t], x.al[t]
        S = al * S @ (eye - b * outer(k, k)) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("kda", g="key", beta="head", keys="unit")
def kda(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        k, v, b, al = x.k[t], x.v[t], x.beta[t], x.al[t]
        S = S @ np.diag(al) @ (eye - b * outer(k, k)) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("gdn2", g="key", beta="value", keys="unit", extra=("erase",))
def gdn2(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        k, v, w, b, al = x.k[t], x.v[t], x.beta[t], x.erase[t], x.al[t]
        S = S @ np.diag(al) @ (eye - outer(b * k, k)) + outer(w * v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("comba", g="head", beta="head", keys="unit", extra=("p",))
def comba(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        k, v, p, b, al = x.k[t], x.v[t], x.p[t], x.beta[t], x.al[t]
        S = al * S - b * outer(S @ p, k) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("qdelta", g="head", beta="head", keys="unit", extra=("p",))
def qdelta(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        k, v, p, b, al = x.k[t], x.v[t], x.p[t], x.beta[t], x.al[t]
        S = al * S @ (eye - b * outer(p, k)) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("eda", g="key", beta="head", keys="unit", steps=2)
def eda(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        S = S @ np.diag(x.al[t])
        for k, v, b in zip(*(y[2 * t : 2 * t + 2] for y in (x.k, x.v, x.beta)), strict=True):
            S = S @ (eye - b * outer(k, k)) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("gated_deltaproduct", g="head", beta="head", keys="unit", steps=2, beta_max=2.0)
def gated_deltaproduct(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    n = len(x.k) // max(x.T, 1)
    for t in range(x.T):
        S = x.al[t] * S
        for i in range(t * n, (t + 1) * n):
            k, v, b = x.k[i], x.v[i], x.beta[i]
            S = S @ (eye - b * outer(k, k)) + b * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("rwkv7", g="key", keys="unit", extra=("p", "removal"), scale=1.0)
def rwkv7(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        k, v, kk, a, w = x.k[t], x.v[t], x.p[t], x.removal[t], x.al[t]
        S = S @ (np.diag(w) - outer(kk, kk * a)) + outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("implicit_delta", g="head", beta="head")
def implicit_delta(x: Head) -> None:
    S, eye = x.S, np.eye(x.K)
    for t in range(x.T):
        k, v, al = x.k[t], x.v[t], x.al[t]
        eps = x.beta[t] / (1 + x.beta[t] * (k @ k))
        S = al * S @ (eye - eps * outer(k, k)) + eps * outer(v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("longhorn", beta="value", scale=1.0)
def longhorn(x: Head) -> None:
    S = x.S
    for t in range(x.T):
        k, v = x.k[t], x.v[t]
        eps = x.beta[t] / (1 + x.beta[t] * (k @ k))  # one per value row
        S = (1 - outer(eps, k**2)) * S + outer(eps * v, k)
        x.y[t] = S @ x.sq[t]
    x.S = S


@oracle("efla", beta="head", beta_max=3.0)
def efla(x: Head) -> None:
    """The flow dS/ds = (v - S k) k^T from 0 to beta, by the exponential of its matrix."""
    S = x.S
    for t in range(x.T):
        k, v, b = x.k[t], x.v[t], x.beta[t]
        values, axes = np.linalg.eigh(outer(k, k))
        kept = (axes * np.exp(-b * values)) @ axes.T
        run = np.where(values > 1e-12, -np.expm1(-b * values) / np.maximum(values, 1e-12), b)
        S = S @ kept + outer(v, k) @ (axes * run) @ axes.T
        x.y[t] = S @ x.sq[t]
    x.S = S


def preconditioner(P: Array, center: float) -> Array:
    z = np.log(P + 1e-6) - center
    softsign = z / (1 + abs(z))
    return np.asarray(1.5**-softsign)


@oracle(
    "precond_gated_deltanet",
    g="head",
    beta="head",
    keys="unit",
    extra=("g_importance", "center"),
    importance="own",
)
def precond_gated_deltanet(x: Head) -> None:
    S, P, eye = x.S, x.J, np.eye(x.K)
    for t in range(x.T):
        k, v, b, al = x.k[t], x.v[t], x.beta[t], x.al[t]
        P = x.al_importance[t] * P + x.b[t] * k**2
        Mk = preconditioner(P, x.center) * k
        S = al * S @ (eye - b * outer(k, Mk)) + b * outer(v, Mk)
        x.y[t] = S @ x.sq[t]
    x.S, x.J = S, P


@oracle(
    "precond_kda",
    g="key",
    beta="head",
    keys="unit",
    extra=("g_importance", "center"),
    importance="own",
)
def precond_kda(x: Head) -> None:
    S, P, eye = x.S, x.J, np.eye(x.K)
    for t in range(x.T):
        k, v, b, al = x.k[t], x.v[t], x.beta[t], x.al[t]
        P = x.al_importance[t] * P + x.b[t] * k**2
        Mk = preconditioner(P, x.center) * k
        S = S @ np.diag(al) @ (eye - b * outer(k, Mk)) + b * outer(v, Mk)
        x.y[t] = S @ x.sq[t]
    x.S, x.J = S, P


# The posterior: full, and diagonal in natural parameters.


@oracle("mesanet", g="head", beta="head", keys="unit", importance="full", scale=1.0)
def mesanet(x: Head) -> None:
    G, H, Lam = x.S, x.J, np.diag(x.prior)
    for t in range(x.T):
        k, v, b, al = x.k[t], x.v[t], x.beta[t], x.al[t]
        G = al * G + b * outer(v, k)
        H = al * H + b * outer(k, k)
        solved = np.linalg.solve(H + Lam, x.sq[t])
        x.y[t] = G @ solved
        x.unc[t] = x.sq[t] @ solved
    x.S, x.J = G, H


# Kalman filters, with variances p and noise w; J is 1 / p less the prior, or p less its inverse.


@oracle("kdn", g="key", beta="head", keys="unit", extra=("noise",), importance="vector")
def kdn(x: Head) -> None:
    S, J = x.S, x.J
    for t in range(x.T):
        k, v, r, al = x.k[t], x.v[t], 1 / max(x.beta[t], 1e-300), x.al[t]
        p = al**2 / (J + x.prior) + x.noise[t]
        gain = p * k / (r + p @ k**2)
        S = S * al
        S = S + outer(v - S @ k, gain)
        J = 1 / p + x.b[t] * k**2 - x.prior
        x.y[t] = S @ x.sq[t]
        x.unc[t] = (1 / (J + x.prior)) @ x.sq[t] ** 2
    x.S, x.J = S, J


@oracle("kdn_isotropic", g="key", beta="head", keys="unit", extra=("noise",), importance="number")
def kdn_isotropic(x: Head) -> None:
    S, J, prior = x.S, x.J[0], x.prior[0]
    for t in range(x.T):
        k, v, r, al = x.k[t], x.v[t], 1 / max(x.beta[t], 1e-300), x.al[t]
        p = (al**2).mean() / (J + prior) + x.noise[t]
        S = S * al
        S = S + outer(v - S @ k, p * k / (r + p * k @ k))
        J = 1 / p + x.b[t] * (k @ k) / x.K - prior
        x.y[t] = S @ x.sq[t]
        x.unc[t] = x.sq[t] @ x.sq[t] / (J + prior)
    x.S, x.J = S, np.array([J])


@oracle(
    "bayesian_layer", g="head", beta="head", keys="unit", extra=("noise",), importance="covariance"
)
def bayesian_layer(x: Head) -> None:
    """The textbook's predict and update, with the symmetric form of the latter."""
    S, C, first, eye = x.S, x.J, np.diag(1 / x.prior), np.eye(x.K)
    for t in range(x.T):
        k, v, al = x.k[t], x.v[t], x.al[t]
        P, S = al**2 * (first + C) + x.noise[t] * eye, al * S
        if x.beta[t] > 0:
            r = 1 / x.beta[t]
            gain = P @ k / (k @ P @ k + r)
            S = S + outer(v - S @ k, gain)
            left = eye - outer(gain, k)
            P = left @ P @ left.T + r * outer(gain, gain)
        x.y[t] = S @ x.sq[t]
        x.unc[t] = x.sq[t] @ P @ x.sq[t]
        C = P - first
    x.S, x.J = S, C


@oracle("gka", g="head", beta="head", keys="unit", extra=("mix",), importance="full", relative=True)
def gka(x: Head) -> None:
    """Keys and values as the paper has them, scaled by the root of the write gate."""
    U, H, eye = x.S, x.J, np.eye(x.K)
    for t in range(x.T):
        w, al, q = np.sqrt(x.beta[t]), x.al[t], x.sq[t]
        k, v = w * x.k[t], w * x.v[t]
        U, H = al * U + outer(v, k), al * H + outer(k, k)
        solved = np.linalg.solve(H + (x.prior[0] * np.linalg.norm(H) + 1e-18) * eye, q)
        x.y[t] = U @ (q + x.mix[t] * (solved - q))
        x.unc[t] = q @ solved
    x.S, x.J = U, H


@oracle("palimpsa", g="head", beta="head", keys="unit", importance="metaplastic")
def palimpsa(x: Head) -> None:
    M, J, I0 = x.S, x.J, x.prior
    for t in range(x.T):
        k, v, bs, b, al = x.k[t], x.v[t], x.beta[t], x.b[t], x.al[t]
        M = al * M + outer(bs * v, k)
        J = al * J + outer(b, k**2)  # I = al I + (1 - al) I0 + b k^2, kept as J = I - I0
        I_t = J + I0
        x.y[t] = (M / I_t) @ x.sq[t]
        x.unc[t] = (1 / I_t) @ x.sq[t] ** 2
    x.S, x.J = M, J


@oracle("meta_mamba2", g="head", beta="head", beta_max=2.0, importance="metaplastic", scale=1.0)
def meta_mamba2(x: Head) -> None:
    M, J, I0 = x.S, x.J, x.prior
    for t in range(x.T):
        dt, B, C, b, al = x.beta[t], x.k[t], x.sq[t], x.b[t], x.al[t]
        M = al * M + outer(dt * x.v[t], B)
        J = al * J + outer(b, B**2)
        I_t = J + I0
        x.y[t] = (M / I_t) @ C
        x.unc[t] = (1 / I_t) @ C**2
    x.S, x.J = M, J


# Metaplastic forms. J is what was accumulated above the prior; every matrix is [V, K], and where
# the value rows share the gate all rows of J are equal. Hebbian: y = (h / (J + I_p)) s q.


def read_posterior(x: Head, t: int, h: Array, J: Array) -> None:
    x.y[t] = (h / (J + x.prior)) @ x.sq[t]
    x.unc[t] = (1 / (J + x.prior)) @ x.sq[t] ** 2


@metaplastic("linear_attention")
def meta_linear_attention(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        h = h + outer(x.v[t], x.k[t])
        J = J + outer(x.b[t], x.k[t] ** 2)
        read_posterior(x, t, h, J)
    x.S, x.J = h, J


@metaplastic("retnet")
def meta_retnet(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        h = retnet_decay(x, t) * h + outer(x.v[t], x.k[t])
        J = retnet_decay(x, t) * J + outer(x.b[t], x.k[t] ** 2)
        read_posterior(x, t, h, J)
    x.S, x.J = h, J


@metaplastic("lightning")
def meta_lightning(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        h = lightning_decay(x, t) * h + outer(x.v[t], x.k[t])
        J = lightning_decay(x, t) * J + outer(x.b[t], x.k[t] ** 2)
        read_posterior(x, t, h, J)
    x.S, x.J = h, J


@metaplastic("simple_gla")
@metaplastic("gla")
def meta_gla(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        a = x.al[t]  # a number, or one per key
        h = a * h + outer(x.v[t], x.k[t])
        J = a * J + outer(x.b[t], x.k[t] ** 2)
        read_posterior(x, t, h, J)
    x.S, x.J = h, J


@metaplastic("mamba2")
@metaplastic("rodimus")
def meta_gated_input(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        a, w = x.al[t], x.beta[t] * x.v[t]
        h = a * h + outer(w, x.k[t])
        J = a * J + outer(x.b[t], x.k[t] ** 2)
        read_posterior(x, t, h, J)
    x.S, x.J = h, J


@metaplastic("hgrn2")
def meta_hgrn2(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        f = x.al[t]
        h = f * h + outer(x.v[t], 1 - f)
        J = f * J + outer(x.b[t], (1 - f) ** 2)
        read_posterior(x, t, h, J)
    x.S, x.J = h, J


@metaplastic("rwkv6")
def meta_rwkv6(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        read_posterior(x, t, h, J)  # of the previous pair; the bonus for the same token stays plain
        x.y[t] += ((x.u * x.k[t]) @ x.sq[t]) * x.v[t]
        h = x.al[t] * h + outer(x.v[t], x.k[t])
        J = x.al[t] * J + outer(x.b[t], x.k[t] ** 2)
    x.S, x.J = h, J


@metaplastic("mlstm")
def meta_mlstm(x: Head) -> None:
    h, J, n = x.S, x.J, x.n
    for t in range(x.T):
        f, exp_i = x.al[t], x.beta[t]
        h = f * h + exp_i * outer(x.v[t], x.k[t])
        J = f * J + outer(x.b[t], x.k[t] ** 2)
        n = f * n + exp_i * x.k[t]
        read_posterior(x, t, h, J)
        x.y[t] /= max(abs(n @ x.sq[t]), 1.0)  # the denominator stays the plain one
    x.S, x.J, x.n = h, J, n


@metaplastic("based")
@metaplastic("rebased")
def meta_based(x: Head) -> None:
    h, J, z = x.S, x.J, x.n
    for t in range(x.T):
        h = h + outer(x.v[t], x.k[t])
        J = J + outer(x.b[t], x.k[t] ** 2)
        z = z + x.k[t]
        read_posterior(x, t, h, J)
        x.y[t] /= z @ x.sq[t] + 1e-6
    x.S, x.J, x.n = h, J, z


@metaplastic("mamba3")
def meta_mamba3(x: Head) -> None:
    h, J = x.S, x.J
    for t in range(x.T):
        a, lam, D, b = x.al[t], x.trap[t], x.beta[t], x.b[t]
        h = a * (h + (1 - lam) * D * outer(x.v_last, x.k_last)) + lam * D * outer(x.v[t], x.k[t])
        J = a * (J + outer((1 - lam) * b, x.k_last**2)) + outer(lam * b, x.k[t] ** 2)
        read_posterior(x, t, h, J)
        x.k_last, x.v_last = x.k[t], x.v[t]
    x.S, x.J = h, J


# Metaplastic delta variants: the memory is the mean mu; predict, observe, correct, read.


def predict(al: Array, mu: Array, J: Array, I_p: Array) -> tuple[Array, Array]:
    """mu' = (a I / I') mu and J' = a J, with I = J + I_p and I' = J' + I_p."""
    return al * (J + I_p) / (al * J + I_p) * mu, al * J


def read_mean(x: Head, t: int, mu: Array, J: Array) -> None:
    x.y[t] = mu @ x.sq[t]
    x.unc[t] = (1 / (J + x.prior)) @ x.sq[t] ** 2


def along(mu: Array, e: Array) -> Array:
    """mu e as a column, one number per value row."""
    return (mu @ e)[:, None]


@metaplastic("deltanet")
@metaplastic("gated_deltanet")
@metaplastic("kda")
def meta_delta(x: Head) -> None:
    """The step beta k on importance one is that of an observation with this precision."""
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, precision = x.k[t], x.v[t][:, None], x.beta[t] / (1 - x.beta[t] * x.k[t] @ x.k[t])
        mu, J = predict(x.al[t], mu, J, x.prior)
        kI = k / (J + x.prior)
        mu = mu + (v - along(mu, k)) * (precision * kI / (1 + precision * (kI @ k)[:, None]))
        J = J + outer(x.b[t], k**2)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("eda")
def meta_eda(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        mu, J = predict(x.al[t], mu, J, x.prior)
        for i in (2 * t, 2 * t + 1):
            k, beta, kI = x.k[i], x.beta[i], x.k[i] / (J + x.prior)
            step = beta * kI / (1 - beta * (k @ k) + beta * (kI @ k)[:, None])
            mu = mu + (x.v[i][:, None] - along(mu, k)) * step
            J = J + outer(x.b[i], k**2)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("deltanet", FIRST_ORDER_ORACLES)
@metaplastic("gated_deltanet", FIRST_ORDER_ORACLES)
@metaplastic("kda", FIRST_ORDER_ORACLES)
def meta_delta_first_order(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, beta = x.k[t], x.v[t][:, None], x.beta[t]
        mu, J = predict(x.al[t], mu, J, x.prior)
        J = J + outer(x.b[t], k**2)
        I_t = J + x.prior
        mu = mu + (beta * v - beta * along(mu, k)) * (k / I_t)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("gdn2")
def meta_gdn2(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, w = x.k[t], (x.beta[t] * x.v[t])[:, None]
        mu, J = predict(x.al[t], mu, J, x.prior)
        J = J + outer(x.b[t], k**2)
        I_t = J + x.prior
        mu = mu + (w - along(mu, x.erase[t] * k)) * (k / I_t)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("comba")
def meta_comba(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, beta, last = x.k[t], x.v[t][:, None], x.beta[t], mu
        mu, J = predict(x.al[t], mu, J, x.prior)
        J = J + outer(x.b[t], k**2)
        I_t = J + x.prior
        mu = mu + (v - along(last, x.p[t])) * (beta * k / I_t)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("qdelta")
def meta_qdelta(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, beta = x.k[t], x.v[t][:, None], x.beta[t]
        mu, J = predict(x.al[t], mu, J, x.prior)
        J = J + outer(x.b[t], k**2)
        mu = mu + (v - along(mu, x.p[t])) * (beta * k / (J + x.prior))
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("eda", FIRST_ORDER_ORACLES)
@metaplastic("gated_deltaproduct")
def meta_gated_deltaproduct(x: Head) -> None:
    mu, J = x.S, x.J
    n = len(x.k) // max(x.T, 1)
    for t in range(x.T):
        mu, J = predict(x.al[t], mu, J, x.prior)
        for i in range(t * n, (t + 1) * n):
            k, v, beta = x.k[i], x.v[i][:, None], x.beta[i]
            J = J + outer(x.b[i], k**2)
            I_t = J + x.prior
            mu = mu + (beta * v - beta * along(mu, k)) * (k / I_t)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("rwkv7")
def meta_rwkv7(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, kk, a, last = x.k[t], x.v[t][:, None], x.p[t], x.removal[t], mu
        mu, J = predict(x.al[t], mu, J, x.prior)
        J = J + outer(x.b[t], k**2)
        I_t = J + x.prior
        mu = mu - along(last, kk) * (kk * a / I_t) + v * (k / I_t)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("efla")
def meta_efla(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, beta = x.k[t], x.v[t][:, None], x.beta[t]
        mu, J = predict(x.al[t], mu, J, x.prior)
        kI = k / (J + x.prior)
        c = (kI @ k)[:, None]
        still = c == 0
        run = np.where(still, beta, -np.expm1(-beta * c) / np.where(still, 1, c))
        mu = mu + (v - along(mu, k)) * (run * kI)
        J = J + outer(x.b[t], k**2)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("implicit_delta")
def meta_implicit_delta(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, beta = x.k[t], x.v[t][:, None], x.beta[t]
        mu, J = predict(x.al[t], mu, J, x.prior)
        kI = k / (J + x.prior)  # the predicted importance I', before this observation
        G = beta * kI / (1 + beta * (kI @ k)[:, None])
        mu = mu + (v - along(mu, k)) * G
        J = J + outer(x.b[t], k**2)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


@metaplastic("longhorn")
def meta_longhorn(x: Head) -> None:
    mu, J = x.S, x.J
    for t in range(x.T):
        k, v, beta = x.k[t], x.v[t][:, None], x.beta[t][:, None]
        mu, J = predict(x.al[t], mu, J, x.prior)
        kI = k / (J + x.prior)
        G = beta * kI / (1 + beta * (kI @ k)[:, None])
        mu = mu * (1 - k * G) + v * G
        J = J + outer(x.b[t], k**2)
        read_mean(x, t, mu, J)
    x.S, x.J = mu, J


# Every precision, basis and way of forgetting: mean mu [V, K] and precision matrix L [K, K].


def posterior_oracle(
    name: str,
    *,
    precision: str = "diagonal",  # isotropic, diagonal, full
    forgetting: str = "temper",  # temper, discount, diffuse
    gain: str = "rate",  # of a delta rule: first_order, exact, rate, flow
    extra: tuple[str, ...] = (),  # "noise": what diffuse adds; "basis": the axes of a diagonal
) -> Oracle:
    """The form of a variant with one write per token that predicts with the key it writes."""
    sig = METAPLASTIC_SIGNATURES[name]
    sig = Signature(**{**vars(sig), "importance": "posterior", "extra": extra})
    delta = name in FIRST_ORDER_ORACLES or name in ("implicit_delta", "efla")
    inv = np.linalg.inv

    def loop(x: Head) -> None:
        R = x.basis if "basis" in extra else np.eye(x.K)
        variance = 1 / x.prior

        def matrix(along: Any) -> Array:
            return np.asarray(R @ np.diag(along * np.ones(x.K)) @ R.T)

        prior = matrix(x.prior)
        L, mu = prior, np.zeros((x.V, x.K))
        for t in range(x.T):
            a, k, v = x.al[t] * np.ones(x.K), x.k[t], x.v[t]
            beta, b = (x.beta[t] if len(x.beta) else 1.0), x.b[t]
            if forgetting == "temper":
                before = a[0] * L + (1 - a[0]) * prior
                mu = a[0] * mu @ L @ inv(before)
            elif forgetting == "discount":
                before = a[0] * L
            else:
                if precision == "full":
                    kept, keep = np.diag(a) @ inv(L) @ np.diag(a), a**2
                else:
                    keep = np.diag(R.T @ np.diag(a**2) @ R)
                    keep = keep.mean() if precision == "isotropic" else keep
                    kept = matrix(keep * np.diag(R.T @ inv(L) @ R))
                before = inv(kept + matrix(x.noise[t] if len(x.noise) else (1 - keep) * variance))
                mu = mu * a
            counted = {"isotropic": (k**2).mean(), "diagonal": (R.T @ k) ** 2}.get(precision)
            L = before + b * (outer(k, k) if counted is None else matrix(counted))
            if delta:
                found = k @ inv(before) @ k
                if gain == "first_order":
                    G = beta * inv(L) @ k
                elif gain == "flow":
                    G = inv(before) @ k * (1 - np.exp(-beta * found)) / found
                else:
                    r = beta / (1 - beta * k @ k) if gain == "rate" else beta
                    G = r * inv(before) @ k / (1 + r * found)
                mu = mu + outer(v - mu @ k, G)
            elif forgetting == "diffuse" and (precision == "isotropic" or "basis" in extra):
                G = inv(before) @ k / (1 + b * k @ inv(before) @ k)
                mu = mu + outer(beta * v - b * mu @ k, G)
            else:
                mu = (mu @ before + outer(beta * v, k)) @ inv(L)
            x.y[t] = mu @ x.sq[t]
            x.unc[t] = x.sq[t] @ inv(L) @ x.sq[t]
        if forgetting == "diffuse":
            x.S, x.J = mu, inv(L) - inv(prior)
        else:
            x.S, x.J = (mu @ L if precision == "full" or not delta else mu) @ R, L - prior
        if precision != "full":
            x.J = np.diag(R.T @ (L - prior) @ R)[: 1 if precision == "isotropic" else None]

    return _over_heads(f"posterior of {name}", sig, loop)


# Shipped specs that differ from another one in the layer around the recurrence alone.
KIN = {
    "gated_deltanet_sigmoid": "gated_deltanet",
    "kda_bounded": "kda",
    "qed": "qdelta",
    "rwkv5": "rwkv6",
}
# Those whose importance is one vector over keys and nothing else.
PER_KEY = ("efla",)


def gate_shapes(name: str) -> tuple[str, ...]:
    """Shapes of importance gates that the metaplastic form of a variant may have."""
    return ("head",) if name in PER_KEY else ("head", "value")


# Random valid operands and states.

REGIMES = (
    "normal",
    "zero_gate",  # importance gate 0 and prior 1: a metaplastic form is its source
    "zero_write",  # beta 0
    "zero_keys",  # some tokens have a key of zeros
    "no_decay",  # g = 0
    "strong_decay",  # g between -30 and -5
    "reset",  # g = -inf at some tokens: the decay is exactly 0
    "large_prior",  # prior 1e4, with noise 10
)


def signature(name: str, gate: str | None) -> Signature:
    return (
        METAPLASTIC_SIGNATURES[name] if gate and name in METAPLASTIC_ORACLES else SIGNATURES[name]
    )


def unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def make_operands(
    name: str,
    rng: np.random.Generator,
    B: int = 2,
    T: int = 12,
    H: int = 2,
    HV: int = 4,
    K: int = 5,
    V: int = 3,
    gate: str | None = None,
    regime: str = "normal",
) -> Operands:
    """Random operands of a variant, or with gate "head" or "value" of its metaplastic form.

    The variants whose importance gate is their own (palimpsa, meta_mamba2) have it in either case,
    "value" by default.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime {regime!r}, accepted: {REGIMES}")
    sig = signature(name, gate)
    n = sig.steps * T
    last = {"head": (), "key": (K,), "value": (V,)}
    ops: Operands = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": rng.standard_normal((B, n, H, K)),
        "v": rng.standard_normal((B, n, HV, V)),
    }
    q, k = ops["q"], ops["k"]
    assert q is not None
    assert k is not None
    if sig.keys == "unit":
        q, k = unit(q), unit(k)
    elif sig.keys == "positive":
        q, k = abs(q), abs(k)
    if regime == "zero_keys":
        k[:, 1::3] = 0.0
    if sig.g in ("head", "key"):
        ops["g"] = make_decay(rng, (B, T, HV, *last[sig.g]), regime)
    elif sig.g == "fixed" and regime in ("no_decay", "strong_decay", "reset"):
        ops["g"] = make_decay(rng, (HV,), regime)
    if sig.beta:
        ops["beta"] = rng.uniform(0.02, sig.beta_max, (B, n, HV, *last[sig.beta]))
        if regime == "zero_write":
            ops["beta"] = np.zeros((B, n, HV, *last[sig.beta]))
    if "b" in sig.operands:
        per_value = sig.importance == "metaplastic" and gate != "head"
        ops["b"] = rng.uniform(0.0, 1.0, (B, n, HV, *((V,) if per_value else ())))
        if regime == "zero_gate":
            ops["b"] = np.zeros((B, n, HV, *((V,) if per_value else ())))
    if "prior" in sig.operands:
        ops["prior"] = rng.uniform(0.5, 2.0, (HV, K))
        if regime in ("zero_gate", "large_prior"):
            # Noise takes importance below its prior, whose digits are then lost.
            large = 10.0 if "noise" in sig.extra else 1e4
            ops["prior"] = np.full((HV, K), 1.0 if regime == "zero_gate" else large)
        if sig.importance == "number":
            ops["prior"] = ops["prior"][:, 0]
        if sig.relative:
            ops["prior"] = rng.uniform(0.01, 0.1, HV)
    if "erase" in sig.extra:
        ops["erase"] = rng.uniform(0.0, 1.0, (B, T, HV, K))
    if "p" in sig.extra:  # near the key, but not it
        ops["p"] = unit(k + 0.3 * rng.standard_normal(k.shape))
    if "removal" in sig.extra:
        ops["removal"] = rng.uniform(0.0, 1.0, (B, T, HV, K))
    if "u" in sig.extra:
        ops["u"] = rng.standard_normal((HV, K))
    if "trap" in sig.extra:
        ops["trap"] = rng.uniform(0.05, 0.95, (B, T, HV))
    if "g_importance" in sig.extra:
        ops["g_importance"] = make_decay(rng, (B, T, HV), regime)
    if "mix" in sig.extra:
        ops["mix"] = rng.uniform(0.05, 0.95, (B, T, HV))
    if "noise" in sig.extra:
        per_key = sig.importance == "vector"
        ops["noise"] = rng.uniform(0.05, 1.0, (B, T, HV, *((K,) if per_key else ())))
    if "center" in sig.extra:
        ops["center"] = -0.2 + 0.3 * rng.standard_normal(HV)
    ops["q"], ops["k"] = q, None if sig.keys == "tied" else k
    return ops


def make_decay(rng: np.random.Generator, shape: tuple[int, ...], regime: str) -> Array:
    g = -rng.uniform(0.01, 1.0, shape)
    if regime == "no_decay":
        g = np.zeros(shape)
    elif regime == "strong_decay":
        g = -rng.uniform(5.0, 30.0, shape)
    elif regime == "reset":
        g = np.where(rng.random(shape) < 0.3, -np.inf, g)
    return g


def make_state(
    name: str,
    rng: np.random.Generator,
    B: int = 2,
    H: int = 2,
    HV: int = 4,
    K: int = 5,
    V: int = 3,
    gate: str | None = None,
) -> OracleState:
    """A random valid state of a variant, or with gate "head" or "value" of its metaplastic form."""
    sig = signature(name, gate)
    importance = None
    if sig.importance == "metaplastic":
        shape = (B, HV, K) if gate == "head" else (B, HV, K, V)
        importance = rng.uniform(0.0, 2.0, shape)
    elif sig.importance in ("own", "vector"):
        importance = rng.uniform(0.0, 2.0, (B, HV, K))
    elif sig.importance == "number":
        importance = rng.uniform(0.0, 2.0, (B, HV, 1))
    elif sig.importance == "log":
        importance = rng.standard_normal((B, HV, K))
    elif sig.importance in ("full", "covariance"):
        x = rng.standard_normal((B, HV, K, K + 1))
        importance = x @ np.swapaxes(x, -1, -2) / K
    normalizer = rng.standard_normal((B, HV, K)) if sig.normalized else None
    if normalizer is not None and sig.keys == "positive":
        normalizer = abs(normalizer)
    lag = None
    if sig.lagged:
        lag = (rng.standard_normal((B, H, K)), rng.standard_normal((B, HV, V)))
    return OracleState(rng.standard_normal((B, HV, K, V)), importance, normalizer, lag)
