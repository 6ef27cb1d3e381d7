"""The layer of any spec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glazoo.api import attention
from glazoo.layers.operands import Context, Inputs, LayerState, OperandProjections
from glazoo.layers.parts import (
    OutputNorm,
    Projection,
    activate,
    fill,
    packed_starts,
    projection,
    real_first,
    reordered,
    wide_dtype,
    wide_parameter,
)
from glazoo.layers.plasticity import (
    EARLIER_NAMES,
    Observation,
    refused_plasticity,
    write_sizes,
)
from glazoo.layers.sizes import Sizes, check_spec
from glazoo.program import lower
from glazoo.spec import Decay, Spec
from glazoo.state import Output, OutputWithUncertainty, State
from glazoo.zoo import load

__all__ = ["GatedLinearAttention", "LayerOutput"]


class LayerOutput(NamedTuple):
    """Result of a layer."""

    output: Float[Tensor, "B T D"]
    state: LayerState | None
    """State after the last token, if asked for."""
    first_values: Tensor | None
    """Values of the first layer, for specs whose later layers interpolate with them."""
    uncertainty: Tensor | None = None
    """Posterior variance of the recurrence's output, if asked for."""


class GatedLinearAttention(OperandProjections):
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

    g_proj: nn.Module
    norm: OutputNorm
    skip: nn.Parameter

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
        spec = load(spec)
        sizes = Sizes.of(
            spec,
            hidden_size,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            head_k_dim=head_k_dim,
            head_v_dim=head_v_dim,
        )
        check_spec(spec)
        super().__init__(
            spec,
            sizes,
            layer_idx=layer_idx,
            num_layers=num_layers,
            first=layer_idx == 0 if first is None else first,
            rope_base=rope_base,
        )
        self.impl, self.check_finite = impl, check_finite
        self._take(spec)
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
        self.o_proj = Projection(width, n.hidden, bias=out.bias)

    def reset_parameters(self) -> None:
        """Sets the layer's own parameters to their published starts; submodules have theirs."""
        ones = {"q_bias": 1.0, "k_bias": 1.0, "erase_decay": 1.0, "query_correction": 1.0}
        ones |= {"erase_scale": 0.71, "key_rate": 1.02, "value_mix_bias": 0.73, "bonus": 0.0}
        ones["skip"] = -0.04 if self.spec.layer.skip == "same_token" else 1.0
        for name, value in ones.items():
            p = getattr(self, name, None)
            if isinstance(p, nn.Parameter):
                fill(p, value)

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
            x, mask, ends, order = real_first(x, attention_mask)
            first_values = None if first_values is None else reordered(first_values, order)
        if cu_seqlens is not None:
            starts = packed_starts(cu_seqlens, x)
        ctx = Context(state or {}, mask, ends, starts, {})
        inputs = self.inputs(x, ctx)
        operands = self.operands(inputs, ctx, lower_bound=lower_bound, first_values=first_values)
        if self.spec.layer.value_residual and first_values is None:
            first_values = operands["v"]
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
            keys = -torch.expm1(g) if k is None else k
            writes = write_sizes(keys, v, operands.get("beta"))
            final = result.final_state
            self.observer(Observation(self.layer_idx, g, b, prior, final, keys, writes))
        if output_state:
            assert result.final_state is not None
            self._keep(result.final_state, k, v, ctx)
        output = self._output(result.output, q, k, v, inputs)
        if self.check_finite and not bool(output.isfinite().all()):
            raise ValueError(f"output: layer {self.layer_idx} ({self.spec.name}) is not finite")
        uncertainty = getattr(result, "uncertainty", None)
        if order is not None:
            back = order.argsort(1)
            output = reordered(output, back)
            first_values, uncertainty = (
                None if x is None else reordered(x, back) for x in (first_values, uncertainty)
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
        sizes["1"] = 1
        shapes = {p.name: tuple(sizes[d] for d in p.shape) for p in self._parts}
        return shapes | self.projection_state_shapes(batch)

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

    def _keep(self, final: State, k: Tensor | None, v: Tensor, ctx: Context) -> None:
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

    def _output(self, y: Tensor, q: Tensor, k: Tensor | None, v: Tensor, inputs: Inputs) -> Tensor:
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
