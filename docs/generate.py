"""Make the pages of the documentation site from docs/, examples/, the specs, the theory and the
command line.

    python docs/generate.py build/docs/pages

It writes the configuration that the site is built with beside them: mkdocs.yml, with every variant
in the navigation. Pages by hand are the Markdown files beside this script; in them $...$ is LaTeX,
and {{ name }} in a line of its own a table of `reference`. What they link to elsewhere in the
repository comes along: Markdown as further pages, anything else as a file.
"""

from __future__ import annotations

import html
import itertools
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import notebooks
import reference
import typeset
import yaml

import glazoo
from glazoo import explore

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent

_MADE = re.compile(r"^\{\{ (\w+) \}\}$", re.M)
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ ]*$", re.M | re.S)
# Or the label of a link, which is not what the first group has: the link is no code.
_CODE = re.compile(r"\[`[^`\n]+`\](?=\()|(`+)(?!`).+?(?<!`)\1(?!`)", re.S)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(?! )([^$\n]+?)(?<! )\$", re.S)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_HREF = re.compile(r' href="([^"]+)"')
_HEADING = re.compile(r"^(#{1,6})[ ]+(.+?)[ ]*(?:\{[ ]*#([\w-]+)[ ]*\})?[ ]*$", re.M)


@dataclass
class Site:
    """What the site is made of, by path in it."""

    pages: dict[str, str] = field(default_factory=dict)
    """Markdown."""
    files: dict[str, Path | str] = field(default_factory=dict)
    """What is copied as it is, or the text of what is made."""


def collect() -> Site:
    """Return the whole site."""
    site = Site()
    for path in sorted(HERE.rglob("*.md")):
        where = path.relative_to(HERE).as_posix()
        text = _typeset(path.read_text("utf-8"))
        text = _MADE.sub(lambda found: reference.TABLES[found[1]](), text)
        site.pages[where] = _linked(text, path, where, site)
    for path in sorted(notebooks.EXAMPLES.glob("*.ipynb")):
        where = f"examples/{path.stem}.md"
        page = _linked(_typeset(notebooks.page(notebooks.read(path))), path, where, site)
        there = f"files/examples/{path.name}"
        site.files[there] = path
        site.pages[where] = f"{page}\n[This page as a notebook](../{there})\n"
    site.files["site.css"] = HERE / "site.css"
    site.pages["variants/index.md"] = reference.variants(figures.field())
    for name in glazoo.names():
        site.pages[f"variants/{name}.md"] = reference.variant(name)
    site.files["explore.js"] = explore.script(pages="variants/{}.html")
    site.pages["theory/statements.md"] = reference.statements()
    site.pages["cli.md"] = reference.commands()
    site.pages["api.md"] = reference.api()
    site.pages["spec.md"] = reference.fields()
    return site


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change a page wherever it is no code."""
    for pattern in (_FENCE, _CODE):
        code = [found for found in pattern.finditer(text) if found[1] is not None]
        if code:
            parts, at = [], 0
            for found in code:
                parts += [outside_code(text[at : found.start()], change), found[0]]
                at = found.end()
            return "".join([*parts, outside_code(text[at:], change)])
    return change(text)


def _typeset(text: str) -> str:
    def math(found: re.Match[str]) -> str:
        if found[1]:
            return f'<div class="formulas">{typeset.mathml(found[1].strip(), block=True)}</div>'
        return typeset.mathml(found[2])

    return outside_code(text, lambda part: _MATH.sub(math, part))


def _linked(text: str, path: Path, where: str, site: Site) -> str:
    """Lead links out of docs/ to what they name, which becomes part of the site."""

    def moved(found: re.Match[str]) -> str:
        mark, label, link = found.groups()
        target, _, anchor = link.partition("#")
        if "://" in link or not target:
            return found[0]
        at = Path(os.path.normpath(path.parent / target))
        if path.is_relative_to(HERE) and at.is_relative_to(HERE):
            return found[0]  # a page by hand, or one that is made
        if at.is_relative_to(HERE):
            there = at.relative_to(HERE).as_posix()
        else:
            inside = at.relative_to(ROOT).as_posix()
            if at.is_dir():
                return label
            if not at.is_file():
                raise ValueError(f"{path.relative_to(ROOT)}: there is no {link}")
            if at.suffix == ".ipynb":
                there = f"examples/{at.stem}.md"
            elif at.suffix == ".md":
                there = f"project/{inside}"
                if there not in site.pages:
                    site.pages[there] = ""
                    site.pages[there] = _linked(at.read_text("utf-8"), at, there, site)
            else:
                there = f"files/{inside}"
                site.files[there] = at
        to = posixpath.relpath(there, posixpath.dirname(where) or ".")
        return f"{mark}[{label}]({to}{'#' + anchor if anchor else ''})"

    return outside_code(text, lambda part: _LINK.sub(moved, part))


def anchors(page: str) -> set[str]:
    """Return the identifiers of a page's headings, as Markdown makes them."""
    known: set[str] = set()
    plain = _FENCE.sub("", page)
    for _, title, own in _HEADING.findall(plain):
        text = html.unescape(re.sub(r"<[^>]+>", "", _LINK.sub(r"\2", title))).replace("`", "")
        known.add(
            own
            or _fresh(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()), known)
        )
    return known


def _fresh(name: str, known: set[str]) -> str:
    """Return a name, numbered as Markdown does where it is taken."""
    names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
    return next(x for x in names if x not in known)


def broken(site: Site) -> Iterator[str]:
    """Name every link of the site that leads nowhere."""
    heads = {where: anchors(page) for where, page in site.pages.items()}
    for where, page in site.pages.items():
        links: list[str] = []

        def seen(part: str, links: list[str] = links) -> str:
            links += [found[3] for found in _LINK.finditer(part)]
            # Only what the pages write as HTML has the names of built pages.
            links += [re.sub(r"\.html\b", ".md", x) for x in _HREF.findall(part)]
            return part

        outside_code(page, seen)
        for link in links:
            target, _, anchor = link.partition("#")
            if "://" in link:
                continue
            path, _, _ = target.partition("?")
            there = posixpath.normpath(posixpath.join(posixpath.dirname(where), path))
            there = there if target else where
            known = there in site.files or there in site.pages
            if not known or (anchor and anchor not in heads.get(there, set())):
                yield f"{where}: {link}"


def groups() -> dict[str, list[str]]:
    """Return the variants by what tells them apart most, in the order of their titles."""
    found: dict[str, list[str]] = {"Hebbian": [], "With a correction": [], "With a precision": []}
    for spec in sorted(map(glazoo.load, glazoo.names()), key=lambda s: s.title.lower()):
        p = spec.posterior
        kind = 2 if p.precision != "frozen" else 1 if p.correction != "none" else 0
        found[list(found)[kind]].append(spec.name)
    return found


def configuration(out: Path) -> dict[str, Any]:
    """Return mkdocs.yml for a file beside the folder of pages, with a navigation of variants."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    at = out.parent.absolute()
    for key in ("docs_dir", "site_dir"):
        config[key] = os.path.relpath(ROOT / config[key], at)
    for plugin in config["plugins"]:
        if isinstance(plugin, dict):
            python = plugin["mkdocstrings"]["handlers"]["python"]
            python["paths"] = [os.path.relpath(ROOT / path, at) for path in python["paths"]]
    (entry,) = (x for x in config["nav"] if x.get("Variants"))
    pages: list[Any] = [{"All of them": entry["Variants"]}]
    for title, names in groups().items():
        pages.append({title: [{glazoo.load(n).title: f"variants/{n}.md"} for n in names]})
    entry["Variants"] = pages
    return config


def write(site: Site, out: Path) -> None:
    """Write the site's pages and files to an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    for where, page in site.pages.items():
        (out / where).parent.mkdir(parents=True, exist_ok=True)
        (out / where).write_text(page, "utf-8")
    for where, file in site.files.items():
        (out / where).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, str):
            (out / where).write_text(file, "utf-8")
        else:
            shutil.copyfile(file, out / where)


def main() -> None:
    """Write the pages to the folder that the command line names."""
    site = collect()
    lost = list(broken(site))
    if lost:
        sys.exit("links that lead nowhere:\n" + "\n".join(lost))
    out = Path(sys.argv[1])
    write(site, out)
    config = yaml.safe_dump(configuration(out), sort_keys=False, allow_unicode=True)
    out.with_name("mkdocs.yml").write_text(config, "utf-8")
    print(f"{len(site.pages)} pages, {len(site.files)} files")


if __name__ == "__main__":
    main()
