"""What mkdocs has to be told about this repository, whose pages are written to be read where they lie.

The README is the site's first page, and a few pages outside `docs/` belong to it too. Links to them are
turned; links to source files, of which the site has none, become plain code.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[1]
_OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "samples/README.md")
# Page of the site → file of the repository.
PAGES = {"index.md": "README.md", **{name: name for name in _OUTSIDE}}
_LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside, and the colours of code."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "assets/code.css", content=colours))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turn the links of a page that is read in the repository into those of the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def turned(link: re.Match[str]) -> str:
        path, hash_sign, anchor = link["target"].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return link[0]
        aim = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = next((uri for uri, file in PAGES.items() if file == aim), aim.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            if not (ROOT / aim).exists():
                return link[0]  # mkdocs says that it leads nowhere
            return link["text"] if "`" in link["text"] else f"`{link['text']}`"
        return f"[{link['text']}]({posixpath.relpath(target, here or '.')}{hash_sign}{anchor})"

    return _LINK.sub(turned, markdown)
