"""Models built from specs: their mixers as a family, and the metaplastic forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from glazoo.converters.errors import ConversionError
from glazoo.converters.families.base import Family, Found
from glazoo.converters.families.calls import Call
from glazoo.converters.families.mixer import MetaplasticMixer, Observation, metaplastic_class
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
    """The models of `glazoo.models`: their configuration holds the spec of every layer."""

    separates = True
    modeling = "glazoo.models.modeling"

    def source_config(self) -> type[Any]:
        """Import the configuration class."""
        return self._from("glazoo.models.configuration", "GlazooConfig")

    @property
    def auto_classes(self) -> dict[str, tuple[str, ...]]:
        """Model classes by the Auto class that loads them."""
        return {"AutoModelForCausalLM": ("GlazooForCausalLM",)}

    @property
    def architectures(self) -> tuple[str, ...]:
        """Generative models."""
        return ("GlazooForCausalLM",)

    def mixers(self, model: nn.Module) -> dict[int, nn.Module]:
        """Return the recurrent layers."""
        layers = (m for m in model.modules() if isinstance(m, GatedLinearAttention))
        return {m.layer_idx: m for m in layers}

    def calls(self, mixer: nn.Module) -> tuple[Call, ...]:
        """Return nothing: the layers call `glazoo.attention` themselves."""
        return ()

    def metaplastic_class(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """Return the class that a layer gets, None for other modules."""
        return metaplastic_class(cls, OwnMixer) if issubclass(cls, GatedLinearAttention) else None

    def _examine(self, mixer: nn.Module, path: str, layer: int, hidden: int) -> Found:
        assert isinstance(mixer, GatedLinearAttention)
        spec, n = mixer.spec, mixer.sizes
        projected = spec.steps.source == "projected" and spec.steps.count > 1
        for reason, present in (
            ("it is metaplastic already", spec.metaplastic),
            ("its gain is exact", spec.posterior.gain == "exact"),
            ("its write gate has one number per value channel", spec.write.shape == "value"),
            ("it writes several times per token", projected),
        ):
            if present:
                raise ConversionError(f"layer_specs: {spec.name!r} cannot be converted: {reason}")
        sizes = n.heads, n.key_heads, mixer.keys, n.value
        return Found(path, layer, type(mixer).__name__, (), spec.name, n.hidden, *sizes)

    def source_spec(self, config: Any, found: Mapping[int, Found]) -> Spec:
        """Return the spec of the recurrent layers, as the configuration holds it."""
        spec: Spec = config.spec(next(iter(found)))
        return spec

    def layer_kinds(self, config: Any) -> tuple[str, ...]:
        """Return the spec of every layer, or what else it is."""
        return tuple(config.layer_specs)


OWN = OwnFamily("glazoo")
"""Models of `glazoo.models` whose recurrent layers share one spec."""
