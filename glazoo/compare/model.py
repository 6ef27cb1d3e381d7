"""The small model in which variants are compared: all of it is the same but the recurrence's
layer."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from glazoo.compare.errors import CompareError
from glazoo.compare.probe import key_size_for, mapped_size
from glazoo.compare.tasks import Vectors
from glazoo.layers import GatedLinearAttention, set_plasticity
from glazoo.layers.attention import LayerOutput
from glazoo.layers.gates import GateModule
from glazoo.layers.parts import LowRank
from glazoo.program import lower
from glazoo.spec import Spec

__all__ = ["Model", "ModelConfig", "Shape", "count_parameters", "has_plasticity", "shape_for"]


class ModelConfig(BaseModel):
    """What all variants of one comparison share."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = ""
    """What tells it apart in tables from others of the same comparison."""
    width: int = Field(default=64, ge=4)
    """Channels."""
    layers: int = Field(default=1, ge=1)
    """Layers with a recurrence."""
    heads: int = Field(default=4, ge=1)
    """Heads per layer, for variants that may have more than one."""
    state_bytes: int = Field(default=4096, ge=4)
    """Budget of one layer's recurrent state, in float32; unused with a key size."""
    key_size: int | None = Field(default=None, ge=1)
    """Key channels per head, of all variants; unset for as many as the budget holds."""
    value_size: int | None = Field(default=None, ge=1)
    """Value channels per head; unset for as many as the channels of the model."""
    start: Literal["drawn", "token", "window"] = "token"
    """How layers start: as they are drawn, or as working associative memories (see `align`), so
    that training measures what they hold rather than luck in finding the circuit. There the key of
    a value is the token before it, which also asks for it, or what convolutions see before it, and
    a blank in its place asks."""
    mlp: int = Field(default=64, ge=0)
    """Inner channels of the position-wise part; 0 for none."""
    decays: tuple[float, float] | None = None
    """First and last rate A of the heads' decays, evenly spaced, where the formula has one; unset
    for the variant's start."""
    plasticity: float = Field(default=0.0, ge=0)
    """Start of the plasticity of metaplastic forms that have a source."""
    trains_prior: bool = True
    """Whether the prior importance is trained."""


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
    """Chooses head sizes: as many heads and value channels as the others, and the config's key size
    or the largest that the state budget holds.

    Raises:
        CompareError: no key size fits, or the width is no multiple of the heads.
    """
    program = lower(spec)
    heads = 1 if spec.layer.heads.sharing == "one" else config.heads
    if config.width % heads:
        raise CompareError(f"width: {config.width} is not a multiple of {heads} heads")
    value_size = (config.value_size or config.width // config.heads) * config.heads // heads
    if config.key_size is not None:
        raw = config.key_size
    else:
        raw = key_size_for(program, config.state_bytes // 4 // heads, value_size)
    if config.key_size is None and "none" not in (spec.layer.q.rotation, spec.layer.k.rotation):
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

    Tokens that are vectors are embedded by a matrix, E token_t, and the head is tied to its columns
    for outputs.

    The mix lets every variant see a pair's key and value together, whether or not it has local
    mixing of its own; it starts with the token's own channels in the first half of x and the
    previous token's in the second.

    Args:
        spec: the variant.
        config: what all variants share.
        interface: number of different tokens, or the channels of tokens that are vectors.
        mlp: inner channels of the position-wise part; default the config's.
        impl: engine, as in `glazoo.attention`.
    """

    def __init__(
        self,
        spec: Spec,
        config: ModelConfig,
        interface: int | Vectors,
        *,
        mlp: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        shape = shape_for(spec, config)
        width, inner = config.width, config.mlp if mlp is None else mlp
        self.interface = interface
        self.embedding: nn.Embedding | nn.Linear
        if isinstance(interface, Vectors):
            self.embedding = nn.Linear(interface.inputs, width, bias=False)
        else:
            self.embedding = nn.Embedding(interface, width)
        self.mix = nn.Linear(2 * width, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(config.layers))
        layers = [
            GatedLinearAttention(
                spec,
                width,
                num_heads=shape.heads,
                num_key_heads=shape.heads,
                head_k_dim=shape.key_size,
                head_v_dim=shape.value_size,
                layer_idx=i,
                num_layers=config.layers,
            )
            for i in range(config.layers)
        ]
        self.attention = nn.ModuleList(layers)
        self.mlp_norms = nn.ModuleList(
            nn.RMSNorm(width, eps=1e-5) for _ in range(config.layers if inner else 0)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))
            for _ in range(config.layers if inner else 0)
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.embedding.weight)
        self.scale = width**-0.5
        half = width // 2
        with torch.no_grad():
            self.mix.weight.zero_()
            self.mix.weight[:half, :half] = torch.eye(half)
            self.mix.weight[half:, width : 2 * width - half] = torch.eye(width - half)
            if config.start != "drawn" and not self.embedding.weight.is_meta:
                # One channel that is the same for all tokens, for gates without a bias.
                if isinstance(interface, Vectors):
                    self.embedding.weight[0] = 0.0
                    self.embedding.weight[0, -1] = 1.0
                else:
                    self.embedding.weight[:, 0] = 1.0
                for layer in layers:
                    align(layer, window=config.start == "window")
                self._balance()
            for layer in layers:
                _set(layer, config)
        # Not before: all of the above is on a CPU, which not every engine serves.
        for layer in layers:
            layer.impl = impl

    def _balance(self) -> None:
        """Scales what layers give to the size of what they get, one: some variants normalise what
        they read, others start so quietly that their first steps do not hear it."""
        generator = torch.Generator().manual_seed(0)
        if isinstance(self.interface, Vectors):
            tokens = torch.randn(8, 64, self.interface.inputs, generator=generator)
            tokens[..., -1] = 1.0
        else:
            tokens = torch.randint(self.interface, (8, 64), generator=generator)
        for module in self.attention:
            assert isinstance(module, GatedLinearAttention)
            given: list[LayerOutput] = []
            hook = module.register_forward_hook(lambda _m, _x, y, to=given: to.append(y))
            self(tokens)
            hook.remove()
            module.o_proj.weight.div_(given[0].output.square().mean().sqrt())

    def forward(
        self, tokens: Int[Tensor, "B T"] | Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B T N"]:
        """Return the logits, or the output channels, of every token."""
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
        weight = self.embedding.weight
        if isinstance(self.interface, Vectors):
            weight = weight[:, -1 - self.interface.outputs : -1].T
        return F.linear(self.norm(x) * self.scale, weight)


def _set(layer: GatedLinearAttention, config: ModelConfig) -> None:
    """Sets what a config says about the start of decays, plasticity and prior."""
    for name, module in layer.named_modules():
        if config.decays and isinstance(module, GateModule) and name.endswith("decay"):
            rates = module.A_log
            if rates is not None:
                rates.copy_(torch.linspace(*config.decays, len(rates), device=rates.device).log())
    if layer.metaplastic is None:
        return
    if config.plasticity and layer.spec.counterpart is not None:
        set_plasticity(layer, config.plasticity)
    if layer.metaplastic.ip_log is not None and not config.trains_prior:
        layer.metaplastic.ip_log.requires_grad_(False)


def has_plasticity(spec: Spec) -> bool:
    """Return whether a spec's importance gate has a factor that is trained, the plasticity."""
    return spec.importance is not None and spec.importance.scale.parameterization != "none"


_RATE = 0.01
"""Start of what a decay forgets per token: the geometric mean of the usual draws."""

_STEP = 0.1
"""Start of gates that write and erase."""

_OPEN = 1.5
"""Start of an output gate before its activation: silu and sigmoid give about 1.2 and 0.8."""


@torch.no_grad()
def align(layer: GatedLinearAttention, *, window: bool = False) -> None:
    """Starts a layer as a working associative memory, so that training measures what the memory
    holds rather than luck in finding the circuit.

    - The query of a token is the key that the token gets as the previous one: every part of the
      query path takes the key path's parameters where both have it, and the projection takes them
      with the halves of its input swapped. With `window` it is the token's own key: halves stay.
    - What is read comes back as the value's channels were: the output projection is the transposed
      value projection.
    - Output gates are open. Drawn at random, a silu gate multiplies what is read by about as many
      negative as positive numbers, which hides it from the first steps.
    - Convolutions are the identity, and so is an inner projection that is square, so that the
      halves reach the streams behind them. With `window`, those of keys and queries are alike, and
      as they are drawn: from identities, products of two taps that are both zero hardly grow.
    - Skips are zero: what a memory gives is at first small beside the token's own value.
    - Decays are alike in all heads, and slow, and write and erase gates are small: as they are
      drawn otherwise, they decide how many heads ever remember the whole sequence.

    Args:
        layer: a layer whose input has a token's own channels in its first half and the previous
            token's in the second, and a one in its first channel.
        window: whether keys are what convolutions see, and the value's own place asks.
    """
    parameters = dict(layer.named_parameters())
    for name, p in parameters.items():
        if name == "skip" or name.endswith("decay.A_log"):
            p.zero_()
        if name == "in_proj.weight" and p.shape[0] == p.shape[1]:
            p.copy_(torch.eye(p.shape[0]))
        part = name.split(".")[0]
        if part.endswith("conv") and not (window and part in ("q_conv", "k_conv")):
            # [C, 1, taps], the current token's last.
            p.zero_()
            if p.ndim == 3:
                p[..., -1] = 1.0
    _align_queries(parameters, window)
    _return_values(layer)
    for name, module in layer.named_modules():
        if isinstance(module, GateModule):
            if name.endswith("decay"):
                _start_at(module, -_RATE)
            elif name in ("write", "erase"):
                _start_at(module, _STEP)
    if layer.spec.layer.output.gate != "none":
        _shift(layer.g_proj, _OPEN)


def _align_queries(parameters: dict[str, nn.Parameter], window: bool) -> None:
    for name, k in parameters.items():
        q = parameters.get("q_" + name[2:])
        if not name.startswith("k_") or q is None:
            continue
        # Several keys per token: the first is the one to ask for.
        p = k[: len(q)]
        if p.shape != q.shape:
            continue
        if name == "k_proj.weight" and not window:
            own, previous = p.chunk(2, -1)
            p = torch.cat([previous, own], -1)
        q.copy_(p)


def _return_values(layer: GatedLinearAttention) -> None:
    out = layer.o_proj.weight
    v_proj = getattr(layer, "v_proj", None)
    # Without a projection of their own, values are the inner branch.
    back = torch.eye(*out.shape) if v_proj is None else v_proj.weight[: out.shape[1]].T
    if back.shape == out.shape:
        out.copy_(back)


def _start_at(gate: GateModule, value: float) -> None:
    """Starts a gate near a value for every token, whatever its formula."""
    x = torch.zeros(1, 1, gate.in_features)
    x[..., 0] = 1.0

    def at(shift: float) -> float:
        if gate.dt_bias is not None:
            gate.dt_bias.fill_(shift)
        else:
            assert gate.proj is not None
            _shift(gate.proj, shift)
        return float(gate(x).value.mean())

    low, high = -20.0, 20.0
    rising = at(high) > at(low)
    for _ in range(40):
        middle = (low + high) / 2
        if (at(middle) < value) == rising:
            low = middle
        else:
            high = middle


def _shift(projection: nn.Module, value: float) -> None:
    """Starts a projection near a value for every token."""
    last = projection.up if isinstance(projection, LowRank) else projection
    assert isinstance(last, nn.Linear)
    bias: Tensor | None = last.bias
    if bias is not None:
        bias.fill_(value)
        return
    if isinstance(projection, LowRank):
        # The first inner channel is the input's constant, and no other one has a part of it.
        projection.down.weight[0] = 0.0
        projection.down.weight[:, 0] = 0.0
        projection.down.weight[0, 0] = 1.0
    last.weight[:, 0] = value


def count_parameters(
    spec: Spec, config: ModelConfig, interface: int | Vectors, mlp: int | None = None
) -> int:
    """Counts a model's parameters without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(spec, config, interface, mlp=mlp).parameters())
