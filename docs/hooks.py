"""Hooks of MkDocs: pages from files outside of docs/, and links that hold on GitHub and in the built pages.

README, CHANGELOG and CONTRIBUTING become pages. A file of the repository that a page links becomes a page with its
text, so that the built pages need no network. MkDocs calls the functions whose names begin with `on_`.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
"""Pages whose text lies outside of docs/, by their paths in the repository."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
SHORT = re.compile(r"<td>(?=[^<]{1,16}</td>)")
PAIR = re.compile(r"<td>(?=[^<]{1,12}\N{RIGHTWARDS ARROW}[^<]{1,16}</td>)")
COMMANDS = "<!-- command line -->"
SOURCE = """---
search:
  exclude: true
---
# {path}

~~~~~~ {{ .{language} }}
{text}
~~~~~~
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/, and whatever files of the repository the pages link."""
    from mkdocs.structure.files import File

    texts = {path: (ROOT / path).read_text() for path in PAGES}
    for path, text in texts.items():
        files.append(File.generated(config, PAGES[path], content=text))
    texts |= {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path in sorted({target for page, text in texts.items() for target in _linked(page, text)}):
        place = _place(path)
        if place is None or files.get_file_from_path(place):
            continue
        if place.startswith("source/"):
            language = Path(path).suffix.removeprefix(".") or "text"
            text = (ROOT / path).read_text().rstrip()
            files.append(File.generated(config, place, content=SOURCE.format(path=path, language=language, text=text)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the pages, and print the help of the command line."""
    here = page.file.src_uri
    origin = next((path for path, place in PAGES.items() if place == here), f"docs/{here}")

    def turned(match: re.Match[str]) -> str:
        place = _place(_resolved(origin, match[1]))
        if place is None:
            return match[0]
        return posixpath.relpath(place, posixpath.dirname(here) or ".") + (match[2] or "")

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(turned, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    text = "".join([*parts, LINK.sub(turned, markdown[end:])])
    # A browser may break `->` in two.
    text = re.sub(r"^\|.*$", lambda row: row[0].replace(" -> ", " \N{RIGHTWARDS ARROW} "), text, flags=re.MULTILINE)
    return text.replace(COMMANDS, "\n".join(_commands())) if COMMANDS in text else text


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Give a page without sections, which are tables, the width of the table of contents; home has no neighbours.

    Short cells of tables, and pairs of numbers, are marked: they are easier to read in one line.
    """
    if not any(entry.children for entry in page.toc):
        page.meta.setdefault("hide", []).append("toc")
    if page.file.src_uri in (PAGES["README.md"], PAGES["README.zh-CN.md"]):
        page.meta.setdefault("hide", []).append("navigation")
    html = SHORT.sub('<td class="short">', PAIR.sub('<td class="pair">', html))
    # Browsers choose other glyphs for Japanese, and read with other voices.
    return f'<div lang="zh-CN">{html}</div>' if page.file.src_uri.startswith("zh/") else html


def _linked(page: str, text: str) -> Iterator[str]:
    """Paths in the repository that a page links."""
    return (_resolved(page, match[1]) for match in LINK.finditer(FENCE.sub("", text)))


def _resolved(page: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _place(path: str) -> str | None:
    """Where a file of the repository is in the built pages; None where it is none, which MkDocs then says."""
    if path in PAGES:
        return PAGES[path]
    if not (ROOT / path).is_file():
        return None
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    return f"files/{path}" if Path(path).suffix in (".png", ".svg") else f"source/{path}.md"


def _commands() -> Iterator[str]:
    """The help of each command, from the real parser."""
    from trainer_fsdp_patch import cli

    [commands] = (item for item in cli.parser()._actions if isinstance(item, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        yield f"### {name}\n\n```text\n{command.format_help()}```\n"
