"""The steps of which programs consist.

A step is data. It runs on an environment of tensors, with the core operations of an engine; it
writes itself on an environment of terms, which gives the same recurrence as mathematics; and it
counts its operations. Both environments know operands, states and what earlier steps made by the
same names. Where a step takes a name, `None` stands for a one or for nothing to do. Only running
needs torch, which comes with the environment.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from glazoo.program.core import Kernel
from glazoo.program.terms import NUMBER, Names, Shape, Term, apply, number

if TYPE_CHECKING:
    from torch import Tensor

    from glazoo.program.env import Env

_KEY: Shape = ("K", "")
_MEMORY: Shape = ("K", "V")
_ONE, _PRIOR = number(1), Term("I_p", _KEY)


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of the recurrent state."""

    name: str
    symbol: str
    """Its name in the recurrence."""
    shape: tuple[str, ...]
    meaning: str


class Step(ABC):
    """One step of a program."""

    __slots__ = ()
    kernel: ClassVar[Kernel | None] = None
    """The kernel class that it calls. A program is of the class of its first core call."""
    operations: ClassVar[tuple[tuple[str, float], ...]] = ()
    """Multiplications, additions and divisions per value head and (sub-)token: a number per K, V
    and products of them."""

    @abstractmethod
    def run(self, env: Env) -> None:
        """Compute."""

    @abstractmethod
    def write(self, names: Names) -> None:
        """Write the same as mathematics."""

    def cost(self, key_size: int, value_size: int) -> int:
        """Count its operations for given sizes."""
        sizes = {"K": key_size, "V": value_size}
        return sum(int(n * math.prod(sizes[d] for d in dims)) for dims, n in self.operations)

    def state(self) -> tuple[StatePart, ...]:
        """List what it carries from token to token."""
        return ()


@dataclass(frozen=True, slots=True)
class TiedKey(Step):
    """The key that the decay leaves room for: k = 1 - a."""

    operations = (("K", 1),)

    def run(self, env: Env) -> None:
        env.x["k"] = -env.x["g"].expm1().to(env.narrow)

    def write(self, names: Names) -> None:
        names.x["k"] = names.let("k", _ONE - names.x["g"])


@dataclass(frozen=True, slots=True)
class Times(Step):
    """A gate times a key or a value."""

    out: str
    gate: str
    of: str

    def run(self, env: Env) -> None:
        gate, of = env.x[self.gate], env.x[self.of]
        if gate.ndim == 3:
            env.x.postpone(self.out, of, gate)
        else:
            env.x[self.out] = env.times(gate, of)

    def write(self, names: Names) -> None:
        names.x[self.out] = names.x[self.gate] * names.x[self.of]

    def cost(self, key_size: int, value_size: int) -> int:
        return value_size if self.of == "v" else key_size


@dataclass(frozen=True, slots=True)
class Lag(Step):
    """The previous token's key and value, and how a token's gates are shared between both."""

    gates: tuple[str, ...]
    """Gates of writes; those that are no operand are ones."""
    operations = (("", 6),)

    def run(self, env: Env) -> None:
        x, trap = env.x, env.x["trap"]
        for name, part in (("k", "lag_key"), ("v", "lag_value")):
            first = x.get(part)
            x[f"{name}_previous"] = env.previous(x[name], first)
            x[part] = env.last(x[name], first)
        for name in self.gates:
            gate = x.get(name)
            now = trap if gate is None or gate.ndim == trap.ndim else trap[..., None]
            x[f"{name}_previous"] = 1 - now if gate is None else gate * (1 - now)
            x[name] = now if gate is None else gate * now

    def write(self, names: Names) -> None:
        x, trap = names.x, names.x["trap"]
        for name in ("k", "v"):
            x[f"{name}_previous"] = names.previous(name, x[name].shape)
        for name in self.gates:
            gate = x.get(name)
            x[f"{name}_previous"] = _ONE - trap if gate is None else gate * (_ONE - trap)
            x[name] = trap if gate is None else gate * trap

    def state(self) -> tuple[StatePart, ...]:
        return (
            StatePart("lag_key", "k", ("N", "H", "K"), "key of the last token"),
            StatePart("lag_value", "v", ("N", "HV", "V"), "value of the last token"),
        )


@dataclass(frozen=True, slots=True)
class SubTokens(Step):
    """Several sub-tokens per token, of which the last one is read."""

    parts: tuple[tuple[str, tuple[str | None, ...]], ...]
    """What every name stands for at each sub-token; None: zero, for a decay one. Names that are not
    listed are given per sub-token."""

    @property
    def count(self) -> int:
        """Sub-tokens per token."""
        return len(self.parts[0][1])

    def run(self, env: Env) -> None:
        made = {}
        for name, parts in self.parts:
            given = [None if part is None else env.x[part] for part in parts]
            heads = max(x.shape[2] for x in given if x is not None)
            spread = [None if x is None else env.spread(x, heads) for x in given]
            like = next(x for x in spread if x is not None)
            zero = like.new_zeros(like.shape) if None in parts else like
            made[name] = env.interleave(*(zero if x is None else x for x in spread))
        for name, x in made.items():
            env.x[name] = x
        if env.cu_seqlens is not None:
            env.cu_seqlens = self.count * env.cu_seqlens

    def write(self, names: Names) -> None:
        names.lines.append(f"for i = 1 to {self.count}:")
        names.index, made = "i", {}
        for name, parts in self.parts:
            # Formulas know a decay by its exponential.
            symbol = {"g": "a", "forget": "f"}.get(name, name)
            nothing = number(0) if symbol == name else _ONE
            given = [nothing if part is None else names.x[part] for part in parts]
            shape = next(x.shape for x in given if x is not nothing)
            row = Term(f"[{', '.join(x.text for x in given)}]", shape)
            made[name] = names.let(symbol, row)
        names.x |= made


