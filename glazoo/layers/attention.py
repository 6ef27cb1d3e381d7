"""The layer of any spec."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glazoo.api import attention, schedule
from glazoo.layers.gates import GateModule, GateValue, power
from glazoo.layers.parts import (
    Convolution,
    FeatureMap,
    KeepsWide,
    LowRank,
    OutputNorm,
    Projection,
    RMSNorm,
    TokenShift,
    activate,
    feature_size,
    fill,
    frequencies,
    normalize,
    projection,
    rotate,
    rotated_size,
    wide_dtype,
    wide_parameter,
)
from glazoo.layers.plasticity import (
    EARLIER_NAMES,
    ImportanceGate,
    Observation,
    observed_precision,
    refused_plasticity,
)
from glazoo.program import lower
from glazoo.spec import Decay, Gate, Spec, SpecError, Stream
from glazoo.state import Output, OutputWithUncertainty, State
from glazoo.zoo import load

__all__ = ["GatedLinearAttention", "LayerOutput", "LayerState", "Sizes"]

LayerState: TypeAlias = dict[str, Tensor]
"""What a layer carries between calls, by name; every tensor has the sequences first."""

_STREAMS = ("q", "k", "v")


class LayerOutput(NamedTuple):
    """Result of a layer."""

    output: Float[Tensor, "B T D"]
    state: LayerState | None
    """State after the last token, if asked for."""
    first_values: Tensor | None
    """Values of the first layer, for specs whose later layers interpolate with them."""
    uncertainty: Tensor | None = None
    """Posterior variance of the recurrence's output, if asked for."""


class Sizes(NamedTuple):
    """Head counts and channels of a layer."""

    hidden: int
    heads: int
    """Heads that have a state of their own."""
    key_heads: int
    """Heads of the shared streams: keys and values of grouped queries, else queries and keys."""
    key: int
    """Key channels per head, before a feature map."""
    value: int
    """Value channels per head."""

    @classmethod
    def of(
        cls,
        spec: Spec,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        num_key_heads: int | None = None,
        head_k_dim: int | None = None,
        head_v_dim: int | None = None,
    ) -> Sizes:
        """Fills in a spec's published sizes and checks that all fit together.

        Raises:
            ValueError: a size is not positive, or does not divide what it must divide.
        """
        h = spec.layer.heads
        given = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_key_heads": num_key_heads,
            "head_k_dim": head_k_dim,
            "head_v_dim": head_v_dim,
        }
        for name, x in given.items():
            if x is not None and (not isinstance(x, int) or x < 1):
                raise ValueError(f"{name}: got {x!r}, accepted are integers >= 1")
        width = round(h.expand * hidden_size)
        if h.sharing == "one":
            if num_heads not in (None, 1):
                raise ValueError(f"num_heads: got {num_heads}, but {spec.name!r} has one head")
            num_heads = 1
            head_v_dim = head_v_dim or width
        elif num_heads is None:
            size = head_v_dim or h.value_size
            if width % size:
                raise ValueError(
                    f"hidden_size: {h.expand:g} x {hidden_size} = {width} value channels are not a "
                    f"multiple of the {size} of a head; give num_heads and head_v_dim"
                )
            num_heads = width // size
        if num_key_heads is None:
            num_key_heads = 1 if h.sharing == "state_groups" else num_heads
        if h.sharing in ("all", "one") and num_key_heads != num_heads:
            raise ValueError(
                f"num_key_heads: got {num_key_heads}, but {spec.name!r} has as many key heads as "
                f"heads ({num_heads})"
            )
        if num_heads % num_key_heads:
            raise ValueError(
                f"num_heads: got {num_heads}, accepted are multiples of num_key_heads = "
                f"{num_key_heads}"
            )
        head_k_dim = head_k_dim or h.key_size
        head_v_dim = head_v_dim or h.value_size
        if any(s.rotation == "static" for s in (spec.layer.q, spec.layer.k)) and head_k_dim % 2:
            raise ValueError(
                f"head_k_dim: got {head_k_dim}, accepted are even numbers: {spec.name!r} rotates "
                "pairs of key channels"
            )
        return cls(hidden_size, num_heads, num_key_heads, head_k_dim, head_v_dim)


