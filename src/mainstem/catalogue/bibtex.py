"""A catalogue entry as BibTeX."""

from __future__ import annotations

import re
from typing import Any

_VENUE = {"inproceedings": "booktitle", "article": "journal", "phdthesis": "school", "techreport": "institution"}


def entry(paper: dict[str, Any]) -> str:
    """The BibTeX entry of a paper, under its id."""
    own = dict(paper["bibtex"])
    kind = own.pop("type", "misc")
    fields = {"title": f"{{{_escaped(paper['title'])}}}", "author": " and ".join(map(_escaped, paper["authors"]))}
    if paper["venue"] and kind in _VENUE:
        fields[_VENUE[kind]] = _escaped(paper["venue"])
    fields |= {name: _escaped(str(value)) for name, value in own.items()}
    fields["year"] = str(paper["year"])
    if paper["arxiv"]:
        fields |= {"eprint": paper["arxiv"], "archiveprefix": "arXiv"}
    if paper["url"]:
        fields["url"] = paper["url"]
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{paper['id']},\n{lines}\n}}"


def _escaped(text: str) -> str:
    """`text` without what LaTeX would read as a command."""
    return re.sub(r"([&%$#_])", r"\\\1", text)
