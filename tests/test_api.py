"""`glazoo.attention` refuses what it cannot compute, in words that help."""

from __future__ import annotations

import logging

import pytest
import torch

import glazoo
from glazoo.api import schedule
from glazoo.layers import GatedLinearAttention


def operands(**change):
    gen = torch.Generator().manual_seed(0)
    ops = {
        "q": torch.randn(2, 5, 2, 4, generator=gen),
        "k": torch.randn(2, 5, 2, 4, generator=gen),
        "v": torch.randn(2, 5, 4, 3, generator=gen),
        "g": -torch.rand(2, 5, 4, generator=gen),
        "beta": torch.rand(2, 5, 4, generator=gen),
    }
    ops |= change
    return [ops.pop(x) for x in ("q", "k", "v")], ops


def run(name="gated_deltanet", *, options=None, **change):
    args, kwargs = operands(**change)
    return glazoo.attention(name, *args, **kwargs, **({"impl": "reference"} | (options or {})))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": None}, ValueError, r"g: 'gated_deltanet' needs it \(log decay, \[B, T, HV\], <= 0"),
        (
            {"b": torch.ones(2, 5, 4)},
            ValueError,
            r"b: 'gated_deltanet' does not take it; it takes q, k, v, g, beta",
        ),
        ({"k": None}, ValueError, r"k: 'gated_deltanet' needs it"),
        (
            {"k": torch.ones(2, 5, 2, 5)},
            ValueError,
            r"k: got shape \[2, 5, 2, 5\], accepted is \[B, T, H, K\] = \[2, 5, 2, 4\]",
        ),
        (
            {"v": torch.ones(2, 5, 3, 3)},
            ValueError,
            r"v: its 3 heads are not a multiple of the 2 heads of q",
        ),
        (
            {"q": torch.ones(2, 5, 4)},
            ValueError,
            r"q: got 3 dimensions \[2, 5, 4\], accepted is \[B, T, heads, channels\]",
        ),
        ({"q": [1.0]}, TypeError, r"q: got list, accepted is a torch.Tensor"),
        (
            {"k": torch.ones(2, 5, 2, 4, dtype=torch.int64)},
            ValueError,
            r"k: got dtype torch.int64, accepted are floating",
        ),
        (
            {"g": torch.rand(2, 5, 4) + 0.1},
            ValueError,
            r"g: got values from .* to [\d.]+, accepted are <= 0, natural log",
        ),
        (
            {"beta": -torch.ones(2, 5, 4)},
            ValueError,
            r"beta: got values from -1 to .*, accepted are >= 0",
        ),
        (
            {"g": -torch.ones(2, 5, 4, 4)},
            ValueError,
            r"g: got shape \[2, 5, 4, 4\], accepted is \[B, T, HV\] = \[2, 5, 4\]",
        ),
    ],
)
def test_bad_operands(change, error, message) -> None:
    with pytest.raises(error, match=message):
        run(**change)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"impl": "fast"},
            ValueError,
            r"impl: got 'fast', accepted are auto, reference, chunked, compiled, traceable, triton",
        ),
        ({"scale": float("nan")}, ValueError, r"scale: got nan, accepted is a finite number"),
        (
            {"initial_state": (torch.zeros(1),)},
            TypeError,
            r"initial_state: got tuple, accepted is a glazoo.State",
        ),
        (
            {"initial_state": glazoo.State(torch.zeros(2, 4, 3, 4))},
            ValueError,
            r"initial_state.memory: got shape \[2, 4, 3, 4\], "
            r"accepted is \[N, HV, K, V\] = \[2, 4, 4, 3\]",
        ),
        (
            {"initial_state": glazoo.State(torch.zeros(2, 4, 4, 3), torch.zeros(2, 4, 4))},
            ValueError,
            r"initial_state.importance: 'gated_deltanet' has no such part; it has memory",
        ),
        (
            {"initial_state": glazoo.State(torch.zeros(2, 4, 4, 3, dtype=torch.bfloat16))},
            ValueError,
            r"initial_state.memory: got dtype torch.bfloat16, accepted are float32 and float64",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5])},
            ValueError,
            r"cu_seqlens: packed sequences have B = 1, but q has B = 2",
        ),
    ],
)
def test_bad_options(options, error, message) -> None:
    with pytest.raises(error, match=message):
        run(options=options)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 4], r"cu_seqlens: got \[0, 4\], accepted is 0 = c_0 <= c_1 <= ... <= c_N = T = 5"),
        ([1, 5], r"cu_seqlens: got \[1, 5\]"),
        ([0, 4, 3, 5], r"cu_seqlens: got \[0, 4, 3, 5\]"),
        ([0], r"accepted is a tensor \[N \+ 1\]"),
    ],
)
def test_bad_packing(bounds, message) -> None:
    args, kwargs = operands()
    one = [x[:1] for x in args]
    with pytest.raises(ValueError, match=message):
        glazoo.attention(
            "gated_deltanet",
            *one,
            **{k: x[:1] for k, x in kwargs.items()},
            cu_seqlens=torch.tensor(bounds),
        )
    with pytest.raises(ValueError, match=r"got dtype torch\.float32, accepted are int32 and int64"):
        glazoo.attention("linear_attention", *one, cu_seqlens=torch.tensor([0.0, 5.0]))


