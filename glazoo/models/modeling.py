"""A causal language model whose layers are built from specs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from glazoo.layers import GatedLinearAttention, LayerState, layers_of
from glazoo.layers.parts import (
    KeepsWide,
    Projection,
    RMSNorm,
    TokenShift,
    fill,
    frequencies,
    packed_starts,
    real_first,
    reordered,
    rotate,
    wide_dtype,
    wide_parameter,
)
from glazoo.layers.plasticity import EARLIER_NAMES
from glazoo.models.cache import CACHE, recurrent_layer
from glazoo.models.configuration import GlazooConfig
from glazoo.models.decay import teach_trainer
from glazoo.models.saving import SavesWhole, refuse_incomplete_gates
from glazoo.models.sharding import teach_accelerate

__all__ = ["GlazooForCausalLM", "GlazooModel", "GlazooPreTrainedModel"]

_MLP_SHIFT = "mlp_shift"
"""Name of what channel mixing carries between calls, beside the state of the mixer."""
_EARLIER = {rf"\.{old}": f".{new}" for old, new in EARLIER_NAMES.items()}


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with rotary positions and grouped queries.

    y = softmax(rope(q) rope(k)^T / sqrt(d) + mask) v
    """

    def __init__(self, config: GlazooConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.num_attention_heads is not None
        assert config.num_key_value_heads is not None
        self.layer_idx, self.theta = layer_idx, config.rope_theta
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.q_proj = Projection(config.hidden_size, self.heads * self.size)
        self.k_proj = Projection(config.hidden_size, self.kv_heads * self.size)
        self.v_proj = Projection(config.hidden_size, self.kv_heads * self.size)
        self.o_proj = Projection(self.heads * self.size, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        positions: Int[Tensor, "#B T"],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """Attends; `mask` is [B, 1, T, S] bool, or None for a causal one without past."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.size))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.size))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.size))
        base = frequencies(self.size, self.theta, x.device).to(wide_dtype(x))
        angles = positions[..., None, None] * base
        q, k = rotate(q, angles).transpose(1, 2), rotate(k, angles).transpose(1, 2)
        y = self.attend(q, k, v.transpose(1, 2), mask, cache)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return output

    def attend(
        self,
        q: Float[Tensor, "B H T d"],
        k: Float[Tensor, "B HKV T d"],
        v: Float[Tensor, "B HKV T d"],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B H T d"]:
        """Reads the values of the tokens so far, those in the cache included."""
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.kv_heads
        )


class FeedForward(nn.Module):
    """down(silu(gate(x)) up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden_size, intermediate_size)
        self.up_proj = Projection(hidden_size, intermediate_size)
        self.down_proj = Projection(intermediate_size, hidden_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Maps every token."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class ChannelMix(nn.Module):
    """value(relu(key(shift_k(x)))^2), with a gate times sigmoid(receptance(shift_r(x))).

    Reference: arXiv:2404.05892 (gated) and arXiv:2503.14456 (without).
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, gated: bool, depth: float
    ) -> None:
        super().__init__()
        # RWKV-7 starts with a power of (1 - depth)^4.
        uses = ("mlp", "receptance") if gated else ("mlp",)
        self.shift = TokenShift(hidden_size, uses, "static", 1 - (1 - depth) ** 4)
        self.key = Projection(hidden_size, intermediate_size)
        self.value = Projection(intermediate_size, hidden_size)
        self.receptance = Projection(hidden_size, hidden_size) if gated else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        padding: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Float[Tensor, "B 1 D"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B 1 D"]]:
        """Maps every token with the real one before it; gives the last one for what follows."""
        order = ends = starts = None
        if padding is not None:
            x, _, ends, order = real_first(x, padding)
        if cu_seqlens is not None:
            starts = packed_starts(cu_seqlens, x)
        shifted, last = self.shift(x, context, ends=ends, starts=starts)
        y: Tensor = self.value(F.relu(self.key(shifted["mlp"])).square())
        if self.receptance is not None:
            y = torch.sigmoid(self.receptance(shifted["receptance"])) * y
        return y if order is None else reordered(y, order.argsort(1)), last


class LowerBounds(KeepsWide):
    """Learned lower bounds of decays that grow from layer to layer.

    l_i = sum_{j <= i} softmax_j(logits) - softmax_0(logits)
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.logits = wide_parameter(layers, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts all layers alike."""
        fill(self.logits, 0.0)

    def forward(self) -> Float[Tensor, "layers width"]:
        """Return the bounds of all layers."""
        self.refuse_narrow()
        share = self.logits.softmax(0)
        return share.cumsum(0) - share[0]


def _norm(config: GlazooConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, config.norm_eps)
    return RMSNorm(config.hidden_size, config.norm_eps)


class GlazooBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GlazooConfig, layer_idx: int, first: bool) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        spec = config.spec(layer_idx)
        self.mixer_norm = _norm(config)
        self.mixer: GatedLinearAttention | SoftmaxAttention
        if spec is None:
            self.mixer = SoftmaxAttention(config, layer_idx)
        else:
            self.mixer = GatedLinearAttention(
                spec,
                config.hidden_size,
                **config.sizes(layer_idx),
                layer_idx=layer_idx,
                num_layers=config.num_hidden_layers,
                first=first,
                rope_base=config.rope_theta,
                impl=config.impl,
                check_finite=config.check_finite,
            )
        self.mlp: FeedForward | ChannelMix | None = None
        if inner := config.intermediate_size:
            self.mlp_norm = _norm(config)
            if config.feed_forward == "swiglu":
                self.mlp = FeedForward(config.hidden_size, inner)
            else:
                gated = config.feed_forward == "gated_channel_mix"
                depth = layer_idx / config.num_hidden_layers
                self.mlp = ChannelMix(config.hidden_size, inner, gated=gated, depth=depth)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        *,
        padding: Tensor | None = None,
        causal: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lower_bound: Tensor | None = None,
        first_values: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Tensor | None]:
        """Runs the block; gives its output and the first values for the blocks after it."""
        cache = cache if use_cache else None
        if isinstance(self.mixer, SoftmaxAttention):
            assert positions is not None
            y = self.mixer(
                self.mixer_norm(hidden_states), positions=positions, mask=causal, cache=cache
            )
            return self._feed_forward(hidden_states + y, padding, cu_seqlens, {})[0], first_values
        kept = None if cache is None else recurrent_layer(cache, self.layer_idx)
        given = first_values if self.mixer.shares_values else None
        run = functools.partial(
            self._recurrent,
            before={} if kept is None else kept.state,
            output_state=kept is not None,
            cu_seqlens=cu_seqlens,
            lower_bound=lower_bound if self.mixer.needs_lower_bound else None,
        )
        output, values, state = run(hidden_states, padding, first_values=given)
        if kept is not None:

            def again(n: int) -> LayerState:
                hidden = None if padding is None else padding[:, :n]
                first = None if given is None else given[:, :n]
                return run(hidden_states[:, :n], hidden, first_values=first)[2]

            kept.store(state, hidden_states.shape[1], again)
        return output, values if self.mixer.shares_values else first_values

    def _recurrent(
        self,
        x: Tensor,
        padding: Tensor | None,
        *,
        before: LayerState,
        output_state: bool,
        cu_seqlens: Tensor | None,
        lower_bound: Tensor | None,
        first_values: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """Return the block's output, the mixer's first values, and the state after the call."""
        result = self.mixer(
            self.mixer_norm(x),
            padding,
            state={name: s for name, s in before.items() if name != _MLP_SHIFT},
            output_state=output_state,
            cu_seqlens=cu_seqlens,
            lower_bound=lower_bound,
            first_values=first_values,
        )
        output, own = self._feed_forward(x + result.output, padding, cu_seqlens, before)
        return output, result.first_values, (result.state or {}) | own

    def _feed_forward(
        self, x: Tensor, padding: Tensor | None, cu_seqlens: Tensor | None, before: LayerState
    ) -> tuple[Tensor, LayerState]:
        if self.mlp is None:
            return x, {}
        if isinstance(self.mlp, FeedForward):
            return x + self.mlp(self.mlp_norm(x)), {}
        y, last = self.mlp(
            self.mlp_norm(x),
            padding=padding,
            cu_seqlens=cu_seqlens,
            context=before.get(_MLP_SHIFT),
        )
        return x + y, {_MLP_SHIFT: last}


class GlazooPreTrainedModel(SavesWhole, PreTrainedModel):
    """What the models share: configuration, weight initialisation, abilities."""

    config: GlazooConfig
    config_class = GlazooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GlazooBlock"]  # noqa: RUF012 - of the base class
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012 - of the base class
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def __init__(self, config: GlazooConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        teach_trainer()
        teach_accelerate()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: transformers would save this module's file with every model."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        key_mapping: Mapping[str, str] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a checkpoint, of 0.1 too; absent or unknown tensors of importance gates are an
        error, not a log line."""
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            key_mapping={**_EARLIER, **(key_mapping or {})},
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        # Saved again, tensors have the names of today.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in used if not set(c.source_patterns) & set(_EARLIER)]
        refuse_incomplete_gates(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Projection) and module.published:
            module.reset_parameters()
        elif isinstance(module, Projection):
            init.normal_(module.weight, std=self.config.initializer_range)
            module.reset_bias()
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if (bias := getattr(module, "bias", None)) is not None:
                init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif type(module).__module__.startswith("glazoo."):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()


class GlazooModel(GlazooPreTrainedModel):
    """The model without its language head."""

    def __init__(self, config: GlazooConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_norm = _norm(config) if config.embedding_norm else None
        blocks: list[GlazooBlock] = []
        bounded: list[GatedLinearAttention] = []
        first = True
        for i in range(config.num_hidden_layers):
            block = GlazooBlock(config, i, first)
            blocks.append(block)
            if isinstance(block.mixer, GatedLinearAttention):
                first = first and not block.mixer.shares_values
                if block.mixer.needs_lower_bound:
                    bounded.append(block.mixer)
        self.layers = nn.ModuleList(blocks)
        self.norm = _norm(config)
        self.lower_bounds: LowerBounds | None = None
        if bounded:
            widths = {m.width for m in bounded}
            if len(widths) > 1:
                raise ValueError(
                    "layer_specs: decays with a learned lower bound have different widths "
                    f"{sorted(widths)}; the bound grows over layers and needs one width"
                )
            self.lower_bounds = LowerBounds(len(bounded), widths.pop())
        # transformers casts what it loads to the model's dtype, except for what is named here.
        self._keep_in_fp32_modules_strict = set(wide_names(self))
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def update_specs(self) -> None:
        """Takes the specs of the layers into the configuration, after they changed in place."""
        self.config.take_specs({m.layer_idx: m.spec for m in layers_of(self).values()})
        self._keep_in_fp32_modules_strict = set(wide_names(self))

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Int[Tensor, "N1"] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the layers.

        Args:
            input_ids: [B, T], tokens.
            attention_mask: [B, past + T], 1 for real tokens and 0 for padding, wherever it stands.
            position_ids: [B, T]; only softmax attention uses them, and packed sequences are
                recognised by positions that start over (B = 1).
            cache: that of an earlier call.
            inputs_embeds: [B, T, hidden_size] instead of `input_ids`.
            use_cache: whether to give a cache back. Default: the configuration's, not in training.
            output_hidden_states: whether to give the input of every layer and the output.
            return_dict: whether to give a named output rather than a tuple.
            cu_seq_lens_q: [N + 1], bounds of packed sequences, B = 1.
            past_key_values: `cache`, under the name that it had before transformers 5.24.
            **kwargs: other arguments of transformers' callers, which have no meaning here.

        Returns:
            `BaseModelOutputWithPast`.

        Raises:
            ValueError: the inputs contradict each other, or the cache is another model's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: exactly one of them is needed")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x if self.embed_norm is None else self.embed_norm(x)
        batch, tokens = x.shape[:2]
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = cache is not None or (bool(self.config.use_cache) and not self.training)
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        packed = _packed(cu_seq_lens_q, position_ids, attention_mask, cache, batch)
        use_cache = use_cache and packed is None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else _seen(cache, self.config)
        padding = _padding(attention_mask, batch, past, tokens)
        if position_ids is None:
            # Real tokens are counted: padding between them moves nothing.
            position_ids = (
                torch.arange(past, past + tokens, device=x.device)[None]
                if padding is None
                else (padding.cumsum(1) - 1).clamp(min=0)[:, past:]
            )
        causal = None
        if "full_attention" in self.config.layer_types:
            causal = _causal(padding, packed, past, tokens, x.device)
        own = None if padding is None else padding[:, past:]
        bounds = None if self.lower_bounds is None else iter(self.lower_bounds().unbind(0))
        first_values: Tensor | None = None
        seen: list[Tensor] = []
        for block in self.layers:
            assert isinstance(block, GlazooBlock)
            if output_hidden_states:
                seen.append(x)
            bounded = isinstance(block.mixer, GatedLinearAttention) and (
                block.mixer.needs_lower_bound
            )
            x, first_values = block(
                x,
                padding=own,
                causal=causal,
                positions=position_ids,
                cu_seqlens=packed,
                lower_bound=next(bounds) if bounds is not None and bounded else None,
                first_values=first_values,
                cache=cache,
                use_cache=use_cache,
            )
        x = self.norm(x)
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*seen, x) if output_hidden_states else None,
            **kept,
        )
        return output if return_dict is not False else output.to_tuple()


class GlazooForCausalLM(GlazooPreTrainedModel, GenerationMixin):
    """A causal language model: embedding, layers of any specs, language head.

    logits_t = W norm(layers(embed(tokens)))_t ;  loss = mean over t of -log p(token_{t+1})
    """

    _tied_weights_keys = {  # noqa: RUF012 - of the base class
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: GlazooConfig) -> None:
        super().__init__(config)
        self.model = GlazooModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Runs the model; arguments are those of `GlazooModel.forward`, and these.

        Args:
            input_ids: [B, T], tokens.
            attention_mask: [B, past + T], 1 for real tokens.
            position_ids: [B, T].
            cache: that of an earlier call.
            inputs_embeds: [B, T, hidden_size] instead of `input_ids`.
            labels: [B, T], tokens to predict (shifted inside); -100 is left out of the loss.
            use_cache: whether to give a cache back.
            output_hidden_states: whether to give hidden states.
            return_dict: whether to give a named output rather than a tuple.
            logits_to_keep: compute the logits of this many last tokens (0: all), or of the tokens
                with these indices.
            past_key_values: `cache`, under the name that it had before transformers 5.24.
            **kwargs: `cu_seq_lens_q`, `num_items_in_batch` and what else callers pass.

        Returns:
            `CausalLMOutputWithPast`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=kwargs.pop("cu_seq_lens_q", None),
        )
        x = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )
        return output if return_dict is not False else output.to_tuple()


def wide_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that stay float32 whatever the model is cast to."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, m in module.named_modules()
        if isinstance(m, KeepsWide)
        for name, _ in m.named_parameters(recurse=False)
    ]


