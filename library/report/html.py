"""The report as HTML: one document that asks for nothing outside itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from library.report.curves import Standing, facts_of
from library.report.next_steps import Result, going_on, next_steps
from library.report.pictures import Shown
from library.report.script import SCRIPT
from library.report.style import STYLE

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
# Nothing from outside may be loaded, and no script but ours runs, whatever stands in a prompt.
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
TRAINING, FINISHED, STOPPED, BROKEN = "training", "finished", "stopped", "broke off"


@dataclass(frozen=True)
class Facts:
    """What is on the page. ``status``: one of the words above; ``note``: a sentence about it. ``settings``: (section, flag,
    value, changed from its default); ``data``: the HTML of the data's contact sheet, or ""."""

    name: str
    program: str
    status: str
    note: str
    written: str
    total_steps: int
    standing: Standing
    charts: Sequence[Mapping[str, Any]]
    shown: Shown
    results: Sequence[Result]
    settings: Sequence[tuple[str, str, str, bool]]
    data: str


def render(facts: Facts) -> str:
    """The whole document."""
    sections = [("curves", "Curves", _curves(facts)), ("previews", "Previews", _previews(facts.shown)),
                ("next", "What to do next", next_steps(facts.name, facts.program, facts.status == FINISHED, facts.results,
                                                         going_on(facts.settings))),
                ("pictures", "What it learns from", [facts.data] if facts.data else []),
                ("settings", "Settings", _settings(facts))]
    parts = [_head(facts)]
    for name, title, lines in sections:
        content = "\n".join(lines)
        if content:
            parts.append(f'<section id="{name}">\n<h2>{title}</h2>\n{content}\n</section>')
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(facts.name)}: training report</title>",
        f"<style>{STYLE}</style>\n</head>\n<body>", *parts,
        f'<script type="application/json" id="numbers">{_data(facts.charts)}</script>',
        f"<script>{SCRIPT}</script>", "</body>\n</html>\n"])


def _data(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _head(facts: Facts) -> str:
    at, kind = facts.standing, {FINISHED: " good", STOPPED: " bad", BROKEN: " bad"}.get(facts.status, "")
    share = min(1.0, at.step / max(1, facts.total_steps))
    tiles = "".join(f'<div class="tile"><b>{escape(value)}</b><span class="soft small">{escape(name)}</span></div>'
                    for name, value in facts_of(at, facts.total_steps).items())
    again = "; open it again for newer numbers" if facts.status == TRAINING else ""
    lines = [f'<header><h1>{escape(facts.name)}</h1><p class="soft small"><span class="state{kind}">{escape(facts.status)}</span>'
             f" · {escape(facts.program)} · written {escape(facts.written)}{again}</p></header>",
             f'<div class="course"><div style="width:{share:.2%}"></div></div>', f'<div class="tiles">{tiles}</div>']
    if facts.note:
        lines.append(_finding("warning" if facts.status in (STOPPED, BROKEN) else "note", facts.note))
    if at.turned:
        lines.append(_finding("warning", f"The loss on pictures that are not trained was lowest at step {at.best_step:,} "
                     f"({at.best_loss:.4g}) and has risen since ({at.latest_held_out:.4g} now): the model begins to learn the "
                     "pictures by heart. A checkpoint from about that step may be the better one; compare the previews."))
    return "\n".join(lines)


def _finding(kind: str, text: str) -> str:
    return f'<div class="finding {kind}"><p>{escape(text)}</p></div>'


def _curves(facts: Facts) -> Iterable[str]:
    if not facts.charts:
        yield '<p class="soft">There are no steps yet.</p>'
        return
    yield ('<noscript><p class="soft">The curves are drawn by a script, which this viewer does not run; the numbers are in '
           f"{escape(facts.name)}_log.csv.</p></noscript>")
    yield ('<div class="knobs" id="knobs" hidden><label>smoothing '
           '<input type="range" id="smoothing" min="0" max="20" step="1" value="6"></label>'
           '<label><input type="checkbox" id="logarithmic"> logarithmic</label></div>')
    yield '<div class="charts">'
    for chart in facts.charts:
        series, unit = chart["series"], f' <span class="soft small">{escape(chart["unit"])}</span>' if chart["unit"] else ""
        keys = "".join(f'<span><i style="color:var(--s{at % 6})"></i>{escape(_key(each))}</span>'
                       for at, each in enumerate(series))
        yield (f'<figure class="chart{" wide" if chart["wide"] else ""}" id="chart-{chart["key"]}"><figcaption><b>'
               f'{escape(chart["title"])}</b>{unit}<span class="keys">{keys if len(series) > 1 or chart["wide"] else ""}</span>'
               '<span class="readout"></span></figcaption></figure>')
    yield "</div>"


def _key(series: Mapping[str, Any]) -> str:
    return f"{series['title']}, and its running mean" if series["role"] == "raw" else series["title"]


def _previews(shown: Shown) -> Iterable[str]:
    if not shown.strips:
        return
    left_out = []
    if shown.left_out:
        left_out.append(f"{shown.left_out} steps between are left out to keep this file small")
    if shown.prompts_left_out:
        count = shown.prompts_left_out
        left_out.append(f"so are {count} prompts" if left_out else f"{count} prompts are left out")
    if left_out:
        yield (f'<p class="soft small">{escape(", ".join(left_out).capitalize())}; the folder sample has all of them in full '
               "size.</p>")
    yield ('<div class="slide" id="slide" hidden><output id="slide-step" for="slider"></output>'
           '<button id="earlier" type="button" aria-label="earlier step">‹</button>'
           '<input type="range" id="slider" min="0" step="1" aria-label="step">'
           '<button id="later" type="button" aria-label="later step">›</button></div>')
    yield '<div class="strips">'
    for strip, pictures in shown.strips:
        images = "".join(f'<img src="{url}" data-step="{step}" alt="step {step}"{_ON if step == pictures[-1][0] else ""}>'
                         for step, url in pictures)
        words = strip.settings
        small = [f"{label} {words[key]}" if label else words[key] for key, label in
                 (("size", ""), ("seed", "seed"), ("sample_steps", "steps"), ("scale", "scale")) if words.get(key)]
        negative = f'<p class="soft small">not: {escape(words["negative_prompt"])}</p>' if words.get("negative_prompt") else ""
        yield (f'<figure class="strip"><div class="stack">{images}</div><figcaption><p class="prompt">'
               f'{escape(words.get("prompt") or "(empty prompt)")}</p>{negative}<p class="soft small">{escape(", ".join(small))}'
               "</p></figcaption></figure>")
    yield "</div>"


_ON = ' class="on"'


def _settings(facts: Facts) -> Iterable[str]:
    if not facts.settings:
        return
    changed = [each for each in facts.settings if each[3]]
    yield (f'<p class="soft">What was set, and all values below; {escape(facts.name)}_config.toml holds them for '
           "--config_file.</p>")
    yield _table(changed)
    yield f"<details><summary>all {len(facts.settings)} settings</summary>{_table(facts.settings)}</details>"


def _table(settings: Sequence[tuple[str, str, str, bool]]) -> str:
    rows = "".join(f"<tr><td>{escape(flag)}</td><td>{escape(value)}</td></tr>" for _, flag, value, _ in settings)
    return f'<div class="scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'