@dataclass(frozen=True, slots=True)
class Turn(Step):
    """Vectors over keys in the basis of the importance, or back from it."""

    out: str
    of: str
    back: bool = False
    operations = (("KK", 2),)

    def run(self, env: Env) -> None:
        x = env.x
        x[self.out] = env.turned(x[self.of].to(env.wide), x["basis"], back=self.back)

    def write(self, names: Names) -> None:
        basis = Term("R", ("K", "K"))
        turned = (basis if self.back else basis.T) @ names.x[self.of]
        symbol = f"{self.of}_axes" if self.out == self.of else self.out
        names.x[self.out] = names.let(symbol, turned)


@dataclass(frozen=True, slots=True)
class Importance(Step):
    """The scan of an importance over keys, or of one for all of them, above the prior."""

    g: str | None
    keeps_previous: bool
    """Whether later steps need the importance that each token finds, too."""
    isotropic: bool = False
    discount: bool = False
    """Whether what decays is the whole importance, and not what lies above the prior."""
    operations = (("K", 4),)

    def run(self, env: Env) -> None:
        x, first = env.x, env.x.get("importance")
        k, b = env.token("k"), x["b"]
        if self.isotropic:
            b = b * env.heads("k").to(env.wide).square().mean(-1)
            k = k.new_ones(1).expand(*k.shape[:2], 1, 1)
        start = first
        if self.discount:
            start = x["prior"].expand(env.sequences(), -1, k.shape[-1])
            start = start if first is None else start + first
        J, final = env.core.importance(
            k, b, env.gate(self.g), initial_state=start, cu_seqlens=env.cu_seqlens
        )
        if self.discount:
            J, final = J - x["prior"], final - x["prior"]
        x["importance"] = final
        self.keep(env, J, first)

    def keep(self, env: Env, J: Tensor, first: Tensor | None) -> None:
        """Keep the importance of every token for later steps, from the one before the first."""
        env.x["J"] = env.over_keys(J)
        if self.keeps_previous:
            env.x.functions["J_previous"] = lambda: env.over_keys(env.previous(J, first))

    def write(self, names: Names) -> None:
        x, shape = names.x, NUMBER if self.isotropic else _KEY
        x["J_previous"] = names.previous("J", shape)
        kept = names.decayed(self.g, "J", shape)
        if self.discount and self.g is not None:
            kept = kept - (_ONE - x[self.g]) * _prior(kept)
        x["J"] = names.let("J", kept + x["b"] * _evidence(x["k"], self.isotropic))

    def state(self) -> tuple[StatePart, ...]:
        return (_importance(("1",) if self.isotropic else ("K",)),)


def _evidence(k: Term, isotropic: bool) -> Term:
    """Write what a key counts for."""
    return _mean(k.squared) if isotropic else k.squared


def _mean(x: Term) -> Term:
    return Term(f"mean({x.text})")


def _prior(importance: Term) -> Term:
    """Write the prior of an importance: one number, or one per key."""
    return Term("I_p", NUMBER if importance.shape == NUMBER else _KEY)


@dataclass(frozen=True, slots=True)
class Diffuse(Step):
    """The scan of an importance whose variance grows, the scalar Riccati recursion of a Kalman
    filter, and the importance I' that a token finds."""

    k: str
    g: str | None
    noise: str | None
    isotropic: bool
    turned: bool
    """Whether decays per key act along the axes of a basis."""
    operations = (("K", 12),)

    def run(self, env: Env) -> None:
        x, first, prior = env.x, env.x.get("importance"), env.x["prior"]
        u = env.heads(self.k).to(env.wide).square()
        g = env.channels(self.g)
        if g is None:
            keep = u.new_ones(1).expand(*u.shape[:3], 1)
        else:
            keep = (2 * g).exp()
            if self.isotropic:
                keep = keep.mean(-1, keepdim=True)
            elif self.turned and keep.shape[-1] > 1:
                keep = env.turned(keep, x["basis"].square())
        u = x["b"][..., None] * (u.mean(-1, keepdim=True) if self.isotropic else u)
        noise = env.channels(self.noise)
        if noise is None:
            # Above the prior, where nothing that is added keeps it at zero to the last bit.
            one, lost = keep.new_ones(keep.shape), (1 - keep) / prior
            J, x["importance"] = env.core.riccati(
                keep, lost, one, u, initial_state=first, cu_seqlens=env.cu_seqlens
            )
            old = env.previous(J, first)
            drift = keep * old / (1 + lost * old)
        else:
            start = prior.expand(env.sequences(), -1, u.shape[-1])
            start = start if first is None else start + first
            total, final = env.core.riccati(
                noise.new_ones(noise.shape), noise, keep, u,
                initial_state=start, cu_seqlens=env.cu_seqlens,
            )  # fmt: skip
            J, x["importance"] = total - prior, final - prior
            old = env.previous(total, start)
            drift = old / (noise * old + keep) - prior
        x["J"] = env.over_keys(J)
        x["J_previous"] = env.over_keys(old if noise is None else old - prior)
        x["found"] = env.over_keys(drift + prior)

    def write(self, names: Names) -> None:
        x, shape = names.x, NUMBER if self.isotropic else _KEY
        old = names.previous("J", shape)
        prior, keep = _prior(old), _ONE
        if self.g is not None:
            keep = x[self.g].squared
            if self.isotropic and keep.shape != NUMBER:
                keep = names.let("r", _mean(keep))
            elif self.turned and keep.shape != NUMBER:
                keep = names.let("r", Term("(R^T)^2", ("K", "K")) @ keep)
        added = (_ONE - keep) / prior if self.noise is None else x[self.noise]
        spread = keep / (old + prior) + added
        x["found"], x["J_previous"] = names.let("I'", _ONE / spread), old
        x["J"] = names.let("J", x["found"] - prior + x["b"] * _evidence(x[self.k], self.isotropic))

    def state(self) -> tuple[StatePart, ...]:
        return (_importance(("1",) if self.isotropic else ("K",)),)


