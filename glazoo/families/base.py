"""A model family: the models of one `model_type`, and what is found in them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from glazoo.errors import ConversionError
from glazoo.families.calls import Call, Recurrence, known_calls
from glazoo.families.interception import absent_calls, calls_of, running
from glazoo.families.mixer import (
    InterceptedMixer,
    metaplastic_class,
    twin_class,
)
from glazoo.families.settings import Settings
from glazoo.layers import ImportanceGate
from glazoo.spec import Spec, no_exact_gain
from glazoo.zoo import load

__all__ = [
    "CACHES",
    "Family",
    "Found",
    "LiveFamily",
    "Quirks",
]


@dataclass(frozen=True, slots=True, eq=False)
class Quirks:
    """What a family's models do that cannot be found by looking at them."""

    positions: bool = False
    """Whether a continued cache needs explicit `position_ids`."""
    apart: bool = False
    """Whether the layers other than the mixers keep packed documents apart where positions start
    again. Where nobody has tried, documents are computed in rows of their own."""
    defects: Mapping[str, str] = field(default_factory=dict)
    """Known defects of the source's own code, by the check of a comparison whose numbers they are
    in. The converted model shares them."""
    exact: Any = None
    """Recomputes, in the dtype that a mixer has now, fixed numbers that its files hold rounded."""


@dataclass(frozen=True, slots=True)
class Found:
    """One mixer of a model, as it was found."""

    path: str
    """Name of the mixer in the model."""
    layer: int
    """Index of its layer."""
    mixer: str
    """Name of its class."""
    calls: tuple[str, ...]
    """Scan functions that it calls; none for a mixer with a forward pass of ours."""
    spec: str
    """Name of the spec that it follows."""
    hidden: int
    """Width of its input, D."""
    heads: int
    """Value heads, HV."""
    key_heads: int
    """Key heads, H."""
    key: int
    """Key channels per head, K."""
    value: int
    """Value channels per head, V."""

    def gate(self, spec: Spec, *, plasticity: float, seed: int) -> ImportanceGate:
        """Return the importance gate that conversion adds to the mixer.

        Args:
            spec: the metaplastic spec that the mixer gets.
            plasticity: kappa at the start.
            seed: seed of the gate's inner projection.
        """
        assert spec.importance is not None
        return ImportanceGate(
            spec.importance,
            in_features=self.hidden,
            heads=self.heads,
            keys=self.key,
            values=self.value,
            key_heads=self.key_heads,
            steps=spec.substeps,
            plasticity=plasticity,
            seed=seed,
            layer=self.layer,
        )


class _Seen(Exception):
    """Carries the operands of a scan out of a mixer's forward pass."""

    def __init__(self, operands: Recurrence) -> None:
        self.operands = operands


class _Recorder:
    """Stands for a mixer whose scan is only looked at."""

    def scan(self, x: Recurrence, *_rest: Any) -> Any:
        raise _Seen(x)


def _sizes(mixer: nn.Module, hidden: int, tokens: int) -> tuple[int, int, int, int]:
    """Return value heads, key heads, key and value channels of a mixer, by running it on a few
    tokens up to its scan."""
    weight = next(mixer.parameters())
    x = torch.zeros(1, tokens, hidden, dtype=weight.dtype, device=weight.device)
    base, training = type(mixer), mixer.training
    inner: Any = twin_class(base)
    mixer.__class__ = inner
    mixer.eval()
    try:
        recorder: Any = type(base.__name__, (_Recorder,), {})()
        with torch.no_grad(), running(recorder, x, None):
            inner.forward(mixer, x)
    except _Seen as seen:
        operands = seen.operands
        k, v = operands.k, operands.v
        if v.shape[:2] != x.shape[:2] or operands.cu_seqlens is not None:
            raise ConversionError(
                f"{base.__name__} gives its scan other tokens than those of its input, and the "
                "importance gate would not know which is which"
            ) from None
        return v.shape[2], k.shape[2], k.shape[3], v.shape[3]
    except Exception as e:
        reason = " ".join(str(e).split())
        if weight.device.type == "cpu" and _is_triton(e):
            reason = (
                f"its code before the scan is Triton, which runs on a GPU only ({reason}): move "
                "the model there before converting it"
            )
        raise ConversionError(f"{base.__name__} could not be followed to its scan: {reason}") from e
    finally:
        mixer.__class__ = base
        mixer.train(training)
    raise AssertionError("a scan that was called ends the forward pass")


