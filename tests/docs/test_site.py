"""The pages of the site before it is built: all are there, and every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import generate
import notebooks
import pytest
import typeset

import glazoo
from glazoo.theory import ENTRIES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site() -> generate.Site:
    return generate.collect()


def test_every_link_leads_somewhere(site: generate.Site) -> None:
    assert not list(generate.broken(site))


def test_a_link_that_leads_nowhere_is_named(site: generate.Site) -> None:
    lost = generate.Site(
        {"a.md": "# A\n[b](b.md) [c](#c) [a](#a) `[x](x.md)` [a](a.md?x=1) [`d`](d.md)"}
    )
    assert list(generate.broken(lost)) == ["a.md: b.md", "a.md: #c", "a.md: d.md"]


def test_the_navigation_has_every_page_once(site: generate.Site) -> None:
    config = generate.configuration(ROOT / "build" / "docs" / "pages")
    assert (config["docs_dir"], config["site_dir"]) == ("pages", "site")

    def pages(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            (value,) = entry.values()
            yield from [value] if isinstance(value, str) else pages(value)

    named = list(pages(config["nav"]))
    assert len(set(named)) == len(named)
    assert set(named) == {where for where in site.pages if not where.startswith("project/")}


def test_every_variant_has_a_page_that_the_catalogue_and_the_map_lead_to(
    site: generate.Site,
) -> None:
    catalogue = site.pages["variants/index.md"]
    for name in glazoo.names():
        assert f"variants/{name}.md" in site.pages
        assert f"]({name}.md)" in catalogue
        assert f'href="{name}.html"' in catalogue


def test_every_variant_can_be_watched_and_leads_to_its_page(site: generate.Site) -> None:
    script = site.files["explore.js"]
    assert isinstance(script, str)
    for name in glazoo.names():
        assert f'"page": "variants/{name}.html"' in script
        assert f'href="../explore.html?memory={name}"' in site.pages[f"variants/{name}.md"]
    assert 'id="glazoo-explore"' in site.pages["explore.md"]
    assert 'src="explore.js"' in site.pages["explore.md"]


def test_every_notebook_has_a_page_with_what_it_shows(site: generate.Site) -> None:
    found = sorted(notebooks.EXAMPLES.glob("*.ipynb"))
    assert found
    pictures = 0
    for path in found:
        page = site.pages[f"examples/{path.stem}.md"]
        assert f"](../files/examples/{path.name})" in page
        assert f"](../../examples/{path.stem}.md)" in site.pages["project/examples/README.md"]
        for cell in notebooks.read(path).cells:
            assert cell.source in page
            for output in cell.get("outputs", []):
                if output.output_type == "stream":
                    assert output.text.rstrip() in page
                else:
                    assert "".join(output.data["image/png"].split()) in page
                    pictures += 1
    assert pictures


def test_every_statement_is_in_the_catalogue(site: generate.Site) -> None:
    headings = re.findall(r"^### (.+)$", site.pages["theory/statements.md"], re.M)
    assert sorted(headings) == sorted(e.id for e in ENTRIES)


def test_every_formula_that_a_program_prints_can_be_typeset(site: generate.Site) -> None:
    for name in glazoo.names():
        lines = glazoo.lower(glazoo.load(name)).recurrence
        page = site.pages[f"variants/{name}.md"]
        assert typeset.recurrence(lines) in page


def test_no_formula_is_left_as_it_was_written(site: generate.Site) -> None:
    for where, page in site.pages.items():
        left: list[str] = []

        def seen(part: str, left: list[str] = left) -> str:
            left += re.findall(r"\$[^$\n]*\$|\{\{|\\[a-z]{3,}", part)
            return part

        if not where.startswith("project/"):
            generate.outside_code(page, seen)
        assert not left, where


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("1 / (J_t + I_p)", r"\frac{1}{{J}_{t} + {I}_{p}}"),
        ("I'_t (.) k_t", r"{I'}_{t} \odot {k}_{t}"),
        ("(a + b) / (c)", r"\frac{a + b}{c}"),
        ("(a) (b) / c", r"\frac{{(a)} \, {(b)}}{c}"),
        ("q_axes_t^2", r"{q}_{\text{axes}, t}^{2}"),
        ("mu_{t-1}^T k", r"{\mu}_{t-1}^{\top} \, k"),
        ("1e-06 + H^-1", r"10^{-6} + {H}^{-1}"),
    ],
)
def test_the_notation_of_programs_is_read(text: str, latex: str) -> None:
    assert typeset.formula(text) == latex


@pytest.mark.parametrize("text", ["a +", "a ? b", "(a", "a) b", "f(a"])
def test_what_is_no_formula_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        typeset.formula(text)


def test_every_public_name_is_documented(site: generate.Site) -> None:
    names = re.findall(r"^::: [\w.]+\.(\w+)$", site.pages["api.md"], re.M)
    assert set(glazoo.__all__) <= set(names)


def test_commands_that_pages_show_exist(site: generate.Site) -> None:
    known = set(re.findall(r"^## glazoo (\S+)$", site.pages["cli.md"], re.M))
    shown = "\n".join([*site.pages.values(), (ROOT / "README.md").read_text("utf-8")])
    blocks = re.findall(r"^```(?:bash|console)$.*?^```$", shown, re.M | re.S)
    used = set(re.findall(r"^(?:\$ )?glazoo ([a-z]+)", "\n".join(blocks), re.M))
    used |= set(re.findall(r"`glazoo ([a-z]+)", shown))
    assert {"show", "convert", "compare"} <= used
    assert used <= known
