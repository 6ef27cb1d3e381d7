"""The importance gate that conversion adds to a mixer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glazoo.converters.settings import GateShape
from glazoo.layers.clamp import live_clamp
from glazoo.layers.parts import KeepsWide
from glazoo.layers.plasticity import importance_gate
from glazoo.spec import Gate

__all__ = ["GATE_TENSORS", "ImportanceGate", "gate_shapes", "initial_gate"]

GATE_TENSORS = ("b_down", "b_up", "b_scale", "ip_log")
"""Names of the tensors that conversion adds to a mixer, in the order in which they are stored."""


def gate_shapes(
    *, hidden: int, heads: int, value: int, rank: int, gate: GateShape
) -> dict[str, tuple[int, ...]]:
    """Gives the shapes of the tensors that conversion adds to one mixer, in stored order."""
    width = heads * value if gate == "value" else heads
    return {
        "b_down": (rank, hidden),
        "b_up": (width, rank),
        "b_scale": (heads,),
        "ip_log": (heads,),
    }


def initial_gate(
    name: str, shape: tuple[int, ...], *, plasticity: float, seed: int, layer: int
) -> Tensor:
    """Gives the start of one added tensor, float32, the same wherever and in whatever order it is
    drawn."""
    if name == "b_down":
        generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
        bound = 1 / math.sqrt(shape[1])
        # Named dtype and device: models are built under a meta device and a default dtype of their
        # own.
        t = torch.empty(shape, dtype=torch.float32, device="cpu")
        return t.uniform_(-bound, bound, generator=generator)
    value = plasticity if name == "b_scale" else 0.0
    return torch.full(shape, value, dtype=torch.float32, device="cpu")


class ImportanceGate(KeepsWide):
    """The importance gate and the prior of one mixer.

        b_t = kappa r_t 2 sigmoid(b_up b_down h_t) ;
        kappa = max(b_scale, 0) with a live gradient ;  I_p = exp(ip_log)

    with h_t the mixer's input and r_t what `observed_precision` makes of its write gate: the gate
    itself, or the precision whose rate it is. `b_up` starts at zero, so at the start b_t = kappa
    r_t exactly: kappa = 0 is the source, kappa = 1 the full metaplastic form. `ip_log` starts at
    zero: I_p = 1.

    The factors are bare parameters rather than linear layers, so that quantisers and adapters that
    collect linear layers leave them alone, and they stay in float32 or wider whatever the model is
    cast to.

    Reference: arXiv:2602.09075, importance gate; the clamp at zero and the zero start of `b_up` are
    this project's.
    """

    no_weight_decay = True
    """Zero is a plasticity, a prior and an opening like others: trainers should not pull there."""

    b_down: nn.Parameter
    b_up: nn.Parameter
    b_scale: nn.Parameter
    ip_log: nn.Parameter

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        value: int,
        rank: int,
        gate: GateShape,
        plasticity: float = 0.0,
        seed: int = 0,
        layer: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.value, self.gate = heads, value, gate
        self.opening = Gate(shape=gate, parameterization="sigmoid", factor=2.0, tie="write")
        self.plasticity, self.seed, self.layer = plasticity, seed, layer
        for name, shape in gate_shapes(
            hidden=hidden, heads=heads, value=value, rank=rank, gate=gate
        ).items():
            empty = torch.empty(shape, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets every parameter to its start, but those that a checkpoint has filled already."""
        for name in GATE_TENSORS:
            p = self.get_parameter(name)
            if p.is_meta or getattr(p, "_is_hf_initialized", False):
                continue
            start = initial_gate(
                name,
                tuple(p.shape),
                plasticity=self.plasticity,
                seed=self.seed,
                layer=self.layer,
            )
            p.copy_(start)

    def forward(
        self, hidden: Float[Tensor, "B T D"], write: Float[Tensor, "B T HV"]
    ) -> tuple[Float[Tensor, "B T HV *V"], Float[Tensor, " HV"]]:
        """Gives the importance gate of every token and the prior of every head.

        Args:
            hidden: the mixer's input, [B, T, D].
            write: what the gate multiplies, from `observed_precision`, [B, T, HV], float32 or
                float64.

        Returns:
            b >= 0, [B, T, HV] for a head gate and [B, T, HV, V] for a value gate, and I_p > 0,
            [HV], both in the write gate's dtype.
        """
        self.refuse_narrow()
        # The two small products run in the model's dtype; what they give enters a sigmoid.
        low = F.linear(F.linear(hidden, self.b_down.to(hidden.dtype)), self.b_up.to(hidden.dtype))
        z = low.to(write.dtype).unflatten(-1, (self.heads, -1))
        kappa = live_clamp(self.b_scale).to(write.dtype)
        # One call gives both: between calls, an offloading hook takes the parameters away.
        return importance_gate(self.opening, z, write, kappa), self.ip_log.to(write.dtype).exp()

    def extra_repr(self) -> str:
        rank = self.b_down.shape[0]
        return f"heads={self.heads}, value={self.value}, gate={self.gate!r}, rank={rank}"