def _is_triton(error: BaseException) -> bool:
    """Say whether an exception comes out of Triton."""
    found = error.__traceback__
    while found is not None:
        if found.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "triton":
            return True
        found = found.tb_next
    return False


_ABOVE_ONE = ("linear_allow_neg_eigval", "allow_neg_eigval")
"""Options that let the write gate of a delta rule exceed 1."""

CACHES = ("cache", "past_key_values", "cache_params")
"""What versions and families call a cache, the newest first."""

_GENERATIVE = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


class Family:
    """The models of one `model_type` of transformers: how they are built, and what is in them."""

    native = False
    """Whether the models are metaplastic by their own configuration and layers, in which nothing
    needs to be replaced."""
    saves = True
    """Whether converted models can be saved, and loaded again through transformers' classes."""
    lengths: tuple[int, ...] = (2,)
    """Numbers of tokens on which a mixer is followed to its scan."""

    def __init__(
        self,
        model_type: str,
        *,
        quirks: Quirks | None = None,
        overrides: Mapping[str, type[Any]] | None = None,
    ) -> None:
        self.model_type = model_type
        self.quirks = quirks or Quirks()
        self.overrides = overrides or {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_type!r})"

    @property
    def converted_model_type(self) -> str:
        """`model_type` of a converted checkpoint."""
        return f"metaplastic_{self.model_type}"

    def converted_architecture(self, architecture: str) -> str:
        """Return the class name of the converted form of one of the family's models."""
        return f"Metaplastic{architecture}"

    def converted_config(
        self, raw: Mapping[str, Any], config: Any, architecture: str, settings: Settings
    ) -> dict[str, Any]:
        """Return the content of a converted folder's config.json.

        Args:
            raw: that of the source's.
            config: the source's configuration.
            architecture: the source's model class.
            settings: what to convert.
        """
        return {
            **raw,
            "architectures": [self.converted_architecture(architecture)],
            "model_type": self.converted_model_type,
            "metaplastic": settings.to_block(),
        }

    def source_config(self) -> type[Any]:
        """Import the configuration class.

        By its own module and never through an Auto class, which are open to re-registration: other
        packages put classes of their own behind the same `model_type`.
        """
        from transformers.models.auto import configuration_auto as auto

        name = auto.CONFIG_MAPPING_NAMES.get(self.model_type)  # type: ignore[attr-defined]
        if name is None:
            raise self._absent(f"{self.model_type} configuration")
        package = f"transformers.models.{auto.model_type_to_module_name(self.model_type)}"
        return self._from(package, name)

    @property
    def modeling(self) -> str:
        """Name of the module of the models and mixers."""
        return self.source_config().__module__.replace(".configuration_", ".modeling_")

    def source_model(self, architecture: str) -> type[Any]:
        """Import one of the family's model classes, by its own module."""
        return self._from(self.modeling, architecture)

    def own_model(self, name: str) -> type[Any] | None:
        """Return a model class of the family by its name, None if it has none of that name."""
        from transformers import PreTrainedModel

        found = getattr(importlib.import_module(self.modeling), name, None)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            return None
        return found if getattr(found, "config_class", None) is self.source_config() else None

    def own_mixer(self, name: str) -> type[nn.Module] | None:
        """Return the metaplastic form of a mixer class by the source's name, None if it has none of
        that name."""
        found = getattr(importlib.import_module(self.modeling), name, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            return None
        return self.metaplastic_class(found)

    def _from(self, module: str, name: str) -> type[Any]:
        try:
            found: type[Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as e:
            raise self._absent(name) from e
        return found

    def _absent(self, name: str) -> ConversionError:
        return ConversionError(
            f"the installed transformers has no {name}: the family {self.model_type!r} needs "
            "another version"
        )

    @functools.cached_property
    def auto_classes(self) -> Mapping[str, tuple[str, ...]]:
        """Model classes of the family by the Auto class that loads them: language models first."""
        from transformers.models.auto import modeling_auto

        space = vars(modeling_auto)
        found: dict[str, tuple[str, ...]] = {}
        for name, auto in space.items():
            mapping = getattr(auto, "_model_mapping", None)
            if not name.startswith("AutoModel") or mapping is None:
                continue
            listed = next((k for k, v in space.items() if v is mapping), "")
            names = space.get(f"{listed}_NAMES", {}).get(self.model_type)
            if names is not None:
                found[name] = (names,) if isinstance(names, str) else tuple(names)
        return dict(sorted(found.items(), key=lambda item: item[0] not in _GENERATIVE))

    def auto_models(self) -> dict[str, type[Any]]:
        """Import the family's model classes, by the Auto class that loads them."""
        from transformers.models.auto import modeling_auto

        config = self.source_config()
        first = self.architectures[0]
        found = dict.fromkeys(self.loaders(first), self.source_model(first))
        for name, auto in vars(modeling_auto).items():
            mapping = getattr(auto, "_model_mapping", None)
            if not isinstance(auto, type) or mapping is None:
                continue
            cls = mapping.get(config, None)
            # Some give a multimodal checkpoint's text model alone, which has no place for the whole
            # configuration.
            if getattr(cls, "__module__", "") == self.modeling and cls.config_class is config:
                found.setdefault(name, cls)
        return found

    def loaders(self, architecture: str) -> tuple[str, ...]:
        """Return the names of the Auto classes that load a converted model.

        Those that load its source, and for a generative model that of language models too, which is
        what programs that evaluate models use.
        """
        found = [auto for auto, names in self.auto_classes.items() if architecture in names]
        if architecture in self.architectures:
            found = [*found, _GENERATIVE[0]]
        return tuple(dict.fromkeys(found)) or ("AutoModel",)

    @property
    def generative(self) -> tuple[str, ...]:
        """Names of the generative models that transformers lists for the family."""
        names = [n for auto in _GENERATIVE for n in self.auto_classes.get(auto, ())]
        return tuple(dict.fromkeys(names))

    @functools.cached_property
    def architectures(self) -> tuple[str, ...]:
        """Generative models of the family."""
        # Some types are listed with a text model that has a configuration of its own.
        return tuple(name for name in self.generative if self.own_model(name) is not None)

    def text_config(self, config: Any) -> Any:
        """Return the language model's part of a configuration object."""
        # Configurations of other packages need not have one.
        return getattr(config, "get_text_config", lambda: config)()

    def hidden_size(self, config: Any) -> int:
        """Return the width of the mixers' input.

        Raises:
            ConversionError: the configuration does not say.
        """
        found = getattr(self.text_config(config), "hidden_size", None)
        if not isinstance(found, int):
            raise ConversionError(
                f"{type(config).__name__} has no hidden_size, the width of the mixers' input"
            )
        return found

    @property
    def multimodal(self) -> bool:
        """Whether the configuration holds that of a text model beside others."""
        return "text_config" in getattr(self.source_config(), "sub_configs", {})

    def build(self, architecture: str, config: Any) -> nn.Module:
        """Build a model without data."""
        with torch.device("meta"):
            model: nn.Module = self.source_model(architecture)(config)
        return model

    def mixers(self, model: nn.Module) -> dict[int, nn.Module]:
        """Return a model's mixers by layer: by what their code calls, not by name, since some
        families reuse an attribute for other modules."""
        found: dict[int, nn.Module] = {}
        for module in model.modules():
            if self.calls(module) or self._override(type(module)):
                index = getattr(module, "layer_idx", None)
                if not isinstance(index, int):
                    raise ConversionError(
                        f"{type(module).__name__} has no layer_idx, by which caches know its layer"
                    )
                if index in found:
                    raise ConversionError(f"layer {index} has two mixers")
                found[index] = module
        return dict(sorted(found.items()))

    def _override(self, cls: type) -> Any:
        names = (base.__name__ for base in cls.__mro__)
        return next((self.overrides[name] for name in names if name in self.overrides), None)

    def calls(self, mixer: nn.Module) -> tuple[Call, ...]:
        """Return the scan functions that a mixer calls."""
        return () if self._override(type(mixer)) else calls_of(type(mixer))

    def metaplastic_class(self, cls: type[nn.Module]) -> type[nn.Module] | None:
        """Return the class that a mixer of a class gets, None if it is no mixer's."""
        mixin = self._override(cls) or (InterceptedMixer if calls_of(cls) else None)
        return mixin and metaplastic_class(cls, mixin)

    def examine(self, model: nn.Module) -> dict[int, Found]:
        """Say what a model's mixers are.

        Args:
            model: a model of the family, with or without data.

        Raises:
            ConversionError: it has none, or they follow several specs.
        """
        mixers = self.mixers(model)
        if any("forward" in vars(mixer) for mixer in mixers.values()):
            # A hook of that kind keeps the source's forward pass on the instance, over any class.
            raise ConversionError(
                "the model's mixers carry hooks that replace `forward` (it was loaded with a "
                "device_map that offloads): convert the checkpoint folder, or load the model "
                "without"
            )
        names = {id(module): name for name, module in model.named_modules()}
        hidden = self.hidden_size(model.config)
        found = {
            layer: self._examine(mixer, names[id(mixer)], layer, hidden)
            for layer, mixer in mixers.items()
        }
        if not found:
            absent = dict.fromkeys(name for m in model.modules() for name in absent_calls(type(m)))
            hint = f" ({', '.join(absent)} would be called if it were installed)" if absent else ""
            raise ConversionError(
                f"{type(model).__name__} has no mixer that can be converted: none calls a known "
                f"scan function{hint}; known are: {known_calls()}"
            )
        specs = sorted({f.spec for f in found.values()})
        if len(specs) > 1:
            raise ConversionError(
                f"{type(model).__name__} has mixers of several specs ({', '.join(specs)}); "
                "accepted is one"
            )
        return found

    def _examine(self, mixer: nn.Module, path: str, layer: int, hidden: int) -> Found:
        override, calls = self._override(type(mixer)), self.calls(mixer)
        if override is not None:
            spec, sizes = override.spec, override.sizes(mixer)
        else:
            if len({c.spec for c in calls}) > 1:
                raise ConversionError(
                    f"{path} calls scans of several specs: {', '.join(c.name for c in calls)}"
                )
            spec = calls[0].spec
            sizes, *others = (_sizes(mixer, hidden, tokens) for tokens in self.lengths)
            if any(other != sizes for other in others):
                raise ConversionError(f"{path} has other heads on longer inputs")
        name = type(mixer).__name__
        return Found(path, layer, name, tuple(c.name for c in calls), spec, hidden, *sizes)

    def source_spec(self, config: Any, found: Mapping[int, Found]) -> Spec:
        """Return the spec that the mixers follow."""
        return load(next(iter(found.values())).spec)

    def layer_kinds(self, config: Any) -> tuple[str, ...]:
        """Return the kind of every layer, as far as the configuration has names for them."""
        text = self.text_config(config)
        kinds = getattr(text, "layer_types", None)
        return tuple(kinds) if kinds else ("layer",) * int(text.num_hidden_layers)

    def write_above_one(self, config: Any) -> str | None:
        """Return the configuration field that lets the write gate of a delta rule exceed 1, if one
        does."""
        text = self.text_config(config)
        return next((name for name in _ABOVE_ONE if getattr(text, name, False)), None)

    def no_exact_gain(self, config: Any, found: Mapping[int, Found]) -> str | None:
        """Say why the mixers cannot have the exact gain; None if they can."""
        field = self.write_above_one(config)
        if field is not None:
            return f"{field} lets the write gate exceed 1, and a rate above 1 has no precision"
        return no_exact_gain(self.source_spec(config, found))

    def settings(
        self, config: Any, architecture: str, found: Mapping[int, Found], **asked: Any
    ) -> Settings:
        """Return what a conversion of a model will be, checked: `Settings.make` says of what."""
        return Settings.make(
            base_model_type=self.model_type,
            base_architectures=(architecture,),
            spec=self.source_spec(config, found),
            hidden_size=next(iter(found.values())).hidden,
            convertible=tuple(sorted(found)),
            no_exact_gain=self.no_exact_gain(config, found),
            **asked,
        )


class LiveFamily(Family):
    """The models of one class that is not transformers' own, in memory only: neither folders nor
    Auto classes know them by their `model_type`, which may be that of other models there."""

    saves = False
    # Layers of other packages choose between functions by length.
    lengths = (2, 70)

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        super().__init__(str(getattr(config, "model_type", None) or type(model).__name__))
        self._config = type(config)
        mixers = self.mixers(model).values()
        names = (name for name in _ABOVE_ONE for mixer in mixers if getattr(mixer, name, False))
        self._above_one = next(names, None)

    def source_config(self) -> type[Any]:
        """Return the configuration class of the model."""
        return self._config

    def write_above_one(self, config: Any) -> str | None:
        """Return the name of the option that lets the write gate of a delta rule exceed 1."""
        return self._above_one or super().write_above_one(config)
