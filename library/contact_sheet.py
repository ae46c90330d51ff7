"""The contact sheet: one picture of all previews so far, a row per prompt, a column per training step.

It is redrawn from the PNGs on disk, so it goes on growing after a restart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from library.atomic import atomic_file
from library.prompts import Prompt

MAX_COLUMNS = 8
CELL = 256  # the longer side of a thumbnail, in pixels
MIN_CELL = 64
MAX_SHEET_HEIGHT = 16384  # with very many prompts the thumbnails shrink instead
LABEL_WIDTH = 250
MARGIN, GAP = 28, 10
# The usual fonts for Chinese, Japanese and Korean on Linux, macOS and Windows.
CJK_FONTS = ("NotoSansCJK-Regular.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "msyh.ttc", "malgun.ttf", "YuGothM.ttc")
PAPER, INK, FAINT, EMPTY = "#fbfaf8", "#22211f", "#8b8781", "#efece7"


def picture_name(name: str | None, step: int, index: int, seed: int) -> str:
    """The file name of one preview: ``{name}_{step:06d}_{index:02d}_{seed}.png``."""
    return f"{name + '_' if name else ''}{step:06d}_{index:02d}_{seed}.png"


def settings_of(prompt: Prompt) -> dict[str, str]:
    """What decides a preview besides the weights, as PNG texts; pictures with equal settings can be compared."""
    return {"prompt": prompt.text, "negative_prompt": prompt.negative, "seed": str(prompt.seed),
            "size": f"{prompt.width}x{prompt.height}", "sample_steps": str(prompt.steps), "scale": f"{prompt.cfg:g}",
            "guidance_scale": f"{prompt.guidance:g}"}


def write_contact_sheet(folder: Path, name: str | None, prompts: Sequence[Prompt], last_step: int) -> Path:
    """Draw ``folder/{name}_contact_sheet.png`` from the previews of ``prompts`` (with seeds) up to ``last_step``.

    Later steps can only be left over from an earlier run and are not shown; nor are pictures whose recorded settings
    differ from the prompt's of today (an edited prompt file). The first, the last and evenly spaced steps between
    make at most 8 columns.
    """
    sheet_path = Path(folder) / f"{name + '_' if name else ''}contact_sheet.png"
    found = find_pictures(folder, name, prompts, last_step)
    steps = spread(sorted({step for step, _ in found}), MAX_COLUMNS)
    sheet = draw([_row(prompt, index, steps, found) for index, prompt in enumerate(prompts)], steps, name or "previews")
    with atomic_file(sheet_path) as file:
        sheet.save(file, format="PNG")
    return sheet_path


def find_pictures(folder: Path, name: str | None, prompts: Sequence[Prompt], last_step: int) -> dict[tuple[int, int], Path]:
    """(step, index of the prompt) -> the preview on disk."""
    pattern = re.compile(re.escape(f"{name}_" if name else "") + r"(\d{6,})_(\d{2,})_(\d+)\.png")
    expected = [settings_of(prompt) for prompt in prompts]
    found = {}
    for path in sorted(Path(folder).iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        step, index, seed = (int(group) for group in match.groups())
        if step <= last_step and index < len(prompts) and seed == prompts[index].seed and _fits(path, expected[index]):
            found[step, index] = path
    return found


def _fits(path: Path, expected: Mapping[str, str]) -> bool:
    try:
        with Image.open(path) as image:  # reads the header and the text chunks, no pixels
            return all(image.info.get(key) == value for key, value in expected.items())
    except OSError:
        return False  # damaged: leave its place empty


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``steps``: the first, the last, and evenly spaced ones between."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(position * (len(steps) - 1) / (most - 1))] for position in range(most)]


@dataclass(frozen=True)
class Row:
    """One prompt: its label, the size (w, h) of its pictures, and one of them (or None) per column."""

    text: str
    detail: str
    size: tuple[int, int]
    pictures: tuple[Path | None, ...]


def _row(prompt: Prompt, index: int, steps: Sequence[int], found: Mapping[tuple[int, int], Path]) -> Row:
    detail = f"seed {prompt.seed}, {prompt.steps} steps, {prompt.width}x{prompt.height}"
    return Row(prompt.text or "(empty prompt)", detail, (prompt.width, prompt.height),
               tuple(found.get((step, index)) for step in steps))


def draw(rows: Sequence[Row], steps: Sequence[int], title: str) -> Image.Image:
    """The whole sheet: title, step numbers on top, prompts on the left."""
    title_font, step_font, detail_font = font_for(title, 24), ImageFont.load_default(18), ImageFont.load_default(13)
    limit = max(MIN_CELL, min(CELL, MAX_SHEET_HEIGHT // max(1, len(rows)) - GAP))
    sizes = [_thumbnail_size(row.size, limit) for row in rows]
    column_width = max(max(width for width, _ in sizes), 120)  # room for the step number
    # The title may be wider than a narrow sheet.
    width = max(2 * MARGIN + LABEL_WIDTH + len(steps) * (column_width + GAP), 2 * MARGIN + round(title_font.getlength(title)))
    top = MARGIN + 86
    sheet = Image.new("RGB", (width, top + sum(height + GAP for _, height in sizes) - GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 4), title, INK, font=title_font)
    left = MARGIN + LABEL_WIDTH + GAP
    for column, step in enumerate(steps):
        middle = left + column * (column_width + GAP) + column_width // 2
        pen.text((middle, top - 30), f"step {step}", INK, font=step_font, anchor="ms")
        if step == 0:
            pen.text((middle, top - 12), "before training", FAINT, font=detail_font, anchor="ms")
    for row, (cell_width, cell_height) in zip(rows, sizes, strict=True):
        _draw_label(pen, row, (MARGIN, top, LABEL_WIDTH - 6, cell_height), font_for(row.text, 17), detail_font)
        for column, path in enumerate(row.pictures):
            x = left + column * (column_width + GAP) + (column_width - cell_width) // 2
            thumbnail = _thumbnail(path, (cell_width, cell_height))
            if thumbnail is None:
                pen.rectangle((x, top, x + cell_width - 1, top + cell_height - 1), EMPTY)
            else:
                sheet.paste(thumbnail, (x, top))
        top += cell_height + GAP
    return sheet


def _thumbnail_size(size: tuple[int, int], limit: int) -> tuple[int, int]:
    """``size`` scaled, up or down, so that its longer side is ``limit`` pixels."""
    scale = limit / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _thumbnail(path: Path | None, size: tuple[int, int]) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except OSError:
        return None  # the header was read, the pixels are damaged


def _draw_label(pen: ImageDraw.ImageDraw, row: Row, box: tuple[int, int, int, int], text_font: ImageFont.FreeTypeFont,
                detail_font: ImageFont.FreeTypeFont) -> None:
    """The prompt, wrapped and cut to its row, and below it the settings; ``box`` is (x, y, width, height)."""
    x, y, width, height = box
    line_height = 22
    lines = wrap(row.text, text_font, width)
    room = max(1, (height - 20) // line_height)
    if len(lines) > room:
        lines = [*lines[:room - 1], _cut(lines[room - 1] + " ...", text_font, width)]
    for line in lines:
        pen.text((x, y), line, INK, font=text_font)
        y += line_height
    if y + 16 <= box[1] + height:
        pen.text((x, y + 2), row.detail, FAINT, font=detail_font)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first of the fonts at hand that can draw all of ``text``, or else the one that draws most of it."""
    best, best_missing = None, 0
    for font in _fonts(size):
        missing = _undrawable(text, font)
        if best is None or missing < best_missing:
            best, best_missing = font, missing
        if missing == 0:
            break
    return best


