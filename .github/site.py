"""A hook of MkDocs: the README is the site's first page, and links out of docs/ lead to the files on GitHub.

The address of the repository comes from GitHub Actions; elsewhere such a link becomes plain text.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^]]*\]\(\.\./([^)\s]+)\)")


def on_config(config: Any) -> Any:
    """Give pages of docs/ that the navigation does not list a place at its end, under "More"."""
    listed = {page for part in config.nav for pages in part.values() if isinstance(pages, list) for page in pages}
    more = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in listed)
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add to those of docs/ the pages of the root, and pictures that pages show from elsewhere."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    shown = {name for page in (ROOT / "docs").glob("*.md") for name in PICTURE.findall(page.read_text("utf-8"))}
    for name in sorted(shown):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write links between pages as the site has them, and those out of it as GitHub has them."""
    generated = page.file.src_uri in PAGES.values()
    return LINK.sub(lambda found: _link(*found.groups(), generated=generated), markdown)


def _link(mark: str, text: str, target: str, *, generated: bool) -> str:
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return f"{mark}[{text}]({target})"
    inside = os.path.normpath(path if generated else f"docs/{path}")
    if inside in PAGES:
        return f"[{text}]({PAGES[inside]}{'#' if anchor else ''}{anchor})"
    if mark or inside.startswith("docs/") or (generated and (ROOT / "docs" / path).exists()):
        return f"{mark}[{text}]({target if not mark or inside.startswith('docs/') else inside})"
    server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    if not server or not repository:
        return text
    return f"[{text}]({server}/{repository}/blob/main/{PurePosixPath(inside)})"