@dataclass(frozen=True, slots=True)
class Kept(Step):
    """What an observation leaves of a mean whose synapses correct their own part alone: the decay
    times I' / I."""

    g: str | None
    operations = (("K", 4),)

    def run(self, env: Env) -> None:
        x, g = env.x, env.channels(self.g)
        kept = (x["found"] / (x["J"] + x["prior"])).log()
        x["kept"] = kept if g is None else kept + g

    def write(self, names: Names) -> None:
        x = names.x
        kept = x["found"] / (x["J"] + _prior(x["J"]))
        x["kept"] = kept if self.g is None else x[self.g] * kept


def _importance(channels: tuple[str, ...]) -> StatePart:
    return StatePart("importance", "J", ("N", "HV", *channels), "importance above the prior")


@dataclass(frozen=True, slots=True)
class LogImportance(Step):
    """The scan of an importance that counts e^k, in logarithms, and what it makes of decay and
    key."""

    operations = (("K", 7),)

    def run(self, env: Env) -> None:
        x, k, first = env.x, env.heads("k"), env.x.get("importance")
        wide = k.to(env.wide)
        if first is None:
            first = wide.new_full((env.sequences(), *k.shape[2:]), -math.inf)
        x["z"] = z = env.log_sums(wide, first)
        x["importance"] = env.last(z, first)
        x["forget"], x["kappa"] = env.previous(z, first) - z, (k - z).exp()

    def write(self, names: Names) -> None:
        x, old = names.x, names.previous("z", _KEY)
        z = names.let("z", apply("log", apply("exp", old) + apply("exp", x["k"])))
        x["z"] = z
        x["forget"], x["kappa"] = apply("exp", old - z), apply("exp", x["k"] - z)

    def state(self) -> tuple[StatePart, ...]:
        return (StatePart("importance", "z", ("N", "HV", "K"), "logarithm of importance"),)


@dataclass(frozen=True, slots=True)
class Forget(Step):
    """How the mean is forgotten when its importance decays to the prior, and the importance I' that
    a token finds."""

    g: str | None
    operations = (("K", 4),)

    def run(self, env: Env) -> None:
        x, g = env.x, env.channels(self.g)
        if g is None:
            x["found"] = x["J_previous"] + x["prior"]
        else:
            x["forget"], x["found"] = env.forgetting(x["J_previous"], g, x["prior"])

    def write(self, names: Names) -> None:
        x, old = names.x, names.x["J_previous"]
        found = names.let("I'", names.decayed(self.g, "J", old.shape) + _prior(old))
        x["found"] = found
        if self.g is not None:
            x["forget"] = x[self.g] * (old + _prior(old)) / found


@dataclass(frozen=True, slots=True)
class Discounted(Step):
    """The importance I' that a token finds where the prior is forgotten, too."""

    g: str | None
    operations = (("K", 2),)

    def run(self, env: Env) -> None:
        x, g = env.x, env.channels(self.g)
        total = x["J_previous"] + x["prior"]
        x["found"] = total if g is None else total * g.exp()

    def write(self, names: Names) -> None:
        old = names.x["J_previous"]
        total = old + _prior(old)
        names.x["found"] = names.let("I'", total if self.g is None else names.x[self.g] * total)


@dataclass(frozen=True, slots=True)
class Divide(Step):
    """A key or query over the importance."""

    out: str
    of: str
    importance: str
    """J or J_previous, above the prior, or `found` with it."""
    whole: bool = False
    """Whether that contains the prior."""
    operations = (("K", 2),)

    def run(self, env: Env) -> None:
        x, of = env.x, env.heads(self.of)
        importance = x[self.importance]
        x[self.out] = of / importance if self.whole else env.over(of, importance, x["prior"])

    def write(self, names: Names) -> None:
        importance = names.x[self.importance]
        total = importance if self.whole else importance + _prior(importance)
        names.x[self.out] = names.x[self.of] / total


@dataclass(frozen=True, slots=True)
class Precondition(Step):
    """The bounded factor on the write key that stands for a reciprocal importance:
    base ^ -softsign(log(J + eps) - center)."""

    base: float
    eps: float
    operations = (("K", 8),)

    def run(self, env: Env) -> None:
        x = (env.x["J"] + self.eps).log() - env.x["center"][:, None]
        env.x["m"] = (-math.log(self.base) * x / (1 + x.abs())).exp()

    def write(self, names: Names) -> None:
        level = apply("log", names.x["J"] + number(self.eps)) - names.x["center"]
        power = Term(f"{number(self.base).text}^(-{apply('softsign', level).text})", _KEY)
        names.x["m"] = names.let("m", power)


def _strength(names: Names, beta: Term | None, found: Term, square: Term | None) -> Term:
    """Write what the exact gain makes of a write gate: a precision, or with `square` a rate."""
    beta = _ONE if beta is None else beta
    reached = found if beta is _ONE else beta * found
    if square is None:
        return beta / (_ONE + reached)
    known = names.let("c", square if beta is _ONE else beta * square)
    most = names.let("d", Term(f"max({known.text}, 1)", known.shape))
    return beta / ((most - known + reached) / most)