def test_a_metaplastic_call_needs_its_importance_part() -> None:
    state = glazoo.State(torch.zeros(2, 4, 4, 3))
    with pytest.raises(
        ValueError,
        match=r"initial_state.importance: missing; 'metaplastic_gated_deltanet' needs it",
    ):
        run("metaplastic_gated_deltanet", b=torch.ones(2, 5, 4), options={"initial_state": state})


@pytest.mark.parametrize("prior", [0.0, -1.0, torch.zeros(4), torch.ones(3)])
def test_a_prior_is_positive_and_of_known_shape(prior) -> None:
    with pytest.raises(ValueError, match=r"prior: got (values from -?[01] to|shape \[3\])"):
        run("metaplastic_gated_deltanet", b=torch.ones(2, 5, 4), prior=prior)


def test_a_number_a_vector_and_a_matrix_are_the_same_prior() -> None:
    b = torch.ones(2, 5, 4)
    results = [
        run("metaplastic_gated_deltanet", b=b, prior=p).output
        for p in (2.0, torch.full((4,), 2.0), torch.full((4, 4), 2.0))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_tied_key_is_no_operand() -> None:
    args, kwargs = operands(g=-torch.ones(2, 5, 4, 4), beta=None)
    with pytest.raises(ValueError, match=r"k: 'hgrn2' does not take it; it takes q, v, g"):
        glazoo.attention("hgrn2", *args, **kwargs)
    assert glazoo.attention(
        "hgrn2", args[0], None, args[2], g=kwargs["g"], impl="reference"
    ).output.shape == (2, 5, 4, 3)


def test_results_unpack_in_two() -> None:
    output, state = run(options={"output_final_state": True})
    assert output.shape == (2, 5, 4, 3)
    assert state.memory.shape == (2, 4, 4, 3)
    assert run().final_state is None


def test_fixed_schedules() -> None:
    h = torch.arange(4, dtype=torch.float64)
    retnet = glazoo.load("retnet").decay
    torch.testing.assert_close(schedule(retnet, 4).exp(), 1 - 2.0 ** (-5 - h))
    lightning = glazoo.load("lightning").decay
    first, last = (schedule(lightning, 4, layer=i, layers=3) for i in (0, 2))
    torch.testing.assert_close(first, -(2.0 ** (-2 * (h + 1))) * (1 + 1e-5), rtol=1e-12, atol=0)
    assert (last.abs() < 1e-4 * first.abs()).all()
    with pytest.raises(
        ValueError, match="its source is 'data', and only a fixed gate has a schedule"
    ):
        schedule(glazoo.load("gla").decay, 4)


def test_auto_says_what_it_picked(caplog) -> None:
    from glazoo import engines

    engines._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="glazoo"):
        run(options={"impl": "auto"})
    picked = "compiled" if "compiled" in engines.available() else "chunked"
    assert f"impl='auto' runs the {picked} engine on cpu" in caplog.text


def test_without_numba_auto_is_chunked_and_compiled_says_what_to_install(monkeypatch) -> None:
    from glazoo import engines

    monkeypatch.setattr(engines, "_HAS_NUMBA", False)
    assert engines.automatic("cpu") == engines.automatic("cuda") == "chunked"
    assert engines.available() == ("reference", "chunked")
    with pytest.raises(ValueError, match=r"numba is not installed; pip install 'glazoo\[cpu\]'"):
        run(options={"impl": "compiled"})


def test_a_call_like_one_that_was_valid_is_still_looked_at() -> None:
    """What is remembered of a call is its shapes and dtypes, never what was in it."""
    x = {"q": torch.randn(1, 3, 2, 4), "beta": torch.rand(1, 3, 2)}
    for _ in range(2):
        glazoo.attention("deltanet", x["q"], x["q"], x["q"], beta=x["beta"])
        with pytest.raises(ValueError, match="beta: got values from"):
            glazoo.attention("deltanet", x["q"], x["q"], x["q"], beta=-x["beta"])
        with pytest.raises(ValueError, match="beta: got shape"):
            glazoo.attention("deltanet", x["q"], x["q"], x["q"], beta=x["beta"][:, :2])
        with pytest.raises(ValueError, match="g: 'deltanet' does not take it"):
            glazoo.attention("deltanet", x["q"], x["q"], x["q"], beta=x["beta"], g=-x["beta"])


def test_heads_before_tokens_are_warned_of():
    def call(shape, **more):
        q = torch.randn(shape)
        beta = torch.rand(shape[:3])
        return glazoo.attention("deltanet", q, q, q, beta=beta, **more)

    with pytest.warns(UserWarning, match=r"got shape \[2, 4, 6, 8\], that is 4 tokens and 6 heads"):
        swapped = call((2, 4, 6, 8), output_final_state=True)
    call((2, 6, 4, 8))
    # Compiled as one graph: nothing is said, and nothing breaks.
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert compiled((2, 4, 6, 8)).output.shape == (2, 4, 6, 8)
    # A single token, a continuation, packed sequences, and what layers do: no mistakes.
    call((2, 1, 6, 8))
    call((2, 4, 6, 8), initial_state=swapped.final_state)
    call((1, 4, 6, 8), cu_seqlens=torch.tensor([0, 1, 4]))
    layer = GatedLinearAttention("deltanet", 32, num_heads=6, head_k_dim=8, head_v_dim=8)
    layer(torch.randn(1, 3, 32))
