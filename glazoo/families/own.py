"""Models built from specs as a family: what is metaplastic in them is their specs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from glazoo.errors import ConversionError
from glazoo.families.base import Family, Found
from glazoo.families.calls import Call
from glazoo.families.settings import Settings
from glazoo.layers import GatedLinearAttention, layers_of
from glazoo.spec import Spec

__all__ = ["OWN", "OwnFamily"]


class OwnFamily(Family):
    """The models of `glazoo.models`: their configuration holds the spec of every layer."""

    native = True
    modeling = "glazoo.models.modeling"

    @property
    def converted_model_type(self) -> str:
        """`model_type` of a converted checkpoint: the specs say what it is."""
        return self.model_type

    def converted_architecture(self, architecture: str) -> str:
        """Return the class of a converted model, which is the source's."""
        return architecture

    def converted_config(
        self, raw: Mapping[str, Any], config: Any, architecture: str, settings: Settings
    ) -> dict[str, Any]:
        """Return the content of a converted folder's config.json."""
        new = copy.deepcopy(config)
        new.take_specs({i: settings.metaplastic_spec(config.spec(i)) for i in settings.layers})
        own = {name: getattr(new, name) for name in ("specs", "layer_specs", "spec_sizes")}
        return {**raw, **{name: x for name, x in own.items() if x is not None}}

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
        """Return the recurrent layers that are not metaplastic."""
        layers = layers_of(model).values()
        return {m.layer_idx: m for m in layers if not m.spec.metaplastic}

    def calls(self, mixer: nn.Module) -> tuple[Call, ...]:
        """Return nothing: the layers call `glazoo.attention` themselves."""
        return ()

    def examine(self, model: nn.Module) -> dict[int, Found]:
        """Say what a model's layers are."""
        if (layers := layers_of(model)) and not self.mixers(model):
            names = sorted({m.spec.name for m in layers.values()})
            raise ConversionError(f"layer_specs: {', '.join(names)}: metaplastic already")
        names = sorted({m.spec.name for m in layers.values() if not m.spec.metaplastic})
        if len(names) > 1:
            raise ConversionError(
                f"layer_specs: folders are converted from one spec, and this has "
                f"{', '.join(names)}: load the model, call glazoo.metaplasticize(model) and save it"
            )
        return super().examine(model)

    def _examine(self, mixer: nn.Module, path: str, layer: int, hidden: int) -> Found:
        assert isinstance(mixer, GatedLinearAttention)
        n = mixer.sizes
        sizes = n.heads, n.key_heads, mixer.keys, n.value
        return Found(path, layer, type(mixer).__name__, (), mixer.spec.name, n.hidden, *sizes)

    def source_spec(self, config: Any, found: Mapping[int, Found]) -> Spec:
        """Return the spec of the recurrent layers, as the configuration holds it."""
        spec: Spec = config.spec(next(iter(found)))
        return spec

    def layer_kinds(self, config: Any) -> tuple[str, ...]:
        """Return the spec of every layer, or what else it is."""
        return tuple(config.layer_specs)


OWN = OwnFamily("glazoo")
"""Models of `glazoo.models` whose recurrent layers that are not metaplastic share one spec."""
