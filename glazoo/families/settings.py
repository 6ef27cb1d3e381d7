"""What a conversion was asked for, as it is kept in the converted model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Unpack, cast, get_args

from glazoo.errors import ConversionError
from glazoo.layers.plasticity import default_rank, refused_plasticity
from glazoo.spec import Counterpart, Spec, SpecError, metaplasticize
from glazoo.zoo import load

__all__ = ["FORMAT_VERSION", "READABLE", "Gain", "GateShape", "Settings"]

FORMAT_VERSION = 3
"""Version of the converted format; raised whenever an older reader would misread a newer folder.
Version 1 had neither `beta` nor `tie`, version 2 neither `precision`, `basis` nor `forgetting`."""
READABLE = range(1, FORMAT_VERSION + 1)
"""Versions that this reader understands."""

GateShape = Literal["head", "value"]
Gain = Literal["first_order", "exact"]
Precision = Literal["diagonal", "isotropic", "full"]
Basis = Literal["own", "rotated"]
Forgetting = Literal["temper", "diffuse"]
Tie = Literal["write", "precision"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The block `metaplastic` of a converted model's configuration."""

    base_model_type: str
    """`model_type` of the source."""
    base_architectures: tuple[str, ...]
    """`architectures` of the source."""
    spec: str
    """Name of the source's spec; the converted mixers follow its metaplastic counterpart."""
    gate: GateShape
    """Shape of the importance gate."""
    rank: int
    """Rank of the importance gate's projection."""
    plasticity: float
    """kappa at the start."""
    layers: tuple[int, ...]
    """Indices of the converted layers."""
    seed: int
    """Seed of the importance gate's inner projection."""
    gain: Gain = "first_order"
    """Learning rate of a delta rule."""
    beta: Literal["precision", "rate"] = "precision"
    """What the write gate is to the exact gain."""
    tie: Tie = "write"
    """What the importance gate multiplies."""
    precision: Precision = "diagonal"
    """What importance is."""
    basis: Basis = "own"
    """Along which axes a vector of importances counts."""
    forgetting: Forgetting = "temper"
    """How a decay acts on importance."""
    format_version: int = FORMAT_VERSION

    @property
    def form(self) -> Counterpart:
        """The form of the spec, as options of `glazoo.metaplasticize`."""
        form: Counterpart = {
            "gate": self.gate,
            "precision": self.precision,
            "basis": self.basis,
            "forgetting": self.forgetting,
        }
        # A flow is the source's own, for which there is no option.
        if self.gain in get_args(Gain):
            form["gain"] = self.gain
        return form

    @classmethod
    def make(
        cls,
        *,
        base_model_type: str,
        base_architectures: Sequence[str],
        spec: str | Spec,
        hidden_size: int,
        convertible: Sequence[int],
        plasticity: float,
        rank: int | None,
        layers: Sequence[int] | None,
        seed: int,
        no_exact_gain: str | None = None,
        **form: Unpack[Counterpart],
    ) -> Settings:
        """Checks what a caller asked for and fills in the defaults."""
        source = load(spec)
        if reason := refused_plasticity(source, plasticity):
            raise ConversionError(reason)
        gain = form.get("gain")
        # A gain of the source's own, a flow, stays.
        own = source.posterior.gain != "first_order"
        if gain is None and no_exact_gain is not None and not own:
            form["gain"] = "first_order"
        if gain == "exact" and no_exact_gain is not None:
            raise ConversionError(f"gain: 'exact' is not possible here: {no_exact_gain}")
        if rank is None:
            rank = default_rank(hidden_size)
        if not 1 <= rank <= hidden_size:
            raise ConversionError(
                f"rank: got {rank!r}, accepted are 1 to {hidden_size} (the hidden size)"
            )
        try:
            made = metaplasticize(source, rank=rank, **form)
        except SpecError as e:
            raise ConversionError(str(e)) from e
        imp = made.importance
        assert imp is not None
        chosen = tuple(convertible) if layers is None else tuple(sorted(set(layers)))
        if strangers := sorted(set(chosen) - set(convertible)):
            raise ConversionError(
                f"layers: {strangers} hold no convertible mixer; convertible are "
                f"{list(convertible)}"
            )
        if not chosen:
            raise ConversionError("layers: got none, at least one layer must be converted")
        return cls(
            base_model_type=base_model_type,
            base_architectures=tuple(base_architectures),
            spec=source.name,
            gate=cast(GateShape, imp.gate.shape),
            rank=rank,
            plasticity=float(plasticity),
            layers=chosen,
            seed=seed,
            gain=cast(Gain, made.posterior.gain),
            beta=made.posterior.beta,
            tie=cast(Tie, imp.gate.tie),
            precision=cast(Precision, made.posterior.precision),
            basis=imp.basis,
            forgetting=cast(Forgetting, imp.forgetting),
        )

    def metaplastic_spec(self, source: Spec) -> Spec:
        """Return the spec that the converted mixers follow, from that of the source's."""
        gain: Gain | None = "first_order" if source.posterior.gain == "first_order" else None
        made = metaplasticize(
            source,
            rank=self.rank,
            gate=self.gate,
            gain=gain,
            precision=self.precision,
            basis=self.basis,
            forgetting=self.forgetting,
        )
        data = made.model_dump()
        data["posterior"] |= {"gain": self.gain, "beta": self.beta}
        data["importance"]["gate"]["tie"] = self.tie
        return Spec.model_validate(data)

    def to_block(self) -> dict[str, Any]:
        """Return the block as JSON data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_block(cls, block: object) -> Settings:
        """Reads the block of a configuration.

        Raises:
            ConversionError: it is absent, of a newer format, or incomplete.
        """
        if not isinstance(block, dict):
            raise ConversionError(
                "the configuration has no block 'metaplastic': it is not a converted model's"
            )
        version = block.get("format_version")
        if version not in READABLE:
            raise ConversionError(
                f"metaplastic.format_version is {version!r}, this glazoo reads "
                f"{', '.join(map(str, READABLE))}: install the glazoo that wrote it"
            )
        if (
            version == 1
            and block.get("gain") == "exact"
            and block.get("base_model_type") != "glazoo"
        ):
            # The mixers of other packages made the precision of their write gate themselves;
            # glazoo's own took it for the precision.
            block = block | {"beta": "rate"}
        try:
            return cls(
                **{
                    **block,
                    "base_architectures": tuple(block["base_architectures"]),
                    "layers": tuple(block["layers"]),
                }
            )
        except (KeyError, TypeError) as e:
            raise ConversionError(f"the configuration's block 'metaplastic' is damaged: {e}") from e
