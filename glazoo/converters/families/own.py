"""Models built from specs: their mixers as a family, and the metaplastic forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glazoo.converters.errors import ConversionError
from glazoo.converters.families.base import Block, Family, Sizes
from glazoo.converters.families.mixer import MetaplasticMixer, Observation
from glazoo.layers import GatedLinearAttention
from glazoo.layers.attention import LayerOutput
from glazoo.layers.parts import wide_dtype
from glazoo.spec import Spec
from glazoo.state import State

__all__ = ["OWN", "OwnFamily", "OwnMixer"]


class OwnMixer(MetaplasticMixer):
    """Forward pass of a layer of any spec whose scan carries an importance state.

        J_t = a_t J_{t-1} + b_t k_t^2 ;   I_t = J_t + I_p

    with b_t and I_p of `ImportanceGate`. Everything else is the layer's own. States are float32, or
    float64 in a float64 model.
    """

    # What the layer's class gives.
    impl: str
    _take: Callable[[Spec], None]
    _observed: Callable[[dict[str, Tensor]], Tensor | None]

    _seen: tuple[Tensor, Tensor, Tensor]

    def attached(self) -> None:
        """Makes the layer follow the metaplastic spec."""
        self.metaplastic_impl = self.impl
        self._take(self.metaplastic_spec)

    def forward(self, *args: Any, **kwargs: Any) -> LayerOutput:
        """Runs the layer, with the arguments of `GatedLinearAttention.forward`."""
        self.impl = self.metaplastic_impl
        observed = self.observer is not None and kwargs.get("cu_seqlens") is None
        keep = bool(kwargs.pop("output_state", False))
        result: LayerOutput = super().forward(*args, output_state=keep or observed, **kwargs)
        if observed:
            assert self.observer is not None
            assert result.state is not None
            g, b, prior = self._seen
            state = State(result.state["memory"], result.state["importance"])
            self.observer(Observation(self.layer_idx, g, b, prior, state))
        return result if keep else result._replace(state=None)

    def _gate_operands(self, operands: dict[str, Tensor], inputs: Any, *rest: Any) -> None:
        super()._gate_operands(operands, inputs, *rest)  # type: ignore[misc]
        hidden = inputs.hidden
        dtype, heads = wide_dtype(hidden), self.metaplastic.heads
        write = self._observed(operands)
        if write is None:
            write = hidden.new_ones(*hidden.shape[:2], heads, dtype=dtype)
        b, prior = self.metaplastic(hidden, write)
        operands["b"], operands["prior"] = b, prior
        if self.observer is not None:
            g = operands.get("g", hidden.new_zeros(heads, dtype=dtype))
            self._seen = (g, b, prior)


class OwnFamily(Family):
    """The models of `glazoo.models`: their configuration holds the spec of every layer, and their
    mixers' tensors follow from it."""

    def _recurrent(self, config: Any) -> tuple[int, ...]:
        return tuple(i for i in range(config.num_hidden_layers) if config.spec(i) is not None)

    def source_spec(self, config: Any) -> Spec:
        """Gives the spec of the recurrent layers.

        Raises:
            ConversionError: there is none, there are several, or its form has no converted one.
        """
        specs = {config.layer_specs[i]: config.spec(i) for i in self._recurrent(config)}
        if len(specs) != 1:
            found = ", ".join(specs) or "none"
            raise ConversionError(
                f"layer_specs: the recurrent layers have the specs {found}; accepted is one"
            )
        spec: Spec = next(iter(specs.values()))
        projected = spec.steps.source == "projected" and spec.steps.count > 1
        for reason, present in (
            ("it is metaplastic already", spec.metaplastic),
            ("its gain is exact", spec.posterior.gain == "exact"),
            ("its write gate has one number per value channel", spec.write.shape == "value"),
            ("it writes several times per token", projected),
        ):
            if present:
                raise ConversionError(f"layer_specs: {spec.name!r} cannot be converted: {reason}")
        return spec

    def _mixer(self, config: Any, layer: int) -> GatedLinearAttention:
        with torch.device("meta"):
            return GatedLinearAttention(
                config.spec(layer),
                config.hidden_size,
                **config.sizes(layer),
                layer_idx=layer,
                num_layers=config.num_hidden_layers,
                first=layer == self._recurrent(config)[0],
            )

    def symbols(self, config: Any) -> Sizes:
        """Gives hidden size, heads, key and value channels of the recurrent layers."""
        self.source_spec(config)
        mixer = self._mixer(config, self._recurrent(config)[0])
        n = mixer.sizes
        return {"D": n.hidden, "H": n.heads, "G": n.key_heads, "K": mixer.keys, "V": n.value}

    def mixer_shapes(self, config: Any, layer: int | None = None) -> dict[str, tuple[int, ...]]:
        """Gives the tensors that the mixer of a layer, default the first, must have, with their
        shapes."""
        self.source_spec(config)
        first = self._recurrent(config)[0]
        state = self._mixer(config, first if layer is None else layer).state_dict()
        return {name: tuple(t.shape) for name, t in state.items()}

    def layers(self, config: Any) -> tuple[int, ...]:
        """Gives the indices of the layers with a mixer."""
        return self._recurrent(config)


OWN = OwnFamily(
    model_type="glazoo",
    architectures=("GlazooForCausalLM",),
    spec="",
    block=Block(name="own", tensors=(), derived={}, mixin=OwnMixer, hooked=()),
    configuration="glazoo.models.configuration:GlazooConfig",
    modeling="glazoo.models.modeling",
    mixer="GatedLinearAttention",
    mixer_keys=r"(?P<prefix>model\.layers\.(?P<layer>\d+)\.mixer)\.",
    sizes={},
)
"""Models of `glazoo.models` whose recurrent layers share one spec."""
