"""The ranking by distance to exact inference."""

import json
import sys

import pytest
from rich.console import Console

import glazoo
from glazoo.theory import posterior, ranking
from glazoo.theory.posterior import Condition, unsuited

RANDOM = Condition("random", 1.0, 0.95)
FREE = Condition("random", 1.0, 1.0)
BASIS = Condition("orthogonal", 1.0, 1.0)


def distances(names, *conditions, seeds=8, **options):
    result = posterior.run(names, seeds=seeds, key_size=8, conditions=conditions, **options)
    return {(d.spec, d.condition): d for d in result}


def test_the_ranking_that_the_theory_predicts() -> None:
    found = distances(
        ["mesanet", "implicit_delta", "palimpsa", "gated_deltanet", "mamba2"], RANDOM, seeds=20
    )
    mean = {spec: d.mean for (spec, _), d in found.items()}
    exact_gain = mean["metaplastic_implicit_delta[head]"]
    first_order = mean["metaplastic_gated_deltanet[head, first order]"]
    assert mean["mesanet"] < 1e-10
    assert 0.05 < exact_gain < mean["implicit_delta"] < first_order
    assert exact_gain < mean["palimpsa"]
    # The write gate as the rate of the precision: the same gain.
    assert mean["metaplastic_gated_deltanet[head]"] == pytest.approx(exact_gain)
    # Importance brings every source closer.
    assert first_order < 0.8 * mean["gated_deltanet"]
    assert mean["palimpsa"] < 0.8 * mean["mamba2"]
    assert mean["metaplastic_mamba2[value]"] == pytest.approx(mean["palimpsa"])


def test_intervals_hold_the_mean_and_shrink() -> None:
    few = distances(["palimpsa"], RANDOM, seeds=6)[("palimpsa", RANDOM)]
    many = distances(["palimpsa"], RANDOM, seeds=96)[("palimpsa", RANDOM)]
    for d in (few, many):
        assert d.low < d.mean < d.high
    # Sixteen times the seeds: a quarter of the width, but six seeds say little of their spread.
    assert many.high - many.low < few.high - few.low


def test_orthonormal_keys_leave_the_implicit_rule_exact_without_forgetting() -> None:
    found = distances(["implicit_delta", "gated_deltanet"], BASIS)
    assert found[("implicit_delta", BASIS)].mean < 1e-10
    assert found[("gated_deltanet", BASIS)].mean > 0.1


def test_variants_of_one_class_give_the_same_answers() -> None:
    result = posterior.run(
        ["gla", "retnet", "rwkv6", "mamba3", "kda", "gdn2", "comba", "rwkv7"],
        seeds=3,
        key_size=4,
        conditions=(RANDOM, FREE),
    )
    names = list(ranking.groups(result))
    assert "gla = mamba3 = retnet = rwkv6" in {" = ".join(sorted(n.split(" = "))) for n in names}
    assert "comba = gdn2 = kda = rwkv7" in {" = ".join(sorted(n.split(" = "))) for n in names}


def test_all_that_qualify_are_ranked_by_default() -> None:
    result = posterior.run(seeds=1, key_size=4, queries=2, conditions=(RANDOM,))
    sources = {d.source for d in result}
    assert sources == {n for n in glazoo.names() if unsuited(glazoo.load(n)) is None}
    assert {"hgrn2", "lightnet", "based", "rebased"} == set(glazoo.names()) - sources
    exact = {d.spec for d in result if d.mean < 1e-9}
    assert {"mesanet", "metaplastic_mamba2_full", "metaplastic_gated_deltanet_full"} <= exact
    assert {d.spec for d in result[: len(exact)]} == exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": ["hgrn2"]}, "which: hgrn2 has no distance .* tied to its decay"),
        ({"which": ["lightnet"]}, "positive evidence"),
        ({"which": ["based"]}, "positive features"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"key_size": 0}, "key_size: got 0"),
    ],
)
def test_wrong_requests_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior.run(**options)


def test_engines_agree_and_seeds_decide() -> None:
    a = distances(["kda"], RANDOM)
    assert a == distances(["kda"], RANDOM)
    b = distances(["kda"], RANDOM, impl="chunked")
    for key, d in a.items():
        assert b[key].mean == pytest.approx(d.mean, rel=1e-9)


def test_table_plot_and_data(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    result = posterior.run(
        ["mesanet", "palimpsa", "gated_deltanet"],
        seeds=3,
        key_size=4,
        conditions=(BASIS, FREE, RANDOM),
    )
    console = Console(width=160)
    with console.capture() as capture:
        console.print(ranking.render(result))
    table = capture.get()
    assert table.index("mesanet") < table.index("palimpsa") < table.index(" gated_deltanet")
    assert "a = 0.95" in table
    image, data = ranking.plot(result, tmp_path / "ranking.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(data.read_text("utf-8"))
    assert len(rows) == len(result)
    assert rows[0]["condition"]["keys"] == "orthogonal"
    svg, _ = ranking.plot(result, tmp_path / "ranking.svg")
    assert "<svg" in svg.read_text("utf-8")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path) -> None:
    result = posterior.run(["palimpsa"], seeds=1, key_size=2, conditions=(FREE,))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'glazoo\[plots\]'"):
        ranking.plot(result, tmp_path / "x.png")


def test_progress_counts_to_the_end() -> None:
    seen = []
    posterior.run(
        ["palimpsa"],
        seeds=1,
        key_size=2,
        conditions=(FREE, RANDOM),
        progress=lambda *x: seen.append(x[1:]),
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]
