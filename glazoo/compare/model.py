"""The small model in which variants are compared: all of it is the same but the recurrence's
layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glazoo.compare.errors import CompareError
from glazoo.compare.probe import key_size_for, mapped_size
from glazoo.layers import GatedLinearAttention
from glazoo.layers.gates import GateModule
from glazoo.program import lower
from glazoo.spec import Spec

__all__ = ["Model", "ModelConfig", "Shape", "count_parameters", "shape_for"]


class ModelConfig(BaseModel):
    """What all variants of one comparison share."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    width: int = Field(default=64, ge=4)
    """Channels."""
    layers: int = Field(default=1, ge=1)
    """Layers with a recurrence."""
    heads: int = Field(default=4, ge=1)
    """Heads per layer, for variants that may have more than one."""
    state_bytes: int = Field(default=4096, ge=4)
    """Budget of one layer's recurrent state, in float32."""
    aligned: bool = True
    """Whether a query starts as the key of the same token written one place later, so that recall
    works from the first step and training measures memory rather than luck in finding the
    circuit."""
    mlp: int = Field(default=64, ge=0)
    """Inner channels of the position-wise part; 0 for none."""


class Shape(BaseModel):
    """Head sizes of one variant under a state budget."""

    model_config = ConfigDict(frozen=True)

    heads: int
    key_size: int
    """Before a feature map."""
    value_size: int
    state_bytes: int
    """What is used of the budget, per layer."""


def shape_for(spec: Spec, config: ModelConfig) -> Shape:
    """Chooses head sizes: as many heads and value channels as the others, and the largest key size
    that the state budget holds.

    Raises:
        CompareError: no key size fits, or the width is no multiple of the heads.
    """
    program = lower(spec)
    heads = 1 if spec.layer.heads.sharing == "one" else config.heads
    if config.width % heads:
        raise CompareError(f"width: {config.width} is not a multiple of {heads} heads")
    value_size = config.width // heads
    floats = config.state_bytes // 4 // heads
    raw = key_size_for(program, floats, value_size)
    if "none" not in (spec.layer.q.rotation, spec.layer.k.rotation):
        raw -= raw % 2
        if raw == 0:
            raise CompareError(
                f"state: {config.state_bytes:,} bytes a layer leave {spec.name!r} one key channel, "
                "but it rotates pairs of them"
            )
    used = 4 * heads * program.state_floats(mapped_size(program, raw), value_size)
    return Shape(heads=heads, key_size=raw, value_size=value_size, state_bytes=used)


class Model(nn.Module):
    """Embedding, a mix of neighbouring tokens, layers of one variant, and a tied head.

        x_t = W (E[token_t], E[token_{t-1}]) ;  x += attention(norm(x)) ;  x += mlp(norm(x))
        logits = norm(x) E^T

    The mix lets every variant see a pair's key and value together, whether or not it has local
    mixing of its own; it starts with the token's own channels in the first half of x and the
    previous token's in the second.

    Args:
        spec: the variant.
        config: what all variants share.
        tokens: number of different tokens.
        mlp: inner channels of the position-wise part; default the config's.
        impl: engine, as in `glazoo.attention`.
    """

    def __init__(
        self,
        spec: Spec,
        config: ModelConfig,
        tokens: int,
        *,
        mlp: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        shape = shape_for(spec, config)
        width, inner = config.width, config.mlp if mlp is None else mlp
        self.embedding = nn.Embedding(tokens, width)
        self.mix = nn.Linear(2 * width, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(config.layers))
        self.attention = nn.ModuleList(
            GatedLinearAttention(
                spec,
                width,
                num_heads=shape.heads,
                num_key_heads=shape.heads,
                head_k_dim=shape.key_size,
                head_v_dim=shape.value_size,
                layer_idx=i,
                num_layers=config.layers,
                impl=impl,
            )
            for i in range(config.layers)
        )
        self.mlp_norms = nn.ModuleList(
            nn.RMSNorm(width, eps=1e-5) for _ in range(config.layers if inner else 0)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))
            for _ in range(config.layers if inner else 0)
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.embedding.weight)
        half = width // 2
        with torch.no_grad():
            self.mix.weight.zero_()
            self.mix.weight[:half, :half] = torch.eye(half)
            self.mix.weight[half:, width : 2 * width - half] = torch.eye(width - half)
            if config.aligned:
                for layer in self.attention:
                    align(layer)
        self.scale = width**-0.5

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T N"]:
        """Gives the logits of every token."""
        x = self.embedding(tokens)
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        x = self.mix(torch.cat([x, previous], -1))
        first_values: Tensor | None = None
        for i, (norm, layer) in enumerate(zip(self.norms, self.attention, strict=True)):
            result = layer(norm(x), first_values=first_values)
            first_values = result.first_values if first_values is None else first_values
            x = x + result.output
            if len(self.mlps):
                x = x + self.mlps[i](self.mlp_norms[i](x))
        return F.linear(self.norm(x) * self.scale, self.embedding.weight)


_STEP = 0.01
"""Start of the discretisation step: the geometric mean of the usual draws."""


@torch.no_grad()
def align(layer: nn.Module) -> None:
    """Starts a layer so that the query of a token is the key that the token gets as the previous
    one.

    Every part of the query path takes the key path's parameters where both have it; the projection
    takes them with the halves of its input swapped. Convolutions start as the identity, and so does
    an inner projection that is square, so that the halves reach the streams behind them. Skips
    start at zero: what a memory gives is at first small beside the token's own value. Rates and
    steps of decays start alike in all heads, and slow: drawn at random, as they otherwise are, they
    decide how many heads ever remember the whole sequence.

    Args:
        layer: a layer whose input has a token's own channels in its first half and the previous
            token's in the second.
    """
    parameters = dict(layer.named_parameters())
    for name, p in parameters.items():
        if name == "skip" or name.endswith("decay.A_log"):
            p.zero_()
        if name.endswith("decay.dt_bias"):
            p.fill_(math.log(math.expm1(_STEP)))
        if name.startswith("decay.proj.") and name.endswith("bias"):
            module = layer.get_submodule("decay")
            gate = module.gate if isinstance(module, GateModule) else None
            if gate is not None and gate.parameterization == "log_sigmoid":
                p.fill_(-math.log(math.expm1(_STEP * (gate.divisor or 1.0))))
        if name == "in_proj.weight" and p.shape[0] == p.shape[1]:
            p.copy_(torch.eye(p.shape[0]))
        if name.split(".")[0].endswith("conv"):
            # [C, 1, taps], the current token's last.
            p.zero_()
            if p.ndim == 3:
                p[..., -1] = 1.0
        if not name.startswith("k_"):
            continue
        q = parameters.get("q_" + name[2:])
        if q is None or q.shape != p.shape:
            continue
        own, previous = p.chunk(2, -1) if p.shape[-1] % 2 == 0 else (p, None)
        swap = name.startswith("k_proj") and p.ndim == 2 and previous is not None
        q.copy_(torch.cat([previous, own], -1) if swap and previous is not None else p)


def count_parameters(spec: Spec, config: ModelConfig, tokens: int, mlp: int | None = None) -> int:
    """Counts a model's parameters without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(spec, config, tokens, mlp=mlp).parameters())