def _packed(
    bounds: Tensor | None,
    position_ids: Tensor | None,
    mask: Tensor | None,
    cache: Cache | None,
    batch: int,
) -> Tensor | None:
    """Return the bounds of packed sequences, from the caller or from positions that start over."""
    if bounds is None:
        unpackable = mask is not None or cache is not None or batch != 1
        if position_ids is None or unpackable or torch.compiler.is_compiling():
            return None
        starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
        if len(starts) == 0:
            return None
        edge = starts.new_tensor
        bounds = torch.cat([edge([0]), starts, edge([position_ids.shape[1]])])
    if cache is not None or (mask is not None and not bool(mask.all())):
        raise ValueError(
            "cu_seq_lens_q: packed sequences start fresh and have no padding; they go with neither "
            "a cache nor an attention_mask"
        )
    return bounds.to(torch.int64)


def _seen(cache: Cache, config: GlazooConfig) -> int:
    """Return the number of tokens that a cache has seen, after checking that it is this model's."""
    types = config.layer_types
    if len(cache.layers) != len(types):
        raise ValueError(
            f"cache: it has {len(cache.layers)} layers, but the model has {len(types)}; "
            "make it with DynamicCache(config=model.config)"
        )
    lengths: set[int] = set()
    for i, kind in enumerate(types):
        if kind != "full_attention":
            lengths.add(int(recurrent_layer(cache, i).get_seq_length()))
        elif isinstance(layer := cache.layers[i], DynamicLayer):
            # Some versions of transformers count in a tensor, which a set takes for another number.
            lengths.add(int(layer.get_seq_length()))
        else:
            raise ValueError(
                f"cache: layer {i} is {type(layer).__name__}, but softmax attention "
                "needs keys and values; make it with DynamicCache(config=model.config)"
            )
    if len(lengths) > 1:
        raise ValueError(
            f"cache: its layers have seen different numbers of tokens {sorted(lengths)}"
        )
    return lengths.pop()


def _padding(mask: Tensor | None, batch: int, past: int, tokens: int) -> Tensor | None:
    """Checks a padding mask and gives it as bool [B, past + T]; None if all tokens are real."""
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, past + tokens):
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}, accepted is [B, past + T] = "
            f"[{batch}, {past + tokens}]"
        )
    mask = mask != 0
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def _causal(
    padding: Tensor | None, packed: Tensor | None, past: int, tokens: int, device: torch.device
) -> Tensor | None:
    """Return the mask of softmax attention, [B, 1, T, past + T]; None for a plain causal one."""
    if padding is None and packed is None and past == 0:
        return None
    row = torch.arange(past, past + tokens, device=device)[:, None]
    column = torch.arange(past + tokens, device=device)
    mask = (column <= row)[None, None]
    if packed is not None:
        own = torch.searchsorted(packed.to(device), column, right=True)
        mask = mask & (own[:, None] == own)
    if padding is not None:
        # A padded query attends to itself: softmax over nothing would not be a number.
        mask = mask & (padding[:, None, None] | (column == row))
    return mask