@dataclass(frozen=True, slots=True)
class Gain(Step):
    """The strength of a gain that is not of first order, and the key that it goes along."""

    beta: str | None
    found: str | None
    """The importance I' that divides the key; None: `scaled` is the key over it already."""
    g: str | None
    diagonal: bool
    """Whether every synapse corrects its own part of the prediction alone, which makes the gain
    part of the decay."""
    kind: str
    """exact: the write gate is a precision; exact_rate: the rate of one; flow: how long the delta
    rule runs, with phi(x) = (1 - exp(-x)) / x."""
    scaled: str = "k"

    def run(self, env: Env) -> None:
        x, key = env.x, env.heads("k")
        if self.found is not None:
            self.strengthen(env, *env.whitened(key, x[self.found]))
        else:
            scaled, wide = env.heads(self.scaled), key.to(env.wide)
            found = (wide * scaled).sum(-1)
            square = (wide * wide).sum(-1) if self.kind == "exact_rate" else None
            self.strengthen(env, scaled, found, square)

    def strengthen(self, env: Env, scaled: Tensor, found: Tensor, square: Tensor | None) -> None:
        """Make the strength of the key over I', of k.k / I' and of k.k."""
        x, key, beta = env.x, env.heads("k"), env.gate(self.beta)
        if self.kind == "flow":
            x["rate"] = env.flow_strength(beta, found)
        else:
            square = square if self.kind == "exact_rate" else None
            x["rate"] = env.exact_strength(beta, found, square)
        x["kappa"] = scaled
        if self.diagonal:
            x["kappa"] = x["rate"][..., None] * scaled
            kept, g = (-key * x["kappa"]).log1p(), env.channels(self.g)
            x["kept"] = kept if g is None else kept + g

    def write(self, names: Names) -> None:
        x, k = names.x, names.x["k"]
        beta = None if self.beta is None else x[self.beta]
        scaled = x[self.scaled] if self.found is None else k / x[self.found]
        found = k.T @ scaled
        if self.kind == "flow":
            phi = apply("phi", found if beta is None else beta * found)
            strength = phi if beta is None else beta * phi
        else:
            square = k.T @ k if self.kind == "exact_rate" else None
            strength = _strength(names, beta, found, square)
        x["rate"] = names.let("s", strength)
        x["kappa"] = scaled
        if self.diagonal:
            x["kappa"] = names.let("G", x["rate"] * scaled)
            kept = _ONE - k * x["kappa"]
            x["kept"] = kept if self.g is None else x[self.g] * kept

    def cost(self, key_size: int, value_size: int) -> int:
        return (9 if self.kind == "exact_rate" else 7) * key_size


@dataclass(frozen=True, slots=True)
class Observed(Step):
    """A key over the precision that an observation leaves, from the key over the one that it
    finds, f: f / (1 + b k.f)."""

    out: str
    scaled: str
    b: str | None
    operations = (("K", 4), ("", 2))

    def run(self, env: Env) -> None:
        x, f = env.x, env.heads(self.scaled)
        reached = (env.heads("k").to(env.wide) * f).sum(-1)
        x[self.out] = f / (1 + env.rate(self.b, "v") * reached)[..., None]

    def write(self, names: Names) -> None:
        x, f = names.x, names.x[self.scaled]
        b = _ONE if self.b is None else x[self.b]
        x[self.out] = f / (_ONE + b * (x["k"].T @ f))


@dataclass(frozen=True, slots=True)
class Less(Step):
    """A vector over keys less another one times a gate."""

    out: str
    of: str
    gate: str
    other: str
    operations = (("K", 2),)

    def run(self, env: Env) -> None:
        gate = env.x[self.gate]
        gate = gate.exp() if self.gate == "g" else gate
        env.x[self.out] = env.heads(self.of) - env.times(gate, env.x[self.other])

    def write(self, names: Names) -> None:
        x = names.x
        x[self.out] = x[self.of] - x[self.gate] * x[self.other]


@dataclass(frozen=True, slots=True)
class Solve(Step):
    """The class `full`: H = a H + b k k^T, and a vector over the precision matrix H + Diag(I_p)."""

    out: str
    of: str
    b: str | None
    g: str | None
    at: str = "written"
    """Which matrix: that of the token, the one that it finds (decayed), or that before its decay
    (previous). The first is carried."""
    kernel = Kernel.FULL
    operations = (("KK", 5), ("KKK", 1 / 3))

    def run(self, env: Env) -> None:
        x, cu = env.x, env.cu_seqlens
        k, b, g = env.token("k"), env.rate(self.b, "v"), env.gate(self.g)
        if self.at != "written":
            # The matrix that a token finds is that of a scan which counts the token before.
            k, b = env.previous(k, None), env.previous(b, None)
            if g is not None and self.at == "decayed":
                b = b * g.exp()
            elif g is not None:
                g = env.previous(g, None)
        x[self.out], final = env.core.solve(
            env.token(self.of), k, b, g,
            prior=env.prior(), initial_state=x.get("importance"), cu_seqlens=cu,
        )  # fmt: skip
        if self.at == "written":
            x["importance"] = final

    def write(self, names: Names) -> None:
        x, k, square = names.x, names.x["k"], ("K", "K")
        H = (
            names.previous("H", square)
            if self.at == "previous"
            else names.decayed(self.g, "H", square)
        )
        if self.at == "written":
            H = names.let("H", H + (k @ k.T if self.b is None else x[self.b] * (k @ k.T)))
        total = H + apply("Diag", _PRIOR)
        x[self.out] = names.let(self.out, Term(f"{total.within(0)}^-1", square) @ x[self.of])

    def state(self) -> tuple[StatePart, ...]:
        if self.at != "written":
            return ()
        return (StatePart("importance", "H", ("N", "HV", "K", "K"), "importance above the prior"),)


