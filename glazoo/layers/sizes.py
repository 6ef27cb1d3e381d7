"""What a layer can be built of: its sizes, and the specs that have one."""

from __future__ import annotations

from typing import NamedTuple

from glazoo.spec import Spec, SpecError

__all__ = ["Sizes", "check_spec"]


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


def check_spec(spec: Spec) -> None:
    """Refuse what no layer can be built for.

    Raises:
        SpecError: the spec asks for a combination that has no layer.
    """
    layer, local, steps = spec.layer, spec.layer.local, spec.substeps

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
        layer.erase_key.endswith("query_added") == (layer.erase_mix.shape == "head"),
        "layer.erase_key with query_added and a head-shaped layer.erase_mix go together",
    )
    need(
        not layer.erase_key.endswith("query_added") or steps == 1,
        "layer.erase_key with query_added goes with one step per token",
    )
    need(
        not (spec.steps.source == "erase_then_write" and layer.value_residual),
        "steps.source = erase_then_write and layer.value_residual exclude each other",
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
        "read.mix": spec.read.mix,
        "layer.erase_mix": layer.erase_mix,
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
