"""The elementwise operations of importance and forgetting: values, gradients, edges."""

import pytest
import torch

from glazoo.program.elementwise import exact_strength, forgetting, over, whitened


def _leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.rand(s, generator=generator, dtype=torch.float64) + 0.1 for s in shapes]
    return [x.requires_grad_() for x in made]


def test_over_matches_its_formula_and_gradient() -> None:
    x, importance, prior = _leaves((2, 3, 2, 4), (2, 3, 2, 4), (2, 4))
    assert torch.equal(over(x, importance, prior), x * (1 / (importance + prior)))
    assert torch.autograd.gradcheck(over, (x, importance, prior))


@pytest.mark.parametrize("width", [1, 4])
def test_forgetting_matches_its_formula_and_gradient(width: int) -> None:
    importance, g, prior = _leaves((2, 3, 2, 4), (2, 3, 2, width), (2, 4))
    f, before = forgetting(importance, -g, prior)
    expected = (-g).exp() * importance + prior
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(f, -g + ((importance + prior) / expected).log())
    assert bool((f <= 0).all())
    assert bool((f >= -g).all())
    assert torch.autograd.gradcheck(lambda j, d, p: forgetting(j, -d, p), (importance, g, prior))


@pytest.mark.parametrize("width", [1, 4])
def test_forgetting_of_everything_and_of_nothing(width: int) -> None:
    importance, prior = _leaves((1, 2, 1, 4), (1, 4))
    g = torch.tensor([0.0, -torch.inf], dtype=torch.float64).view(1, 2, 1, 1)
    g = g.expand(1, 2, 1, width).clone().requires_grad_()
    f, before = forgetting(importance, g, prior)
    assert torch.equal(f[:, 0], torch.zeros_like(f[:, 0]))
    assert bool((f[:, 1] == -torch.inf).all())
    assert torch.equal(before[:, 1], prior.expand_as(before[:, 1]))
    for grad in torch.autograd.grad(f.exp().sum() + before.sum(), (importance, g, prior)):
        assert bool(grad.isfinite().all())


def test_whitened_matches_its_formula_and_gradient() -> None:
    key, before = _leaves((2, 3, 2, 4), (2, 3, 2, 4))
    scaled, found, square = whitened(key, before)
    assert torch.equal(scaled, key / before)
    torch.testing.assert_close(found, (key.square() / before).sum(-1))
    torch.testing.assert_close(square, key.square().sum(-1))
    assert torch.autograd.gradcheck(whitened, (key, before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 64, 130])
def test_at_importance_one_the_strength_is_the_write_gate_to_the_last_bit(
    size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    wide = torch.promote_types(dtype, torch.float32)
    for contiguous in (True, False):
        key = torch.randn(3, 50, 2, size, generator=generator, dtype=torch.float64).to(dtype)
        # From very short keys to |k|^2 of 4 times the size.
        key = key * 2 * torch.rand(3, 50, 2, 1, generator=generator, dtype=torch.float64).to(dtype)
        key = key if contiguous else key.mT.contiguous().mT
        beta = torch.rand(3, 50, 2, generator=generator, dtype=torch.float64).to(wide)
        scaled, found, square = whitened(key, torch.ones(key.shape, dtype=wide))
        assert torch.equal(scaled, key.to(wide))
        assert torch.equal(exact_strength(beta, found, square), beta)


def test_the_strength_of_a_rate() -> None:
    beta, found, square = _leaves((40,), (40,), (40,))
    for at in (0.3, 3.0):  # beta |k|^2 below and beyond one
        given = at * (beta if at < 1 else 1 + beta) / square
        total = torch.where(given * square < 1, 1 - given * square + given * found, found / square)
        torch.testing.assert_close(exact_strength(given, found, square), given / total)
    assert torch.autograd.gradcheck(exact_strength, (beta, found, square))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_importance_makes_the_denominator_vanish(dtype: torch.dtype) -> None:
    """A write gate at 1 on unit keys is an infinite precision: what is written is read back."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 64, 1, 16, generator=generator, dtype=torch.float64)
    key = torch.nn.functional.normalize(key, dim=-1).to(dtype)
    for importance in (1e-3, 1.0, 1e4, 1e9):
        noise = 0.5 + torch.rand(key.shape, generator=generator, dtype=torch.float64).to(dtype)
        scaled, found, square = whitened(key, importance * noise)
        for beta in (1.0, 1.5, 2.0):
            strength = exact_strength(torch.full_like(found, beta), found, square)
            assert bool((strength > 0).all())
            # 1 - k.G, the factor on the error: that of the source.
            kept = 1 - (key * scaled).sum(-1) * strength
            if beta > 1:
                assert (kept - (1 - beta)).abs().max() <= 16 * torch.finfo(dtype).eps


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x, importance, prior = _leaves((1, 1, 1, 2), (1, 1, 1, 2), (1, 2))
    (first,) = torch.autograd.grad(over(x, importance, prior).sum(), importance, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first.sum(), x)
