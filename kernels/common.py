"""What every kernel shares: where a chunk lies, decay inside a chunk, launches and configurations.

Legend: B batch, T tokens, HQ/HK/HE heads of q/k/e, HV value heads, K key size, V value size, N
sequences, BT chunk, BK and BV tiles of K and V. `b_` blocks, `o_` offsets, `m_` masks, `p_`
pointers, `i_` indices.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A gate below this is a decay of exactly zero in float32 and needs no finer representation.
GATE_FLOOR = tl.constexpr(-8192.0)

GAINS = ("first_order", "exact", "exact_rate")
"""Learning rates of a posterior, by the number that kernels know them by."""
IMPORTANCES = ("written", "found", "previous")
"""Of a token, after it, as its decay leaves it and before it: likewise."""


@triton.jit
def locate_chunk(i_c, T, cu_seqlens, chunk_ids, chunk_offsets, BT: tl.constexpr):
    """First row of the chunk's sequence, the chunk's first token in it, the sequence's length."""
    if cu_seqlens is None:
        n_t = tl.cdiv(T, BT)
        i_n = i_c // n_t
        i_t = i_c - i_n * n_t
        bos = i_n.to(tl.int64) * T
        length = T
    else:
        i_n = tl.load(chunk_ids + i_c)
        i_t = i_c - tl.load(chunk_offsets + i_n)
        bos = tl.load(cu_seqlens + i_n)
        length = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)
    return bos, i_t * BT, length


@triton.jit
def locate_sequence(i_n, T, cu_seqlens, chunk_offsets, BT: tl.constexpr):
    """First row, length, number of chunks and first chunk of a sequence."""
    if cu_seqlens is None:
        n_t = tl.cdiv(T, BT)
        bos = i_n.to(tl.int64) * T
        length = T
        first = i_n.to(tl.int64) * n_t
    else:
        bos = tl.load(cu_seqlens + i_n)
        length = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)
        n_t = tl.cdiv(length, BT)
        first = tl.load(chunk_offsets + i_n).to(tl.int64)
    return bos, length, n_t, first


@triton.jit
def split_log(b_g):
    """A log decay as a multiple of 1/16 and a remainder in [0, 1/16).

    Sums of the first part are exact up to 2^20, so a difference of two sums keeps nothing of what
    the two share, however strong: a reset (-inf) inside a chunk costs the tokens after it no digit.
    """
    b_g = tl.where(b_g < GATE_FLOOR, GATE_FLOOR, b_g)
    b_hi = tl.floor(b_g * 16.0) * 0.0625
    return b_hi, b_g - b_hi


@triton.jit
def writer_decay(p_d, o_t, rows, HV: tl.constexpr):
    """Sums of both parts of the log decay from the chunk's start (p_d) to each token."""
    p_t = p_d + o_t * (2 * HV)
    m_t = o_t < rows
    return tl.load(p_t, mask=m_t, other=0.0), tl.load(p_t + 1, mask=m_t, other=0.0)


@triton.jit
def reader_decay(p_d, o_t, rows, HV: tl.constexpr, SHIFT: tl.constexpr):
    """As `writer_decay`, without the token's own decay if SHIFT."""
    p_t = p_d + o_t * (2 * HV)
    m_t = o_t < rows
    if SHIFT:
        p_t -= 2 * HV
        m_t = m_t & (o_t > 0)
    return tl.load(p_t, mask=m_t, other=0.0), tl.load(p_t + 1, mask=m_t, other=0.0)


@triton.jit
def whole_decay(p_d, rows, HV: tl.constexpr, BT: tl.constexpr):
    """Sums of both parts of the log decay of the whole chunk."""
    p_t = p_d + (tl.minimum(rows, BT) - 1) * (2 * HV)
    return tl.load(p_t), tl.load(p_t + 1)


@triton.jit
def decay_from_start(r_hi, r_lo):
    """Decay from the chunk's start to a reader."""
    return tl.exp(tl.minimum(r_hi + r_lo, 0.0))


@triton.jit
def decay_between(r_hi, r_lo, c_hi, c_lo):
    """Decay from a writer to a later reader, or to the chunk's end. Shapes broadcast."""
    return tl.exp(tl.minimum((r_hi - c_hi) + (r_lo - c_lo), 0.0))


