"""Writes the table of metadata in docs/outputs.md from library/run_metadata.py: ``python tools/outputs_page.py`` (a test keeps it
current). The rest of that page is written by hand."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.atomic import write_atomic  # noqa: E402
from library.run_metadata import SECTIONS, TABLE  # noqa: E402
from tools.options_page import entries, table  # noqa: E402

PAGE = ROOT / "docs" / "outputs.md"
BEGIN, END = "<!-- Written by tools/outputs_page.py: begin -->", "<!-- end -->"


def metadata_table() -> str:
    """The fields group by group, in the order of the table."""
    lines: list[str] = []
    for group, records in groupby(TABLE, key=lambda one: one.group):
        rows = [(f"`{one.name}`", one.source) for one in records]
        lines += [f"**{group[0].upper()}{group[1:]}**\n", *table(("field", "from"), rows)]
    shown = " ".join(dict.fromkeys(f"`{one.title}`" for entry in entries() for one in entry.settings().values()
                                   if one.section in SECTIONS))
    lines.append(f"**Noise, loss and model.** Every flag under these headings of [options.md](options.md) that holds no path is a field\n"
                 f"`ss_<flag>`, in effect or not: {shown}.")
    return "\n".join(lines)


def page() -> str:
    """The page as it stands, with the table of now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{metadata_table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    write_atomic(PAGE, page())
    print(f"written: {PAGE}")