@dataclass(frozen=True, slots=True)
class SolveRelative(Step):
    """The class `full` with a share of the matrix's norm as prior: H = a H + b k k^T, and the query
    over H + lambda 1, lambda = share |H| + floor.

    Over lambda, the matrix decays by a lambda_{t-1} / lambda_t <= 1, and its prior is one.
    """

    b: str | None
    g: str | None
    floor: float
    kernel = Kernel.FULL
    operations = (("KK", 9), ("KKK", 1 / 3))

    def run(self, env: Env) -> None:
        x, cu, first = env.x, env.cu_seqlens, env.x.get("importance")
        k, b, g = env.heads("k").to(env.wide), env.rate(self.b, "v"), env.gate(self.g)
        seen, x["importance"] = env.core.linear(
            env.token("k"),
            env.token("k"),
            (b[..., None] * k).to(env.narrow),
            g,
            initial_state=first,
            read="pre",
            cu_seqlens=cu,
        )
        # |a H + b k k^T|^2 = a^2 |H|^2 + 2 a b k^T H k + (b k.k)^2
        length = k.square().sum(-1)
        across = 2 * b * (seen.to(env.wide) * k).sum(-1).clamp(min=0)
        across = across if g is None else across * g.exp()
        start = (
            b.new_zeros(env.sequences(), b.shape[2])
            if first is None
            else first.square().sum((-2, -1))
        )
        norm, _ = env.core.importance(
            env.token("k").new_ones(1).expand(*b.shape[:2], 1, 1),
            across + (b * length).square(),
            None if g is None else 2 * g,
            initial_state=start[..., None],
            cu_seqlens=cu,
        )
        share = x["prior"][:, 0]
        # The gradient of a root at zero is infinite.
        level = share * norm[..., 0].clamp(min=env.tiny).sqrt() + self.floor
        before = share * start.clamp(min=env.tiny).sqrt() + self.floor
        drift = (env.previous(level, before) / level).log()
        drift = drift if g is None else g + drift
        solved, _ = env.core.solve(
            env.token("q"),
            env.token("k"),
            b / level,
            drift.clamp(max=0),
            prior=k.new_ones(x["prior"].shape).expand(-1, k.shape[-1]),
            initial_state=None if first is None else first / before[..., None, None],
            cu_seqlens=cu,
        )
        x["x"] = solved / level[..., None]

    def write(self, names: Names) -> None:
        x, k, square = names.x, names.x["k"], ("K", "K")
        new = k @ k.T if self.b is None else x[self.b] * (k @ k.T)
        H = names.let("H", names.decayed(self.g, "H", square) + new)
        share = Term("I_p") * Term(f"norm({H.text})") + number(self.floor)
        total = H + names.let("l", share) * Term("Id", square)
        x["x"] = names.let("x", Term(f"{total.within(0)}^-1", square) @ x["q"])

    def state(self) -> tuple[StatePart, ...]:
        return (StatePart("importance", "H", ("N", "HV", "K", "K"), "importance above the prior"),)


@dataclass(frozen=True, slots=True)
class Mix(Step):
    """The solved query, or a part of it: q + mix (x - q)."""

    operations = (("K", 3),)

    def run(self, env: Env) -> None:
        x, q = env.x, env.heads("q").to(env.wide)
        x["x"] = q + x["mix"][..., None] * (x["x"] - q)

    def write(self, names: Names) -> None:
        x = names.x
        x["x"] = names.let("z", x["q"] + x["mix"] * (x["x"] - x["q"]))


@dataclass(frozen=True, slots=True)
class Natural(Step):
    """The exact gain's strength s on a memory that is importance times mean: values are written
    with s (1 + b k.z), and predictions are removed with that less b, where z is the key over the
    precision that it finds."""

    b: str
    scaled: str
    operations = (("K", 2), ("", 3))

    def run(self, env: Env) -> None:
        x = env.x
        found = (env.heads("k").to(env.wide) * x[self.scaled]).sum(-1)
        x["written"] = x["rate"] * (1 + x[self.b] * found)
        x["removed"] = x["written"] - x[self.b]

    def write(self, names: Names) -> None:
        x = names.x
        found = x["k"].T @ x[self.scaled]
        x["written"] = names.let("w", x["rate"] * (_ONE + x[self.b] * found))
        x["removed"] = x["written"] - x[self.b]


@dataclass(frozen=True, slots=True)
class Covariance(Step):
    """A Kalman filter's covariance, Diag(1 / I_p) + C, and a key times the one that it finds; token
    by token."""

    b: str | None
    g: str | None
    noise: str | None
    kernel = Kernel.COVARIANCE
    operations = (("KK", 9), ("K", 4))

    def run(self, env: Env) -> None:
        x, b = env.x, env.rate(self.b, "v")
        x["found"], spread, x["importance"] = env.core.covariance(
            env.token("q"),
            env.token("k"),
            b,
            env.gate(self.g),
            env.gate(self.noise),
            prior=env.prior(),
            initial_state=x.get("importance"),
            cu_seqlens=env.cu_seqlens,
        )
        if env.uncertainty:
            x["uncertainty"] = spread

    def write(self, names: Names) -> None:
        x, square = names.x, ("K", "K")
        k, q, b = x["k"], x["q"], _ONE if self.b is None else x[self.b]
        g = None if self.g is None else x[self.g]
        drift = names.previous("C", square)
        if g is not None:
            drift = g.squared * drift if g.shape == NUMBER else g * drift * g.T
        if self.noise is not None:
            added = x[self.noise]
            if g is not None:
                # What the decay would lose of the prior's variance comes back as noise.
                added = added - (_ONE - g.squared) / _PRIOR
            one = added.shape == NUMBER
            drift = drift + (added * Term("Id", square) if one else apply("Diag", added))
        if drift.level:
            drift = names.let("C'", drift)
        x["found"] = found = names.let("f", k / _PRIOR + drift @ k)
        gain = b / (_ONE + b * (k.T @ found))
        new = names.let("C", drift - gain * (found @ found.T))
        x["uncertainty"] = q.T @ (q / _PRIOR + new @ q)

    def state(self) -> tuple[StatePart, ...]:
        meaning = "covariance above that of the prior"
        return (StatePart("importance", "C", ("N", "HV", "K", "K"), meaning),)


