"""Writes docs/options.md from config/schema.py: ``python tools/options_page.py`` (a test keeps the page current)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.atomic import write_atomic  # noqa: E402
from library.config.dialect import ELSEWHERE, INERT, LATER, Record  # noqa: E402
from library.config.help import default, description, metavar  # noqa: E402
from library.config.parse import Entry  # noqa: E402
from library.config.values import Setting, show  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
SCRIPTS = ("flux_train", "sdxl_train", "sd3_train", "lumina_train")

INTRO = """# Options

<!-- Written by tools/options_page.py from library/config/schema.py. Do not edit: change the schema and run the tool. -->

Every option is a flag (`--learning_rate 1e-5`) and a key of the TOML file given to `--config_file`
(`learning_rate = 1e-5`). Sections in that file are allowed, one level deep, and their names have no meaning.

- The command line wins over the file, the file over the default. `mixed_precision` has one more layer below the file:
  what `accelerate launch` was told.
- A switch is turned on by `--flag` and off by `--flag=false`; in the file it is `true` or `false`.
- An empty value (`--flag=` or `key = ""`) brings back the default.
- An unknown flag or key is an error that names the nearest known one. All mistakes are shown at once, before anything is read.
- `--output_config --config_file new.toml` writes the resulting configuration to a new file and exits.
  The same file is saved beside the results of every run. Keys of trackers are never written.
"""

FOREIGN = {
    INERT: ("Accepted without effect", "Known from other trainers; nothing would change, so the log names them once."),
    LATER: ("Not built yet, or under another name", "Known from other trainers; refused: they would change the training."),
    ELSEWHERE: ("Flags of other scripts", "Refused, because another script or another kind of model was meant."),
}


def entries() -> list[Entry]:
    """What each script offers."""
    return [importlib.import_module(script).ENTRY for script in SCRIPTS]


def page() -> str:
    """The whole page as Markdown: what all scripts have in common, then what each adds."""
    found = entries()
    shared = [setting for setting in found[0].settings().values() if all(_same(entry, setting) for entry in found)]
    records = [record for record in found[0].dialect().values()
               if all(entry.dialect().get(record.name) == record for entry in found)]
    lines = [INTRO, "## All scripts\n", *_settings(shared, found), *_foreign(records)]
    for entry in found:
        lines.append(f"## `{entry.program}`\n")
        lines += _settings([one for one in entry.settings().values() if one.name not in {each.name for each in shared}], [entry])
        lines += _foreign([one for one in entry.dialect().values() if one not in records])
    return "\n".join(lines).rstrip() + "\n"


def _same(entry: Entry, setting: Setting) -> bool:
    """Whether the script has this setting too, but for its default."""
    other = entry.settings().get(setting.name)
    return other is not None and (other.title, description(other)) == (setting.title, description(setting))


def _settings(settings: Iterable[Setting], scripts: list[Entry]) -> Iterator[str]:
    for title, group in groupby(settings, key=lambda setting: setting.title):
        yield f"### {title}\n"
        yield from table(("option", "default", "off", "meaning"), (_row(setting, scripts) for setting in group))


def _foreign(records: list[Record]) -> Iterator[str]:
    for status, (title, sentence) in FOREIGN.items():
        if same := [record for record in records if record.status == status]:
            yield f"### {title}\n\n{sentence}\n"
            yield from table(("flags", "why", "instead", "passes in silence"), _foreign_rows(same))


def _row(setting: Setting, scripts: list[Entry]) -> tuple[str, ...]:
    value = metavar(setting)
    name = f"`--{setting.name}{f' {value}' if value else ''}`"
    off = setting.meta["off"] or ("`=false`" if setting.kind is bool and setting.default else "")
    by_default: dict[str, list[str]] = {}
    for entry in scripts:
        by_default.setdefault(default(entry.settings()[setting.name]), []).append(f"`{entry.program}`")
    shown = "; ".join(f"{text} ({', '.join(programs)})" for text, programs in by_default.items())
    return name, next(iter(by_default)) if len(by_default) == 1 else shown, off, description(setting)


def _foreign_rows(found: Iterable[Record]) -> Iterator[tuple[str, ...]]:
    alike = groupby(found, key=lambda record: (record.reason, record.remedy, record.neutral))
    for (reason, remedy, neutral), group in alike:
        names = " ".join(f"`{record.name}`" for record in group)
        yield names, reason, remedy, ", ".join(f"`{show(value)}`" for value in neutral)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table; columns that are empty throughout are dropped."""
    rows = list(rows)
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    yield f"| {' | '.join(head[at] for at in kept)} |"
    yield f"|{'|'.join('---' for _ in kept)}|"
    for row in rows:
        yield f"| {' | '.join(row[at].replace('|', chr(92) + '|') for at in kept)} |"
    yield ""


if __name__ == "__main__":
    write_atomic(PAGE, page())
    print(f"written: {PAGE}")
