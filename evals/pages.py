"""The hook of mkdocs.yml: pages and the files that they link to, each at its place in the repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[^)\s#]+")
"""The target of a Markdown link or image, without its anchor."""


def pages_of(nav: object) -> Iterator[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(each)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the pages of the navigation in place of the folder's, and what they link to beside them."""
    pages = [ROOT / page for page in pages_of(config.nav)]
    for path in map(Path, (file.abs_src_path for file in files.documentation_pages())):
        if path not in pages:
            raise PluginError(f"{path.relative_to(ROOT)} is in no part of the navigation; name it in evals/mkdocs.yml.")
    linked = {target for page in pages for target in linked_files(page)}
    others = [file for file in files if not file.is_documentation_page()]
    placed = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for path in [*pages, *sorted(linked.difference(pages))]
    ]
    return Files([*others, *placed])


def linked_files(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path = Path(os.path.normpath(page.parent / target))
        if path.is_file():
            yield path


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out links to folders, which a site has no page for."""
    folder = (ROOT / page.file.src_uri).parent
    return re.sub(r"\[([^\]]+)\]\(([^)\s:#]+)\)", lambda m: m[1] if (folder / m[2]).is_dir() else m[0], markdown)