@dataclass(frozen=True, slots=True)
class Linear(Step):
    """The class `linear`: S = Diag(a) S + k w^T, y = S^T q."""

    q: str
    k: str
    w: str
    g: str | None
    read: str = "post"
    symbol: str = "S"
    kernel = Kernel.LINEAR
    operations = (("KV", 5),)

    def run(self, env: Env) -> None:
        q, w = env.x.factors(self.q), env.x.factors(self.w)
        env.x["y"], env.x["memory"] = env.core.linear(
            env.narrowed(q.of),
            env.token(self.k),
            env.narrowed(w.of),
            env.gate(self.g),
            beta=w.gate,
            scale=q.scale,
            initial_state=env.x.get("memory"),
            read=self.read,
            cu_seqlens=env.cu_seqlens,
        )

    def write(self, names: Names) -> None:
        x, old = names.x, names.previous(self.symbol, _MEMORY)
        new = names.decayed(self.g, self.symbol, _MEMORY) + x[self.k] @ x[self.w].T
        new = names.let(self.symbol, new)
        x["y"] = (new if self.read == "post" else old).T @ x[self.q]

    def state(self) -> tuple[StatePart, ...]:
        return (_memory(self.symbol),)


_MEANINGS = {
    "S": "mean",
    "mu": "mean",
    "h": "importance times mean",
}


def _memory(symbol: str) -> StatePart:
    return StatePart("memory", symbol, ("N", "HV", "K", "V"), _MEANINGS[symbol])


@dataclass(frozen=True, slots=True)
class Delta(Step):
    """The class `delta`: S = Diag(a) S; S = S + k (w - S^T e)^T; y = S^T q."""

    q: str
    e: str
    k: str
    w: str
    g: str | None
    base: str
    symbol: str
    kernel = Kernel.DELTA
    operations = (("KV", 7),)

    def run(self, env: Env) -> None:
        q, e, w = (env.x.factors(name) for name in (self.q, self.e, self.w))
        k = env.x[self.k]
        env.x["y"], env.x["memory"] = env.core.delta(
            env.narrowed(q.of),
            None if e.of is k else env.narrowed(e.of),
            env.narrowed(k),
            env.narrowed(w.of),
            env.gate(self.g),
            beta=w.gate,
            erase=e.gate,
            scale=q.scale,
            initial_state=env.x.get("memory"),
            base=self.base,
            cu_seqlens=env.cu_seqlens,
        )

    def write(self, names: Names) -> None:
        x, old = names.x, names.previous(self.symbol, _MEMORY)
        mean = _decayed_mean(names, self.g, self.symbol)
        seen = mean if self.base == "decayed" else old
        new = mean + x[self.k] @ (x[self.w] - seen.T @ x[self.e]).T
        x["y"] = names.let(self.symbol, new).T @ x[self.q]

    def state(self) -> tuple[StatePart, ...]:
        return (_memory(self.symbol),)


def _decayed_mean(names: Names, g: str | None, symbol: str) -> Term:
    """Write the mean after its decay, if there is one."""
    mean = names.decayed(g, symbol, _MEMORY)
    return mean if g is None else names.let(f"{symbol}'", mean)


@dataclass(frozen=True, slots=True)
class Synapse(Step):
    """The class `synapse`: h = Diag(a) h + k w^T; J = Diag(a) J + k^2 b^T;
    y = (h / (J + I_p))^T q."""

    w: str
    g: str | None
    read: str
    kernel = Kernel.SYNAPSE
    operations = (("KV", 10),)

    def run(self, env: Env) -> None:
        x = env.x
        result = env.core.synapse(
            env.token("q"),
            env.token("k"),
            env.token(self.w),
            x["b"],
            env.gate(self.g),
            prior=env.prior(),
            initial_state=env.pair(),
            read=self.read,
            uncertainty=env.uncertainty,
            cu_seqlens=env.cu_seqlens,
        )
        env.take(result)

    def write(self, names: Names) -> None:
        x = names.x
        h, J = (names.decayed(self.g, s, _MEMORY) for s in ("h", "J"))
        h = names.let("h", h + x["k"] @ x[self.w].T)
        J = names.let("J", J + x["k"].squared @ x["b"].T)
        if self.read == "pre":
            h, J = (names.previous(s, _MEMORY) for s in ("h", "J"))
        x["y"] = (h / (J + _PRIOR)).T @ x["q"]
        x["uncertainty"] = (_ONE / (J + _PRIOR)).T @ x["q"].squared

    def state(self) -> tuple[StatePart, ...]:
        return _memory("h"), _importance(("K", "V"))