@triton.jit
def load_factors(x, row0, o_t, m_t, i_h, HV: tl.constexpr):
    """Return what a head's tokens are multiplied by: x [.., HV], a number for each."""
    return tl.load(x + (row0 + o_t) * HV + i_h, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def reciprocal(x, RECIP: tl.constexpr):
    """1 / x of a positive normal number: 0 correctly rounded, 1 and 2 to one unit in the last
    place."""
    if RECIP == 1:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif RECIP == 2:
        return tl.inline_asm_elementwise(
            "v_rcp_f32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def level_mask(o_i, o_j, level):
    """Pairs whose reader is in the right and whose writer is in the left half of a block.

    Blocks have 2^(level + 1) tokens: every pair i > j belongs to exactly one level.
    """
    b_i = o_i >> level
    return ((b_i & 1) == 1)[:, None] & ((b_i - 1)[:, None] == (o_j >> level)[None, :])


@triton.jit
def level_mask_by_pairs(o_i, o_j, level):
    """The same pairs by the highest bit in which the two differ, an integer for every pair.

    It takes more registers. But of level_mask in a tile of 64 tokens Triton 3.6 made wrong code:
    it packs two indices into 64 bits, where an unused one leaks into the other.
    """
    o_i, o_j = o_i[:, None], o_j[None, :]
    return (((o_i ^ o_j) >> level) == 1) & (o_i > o_j)


@triton.jit
def log2_decay(b_g):
    """A log decay to base 2."""
    return b_g.to(tl.float32) * 1.4426950408889634


@triton.jit
def halves(b_x):
    """A log decay as a sum of two of float16, whose second rounds at 2^-24 of the first."""
    b_x = tl.where(b_x < GATE_FLOOR, GATE_FLOOR, b_x)
    b_hi = b_x.to(tl.float16)
    return b_hi, (b_x - b_hi.to(tl.float32)).to(tl.float16)


@triton.jit
def beside(b_hi, b_lo, o_x, level):
    """Decay of the block of 2^level tokens beside each token's own, in the next larger block.

    o_x: the 16 tokens; b_hi and b_lo: of their log decays. The sum over a block's tokens is a
    product with a matrix of zeros and ones: no table of them is written and read.
    """
    m_beside = (o_x >> level ^ 1)[:, None] == (o_x >> level)[None, :]
    b_one = tl.where(m_beside, 1.0, 0.0).to(tl.float16)
    b_g = tl.dot(b_one, b_hi, out_dtype=tl.float32)
    return tl.exp2(tl.dot(b_one, b_lo, b_g, out_dtype=tl.float32))


@triton.jit
def widen(b_p, b_r, b_beside, o_i, level):
    """Decay products within blocks of 2^level tokens, from their start (own decay excluded) and to
    their end, made those within blocks of twice that."""
    right = (o_i >> level & 1) == 1
    return b_p * tl.where(right, b_beside, 1.0), b_r * tl.where(right, 1.0, b_beside)


@triton.jit
def load_blocks(p_blocks, i_b, o_k, m_k, rows, K: tl.constexpr):
    """Decays of blocks of 16 tokens of a chunk; 1 after its last token."""
    m_b = 16 * i_b + tl.zeros_like(o_k) < rows
    return tl.load(p_blocks + i_b * K + o_k, mask=m_k & m_b, other=1.0)


@triton.jit
def load_chunk(p_blocks, o_k, m_k, rows, K: tl.constexpr, NB: tl.constexpr):
    """Decay of a chunk of NB blocks."""
    b_x = load_blocks(p_blocks, 0, o_k, m_k, rows, K)
    for i in tl.static_range(1, NB):
        b_x *= load_blocks(p_blocks, i, o_k, m_k, rows, K)
    return b_x


@triton.jit
def load_pairs(p_blocks, i_b, o_k, m_k, rows, K: tl.constexpr):
    """Decays of blocks of 32 tokens."""
    b_x = load_blocks(p_blocks, 2 * i_b, o_k, m_k, rows, K)
    return b_x * load_blocks(p_blocks, 2 * i_b + 1, o_k, m_k, rows, K)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch as the host code asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiles: "Tiles"


@dataclasses.dataclass
class _Recording:
    target: str
    launches: list[Launch]


_recording: _Recording | None = None


@contextlib.contextmanager
def record_launches(target: str) -> Iterator[list[Launch]]:
    """Collect the launches of the host code inside, configured for `target`; run none.

    Operands may be on the meta device. `target`: "sm_80", "sm_90", "sm_100" or "gfx942".
    """
    global _recording
    if _recording is not None:
        raise RuntimeError("record_launches: already recording")
    _recording = _Recording(target, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


# Looked at once: tracers know no types of kernels.
_INTERPRETING = not isinstance(locate_chunk, triton.runtime.JITFunction)


def recording() -> bool:
    """Return whether launches are recorded, not run."""
    return _recording is not None


def interpreting() -> bool:
    """Return whether Triton runs kernels in its interpreter."""
    return _INTERPRETING


@functools.cache
def _device_target() -> str:
    if interpreting():
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def current_target() -> str:
    """The target that launches are configured for: "sm_90", "gfx942", "interpreter", ..."""
    return _recording.target if _recording is not None else _device_target()


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 dots: exact for float32 operands, tf32 where they are 16-bit anyway.

    Exact means three tf32 products on NVIDIA, plain float32 in the interpreter and on AMD.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32x3" if current_target().startswith("sm_") else "ieee"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One pinned configuration of a kernel: tiles of keys and values, warps, pipeline stages."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int


def chunk_tiles(kernel: str, K: int, V: int, dtype: torch.dtype, erases: bool = False) -> Tiles:
    """Configuration of a chunk-parallel kernel; erases: of a delta rule, which has a third key."""
    BK, BV = min(64, power_of_two(K)), min(64, power_of_two(V))
    hopper = current_target() in ("sm_90", "sm_100") and dtype != torch.float32
    if kernel == "chunk_dnear_kernel" and erases:
        return Tiles(min(BK, 32), BV, 4, 1)
    if kernel in ("chunk_near_kernel", "chunk_dnear_kernel"):
        return Tiles(16, BV, 1, 1)
    if kernel == "chunk_far_kernel":
        return Tiles(min(BK, 32 if hopper else 16), BV, 4, 1)
    if kernel == "chunk_dfar_kernel":
        return Tiles(min(BK, 32), BV, 8, 2) if hopper else Tiles(16, BV, 4, 1)
    if kernel == "chunk_dkey_kernel":
        # With a single tile of values the loop over them is unrolled, and registers spill.
        BV = BV if V > 64 else min(BV, 32)
    if kernel == "chunk_dkey_kernel":
        if not hopper:
            return Tiles(min(BK, 32), min(BV, 32), 8, 2)
        # On an H200 0.66 ms where eight warps take 0.93, for all that it spills a few bytes.
        return Tiles(BK, BV, 4 if V > 64 and not erases else 8, 2)
    if kernel == "chunk_dscore_kernel" and V <= 64 and current_target().startswith("sm_10"):
        # Likewise; more threads cost less than narrower tiles.
        return Tiles(BK, BV, 8, 2)
    if kernel in ("chunk_output_kernel", "chunk_dvalue_kernel") and V % 128 == 0 and hopper:
        return Tiles(BK, 128, 4 if kernel == "chunk_output_kernel" else 8, 3)
    if kernel == "chunk_solve_kernel" and not hopper:
        return Tiles(BK, BV, 8, 2)
    return Tiles(BK, BV, 4, 2)


def state_tiles(kernel: str, K: int, V: int, dtype: torch.dtype, programs: int = 0) -> Tiles:
    """Configuration of a kernel that walks the chunks of a sequence with the state in registers.

    programs: how many there are for each tile of values; when many, each takes a wider tile.
    """
    target = current_target()
    BK, BV = power_of_two(K), power_of_two(V)
    if not kernel.startswith("delta"):
        BK, BV = min(64, BK), min(64, BV)
        if target == "sm_90":
            return Tiles(BK, 128 if V % 128 == 0 and kernel == "linear_dstate_kernel" else BV, 4, 3)
        # On sm_100 not for speed: with two stages its register allocation may spill.
        deep = target.startswith(("sm_8", "sm_10")) and kernel == "linear_state_kernel"
        return Tiles(BK, BV, 4, 3 if deep else 2)
    if dtype == torch.float32:
        return Tiles(BK, 16, 8, 1)
    # Four warps on Hopper: of eight, half would repeat the products of the others, since a chunk's
    # 64 tokens are the rows of four. Two stages there, for all that they need 223 KB: without a
    # pipeline ptxas 12.8, which Triton 3.6 calls, takes addresses of operands from registers that
    # hold entries of the initial state.
    if K > 128:
        return Tiles(BK, 16, 4, 2) if target == "sm_90" else Tiles(BK, 16, 8, 1)
    if target.startswith("gfx"):
        return Tiles(BK, min(32, BV), 4, 1)
    if target not in ("sm_90", "sm_100"):
        return Tiles(BK, min(32, BV), 8, 2)
    if target == "sm_100" and programs >= 128 and BV >= 64:
        return Tiles(BK, 64, 8, 2)
    return Tiles(BK, min(32, BV), 4, 2)


def gate_kind(g: Tensor | None) -> int:
    """0 without a gate, 1 where it has one number for all channels, 2 where one for each."""
    return 0 if g is None else g.ndim - 2


def reciprocal_kind(exact: bool) -> int:
    """How kernels divide on the current target; the interpreter always divides exactly."""
    target = current_target()
    if exact or target == "interpreter":
        return 0
    return 1 if target.startswith("sm_") else 2


# Axes of operands of kernels, by name. An operand of fewer dimensions has the first of them.
_AXES = {
    name: axes.split()
    for names, axes in (
        ("q", "B T HQ K"),
        ("e", "B T HE K"),
        ("c", "B T HC K"),
        ("k", "B T HK K"),
        ("x", "B T HX K"),
        ("r", "B T HR K"),
        ("w v do b beta", "B T HV V"),
        ("g dq u z j q_near", "B T HV K"),
        ("sums inverse", "B T HV"),
        ("state", "N HV K V"),
        ("enter", "N HV . K V"),
        ("factor", "N HV K"),
        ("maps", "N HV . K"),
        ("columns", "N HV"),
        ("prior", "HV K"),
    )
    for name in names.split()
}
# What kernels know a choice by, made of the argument that chooses.
_CHOICES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "GATE": ("g", gate_kind),
    "HEAD": ("g", lambda g: gate_kind(g) == 1),
    "KEYED": ("g", lambda g: gate_kind(g) == 2),
    **{f"{x.upper()}_KEYS": (x, lambda factor: factor.shape[3] > 1) for x in "acd"},
    "BETA": ("beta", gate_kind),
    "PRIOR": ("prior", lambda prior: prior.ndim),
    "PRE": ("read", lambda read: read == "pre"),
    "PREV": ("base", lambda base: base == "prev"),
    "EXACT": ("gain", GAINS.index),
    "AT": ("at", IMPORTANCES.index),
    "DELTA": ("correction", lambda correction: correction != "none"),
    "DIAGONAL": ("correction", lambda correction: correction == "diagonal"),
    "OWN": ("own", bool),
    "RECIP": ("exact", reciprocal_kind),
    "SCALE": ("scale", float),
}


_Rule = Callable[[Sequence[Any], Tiles], object]


class _Binding:
    """How a kernel's parameters follow from what launches of one form give, by place."""

    def __init__(self, kernel: Any, names: Sequence[str]) -> None:
        self.kernel = kernel
        # The last of a name holds.
        self.places = {name: i for i, name in enumerate(names)}
        self.given = [x for x in kernel.arg_names if x in self.places]
        self.take = operator.itemgetter(*(self.places[x] for x in self.given))
        self.rules = [(x, self.rule(x)) for x in kernel.arg_names if x not in self.places]

    def rule(self, name: str) -> _Rule:
        """How a parameter that is not given follows."""
        places = self.places
        if name in ("BK", "BV"):
            of = operator.attrgetter(name)
            return lambda values, tiles: of(tiles)
        if name in _CHOICES:
            source, choose = _CHOICES[name]
            place = places[source]
            return lambda values, tiles: choose(values[place])
        if name == "PREC":
            alike = [places[x] for x in ("w", "do", "k", "k_near", "dk") if x in places]
            return lambda values, tiles: dot_precision(
                next(values[i].dtype for i in alike if values[i] is not None)
            )
        operands = [x for x in self.given if name in _AXES.get(x, ())]
        sources = [(places[x], _AXES[x].index(name)) for x in operands]

        def size(values: Sequence[Any], tiles: Tiles) -> int:
            for i, axis in sources:
                x = values[i]
                if x is not None and axis < x.ndim:
                    return x.shape[axis]
            if name[0] == "H" and name != "HV":
                # Heads of an operand that is not there.
                return 1
            raise TypeError(f"launch: nothing gives {name} of {self.kernel.__name__}")

        return size


# By the kernel's id (a binding keeps it alive; its hash takes long), records and further names.
_bindings: dict[tuple[Any, ...], _Binding] = {}


def launch(
    kernel: Any,
    rows: int | tuple[int, ...],
    tiles: Tiles,
    *shared: Any,
    across: str = "",
    **own: Any,
) -> None:
    """Run a kernel, or record the launch; an empty grid is no launch.

    Everything is named once: of what is given a kernel takes what its parameters name, its sizes
    follow from operands' axes, its flags from options, BK and BV from tiles.

    Args:
        rows: chunks, sequences or tokens, for each of which every head has its programs; or all of
            the grid.
        shared: NamedTuples of what launches share: an operation's record, chunks, a gate.
        across: of "K" and "V", the axes that are cut into tiles for programs of their own.
        own: operands and constants, before those that are shared.
    """
    form = (id(kernel), *map(type, shared), *own)
    binding = _bindings.get(form)
    if binding is None:
        names = [x for record in shared for x in record._fields]
        binding = _bindings[form] = _Binding(kernel, [*names, *own])
    values = [*itertools.chain(*shared), *own.values()]
    arguments: dict[str, Any] = dict(zip(binding.given, binding.take(values), strict=True))
    for name, rule in binding.rules:
        arguments[name] = rule(values, tiles)
    if isinstance(rows, int):
        cut = [-(-arguments[x] // getattr(tiles, f"B{x}")) for x in across]
        grid = (rows * arguments["HV"], *[math.prod(cut)] * bool(cut))
    else:
        grid = rows
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, tiles))
        return
    if 0 in grid:
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](**arguments, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


class Chunks(NamedTuple):
    """Chunks of a batch or of packed sequences, at most `number`, known without cu_seqlens."""

    BT: int
    number: int
    sequences: int
    cu_seqlens: Tensor | None
    chunk_ids: Tensor | None
    chunk_offsets: Tensor | None


def make_chunks(batch: int, tokens: int, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Cut sequences into chunks of `size` tokens; each packed sequence starts a chunk of its own.

    With packed sequences `number` is an upper bound that depends on shapes only, so that nothing
    waits for the device; surplus chunks lie past the last sequence's end, where kernels return.
    """
    if cu_seqlens is None:
        return Chunks(size, batch * -(-tokens // size), batch, None, None, None)
    sequences = cu_seqlens.numel() - 1
    number = -(-tokens // size) + sequences if tokens else 0
    cu_seqlens = cu_seqlens.contiguous()
    per_sequence = (cu_seqlens.diff() + (size - 1)) // size
    offsets = torch.zeros(sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
    torch.cumsum(per_sequence, 0, dtype=torch.int32, out=offsets[1:])
    chunk = torch.arange(number, dtype=torch.int32, device=cu_seqlens.device)
    ids = torch.searchsorted(offsets, chunk, right=True, out_int32=True) - 1
    return Chunks(size, number, sequences, cu_seqlens, ids.clamp_(max=sequences - 1), offsets)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 16, the smallest tile of a dot."""
    return max(16, 1 << (n - 1).bit_length())


def reduce_heads(x: Tensor, heads: int) -> Tensor:
    """Sum [B, T, HV, D] over the value heads that share one of `heads` heads."""
    if x.shape[2] == heads:
        return x
    return x.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(x.dtype)
