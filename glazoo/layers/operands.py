"""What makes the operands of a recurrence from activations."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from glazoo.api import schedule
from glazoo.layers.gates import GateModule, GateValue, power
from glazoo.layers.parts import (
    Convolution,
    FeatureMap,
    KeepsWide,
    LowRank,
    Projection,
    RMSNorm,
    TokenShift,
    activate,
    feature_size,
    frequencies,
    normalize,
    rotate,
    rotated_size,
    wide_dtype,
    wide_parameter,
)
from glazoo.layers.plasticity import (
    ImportanceGate,
)
from glazoo.layers.sizes import Sizes
from glazoo.program import lower
from glazoo.spec import Gate, Spec, Stream

__all__ = ["Context", "Inputs", "LayerState", "OperandProjections"]

LayerState: TypeAlias = dict[str, Tensor]
"""What a layer carries between calls, by name; every tensor has the sequences first."""

_STREAMS = ("q", "k", "v")


class Context(NamedTuple):
    """What the parts of one call share."""

    state: LayerState
    mask: Tensor | None
    """[B, T] bool, True for real tokens."""
    ends: Tensor | None
    """[B], number of real tokens, which come first."""
    starts: Tensor | None
    """[T], packed sequences: first token of every token's sequence."""
    new_state: LayerState


class Inputs(NamedTuple):
    """What the projections of a layer read."""

    hidden: Tensor
    shifted: dict[str, Tensor]
    branch: Tensor | None
    conv: Tensor | None

    def of(self, use: str, kind: str) -> Tensor:
        """Return the input of one use."""
        if kind == "shift":
            return self.shifted[use]
        found = {"hidden": self.hidden, "branch": self.branch, "conv": self.conv}[kind]
        assert found is not None
        return found