@dataclass(frozen=True, slots=True)
class SynapseDelta(Step):
    """The class `synapse_delta`: mean and importance per synapse, token by token."""

    q: str
    k: str
    v: str
    beta: str | None
    b: str | None
    """None: importance is the constant one."""
    shared: bool
    """Whether the importance of a key is equal for all value channels."""
    g: str | None
    e: str
    evidence: str
    gain: str
    correction: str
    base: str
    kernel = Kernel.SYNAPSE_DELTA
    operations = (("KV", 14),)

    def run(self, env: Env) -> None:
        x, start = env.x, None
        k, v = env.token(self.k), env.token(self.v)
        b = env.gate(self.b)
        if b is not None and self.shared:
            b = b[..., None].expand(v.shape)
        if "memory" in x:
            memory = x["memory"]
            importance = memory.new_zeros(memory.shape) if b is None else x["importance"]
            if self.shared:
                importance = importance[..., None].expand(memory.shape)
            start = memory, importance
        prior = k.new_ones(v.shape[2], k.shape[-1], dtype=env.wide)
        x["y"], (x["memory"], importance), doubt = env.core.synapse_delta(
            env.token(self.q),
            k,
            v,
            env.rate(self.beta, self.v),
            b,
            env.gate(self.g),
            e=None if self.e == self.k else env.token(self.e),
            evidence=None if self.evidence == self.k else env.token(self.evidence),
            prior=prior if b is None else env.prior(),
            gain=self.gain,
            correction=self.correction,
            base=self.base,
            initial_state=start,
            uncertainty=env.uncertainty and b is not None,
            cu_seqlens=env.cu_seqlens,
        )
        if b is not None:
            x["importance"] = importance[..., 0] if self.shared else importance
        if doubt is not None:
            x["uncertainty"] = doubt[..., 0] if self.shared else doubt

    def write(self, names: Names) -> None:
        x, k, v = names.x, names.x[self.k], names.x[self.v]
        symbol, scaled, total = "S", k, None
        if self.b is None:
            mean = _decayed_mean(names, self.g, symbol)
        else:
            symbol = "mu"
            shape, square = (_KEY if self.shared else _MEMORY), x[self.evidence].squared
            new = x[self.b] * square if self.shared else square @ x[self.b].T
            total = names.let("J", names.decayed(self.g, "J", shape) + new) + _PRIOR
            mean = names.previous(symbol, _MEMORY)
            if self.g is not None or self.gain != "first_order":
                found = names.let("I'", names.decayed(self.g, "J", shape) + _PRIOR)
                scaled = k / found
                if self.g is not None:
                    forget = x[self.g] * (names.previous("J", shape) + _PRIOR) / found
                    mean = names.let("mu'", forget * mean)
        beta = None if self.beta is None else x[self.beta]
        old = names.previous(symbol, _MEMORY)
        seen = mean if self.base == "decayed" else old
        if self.gain == "first_order":
            error = v - seen.T @ x[self.e]
            error = error if beta is None else beta * error
            new = mean + (k if total is None else k / total) * error.T
        else:
            rated = self.gain == "exact_rate"
            beta = None if beta is None else beta.T
            strength = _strength(names, beta, k.T @ scaled, k.T @ k if rated else None)
            gain = names.let("G", scaled * strength)
            if self.correction == "diagonal":
                new = mean * (_ONE - k * gain) + gain * v.T
            else:
                new = mean + gain * (v - seen.T @ x[self.e]).T
        x["y"] = names.let(symbol, new).T @ x[self.q]
        if total is not None:
            x["uncertainty"] = (_ONE / total).T @ x[self.q].squared

    def state(self) -> tuple[StatePart, ...]:
        if self.b is None:
            return (_memory("S"),)
        return _memory("mu"), _importance(("K",) if self.shared else ("K", "V"))


@dataclass(frozen=True, slots=True)
class Tempered:
    """Steps of which an engine may have all in one operation: the scan of an importance over keys,
    how a mean is forgotten when it decays, if it is, and the key over the importance."""

    scan: Importance
    variance: Variance
    forget: Forget | None
    divide: Divide | Gain
    """Of a gain the importance is the one that a token finds."""
    keeps: bool
    """Whether later steps need the importance, too."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them."""
        forget = () if self.forget is None else (self.forget,)
        return self.scan, self.variance, *forget, self.divide

    def run(self, env: Env) -> None:
        x, whiten, first = env.x, env.core.whiten, env.x.get("importance")
        if whiten is None:
            for part in self.steps:
                part.run(env)
            return
        gains = isinstance(self.divide, Gain)
        scaled, x["importance"], forget, reached, square, J = whiten(
            None,
            env.token("k"),
            x["b"],
            env.gate(self.scan.g),
            prior=env.prior(),
            initial_state=first,
            at="found" if gains else "written",
            forgets=self.forget is not None and self.forget.g is not None,
            sums=gains,
            keeps=self.keeps or env.uncertainty,
            cu_seqlens=env.cu_seqlens,
        )
        if J is not None:
            self.scan.keep(env, J, first)
            self.variance.run(env)
        if forget is not None:
            x["forget"] = forget
        if isinstance(self.divide, Gain):
            assert reached is not None
            self.divide.strengthen(env, scaled, reached, square)
        else:
            x[self.divide.out] = scaled


