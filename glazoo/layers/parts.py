"""Parts of a layer: parameters that stay wide, projections, norms, local mixing, rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from glazoo.spec import Init, Local, OutputPath, Stream

__all__ = [
    "Convolution",
    "FeatureMap",
    "KeepsWide",
    "LowRank",
    "OutputNorm",
    "Projection",
    "RMSNorm",
    "TokenShift",
    "activate",
    "draw",
    "feature_size",
    "fill",
    "frequencies",
    "normalize",
    "packed_starts",
    "projection",
    "real_first",
    "reordered",
    "rotate",
    "rotated_size",
    "wide_dtype",
    "wide_parameter",
]


def wide_dtype(*xs: Tensor) -> torch.dtype:
    """Return the dtype of gate arithmetic: float32, or float64 if any tensor is."""
    dtype = torch.float32
    for x in xs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def wide_parameter(*shape: int, trainable: bool = True) -> nn.Parameter:
    """Return an unset parameter in float32 or wider, whatever the default dtype is."""
    dtype = torch.promote_types(torch.float32, torch.get_default_dtype())
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=trainable)


def fill(parameter: Tensor, value: Tensor | float) -> None:
    """Sets a parameter to its start, unless it has no storage or a checkpoint has filled it."""
    if parameter.is_meta or getattr(parameter, "_is_hf_initialized", False):
        return
    with torch.no_grad():
        if isinstance(value, Tensor):
            parameter.copy_(value)
        else:
            parameter.fill_(value)


def draw(init: Init, *shape: int) -> Tensor:
    """Draws the start of a parameter in float32 on the CPU."""
    low = 0.0 if init.low is None else init.low
    high = 1.0 if init.high is None else init.high
    u = torch.rand(shape, dtype=torch.float32, device="cpu")
    match init.distribution:
        case "default" | "zeros":
            return torch.zeros_like(u)
        case "ones":
            return torch.ones_like(u)
        case "constant":
            return torch.full_like(u, low)
        case "uniform":
            return low + (high - low) * u
        case "log_uniform":
            return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * u)
        case "log_of_uniform":
            # A draw of exactly zero would start at minus infinity and stay there.
            return (low + (high - low) * u).clamp(min=1e-4).log()
        case "log_of_arange":
            count = torch.arange(1, shape[-1] + 1, dtype=torch.float32, device="cpu")
            return count.log().expand(shape).clone()
        case "linspace":
            line = torch.linspace(low, high, shape[-1], dtype=torch.float32, device="cpu")
            return line.expand(shape).clone()
        case "inverse_softplus_log_uniform":
            step = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * u)
            step = step.clamp(min=init.floor or 0.0)
            return step + torch.log(-torch.expm1(-step))


class KeepsWide(nn.Module):
    """A module whose own parameters are never narrowed below float32.

    `half()`, `bfloat16()` and `to(dtype)` all end in `_apply`: this one moves the module's own
    parameters but keeps their dtype, and treats its submodules as usual.
    """

    no_weight_decay = True
    """Zero is a value like others for them: trainers should not pull them there."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def keep_wide(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return t.to(device=moved.device)
            return moved

        super()._apply(keep_wide, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def refuse_narrow(self) -> None:
        """Called at every use: something that shards or casts by other ways than `_apply` may have
        narrowed them all the same, and a plasticity of 0.5009 would silently be 0.5.

        Raises:
            ValueError: a parameter of the module's own is narrower than float32.
        """
        for name, p in self._parameters.items():
            if p is not None and p.is_floating_point() and p.dtype.itemsize < 4:
                raise ValueError(
                    f"{type(self).__name__}.{name} is {p.dtype}, but computes in float32 or wider: "
                    "mixed precision must leave it alone. With FSDP2, shard with "
                    "glazoo.models.fully_shard in place of torch's; with FSDP1, name the class in "
                    "MixedPrecision(_module_classes_to_ignore=...)"
                )


class Projection(nn.Linear):
    """A linear projection that knows how it starts."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        weight_init: Init | None = None,
        bias_init: Init | None = None,
    ) -> None:
        self.weight_init, self.bias_init = weight_init, bias_init
        super().__init__(in_features, out_features, bias=bias)

    @property
    def published(self) -> bool:
        """Whether the weight has a start of its own, rather than the model's."""
        return self.weight_init is not None and self.weight_init.distribution != "default"

    def reset_parameters(self) -> None:
        """Sets the weight to its start, or to the framework's default, and the bias to its own or
        to zero."""
        if self.published:
            assert self.weight_init is not None
            fill(self.weight, draw(self.weight_init, *self.weight.shape))
        else:
            bound = 1 / math.sqrt(max(1, self.in_features))
            fill(self.weight, (2 * torch.rand(self.weight.shape, device="cpu") - 1) * bound)
        self.reset_bias()

    def reset_bias(self) -> None:
        """Sets the bias to its start; zero if it has none."""
        if self.bias is not None:
            fill(self.bias, draw(self.bias_init or Init(), *self.bias.shape))


class LowRank(nn.Module):
    """Two projections with a narrow middle: up(act(down(x)))."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        activation: str = "none",
        bias: bool = False,
        weight_init: Init | None = None,
        bias_init: Init | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = Projection(in_features, rank)
        self.up = Projection(
            rank, out_features, bias=bias, weight_init=weight_init, bias_init=bias_init
        )

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        """Projects x [..., in] to [..., out]."""
        y: Tensor = self.up(_ACTIVATIONS[self.activation](self.down(x)))
        return y


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "identity": _identity,
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activate(name: str, x: Tensor) -> Tensor:
    """Applies a pointwise map by its name in a spec; `elu` is elu(x) + 1, which is positive."""
    return _ACTIVATIONS[name](x)


def projection(
    in_features: int,
    out_features: int,
    rank: int | None,
    *,
    activation: str = "none",
    bias: bool = False,
    weight_init: Init | None = None,
    bias_init: Init | None = None,
) -> Projection | LowRank:
    """Return a full or a low-rank projection."""
    if rank is None:
        return Projection(
            in_features, out_features, bias=bias, weight_init=weight_init, bias_init=bias_init
        )
    return LowRank(
        in_features,
        out_features,
        rank,
        activation=activation,
        bias=bias,
        weight_init=weight_init,
        bias_init=bias_init,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 or wider."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        fill(self.weight, 1.0)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """Normalises x [..., size]."""
        w = x.to(wide_dtype(x))
        w = w * torch.rsqrt(w.square().mean(-1, keepdim=True) + self.eps)
        return (w * self.weight.to(w.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class OutputNorm(nn.Module):
    """The output norm of a spec: over a head, a group of heads, or all channels."""

    def __init__(self, spec: OutputPath, heads: int, size: int, groups: int) -> None:
        super().__init__()
        self.kind, self.eps = spec.norm, spec.eps
        self.heads, self.size = heads, size
        self.parts = {"rms_group": groups, "rms_full": 1}.get(spec.norm, heads)
        shared = spec.norm == "rms_head"
        self.weight = nn.Parameter(torch.ones(size if shared else heads * size))
        self.bias = nn.Parameter(torch.zeros(heads * size)) if spec.norm == "group" else None

    def reset_parameters(self) -> None:
        """Sets the weight to one and the bias to zero."""
        fill(self.weight, 1.0)
        if self.bias is not None:
            fill(self.bias, 0.0)

    def forward(self, x: Float[Tensor, "B T HV V"]) -> Float[Tensor, "B T HV V"]:
        """Normalises x, [B, T, HV, V], in its own dtype."""
        if self.kind == "rms_head":
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            return y * self.weight.to(x.dtype)
        y = x.reshape(*x.shape[:2], self.parts, -1)
        if self.kind in ("group", "layer"):
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        y = y.flatten(2) * self.weight.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.kind}, heads={self.heads}, size={self.size}, eps={self.eps}"


def _tail(
    extended: Tensor, count: int, ends: Int[Tensor, "B"] | None
) -> Float[Tensor, "B count C"]:
    """Return the last `count` real entries of `extended`, whose first `count` are the old context.

    `ends` is the number of entries after the old context up to the last real token.
    """
    if ends is None:
        # A copy: a view would keep the whole sequence alive in the cache.
        return extended[:, extended.shape[1] - count :].clone()
    index = ends[:, None] + torch.arange(count, device=extended.device)
    return extended.gather(1, index[..., None].expand(-1, -1, extended.shape[-1]))


class Convolution(nn.Module):
    """Causal depthwise convolution over tokens.

    y_t = act(sum_j w_j x_{t - size + 1 + j} + bias)
    """

    def __init__(self, channels: int, spec: Local) -> None:
        super().__init__()
        self.channels, self.size, self.activation = channels, spec.size, spec.activation
        self.weight = nn.Parameter(torch.empty(channels, 1, spec.size))
        self.bias = nn.Parameter(torch.empty(channels)) if spec.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight and bias to the framework's default start of a depthwise convolution."""
        bound = 1 / math.sqrt(self.size)
        for p in (self.weight, self.bias):
            if p is not None:
                fill(p, (2 * torch.rand(p.shape, device="cpu") - 1) * bound)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        context: Float[Tensor, "B size1 C"] | None = None,
        *,
        ends: Int[Tensor, "B"] | None = None,
        starts: Int[Tensor, "T"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B size1 C"]]:
        """Convolves.

        Args:
            x: [B, T, C], masked tokens are zero.
            context: [B, size - 1, C], the last inputs before x; default zeros.
            ends: [B], number of tokens up to the last real one; default T.
            starts: [T], packed sequences: index of the first token of every token's sequence.

        Returns:
            The result and the context for what follows.
        """
        if context is None:
            context = x.new_zeros(x.shape[0], self.size - 1, self.channels)
        extended = torch.cat([context.to(x.dtype), x], 1)
        if starts is None:
            y = F.conv1d(extended.mT, self.weight, self.bias, groups=self.channels).mT
        else:
            at = torch.arange(x.shape[1], device=x.device)
            y = x.new_zeros(()) if self.bias is None else self.bias.to(x.dtype)
            for j in range(self.size):
                back = self.size - 1 - j
                inside = (at - back >= starts)[:, None]
                tap = extended[:, j : j + x.shape[1]].where(inside, x.new_zeros(()))
                y = y + tap * self.weight[:, 0, j].to(x.dtype)
        return activate(self.activation, y), _tail(extended, self.size - 1, ends)

    def extra_repr(self) -> str:
        return f"{self.channels}, size={self.size}, activation={self.activation!r}"


def real_first(
    x: Float[Tensor, "B T D"], mask: Tensor
) -> tuple[Float[Tensor, "B T D"], Tensor, Int[Tensor, "B"], Int[Tensor, "B T"]]:
    """Puts real tokens first, since convolutions and shifts reach over what stands between them.

    Args:
        x: [B, T, D].
        mask: [B, T], nonzero for real tokens.

    Returns:
        x in the new order, its mask as bool, the number of real tokens, and the order.
    """
    order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
    real = reordered(mask, order) != 0
    return reordered(x, order).where(real[..., None], x.new_zeros(())), real, real.sum(1), order


def reordered(x: Tensor, order: Int[Tensor, "B T"]) -> Tensor:
    """Return every row's tokens in an order of its own."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], order]


def packed_starts(cu_seqlens: Int[Tensor, "N1"], x: Float[Tensor, "B T D"]) -> Int[Tensor, "T"]:
    """Return the first token of every token's sequence, for packed sequences."""
    token = torch.arange(x.shape[1], device=x.device)
    bounds = cu_seqlens.to(x.device)
    return bounds[torch.searchsorted(bounds, token, right=True) - 1]


class TokenShift(KeepsWide):
    """Interpolates every token with the one before, with weights of each use's own.

    static   x_i = x + mu_i (x_prev - x)
    data     x_i = x + (mu_i + tanh((x + mu (x_prev - x)) A_i) B_i) (x_prev - x)
    """

    def __init__(
        self,
        channels: int,
        uses: tuple[str, ...],
        kind: Literal["static", "data"],
        depth: float = 0.0,
        rank: int = 32,
    ) -> None:
        super().__init__()
        self.uses, self.kind, self.depth, self.rank = uses, kind, depth, rank
        self.mix = wide_parameter(len(uses), channels)
        if kind == "data":
            self.mix_base = wide_parameter(channels)
            self.down = Projection(channels, len(uses) * self.rank)
            self.mix_up = wide_parameter(len(uses), self.rank, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the weights of the previous token at 1 - (i / D)^p for channel i of D.

        The powers are RWKV-7's: small for queries and output gate, which look at the current token
        only, larger for the others, largest for channel mixing, and falling with depth.
        """
        channels = self.mix.shape[-1]
        ramp = torch.arange(channels, dtype=torch.float32, device="cpu") / channels
        powers = {"q": 0.2, "k": 0.7, "v": 0.7, "output": 0.2, "mlp": 1.0}
        rows = [1 - ramp ** (powers.get(use, 0.9) * (1 - self.depth)) for use in self.uses]
        fill(self.mix, torch.stack(rows))
        if self.kind == "data":
            fill(self.mix_base, 0.5)
            fill(self.mix_up, (2 * torch.rand(self.mix_up.shape, device="cpu") - 1) * 1e-2)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        context: Float[Tensor, "B 1 D"] | None = None,
        *,
        ends: Int[Tensor, "B"] | None = None,
        starts: Int[Tensor, "T"] | None = None,
    ) -> tuple[dict[str, Tensor], Float[Tensor, "B 1 D"]]:
        """Return one interpolated input per use, and the context for what follows."""
        self.refuse_narrow()
        if context is None:
            context = x.new_zeros(x.shape[0], 1, x.shape[2])
        extended = torch.cat([context.to(x.dtype), x], 1)
        previous = extended[:, :-1]
        if starts is not None:
            inside = (torch.arange(x.shape[1], device=x.device) > starts)[:, None]
            previous = previous.where(inside, x.new_zeros(()))
        delta = previous - x
        weight = self.mix.to(x.dtype)
        if self.kind == "data":
            low = torch.tanh(self.down(x + self.mix_base.to(x.dtype) * delta))
            low = low.unflatten(-1, (len(self.uses), self.rank))
            data = torch.einsum("btur,urd->ubtd", low, self.mix_up.to(x.dtype))
            mixed = {u: x + (weight[i] + data[i]) * delta for i, u in enumerate(self.uses)}
        else:
            mixed = {u: x + weight[i] * delta for i, u in enumerate(self.uses)}
        return mixed, _tail(extended, 1, ends)

    def extra_repr(self) -> str:
        return f"{self.kind}, uses={', '.join(self.uses)}"


def feature_size(kind: str, size: int) -> int:
    """Return the channels of a head after a feature map."""
    return {"taylor": 1 + size + size * size, "quadratic": size * size}.get(kind, size)


class FeatureMap(nn.Module):
    """The feature map of a stream, from a head's channels to its keys."""

    no_weight_decay = True
    """For its own parameters, as for those of norms."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        if kind == "hadamard":
            self.left = Projection(size, size, bias=True)
            self.right = Projection(size, size, bias=True)
        elif kind == "quadratic":
            self.gamma = nn.Parameter(torch.ones(size))
            self.beta = nn.Parameter(torch.zeros(size))

    def reset_parameters(self) -> None:
        """Sets the affine parameters of the quadratic map to one and zero."""
        if self.kind == "quadratic":
            fill(self.gamma, 1.0)
            fill(self.beta, 0.0)

    def forward(self, x: Float[Tensor, "B T H d"]) -> Float[Tensor, "B T H K"]:
        """Maps x, [B, T, H, d], to [B, T, H, K]."""
        if self.kind == "hadamard":
            y: Tensor = self.left(x) * self.right(x)
            return y
        if self.kind == "quadratic":
            x = F.layer_norm(x, (self.size,), self.gamma.to(x.dtype), self.beta.to(x.dtype))
            x = x * self.size**-0.25
            return (x[..., :, None] * x[..., None, :]).flatten(-2)
        if self.kind == "taylor":
            x = x * self.size**-0.25
            square = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
            return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)
        return x


def normalize(kind: str, x: Tensor, norm: RMSNorm | None, l2_eps: float) -> Tensor:
    """Applies a stream's norm over the last axis."""
    if kind == "none":
        return x
    if norm is not None:
        y: Tensor = norm(x)
        return y
    w = x.to(wide_dtype(x))
    if kind == "l2":
        w = w * torch.rsqrt(w.square().sum(-1, keepdim=True) + l2_eps)
    elif kind == "softmax":
        w = w.softmax(-1)
    else:
        total = w.sum(-1, keepdim=True)
        # A masked token is all zeros: nothing to normalise.
        w = w / total.where(total != 0, torch.ones_like(total))
    return w.to(x.dtype)


def rotate(
    x: Float[Tensor, "B T H K"], angles: Float[Tensor, "B T #H n"]
) -> Float[Tensor, "B T H K"]:
    """Turns the first 2 n channels of x: channel i and i + n by the i-th angle."""
    n = angles.shape[-1]
    wide = wide_dtype(x, angles)
    cos, sin = angles.to(wide).cos(), angles.to(wide).sin()
    left, right, rest = x[..., :n].to(wide), x[..., n : 2 * n].to(wide), x[..., 2 * n :]
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def frequencies(size: int, base: float, device: torch.device) -> Float[Tensor, "n"]:
    """Return the angles per position of a rotary embedding over `size` channels."""
    i = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    return base ** (-i / size)


def rotated_size(stream: Stream, size: int) -> int:
    """Return the number of channels of a head that the rotation turns, an even number."""
    if stream.rotation == "none":
        return 0
    return 2 * int(size * stream.rotated / 2)