class OperandProjections(KeepsWide):
    """The part of a layer that makes its recurrence's operands: streams and gates.

    Args:
        spec: the variant.
        sizes: head counts and channels.
        layer_idx: index of the layer in its model, from 0.
        num_layers: number of layers of the model.
        first: whether no layer before this one has first values to interpolate with.
        rope_base: base of static rotary embeddings.
    """

    decay: GateModule
    write: GateModule
    erase: GateModule
    erase_mix: GateModule
    mix: GateModule
    angle_proj: Projection
    trap_proj: Projection
    value_mix: LowRank
    bonus: nn.Parameter
    erase_decay: nn.Parameter
    erase_scale: nn.Parameter
    query_correction: nn.Parameter
    key_rate: nn.Parameter
    value_mix_bias: nn.Parameter

    def __init__(
        self,
        spec: Spec,
        sizes: Sizes,
        *,
        layer_idx: int,
        num_layers: int,
        first: bool,
        rope_base: float,
    ) -> None:
        super().__init__()
        self.spec, self.sizes, self.steps = spec, sizes, spec.substeps
        self.layer_idx, self.num_layers, self.first = layer_idx, num_layers, first
        self.rope_base = rope_base
        self.grouped_query = spec.layer.heads.sharing == "grouped_query"
        # Heads of each stream as projected; grouped queries repeat k and v before the recurrence.
        shared = sizes.key_heads
        self.stream_heads = {
            "q": sizes.heads if self.grouped_query else shared,
            "k": shared,
            "v": shared if self.grouped_query else sizes.heads,
        }
        self._build_streams()
        self._build_gates()

    def _build_streams(self) -> None:
        n, layer, local = self.sizes, self.spec.layer, self.spec.layer.local
        width = n.heads * n.value
        self.in_proj: Projection | None = None
        self.conv: Convolution | None = None
        self.shift: TokenShift | None = None
        branch = local.kind == "convolution" and local.at == "branch"
        if branch:
            self.in_proj = Projection(n.hidden, width)
            self.conv = Convolution(width, local)
        used = [s for s in _STREAMS if self._stream(s).local]
        for name, gate in self._gates().items():
            if gate.shape != "none" and gate.input == "shift":
                used.append(name)
        if layer.output.gate != "none" and layer.output.gate_input == "shift":
            used.append("output")
        if local.kind == "token_shift":
            self.shift = TokenShift(
                n.hidden,
                tuple(used),
                "data" if local.shift == "data" else "static",
                self.layer_idx / max(1, self.num_layers),
                local.shift_rank,
            )
        for s in _STREAMS:
            if (s == "k" and self.spec.key != "operand") or (s == "v" and branch):
                continue
            stream, heads = self._stream(s), self.stream_heads[s]
            size = n.value if s == "v" else n.key
            out = self._copies(s) * heads * size
            setattr(self, f"{s}_proj", Projection(width if branch else n.hidden, out))
            if stream.local and local.kind == "convolution" and not branch:
                setattr(self, f"{s}_conv", Convolution(out, local))
            if stream.feature_map != "none":
                setattr(self, f"{s}_map", FeatureMap(stream.feature_map, size))
            mapped = self.keys if s != "v" else size
            if stream.norm == "rms":
                setattr(self, f"{s}_norm", RMSNorm(mapped))
            if stream.bias:
                setattr(self, f"{s}_bias", wide_parameter(n.heads, mapped))
        for s in ("q", "k"):
            if self._stream(s).rotation == "cumulative":
                self.angle_proj = Projection(
                    n.hidden, rotated_size(self._stream(s), self.keys) // 2
                )
        if layer.erase_key == "scaled_key":
            self.erase_decay = wide_parameter(n.key_heads)
        elif layer.erase_key == "scaled_unit_key":
            self.erase_scale = wide_parameter(n.key_heads, self.keys)
        if layer.query_correction:
            self.query_correction = wide_parameter(n.key_heads)
        if layer.key_rate:
            self.key_rate = wide_parameter(n.heads, self.keys)
        if layer.value_residual and not self.first:
            self.value_mix = LowRank(n.hidden, width, layer.value_residual_rank)
            self.value_mix_bias = wide_parameter(width)

    def _build_gates(self) -> None:
        n, spec = self.sizes, self.spec
        for name, gate in self._gates().items():
            if gate.shape == "none" or gate.source in ("fixed", "derived"):
                continue
            shared = self.grouped_query and gate.shape == "key"
            heads = n.key_heads if shared else n.heads
            heads = self.op_key_heads if name == "erase_mix" else heads
            copies = 1 if name in ("decay", "q", "mix", "erase_mix") else self.steps
            inner = n.heads * n.value if gate.input in ("branch", "conv") else n.hidden
            size = {"head": None, "key": self.keys, "value": n.value}[gate.shape]
            rank = n.value if gate.rank == "head" else gate.rank
            module = GateModule(gate, inner, copies * heads, size, rank)
            setattr(self, f"{name}_gate" if name in _STREAMS else name, module)
        if spec.steps.source == "lagged":
            self.trap_proj = Projection(n.hidden, n.heads)
        if spec.read.bonus:
            self.bonus = wide_parameter(n.heads, self.keys)
        self.metaplastic: ImportanceGate | None = None
        if spec.importance is not None:
            self.metaplastic = self._importance_gate(spec)

    def _importance_gate(self, spec: Spec, **start: float | None) -> ImportanceGate:
        assert spec.importance is not None
        return ImportanceGate(
            spec.importance,
            in_features=self.sizes.hidden,
            heads=self.sizes.heads,
            keys=self.keys,
            values=self.sizes.value,
            key_heads=self.op_key_heads,
            steps=self.steps,
            layer=self.layer_idx,
            **start,  # type: ignore[arg-type]
        )

    @property
    def keys(self) -> int:
        """Key channels per head as the recurrence sees them."""
        kinds = {self.spec.layer.q.feature_map, self.spec.layer.k.feature_map}
        return max(feature_size(kind, self.sizes.key) for kind in kinds)

    @property
    def width(self) -> int:
        """Channels of a key-shaped decay over all heads: what a lower bound must have."""
        return self.stream_heads["k"] * self.keys

    @property
    def needs_lower_bound(self) -> bool:
        """Whether the decay has a learned lower bound that grows over the layers."""
        return self.spec.decay.parameterization == "lower_bounded_sigmoid"

    @property
    def shares_values(self) -> bool:
        """Whether the layer gives or takes first values."""
        return self.spec.layer.value_residual

    @property
    def op_key_heads(self) -> int:
        """Query and key heads as the recurrence sees them."""
        k = self.spec.layer.k
        per_head = self.grouped_query or k.bias or k.rotation == "cumulative"
        return self.sizes.heads if per_head else self.sizes.key_heads

    def _stream(self, name: str) -> Stream:
        stream = getattr(self.spec.layer, name)
        assert isinstance(stream, Stream)
        return stream

    def _copies(self, stream: str) -> int:
        """How many vectors per token and head a stream projects."""
        erases_first = self.spec.steps.source == "erase_then_write"
        return 1 if stream == "q" or (stream == "v" and erases_first) else self.steps

    def _gates(self) -> dict[str, Gate]:
        spec = self.spec
        gates: dict[str, Gate] = {
            "decay": spec.decay,
            "write": spec.write,
            "erase": spec.erase.gate,
            "mix": spec.read.mix,
            "erase_mix": spec.layer.erase_mix,
        }
        return gates | {s: self._stream(s).gate for s in _STREAMS}

    def projection_state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that convolutions, shifts and rotations carry between
        calls, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in ("conv", "q_conv", "k_conv", "v_conv"):
            conv = getattr(self, name, None)
            if isinstance(conv, Convolution):
                shapes[name] = (batch, conv.size - 1, conv.channels)
        if self.shift is not None:
            shapes["shift"] = (batch, 1, self.sizes.hidden)
        rotations = {self._stream(s).rotation for s in ("q", "k")}
        if "static" in rotations:
            shapes["position"] = (batch,)
        if "cumulative" in rotations:
            shapes["angle"] = (batch, self.sizes.heads, self.angle_proj.out_features)
        return shapes

    def operands(
        self,
        inputs: Inputs,
        ctx: Context,
        *,
        lower_bound: Tensor | None = None,
        first_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the operands of `glazoo.attention`, by name; the state that their making carries
        on is put into the context.

        Args:
            inputs: what the projections read, from `inputs`.
            ctx: what the parts of the call share.
            lower_bound: [width], lower bound of the decay at this layer; default 0.
            first_values: [B, T, HV, V], values that the first layer gave.

        Raises:
            ValueError: `first_values` has another shape.
        """
        decay = self._decay(inputs, lower_bound)
        operands = self._streams(inputs, decay, ctx, first_values)
        self._gate_operands(operands, inputs, decay, ctx)
        if self.spec.layer.key_rate:
            rate = operands["removal"]
            written = 1 + (rate - 1) * self.key_rate.to(rate.dtype)
            operands["k"] = operands["k"] * written.to(operands["k"].dtype)
        return operands

    def inputs(self, x: Tensor, ctx: Context) -> Inputs:
        """Return what the projections read: the input, its shifted forms, the inner branch."""
        shifted: dict[str, Tensor] = {}
        branch = conv = None
        if self.shift is not None:
            shifted, ctx.new_state["shift"] = self.shift(
                x, ctx.state.get("shift"), ends=ctx.ends, starts=ctx.starts
            )
        if self.in_proj is not None and self.conv is not None:
            branch = self.in_proj(x)
            conv, ctx.new_state["conv"] = self.conv(
                branch, ctx.state.get("conv"), ends=ctx.ends, starts=ctx.starts
            )
        return Inputs(x, shifted, branch, conv)

    def _decay(self, inputs: Inputs, lower_bound: Tensor | None) -> GateValue | None:
        gate = self.spec.decay
        if gate.shape == "none" or gate.source == "derived":
            return None
        if gate.source == "fixed":
            g = schedule(gate, self.sizes.heads, layer=self.layer_idx, layers=self.num_layers)
            return GateValue(g.to(inputs.hidden.device, wide_dtype(inputs.hidden)))
        bound = lower_bound if self.needs_lower_bound else None
        value: GateValue = self.decay(inputs.of("decay", gate.input), bound)
        if gate.minimum is not None:
            value = value._replace(value=value.value.clamp(min=gate.minimum))
        return value

    def _streams(
        self,
        inputs: Inputs,
        decay: GateValue | None,
        ctx: Context,
        first_values: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return q, k and v as the recurrence takes them, and the erase key if there is one."""
        layer = self.spec.layer
        q = self._projected("q", inputs, ctx)
        k = self._projected("k", inputs, ctx) if self.spec.key == "operand" else None
        v = self._projected("v", inputs, ctx)
        operands: dict[str, Tensor] = {}
        adds_query = layer.erase_key.endswith("query_added")
        if layer.erase_key != "none" and not adds_query:
            assert k is not None
            p = self._erase_key(k)
            if layer.query_correction:
                q = q - self.query_correction.to(q.dtype)[:, None] * p
            if layer.erase_key == "scaled_key":
                p = self._normalized("k", p)
            operands["p"] = p
        q = self._shaped("q", q, inputs, decay)
        if k is not None:
            k = self._shaped("k", k, inputs, decay)
        v = self._shaped("v", v, inputs, decay)
        q, k = self._rotated(q, k, inputs.hidden, decay, ctx)
        if adds_query:
            assert k is not None
            mix = self.erase_mix(inputs.of("erase_mix", layer.erase_mix.input)).value
            other = q
            if layer.erase_key == "orthogonal_query_added":
                other = q - k * (k * q).sum(-1, keepdim=True)
            operands["p"] = k + mix[..., None].to(q.dtype) * other
        if self.spec.steps.source == "erase_then_write":
            v = torch.stack([torch.zeros_like(v), v], 2).flatten(1, 2)
        if layer.value_residual and not self.first and first_values is not None:
            if first_values.shape != v.shape:
                raise ValueError(
                    f"first_values: got shape {list(first_values.shape)}, accepted is "
                    f"{list(v.shape)}"
                )
            low = self.value_mix(inputs.of("v", "shift" if layer.v.local else "hidden"))
            mix = torch.sigmoid(low + self.value_mix_bias.to(low.dtype)).view_as(v)
            v = v + mix * (first_values - v)
        operands |= {"q": q, "v": v} if k is None else {"q": q, "k": k, "v": v}
        return operands

    def _projected(self, s: str, inputs: Inputs, ctx: Context) -> Tensor:
        """Projects, mixes locally, activates, splits heads and maps features of one stream."""
        stream, local = self._stream(s), self.spec.layer.local
        if self.conv is not None:
            x = inputs.of(s, "conv" if stream.local else "branch")
        else:
            shifted = stream.local and local.kind == "token_shift"
            x = inputs.of(s, "shift" if shifted else "hidden")
        proj = getattr(self, f"{s}_proj", None)
        x = x if proj is None else proj(x)
        conv = getattr(self, f"{s}_conv", None)
        if conv is not None:
            name = f"{s}_conv"
            x, ctx.new_state[name] = conv(x, ctx.state.get(name), ends=ctx.ends, starts=ctx.starts)
        x = activate(stream.activation, x)
        x = x.unflatten(-1, (self._copies(s), self.stream_heads[s], -1)).flatten(1, 2)
        feature_map = getattr(self, f"{s}_map", None)
        mapped: Tensor = x if feature_map is None else feature_map(x)
        return mapped

    def _normalized(self, s: str, x: Tensor) -> Tensor:
        norm = getattr(self, f"{s}_norm", None)
        return normalize(self._stream(s).norm, x, norm, self.spec.layer.l2_eps)

    def _erase_key(self, k: Tensor) -> Tensor:
        if self.spec.layer.erase_key == "scaled_key":
            return k * torch.sigmoid(self.erase_decay).to(k.dtype)[:, None]
        return normalize("l2", k * self.erase_scale.to(k.dtype), None, self.spec.layer.l2_eps)

    def _shaped(self, s: str, x: Tensor, inputs: Inputs, decay: GateValue | None) -> Tensor:
        """Normalises a stream, gates it, repeats shared heads and adds the bias."""
        stream = self._stream(s)
        x = self._normalized(s, x)
        gate = stream.gate
        if gate.shape != "none":
            if gate.tie == "decay":
                assert decay is not None
                assert decay.tempered is not None
                value = power(*decay.tempered)
            else:
                value = getattr(self, f"{s}_gate")(inputs.of(s, gate.input)).value
            x = x * (value if value.ndim == 4 else value[..., None]).to(x.dtype)
        wanted = self.sizes.heads if s == "v" else self.op_key_heads
        if x.shape[2] != wanted:
            x = x.repeat_interleave(wanted // x.shape[2], 2)
        if stream.bias:
            x = x + getattr(self, f"{s}_bias").to(x.dtype)
        return x

    def _rotated(
        self, q: Tensor, k: Tensor | None, x: Tensor, decay: GateValue | None, ctx: Context
    ) -> tuple[Tensor, Tensor | None]:
        streams = {"q": q, "k": k}
        turning = [s for s in streams if self._stream(s).rotation != "none"]
        if not turning:
            return q, k
        stream = self._stream(turning[0])
        if stream.rotation == "static":
            angles = self._static_angles(rotated_size(stream, self.keys), x, ctx)
        else:
            angles = self._cumulative_angles(x, decay, ctx)
        for s in turning:
            y = streams[s]
            assert y is not None
            streams[s] = rotate(y, angles)
        assert streams["q"] is not None
        return streams["q"], streams["k"]

    def _static_angles(self, size: int, x: Tensor, ctx: Context) -> Tensor:
        batch, tokens = x.shape[:2]
        before = ctx.state.get("position")
        if before is None:
            before = torch.zeros(batch, dtype=torch.int64, device=x.device)
        # Real tokens are counted, so that padding does not move what follows it.
        if ctx.mask is not None:
            position = before[:, None] + ctx.mask.cumsum(1) - 1
            ctx.new_state["position"] = before + ctx.mask.sum(1)
        else:
            count = torch.arange(tokens, device=x.device)
            count = count if ctx.starts is None else count - ctx.starts
            position = before[:, None] + count
            ctx.new_state["position"] = before + tokens
        base = frequencies(size, self.rope_base, x.device)
        return position[..., None, None] * base.to(wide_dtype(x))

    def _cumulative_angles(self, x: Tensor, decay: GateValue | None, ctx: Context) -> Tensor:
        assert decay is not None
        assert decay.step is not None
        turn = math.pi * torch.tanh(self.angle_proj(x).to(decay.step.dtype))
        turn = turn[:, :, None] * decay.step[..., None]
        if ctx.mask is not None:
            turn = turn.where(ctx.mask[..., None, None], turn.new_zeros(()))
        angles = turn.cumsum(1)
        if ctx.starts is not None:
            angles = angles - (angles - turn)[:, ctx.starts]
        if "angle" in ctx.state:
            angles = angles + ctx.state["angle"][:, None].to(angles.dtype)
        ctx.new_state["angle"] = torch.remainder(angles[:, -1], 2 * math.pi)
        return angles

    def _gate_operands(
        self,
        operands: dict[str, Tensor],
        inputs: Inputs,
        decay: GateValue | None,
        ctx: Context,
    ) -> None:
        """Adds every gate that the recurrence takes."""
        spec, n = self.spec, self.sizes
        if decay is not None:
            g = decay.value
            if g.ndim == 4 and g.shape[2] != n.heads:
                g = g.repeat_interleave(n.heads // g.shape[2], 2)
            if spec.decay.source == "fixed" and ctx.mask is not None:
                g = g.expand(*ctx.mask.shape, n.heads)
            operands["g"] = g
        if spec.write.shape != "none":
            operands["beta"] = self._write(inputs, decay)
        if spec.erase.strength == "own":
            own = lower(spec).role("erase")
            assert own is not None
            gate = self.erase(inputs.of("erase", spec.erase.gate.input)).value
            operands[own.name] = self._unstacked(gate)
        if spec.read.bonus:
            operands["u"] = self.bonus
        if spec.steps.source == "lagged":
            trap = self.trap_proj(inputs.hidden)
            operands["trap"] = torch.sigmoid(trap.to(wide_dtype(trap)))
        if spec.read.mix.shape != "none":
            operands["mix"] = self.mix(inputs.of("mix", spec.read.mix.input)).value
        if self.metaplastic is not None:
            k = operands.get("k")
            if k is None:
                # Keys that follow from the decay are no stream of the layer.
                k = -torch.expm1(operands["g"])
            write = operands.get("beta")
            operands |= self.metaplastic(inputs.hidden, write, k, impl=self.impl)

    def _write(self, inputs: Inputs, decay: GateValue | None) -> Tensor:
        gate = self.spec.write
        if gate.tie in ("step", "one_minus_decay"):
            assert decay is not None
            value = decay.step if gate.tie == "step" else -torch.expm1(decay.value)
            assert value is not None
            return value.repeat_interleave(self.steps, 1) if self.steps > 1 else value
        value = self.write(inputs.of("write", gate.input)).value
        return self._unstacked(value)

    def _unstacked(self, gate: Tensor) -> Tensor:
        """Turns [B, T, n HV, ...] into [B, n T, HV, ...]."""
        if self.steps == 1:
            return gate
        return rearrange(gate, "b t (n h) ... -> b (t n) h ...", n=self.steps)