class _Context(NamedTuple):
    """What the parts of one call share."""

    state: LayerState
    mask: Tensor | None
    """[B, T] bool, True for real tokens."""
    ends: Tensor | None
    """[B], number of real tokens, which come first."""
    starts: Tensor | None
    """[T], packed sequences: first token of every token's sequence."""
    new_state: LayerState


class GatedLinearAttention(KeepsWide):
    """The layer of any gated linear attention variant, built from its spec alone.

        q, k, v = norm(map(act(local(project(x)))))
        g, beta, b, ... = the spec's gates of x
        y = attention(spec, q, k, v, g, beta, b, ...)
        output = W_o (gate(x) norm(y + skip))

    Matrices, convolutions and norms take the dtype that the module is cast to. Every other
    parameter (`A_log`, `dt_bias`, importance, skip, bonus ...) stays float32 or wider, also after
    `.to(torch.bfloat16)`, and so do the gates' arithmetic and the recurrent state.

    A masked token is an identity update: its key, value and write gates are zero and its decay is
    one, so that a padded sequence gives what the same sequence gives alone.

    Args:
        spec: a variant's name, the path of a spec file, or a `Spec`.
        hidden_size: channels of input and output.
        num_heads: heads with a state of their own. Default: the spec's width over `head_v_dim`.
        num_key_heads: heads of the shared streams: of k and v for grouped queries, of q and k for
            grouped values and state groups. Must divide `num_heads`.
        head_k_dim: key channels per head. Default: the spec's.
        head_v_dim: value channels per head. Default: the spec's.
        layer_idx: index of the layer in its model, from 0; fixed schedules depend on it.
        num_layers: number of layers of the model.
        first: whether no layer before this one has first values to interpolate with. Default:
            `layer_idx == 0`.
        rope_base: base of static rotary embeddings.
        impl: engine, as in `glazoo.attention`.
        check_finite: whether a non-finite input or output raises.

    Raises:
        ValueError: sizes that do not divide.
        SpecError: the spec asks for a combination that has no layer.

    Reference: arXiv:2602.09075, and the reference of the spec.
    """

    observer: Callable[[Observation], None] | None = None
    """Called after every recurrence that has an importance gate and a prior, for measurements."""

    decay: GateModule
    write: GateModule
    erase: GateModule
    angle_proj: Projection
    trap_proj: Projection
    g_proj: nn.Module
    value_mix: LowRank
    norm: OutputNorm
    skip: nn.Parameter
    bonus: nn.Parameter
    erase_decay: nn.Parameter
    erase_scale: nn.Parameter
    query_correction: nn.Parameter
    key_rate: nn.Parameter
    value_mix_bias: nn.Parameter

    def __init__(
        self,
        spec: str | Path | Spec,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        num_key_heads: int | None = None,
        head_k_dim: int | None = None,
        head_v_dim: int | None = None,
        layer_idx: int = 0,
        num_layers: int = 1,
        first: bool | None = None,
        rope_base: float = 10000.0,
        impl: str = "auto",
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        spec = load(spec)
        self._take(spec)
        self.sizes = n = Sizes.of(
            spec,
            hidden_size,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            head_k_dim=head_k_dim,
            head_v_dim=head_v_dim,
        )
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.first = layer_idx == 0 if first is None else first
        self.rope_base, self.impl, self.check_finite = rope_base, impl, check_finite
        layer = spec.layer
        self.steps = spec.substeps
        _check(spec, self.steps)
        self.grouped_query = layer.heads.sharing == "grouped_query"
        # Heads of each stream as projected; grouped queries repeat k and v before the recurrence.
        shared = n.key_heads
        self.stream_heads = {
            "q": n.heads if self.grouped_query else shared,
            "k": shared,
            "v": shared if self.grouped_query else n.heads,
        }
        self._build_streams()
        self._build_gates()
        self._build_output()
        self.reset_parameters()

    def _take(self, spec: Spec) -> None:
        """Keeps a spec and what every call needs of it, so that no call computes it again."""
        self.spec = spec
        self._parts = lower(spec).state
        # A fixed decay as one per token, so that masked tokens can be exempt from it.
        decay = Decay(shape="head", parameterization="log_sigmoid", divisor=1.0)
        fixed = spec.decay.source == "fixed"
        self._masked_spec = spec.model_copy(update={"decay": decay}) if fixed else spec
        taken = lower(self._masked_spec).operands
        self._idle = {o.name: o.idle for o in taken if o.idle is not None}

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
            )
        for s in _STREAMS:
            if (s == "k" and self.spec.key != "operand") or (s == "v" and branch):
                continue
            stream, heads = self._stream(s), self.stream_heads[s]
            size = n.value if s == "v" else n.key
            copies = 1 if s == "q" else self.steps
            out = copies * heads * size
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
            self.value_mix = LowRank(n.hidden, width, 32)
            self.value_mix_bias = wide_parameter(width)

    def _build_gates(self) -> None:
        n, spec = self.sizes, self.spec
        for name, gate in self._gates().items():
            if gate.shape == "none" or gate.source in ("fixed", "derived"):
                continue
            shared = self.grouped_query and gate.shape == "key"
            heads = n.key_heads if shared else n.heads
            copies = 1 if name in ("decay", "q") else self.steps
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
            steps=self.steps,
            layer=self.layer_idx,
            **start,  # type: ignore[arg-type]
        )

    def _build_output(self) -> None:
        n, layer = self.sizes, self.spec.layer
        out, width = layer.output, n.heads * n.value
        if layer.skip == "head":
            self.skip = wide_parameter(n.heads)
        elif layer.skip == "branch":
            self.skip = wide_parameter(width)
        elif layer.skip == "same_token":
            self.skip = wide_parameter(n.heads, self.keys)
        if out.norm != "none":
            self.norm = OutputNorm(out, n.heads, n.value, n.key_heads)
        if out.gate != "none":
            rank = n.value if out.gate_rank == "head" else out.gate_rank
            self.g_proj = projection(
                n.hidden, width, rank, activation=out.gate_activation, bias=out.gate_bias
            )
        self.o_proj = Projection(width, n.hidden)

    def reset_parameters(self) -> None:
        """Sets the layer's own parameters to their published starts; submodules have theirs."""
        ones = {"q_bias": 1.0, "k_bias": 1.0, "erase_decay": 1.0, "query_correction": 1.0}
        ones |= {"erase_scale": 0.71, "key_rate": 1.02, "value_mix_bias": 0.73, "bonus": 0.0}
        ones["skip"] = -0.04 if self.spec.layer.skip == "same_token" else 1.0
        for name, value in ones.items():
            p = getattr(self, name, None)
            if isinstance(p, nn.Parameter):
                fill(p, value)

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

    def _stream(self, name: str) -> Stream:
        stream = getattr(self.spec.layer, name)
        assert isinstance(stream, Stream)
        return stream

    def _gates(self) -> dict[str, Gate]:
        spec = self.spec
        gates: dict[str, Gate] = {
            "decay": spec.decay,
            "write": spec.write,
            "erase": spec.erase.gate,
        }
        return gates | {s: self._stream(s).gate for s in _STREAMS}

    def metaplasticize_(self, spec: Spec, *, plasticity: float = 0.0, seed: int = 0) -> None:
        """Turns the layer in place into a metaplastic form of its spec.

        Args:
            spec: what `glazoo.metaplasticize` makes of the layer's own.
            plasticity: kappa, from 0 to 1; a Hebbian layer accepts more.
            seed: seed of the gate's inner projection, beside the layer's index.

        Raises:
            ValueError: `plasticity` is out of its domain.
        """
        if reason := refused_plasticity(spec, plasticity):
            raise ValueError(reason)
        weight = self.o_proj.weight
        gate = self._importance_gate(spec, plasticity=plasticity, seed=seed).to(weight.device)
        if weight.dtype.itemsize > 4:
            gate.to(weight.dtype)
        self.metaplastic = gate.train(self.training)
        self._take(spec)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for old, new in EARLIER_NAMES.items():
            for name in [n for n in state_dict if n.startswith(prefix + old)]:
                rest = name.removeprefix(prefix + old)
                state_dict[prefix + new + rest] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        attention_mask: Int[Tensor, "B T"] | None = None,
        *,
        state: LayerState | None = None,
        output_state: bool = False,
        output_uncertainty: bool = False,
        cu_seqlens: Int[Tensor, "N1"] | None = None,
        lower_bound: Float[Tensor, "width"] | None = None,
        first_values: Float[Tensor, "B T HV V"] | None = None,
    ) -> LayerOutput:
        """Runs the layer.

        Args:
            hidden_states: [B, T, hidden_size].
            attention_mask: [B, T], 1 for real tokens and 0 for padding, wherever it stands: real
                tokens give what they give without it.
            state: what an earlier call gave as `state`; default: nothing seen.
            output_state: whether to give the state after the last token.
            output_uncertainty: whether to give the posterior variance.
            cu_seqlens: [N + 1], packed sequences with B = 1, which start fresh.
            lower_bound: [width], lower bound of the decay at this layer; default 0.
            first_values: [B, T, HV, V], values that the first layer gave.

        Returns:
            `LayerOutput(output, state, first_values, uncertainty)`.

        Raises:
            ValueError: a shape does not fit, the state is another layer's, or with `check_finite` a
                value is not finite.
        """
        self.refuse_narrow()
        x = hidden_states
        self._check_input(x, attention_mask, state, cu_seqlens, output_state)
        mask = ends = starts = order = None
        if attention_mask is not None:
            # Real tokens first: convolutions and shifts reach over what stands between them.
            order = (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
            mask = _take(attention_mask, order) != 0
            x = _take(x, order).where(mask[..., None], x.new_zeros(()))
            ends = mask.sum(1)
            first_values = None if first_values is None else _take(first_values, order)
        if cu_seqlens is not None:
            token = torch.arange(x.shape[1], device=x.device)
            bounds = cu_seqlens.to(x.device)
            starts = bounds[torch.searchsorted(bounds, token, right=True) - 1]
        ctx = _Context(state or {}, mask, ends, starts, {})
        inputs = self._inputs(x, ctx)
        decay = self._decay(inputs, lower_bound)
        operands = self._streams(inputs, decay, ctx, first_values)
        if self.spec.layer.value_residual and first_values is None:
            first_values = operands["v"]
        self._gate_operands(operands, inputs, decay, ctx)
        if self.spec.layer.key_rate:
            rate = operands["removal"]
            written = 1 + (rate - 1) * self.key_rate.to(rate.dtype)
            operands["k"] = operands["k"] * written.to(operands["k"].dtype)
        if mask is not None:
            self._hide(operands, mask)
        run: Callable[..., Output | OutputWithUncertainty] = attention
        # Packed sequences have a state each, and nobody measures them.
        observed = self.observer is not None and cu_seqlens is None
        result = run(
            self.spec if mask is None else self._masked_spec,
            initial_state=self._recurrent(ctx.state),
            output_final_state=output_state or observed,
            output_uncertainty=output_uncertainty,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
            **({"k": None} | operands),
        )
        q, k, v = operands["q"], operands.get("k"), operands["v"]
        if observed:
            assert self.observer is not None
            assert result.final_state is not None
            g = operands.get("g", v.new_zeros(self.sizes.heads, dtype=wide_dtype(x)))
            b, prior = operands["b"], operands["prior"]
            self.observer(Observation(self.layer_idx, g, b, prior, result.final_state))
        if output_state:
            assert result.final_state is not None
            self._keep(result.final_state, k, v, ctx)
        output = self._output(result.output, q, k, v, inputs)
        if self.check_finite and not bool(output.isfinite().all()):
            raise ValueError(f"output: layer {self.layer_idx} ({self.spec.name}) is not finite")
        uncertainty = getattr(result, "uncertainty", None)
        if order is not None:
            back = order.argsort(1)
            output = _take(output, back)
            first_values, uncertainty = (
                None if x is None else _take(x, back) for x in (first_values, uncertainty)
            )
        return LayerOutput(
            output, ctx.new_state if output_state else None, first_values, uncertainty
        )

    def _check_input(
        self,
        x: Tensor,
        mask: Tensor | None,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        output_state: bool,
    ) -> None:
        n = self.sizes
        if x.ndim != 3 or x.shape[-1] != n.hidden:
            raise ValueError(
                f"hidden_states: got shape {list(x.shape)}, accepted is [B, T, {n.hidden}]"
            )
        if self.check_finite and not bool(x.isfinite().all()):
            raise ValueError(
                f"hidden_states: the input of layer {self.layer_idx} ({self.spec.name}) is not "
                "finite"
            )
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask: got shape {list(mask.shape)}, accepted is [B, T] = "
                f"{list(x.shape[:2])}"
            )
        if cu_seqlens is not None and (state or output_state or mask is not None):
            raise ValueError(
                "cu_seqlens: packed sequences start fresh and have no padding; "
                "they go with neither a state nor a mask"
            )
        if state:
            self._check_state(state, x.shape[0])

    def _check_state(self, state: LayerState, batch: int) -> None:
        wanted = self.state_shapes(batch)
        if set(state) != set(wanted):
            raise ValueError(
                f"state: it has {', '.join(sorted(state))}, but layer {self.layer_idx} "
                f"({self.spec.name}) carries {', '.join(sorted(wanted))}: it comes from another "
                "layer"
            )
        for name, shape in wanted.items():
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"state: {name} has shape {list(state[name].shape)}, but layer "
                    f"{self.layer_idx} ({self.spec.name}) carries {list(shape)} for {batch} "
                    "sequences: it comes from another layer or batch"
                )

    def state_shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the layer's state, by name."""
        n = self.sizes
        sizes = {"N": batch, "HV": n.heads, "K": self.keys, "V": n.value, "H": self.op_key_heads}
        shapes = {p.name: tuple(sizes[d] for d in p.shape) for p in self._parts}
        for name in ("conv", "q_conv", "k_conv", "v_conv"):
            conv = getattr(self, name, None)
            if isinstance(conv, Convolution):
                shapes[name] = (batch, conv.size - 1, conv.channels)
        if self.shift is not None:
            shapes["shift"] = (batch, 1, n.hidden)
        rotations = {self._stream(s).rotation for s in ("q", "k")}
        if "static" in rotations:
            shapes["position"] = (batch,)
        if "cumulative" in rotations:
            shapes["angle"] = (batch, n.heads, self.angle_proj.out_features)
        return shapes

    @property
    def op_key_heads(self) -> int:
        """Query and key heads as the recurrence sees them."""
        k = self.spec.layer.k
        per_head = self.grouped_query or k.bias or k.rotation == "cumulative"
        return self.sizes.heads if per_head else self.sizes.key_heads

    def _inputs(self, x: Tensor, ctx: _Context) -> _Inputs:
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
        return _Inputs(x, shifted, branch, conv)

    def _decay(self, inputs: _Inputs, lower_bound: Tensor | None) -> GateValue | None:
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
        inputs: _Inputs,
        decay: GateValue | None,
        ctx: _Context,
        first_values: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return q, k and v as the recurrence takes them, and the erase key if there is one."""
        layer = self.spec.layer
        q = self._projected("q", inputs, ctx)
        k = self._projected("k", inputs, ctx) if self.spec.key == "operand" else None
        v = self._projected("v", inputs, ctx)
        operands: dict[str, Tensor] = {}
        if layer.erase_key != "none":
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

    def _projected(self, s: str, inputs: _Inputs, ctx: _Context) -> Tensor:
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
        copies = 1 if s == "q" else self.steps
        x = x.unflatten(-1, (copies, self.stream_heads[s], -1)).flatten(1, 2)
        feature_map = getattr(self, f"{s}_map", None)
        mapped: Tensor = x if feature_map is None else feature_map(x)
        return mapped

    def _normalized(self, s: str, x: Tensor) -> Tensor:
        return normalize(self._stream(s).norm, x, getattr(self, f"{s}_norm", None))

    def _erase_key(self, k: Tensor) -> Tensor:
        if self.spec.layer.erase_key == "scaled_key":
            return k * torch.sigmoid(self.erase_decay).to(k.dtype)[:, None]
        return normalize("l2", k * self.erase_scale.to(k.dtype), None)

    def _shaped(self, s: str, x: Tensor, inputs: _Inputs, decay: GateValue | None) -> Tensor:
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
        self, q: Tensor, k: Tensor | None, x: Tensor, decay: GateValue | None, ctx: _Context
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

    def _static_angles(self, size: int, x: Tensor, ctx: _Context) -> Tensor:
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

    def _cumulative_angles(self, x: Tensor, decay: GateValue | None, ctx: _Context) -> Tensor:
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
        inputs: _Inputs,
        decay: GateValue | None,
        ctx: _Context,
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
        if self.metaplastic is not None:
            operands |= self.metaplastic(inputs.hidden, self._observed(operands))

    def _observed(self, operands: dict[str, Tensor]) -> Tensor | None:
        """Return what the importance gate multiplies."""
        if "beta" not in operands:
            return None
        # Keys that follow from the decay are no stream of the layer.
        k = operands["k"] if "k" in operands else -torch.expm1(operands["g"])
        return observed_precision(self.spec, operands["beta"], k)

    def _write(self, inputs: _Inputs, decay: GateValue | None) -> Tensor:
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
        stacked: Tensor = gate.unflatten(2, (self.steps, self.sizes.heads))
        return stacked.flatten(1, 2)

    def _hide(self, operands: dict[str, Tensor], mask: Tensor) -> None:
        """Makes masked tokens identity updates: nothing is written, nothing decays."""
        for name, idle in self._idle.items():
            x = operands[name]
            keep = mask.repeat_interleave(x.shape[1] // mask.shape[1], 1)
            keep = keep.reshape(*keep.shape, *(1,) * (x.ndim - 2))
            operands[name] = x.where(keep, x.new_full((), idle))

    def _recurrent(self, state: LayerState) -> State | None:
        if "memory" not in state:
            return None
        return State(**{name: state[name] for name in State._fields if name in state})

    def _keep(self, final: State, k: Tensor | None, v: Tensor, ctx: _Context) -> None:
        """Puts the recurrence's final state beside that of the parts."""
        for name, x in final._asdict().items():
            if x is not None:
                ctx.new_state[name] = x
        if final.lag_key is None or ctx.ends is None:
            return
        # The last real token is what the next one repeats, not the padding after it.
        at = torch.arange(v.shape[0], device=v.device)
        for name, x in (("lag_key", k), ("lag_value", v)):
            assert x is not None
            before = ctx.state.get(name, x.new_zeros(x.shape[0], *x.shape[2:]))
            real = torch.cat([before[:, None].to(x.dtype), x], 1)[at, ctx.ends]
            ctx.new_state[name] = real.to(ctx.new_state[name].dtype)

    def _output(self, y: Tensor, q: Tensor, k: Tensor | None, v: Tensor, inputs: _Inputs) -> Tensor:
        layer, dtype = self.spec.layer, inputs.hidden.dtype
        out = layer.output
        y = y.to(wide_dtype(y, inputs.hidden))
        if layer.skip == "head":
            y = y + self.skip.to(y.dtype)[:, None] * v
        elif layer.skip == "branch":
            assert inputs.conv is not None
            y = y + (self.skip.to(y.dtype) * inputs.conv).view_as(y)
        gate: Tensor | None = None
        if out.gate != "none":
            z = self.g_proj(inputs.of("output", out.gate_input)).to(y.dtype)
            gate = activate(out.gate, z).view_as(y)
        if gate is not None and out.order == "gate_norm":
            y = y * gate
        if out.norm != "none":
            y = self.norm(y)
        if layer.skip == "same_token":
            assert k is not None
            weight = (q.to(y.dtype) * k.to(y.dtype) * self.skip.to(y.dtype)).sum(-1, keepdim=True)
            y = y + weight * v
        if gate is not None and out.order == "norm_gate":
            y = y * gate
        output: Tensor = self.o_proj(y.flatten(2).to(dtype))
        return output

    def extra_repr(self) -> str:
        n = self.sizes
        return (
            f"{self.spec.name}, hidden={n.hidden}, heads={n.heads}, key_heads={n.key_heads}, "
            f"key={n.key}, value={n.value}"
        )