def _fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    """Pillow's own, which knows hardly more than ASCII; DejaVu Sans, which matplotlib brings along; then the system's."""
    yield ImageFont.load_default(size)
    matplotlib = find_spec("matplotlib")  # looked up, not imported: only its folder is needed
    shipped = [str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")] if matplotlib else []
    for name in [*shipped, *CJK_FONTS]:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            pass  # not on this system


def _undrawable(text: str, font: ImageFont.FreeTypeFont) -> int:
    """How many different characters of ``text`` the font shows as its sign for a missing one."""
    absent = bytes(font.getmask("\U0010fffe"))  # a code point that is never assigned
    return sum(bytes(font.getmask(character)) == absent for character in set(text) if not character.isspace())


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, broken between words, and within a word that is too long."""
    lines, line = [], ""
    for word in text.split():
        while True:
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                break
            if line:
                lines.append(line)
                line = ""
                continue
            fitting = max(1, max((count for count in range(1, len(word)) if font.getlength(word[:count]) <= width), default=1))
            lines.append(word[:fitting])
            word = word[fitting:]
    return [*lines, line] if line else lines


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """``line``, which ends in an ellipsis, shortened before it until it fits."""
    while font.getlength(line) > width and len(line) > 4:
        line = line[:-5].rstrip() + " ..."
    return line
