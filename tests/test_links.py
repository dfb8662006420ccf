"""README and pages: their links and anchors lead somewhere, their snippets are files, and each page can be found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import fasa_flex
from fasa_flex.backends.table import ORDER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "evals" / "docs"
PAGES = sorted(
    {
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(path for path in (ROOT / "evals").rglob("*.md") if "results" not in path.parts),  # cards of profiles
        ROOT / "fasa_flex" / "lm_eval" / "data" / "README.md",
    }
)
FENCED = re.compile(r"^( *)(```+).*?^\1\2", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"^::: ([\w.]+)$", flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them, and of the names whose docstrings it shows."""
    text = page.read_text(encoding="utf-8")
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", FENCED.sub("", text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return {*found, *NAMED.findall(text)}


def broken(page: Path) -> Iterator[str]:
    """The relative links of a page that lead nowhere."""
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            yield link


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# A `b`: c-d\n## Twice\n## Twice\n```\n# no heading\n```\n::: fasa_flex.enable\n"
    )
    page = tmp_path / "page.md"
    good = ["other.md", "other.md#a-b-c-d", "other.md#twice-1", "other.md#fasa_flex.enable", "#here", "https://a.b"]
    bad = ["none.md", "other.md#twice-2", "other.md#no-heading", "#there", "other.md#enable"]
    page.write_text("# Here\n" + "\n".join(f"[text]({link})" for link in good + bad) + "\n```\n[x](code.md)\n```\n")
    assert list(broken(page)) == bad


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_are_files(page: Path) -> None:
    """And the line above names the file, for who reads the page without the site."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r'^--8<-- "(.+)"$', text, flags=re.MULTILINE):
        assert (ROOT / found[1]).is_file()
        assert f"[`{found[1]}`](" in text[: found.start()]


def test_every_page_is_linked_and_in_the_navigation() -> None:
    linked = {
        os.path.normpath(page.parent / link.partition("#")[0])
        for page in PAGES
        for link in LINK.findall(page.read_text())
    }
    navigation = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "evals" / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(navigation) == [name_of(page) for page in PAGES]
    assert [name_of(page) for page in PAGES if str(page) not in linked] == []


def test_the_reference_has_every_public_name() -> None:
    names = NAMED.findall((DOCS / "reference.md").read_text())
    assert {f"fasa_flex.{name}" for name in fasa_flex.__all__} - {"fasa_flex.__version__"} <= set(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__


def test_the_page_says_what_the_automatic_backends_try() -> None:
    page = (DOCS / "how_it_works.md").read_text()
    rows = re.findall(r"^\| `(auto|fastest)` \| (.+) \| (.+) \|$", page, flags=re.MULTILINE)
    said = {
        (name, cuda): tuple(re.findall(r"\w+", cell))
        for name, *cells in rows
        for cuda, cell in zip((True, False), cells, strict=True)
    }
    assert said == ORDER