class _Inputs(NamedTuple):
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


def _take(x: Tensor, order: Int[Tensor, "B T"]) -> Tensor:
    """Return every row's tokens in an order of its own."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def _check(spec: Spec, steps: int) -> None:
    """Refuses what no layer can be built for."""
    layer, local = spec.layer, spec.layer.local

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise SpecError(f"{spec.name!r}: {what}")

    rotations = {layer.q.rotation, layer.k.rotation} - {"none"}
    need(len(rotations) < 2, "layer.q.rotation and layer.k.rotation must be of one kind")
    need(layer.v.rotation == "none", "layer.v.rotation must be none")
    need(
        "cumulative" not in rotations or spec.decay.has_step,
        "rotation = cumulative needs a decay with a discretisation step",
    )
    need(not rotations or steps == 1, "rotation goes with one step per token")
    need(
        steps == 1 or (layer.skip == "none" and not layer.query_correction),
        "a skip or query correction goes with one step per token",
    )
    branch = local.kind == "convolution" and local.at == "branch"
    need(layer.skip != "branch" or branch, 'layer.skip = branch needs layer.local.at = "branch"')
    need(not branch or steps == 1, 'layer.local.at = "branch" goes with one step per token')
    need(
        (spec.erase.key == "free") == (layer.erase_key != "none"),
        "erase.key = free and layer.erase_key go together",
    )
    need(
        not layer.key_rate or (spec.erase.strength == "own" and spec.erase.side == "removal"),
        "layer.key_rate needs the removal gate of erase.side = removal",
    )
    need(
        not (layer.key_rate or layer.skip == "same_token") or layer.heads.sharing == "all",
        "layer.key_rate and skip = same_token need as many key as value heads",
    )
    need(
        layer.q.feature_map == layer.k.feature_map or spec.key != "operand",
        "layer.q.feature_map and layer.k.feature_map must have one size",
    )
    gates = {
        "decay": spec.decay,
        "write": spec.write,
        "erase.gate": spec.erase.gate,
        "layer.q.gate": layer.q.gate,
        "layer.k.gate": layer.k.gate,
        "layer.v.gate": layer.v.gate,
    }
    for name, gate in gates.items():
        if gate.shape == "none":
            continue
        need(
            gate.input not in ("branch", "conv") or branch,
            f'{name}.input = {gate.input} needs layer.local.at = "branch"',
        )
        need(
            gate.input != "shift" or local.kind == "token_shift",
            f"{name}.input = shift needs layer.local.kind = token_shift",
        )
        need(
            gate.tie != "decay" or "temperature" in spec.decay.parameterization,
            f"{name}.tie = decay needs a decay with a temperature",
        )
    need(
        layer.output.gate_input != "shift" or local.kind == "token_shift",
        "layer.output.gate_input = shift needs layer.local.kind = token_shift",
    )
