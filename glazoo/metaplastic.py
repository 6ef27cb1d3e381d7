"""Metaplastic forms of whatever has one: specs, layers, models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, Unpack, overload

from torch import nn

from glazoo import spec as specs
from glazoo.spec import Counterpart, Spec

__all__ = ["metaplasticize"]

M = TypeVar("M", bound=nn.Module)


@overload
def metaplasticize(x: Spec, *, rank: int | None = None, **form: Unpack[Counterpart]) -> Spec: ...


@overload
def metaplasticize(
    x: M,
    plasticity: float | None = None,
    *,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int | None = None,
    impl: str | None = None,
    **form: Unpack[Counterpart],
) -> M: ...


def metaplasticize(
    x: Spec | nn.Module,
    plasticity: float | None = None,
    *,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int | None = None,
    impl: str | None = None,
    **form: Unpack[Counterpart],
) -> Any:
    """Return the metaplastic form of a spec, or turns a layer or a model into its own, in place.

        J_t = a_t J_{t-1} + b_t k_t^2 ;   I_t = J_t + I_p ;
        b_t = kappa r_t 2 sigmoid(b_up b_down x_t)

    with r_t the write gate or, for the exact gain, the precision whose rate it is. A spec gains the
    operand b and a prior; a module gains what makes them, with kappa = `plasticity`, b_up = 0 and
    I_p = 1 at the start. At kappa = 0 it computes what it did before, up to the rounding of the
    scan, and the gradient of kappa is alive there. Parameters keep their identity, tied weights
    stay tied, and the gates are float32 or wider whatever the rest is cast to.

    Folders of checkpoints: `glazoo convert`, or `glazoo.converters.convert_checkpoint`.

    Args:
        x: a `Spec`; a `GatedLinearAttention`, or a module that holds some, such as a
            `GlazooForCausalLM`, whose configuration then holds the new specs; or a model whose
            mixers call a known scan function, `transformers.Mamba2ForCausalLM` for example. What
            `save_pretrained` writes loads through `AutoModelForCausalLM` after `import
            glazoo.models`; a model of a class that is neither ours nor transformers' own,
            flash-linear-attention's for example, stays in memory: its `save_pretrained` refuses.
        plasticity: kappa, from 0, the source, to 1, the full metaplastic form; sources that
            subtract no prediction accept more. Default: 0.
        gate: "head", the default, for one importance vector over keys per head, which keeps the
            source's matmul kernel; "value" for one importance per synapse: the published form of
            Hebbian sources, at twice their state, and without a matmul kernel for those that
            subtract a prediction.
        gain: learning rate of a source that subtracts its prediction: "first_order", beta k / I, or
            "exact", that of the posterior for the precision beta / (1 - beta k.k), which also
            multiplies the importance gate. Both are the source at kappa = 0. Default: "exact" where
            the source has it.
        precision: what importance is: "diagonal", the default, a vector over keys; "isotropic", one
            number per head; "full", a matrix over keys, the strongest form, whose state is that of
            K more value channels.
        basis: "own", the default; "rotated" for a vector that counts along axes of its own, an
            orthogonal matrix per key head which starts as the identity and trains.
        forgetting: how a decay a acts on importance: "temper" fades old evidence,
            J' = a J, the default where it is sound; "diffuse" lets the variance grow as in a Kalman
            filter, 1 / I' = a^2 / I + (1 - a^2) / I_p, and the mean decay as the source's does: the
            only sound form with a decay per key and a precision or basis that is not the default.
        rank: rank of the gate's projection. Default: 16 for a spec; for a module a sixteenth of the
            width, at most 128.
        layers: indices of the layers to convert. Default: all that can be.
        seed: seed of the gate's inner projection, beside the layer's index. Default: 0.
        impl: engine of the recurrences, as in `glazoo.attention`. Default: as it is.

    Returns:
        The metaplastic spec, named `metaplastic_<name>`, or the module itself.

    Raises:
        TypeError: `x` is none of these.
        SpecError: a spec or every chosen layer is metaplastic already, or has no such form.
        ValueError: another argument is out of its domain, or goes with modules only. A
            `glazoo.converters.ConversionError`, which is one: the model has no mixer that can be
            converted, or is converted already.

    Reference: arXiv:2602.09075, section 3 and appendix (Mamba2 as a limit of Palimpsa).
    """
    start: dict[str, Any] = {"plasticity": plasticity, "layers": layers, "seed": seed, "impl": impl}
    start = {name: value for name, value in start.items() if value is not None}
    if isinstance(x, Spec):
        if start:
            raise ValueError(f"{next(iter(start))}: belongs to modules, and {x.name!r} is a spec")
        width = {} if rank is None else {"rank": rank}
        return specs.metaplasticize(x, **form, **width)
    if not isinstance(x, nn.Module):
        raise TypeError(
            f"x: got {type(x).__name__}, accepted are a Spec (glazoo.load) and a module; folders "
            "are converted by `glazoo convert`"
        )
    from glazoo.layers.conversion import layers_of, metaplasticize_layers

    if layers_of(x):
        return metaplasticize_layers(x, rank=rank, **start, **form)
    from glazoo.models.conversion import metaplasticize_mixers

    return metaplasticize_mixers(x, rank=rank, **start, **form)