@dataclass(frozen=True, slots=True)
class TemperedRead:
    """Likewise: the scan of an importance over keys, and a Hebbian memory that a query over the
    importance reads."""

    scan: Importance
    variance: Variance
    divide: Divide
    memory: Linear

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them."""
        return self.scan, self.variance, self.divide, self.memory

    def run(self, env: Env) -> None:
        x, read, first = env.x, env.core.whitened_linear, env.x.get("importance")
        if read is None:
            for part in self.steps:
                part.run(env)
            return
        q, w = x.factors(self.divide.of), x.factors(self.memory.w)
        y, states, J = read(
            env.narrowed(q.of),
            env.token(self.memory.k),
            env.narrowed(w.of),
            x["b"],
            env.gate(self.scan.g),
            prior=env.prior(),
            beta=w.gate,
            scale=q.scale,
            initial_state=env.pair(),
            read=self.memory.read,
            keeps=env.uncertainty,
            cu_seqlens=env.cu_seqlens,
        )
        if J is not None:
            self.scan.keep(env, J, first)
            self.variance.run(env)
        env.take((y, states, None))


@dataclass(frozen=True, slots=True)
class OneToken:
    """Steps of which an engine may have a token of decoding in one piece: a memory with one write,
    and an importance over keys or per synapse, if any, that decays as it does."""

    before: tuple[Step, ...]
    """What makes a tied key and a gated erase key."""
    memory: tuple[Step | Tempered | TemperedRead, ...]
    """The memory itself."""
    beta: str | None
    b: str | None
    g: str | None
    p: str | None
    """The erase key, if it is not the key."""
    erase: str | None
    """A gate on it, so that beta acts on the value alone."""
    tied: bool
    """Whether the key is what the decay leaves room for."""
    synapse: bool
    """Whether importance or gain have an entry per synapse."""
    correction: str
    gain: str
    read: str
    base: str

    @property
    def steps(self) -> tuple[Step | Tempered | TemperedRead, ...]:
        """All of them."""
        return (*self.before, *self.memory)

    def run(self, env: Env) -> None:
        for part in self.before:
            part.run(env)
        x, step = env.x, env.core.posterior_step
        whole = step is not None and x["v"].shape[1] == 1 and env.cu_seqlens is None
        if self.b is None or self.synapse or not whole or env.wants_derivative():
            for memory in self.memory:
                memory.run(env)
            return
        assert step is not None
        own, e = self.erase is not None, self.p
        if own:
            e = "e"
        result = step(
            env.token("q"),
            env.token("k"),
            env.token("v"),
            env.gate(self.beta),
            x[self.b],
            env.gate(self.g),
            e=None if e is None else env.token(e),
            prior=x["prior"],
            initial_state=env.pair(),
            correction=self.correction,
            gain=self.gain,
            read=self.read,
            base=self.base,
            own=own,
            uncertainty=env.uncertainty,
        )
        env.take(result)


@dataclass(frozen=True, slots=True)
class Variance(Step):
    """The posterior variance of the output, if a call asks for it."""

    importance: str | None
    """J, J_previous, z for its logarithm; None: importance is the constant one."""
    q: str = "q"
    """The query along the axes of the importance."""
    solved: str | None = None
    """The query over a precision matrix."""

    def run(self, env: Env) -> None:
        if not env.uncertainty:
            return
        if self.solved is not None:
            env.x["uncertainty"] = (env.heads("q").to(env.wide) * env.x[self.solved]).sum(-1)
            return
        squares = env.heads(self.q).to(env.wide).square()
        if self.importance == "z":
            squares = squares * (-env.x["z"]).exp()
        elif self.importance is not None:
            squares = squares / (env.x[self.importance] + env.x["prior"])
        env.x["uncertainty"] = squares.sum(-1)

    def write(self, names: Names) -> None:
        q = names.x[self.q]
        if self.importance is None:
            names.x["uncertainty"] = q.T @ (q if self.solved is None else names.x[self.solved])
            return
        importance = names.x[self.importance]
        if importance.shape == NUMBER:
            names.x["uncertainty"] = q.T @ q / (importance + _prior(importance))
            return
        total = apply("exp", importance) if self.importance == "z" else importance + _PRIOR
        names.x["uncertainty"] = (_ONE / total).T @ q.squared


@dataclass(frozen=True, slots=True)
class Bonus(Step):
    """The same-token term of a read before the write: y + ((u (.) k)^T q) w."""

    beta: str | None
    operations = (("K", 3), ("V", 2))

    def run(self, env: Env) -> None:
        x = env.x
        same = (x["u"] * env.heads("k") * env.heads("q")).sum(-1, keepdim=True)
        x["y"] = x["y"] + same * env.times(env.gate(self.beta), x["v"])

    def write(self, names: Names) -> None:
        x = names.x
        w = x["v"] if self.beta is None else x[self.beta] * x["v"]
        x["y"] = x["y"] + ((x["u"] * x["k"]).T @ x["q"]) * w


@dataclass(frozen=True, slots=True)
class Normalize(Step):
    """The output over the decayed sum of similarities."""

    beta: str | None
    g: str | None
    kind: str
    eps: float
    operations = (("K", 5), ("V", 1))

    def run(self, env: Env) -> None:
        x, first = env.x, env.x.get("normalizer")
        ones = env.times(env.gate(self.beta), x["v"].new_ones(1).expand(*x["v"].shape[:-1], 1))
        mass, sums = env.core.linear(
            env.token("q"),
            env.token("k"),
            ones.to(env.narrow),
            env.gate(self.g),
            initial_state=None if first is None else first[..., None],
            cu_seqlens=env.cu_seqlens,
        )
        x["normalizer"], mass = sums[..., 0], mass.to(env.wide)
        x["y"] = x["y"] / (mass + self.eps if self.kind == "sum" else mass.abs().clamp(min=1))

    def write(self, names: Names) -> None:
        x = names.x
        written = x["k"] if self.beta is None else x[self.beta] * x["k"]
        mass = names.let("n", names.decayed(self.g, "n", _KEY) + written).T @ x["q"]
        if self.kind == "sum":
            total = mass + number(self.eps)
        else:
            total = Term(f"max({apply('abs', mass).text}, 1)")
        x["y"] = x["y"] / total

    def state(self) -> tuple[StatePart, ...]:
        return (StatePart("normalizer", "n", ("N", "HV", "K"), "decayed sum of written keys"),)


@dataclass(frozen=True, slots=True)
class ReadOut(Step):
    """What a token gives: the read of its last sub-token."""

    count: int

    def run(self, env: Env) -> None:
        x, tokens = env.x, env.x["y"].shape[1]
        for name in ("y", "uncertainty"):
            # What was computed before tokens were split is per token already.
            if name in x and x[name].shape[1] == tokens:
                x[name] = x[name][:, self.count - 1 :: self.count]
        if env.cu_seqlens is not None:
            env.cu_seqlens = env.cu_seqlens // self.count

    def write(self, names: Names) -> None:
        names.index = "t"
