# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: pages and results that lie outside docs/, and the links to them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
PAGES = {"index.md": "README.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md")
}


def on_files(files: Files, config: Any) -> Files:
    """Add README as the first page, CONTRIBUTING, CHANGELOG and the results."""
    outside = dict(PAGES)
    outside |= {f"results/{p.name}": str(p) for p in (ROOT / RESULTS).glob("*.csv")}
    for uri, source in outside.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are on the site, where all pages lie in one folder."""
    flat = re.sub(rf"\]\((?:\.\./)?{RESULTS}/", "](results/", markdown)
    flat = re.sub(r"\]\((?:\.\./)?README\.md", "](index.md", flat)
    return re.sub(r"\]\((?:docs|\.\.)/", "](", flat)
