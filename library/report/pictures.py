"""The previews of a run, found on disk and made small enough that a page of them stays a few megabytes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

BUDGET = 8 << 20  # bytes of all small pictures before they become text, which takes a third more
PROMPTS = 24  # shown at most
SIZES = (512, 384, 256, 160)  # longest side in pixels: smaller ones where even two steps of every prompt would not fit
QUALITY = 82


@dataclass(frozen=True)
class Preview:
    path: Path
    step: int
    stamp: tuple[int, int]  # mtime in ns and size: a file that was drawn again is another picture


@dataclass(frozen=True)
class Strip:
    """One prompt with its pictures by step. ``settings``: the texts of the PNGs, without the step."""

    index: int
    settings: Mapping[str, str]
    previews: tuple[Preview, ...]


@dataclass(frozen=True)
class Shown:
    """``pictures``: (step, data URL), by step. ``left_out``: steps that are on disk and not here."""

    strips: tuple[tuple[Strip, tuple[tuple[int, str], ...]], ...]
    left_out: int
    prompts_left_out: int


class Album:
    """Finds and shrinks the previews ``{name}_{step:06d}_{index:02d}_{seed}.png`` of a folder, and remembers what it did."""

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        self._pattern = re.compile(re.escape(f"{name}_") + r"(\d{6,})_(\d{2,})_(\d+)\.png")
        self._texts: dict[Preview, Mapping[str, str] | None] = {}
        self._small: dict[tuple[Preview, int], bytes | None] = {}

    def find(self, last_step: int) -> list[Strip]:
        """Every prompt with pictures up to ``last_step``: later ones are left over from an earlier run.

        A prompt that was edited between two runs counts as another one, so that a strip compares only what can be compared.
        """
        found: dict[tuple, list[Preview]] = {}
        for preview, index in self._files():
            if preview.step > last_step:
                continue
            texts = self._texts_of(preview)
            if texts is not None:
                found.setdefault((index, *sorted(texts.items())), []).append(preview)
        strips = [Strip(index, dict(texts), tuple(sorted(previews, key=lambda each: each.step)))
                  for (index, *texts), previews in found.items()]
        return sorted(strips, key=lambda strip: (strip.index, strip.previews[-1].step))

    def show(self, last_step: int, budget: int = BUDGET) -> Shown:
        """All previews as small JPEGs of at most ``budget`` bytes together.

        Where they are more, every second step is left out, then every second of what is left and so on; the first and the last
        stay. What was shown before so mostly stays too, and need not be made again.
        """
        strips = self.find(last_step)
        kept = strips[:PROMPTS]
        for size in SIZES:
            every = 1
            while True:
                chosen = [_every(strip.previews, every) for strip in kept]
                total = self._weight(chosen, size, budget)
                if total <= budget or all(len(some) <= 2 for some in chosen):
                    break
                every *= 2
            if total <= budget:
                break
        shown = tuple((strip, tuple((preview.step, _url(data)) for preview in some if (data := self._shrunk(preview, size))))
                      for strip, some in zip(kept, chosen, strict=True))
        used = {(preview, size) for some in chosen for preview in some}
        self._small = {key: data for key, data in self._small.items() if key in used}
        steps = {preview.step for strip in kept for preview in strip.previews}
        return Shown(tuple(each for each in shown if each[1]), len(steps - {preview.step for some in chosen for preview in some}),
                     len(strips) - len(kept))

    def _weight(self, chosen: Sequence[Sequence[Preview]], size: int, budget: int) -> int:
        """Bytes of the small pictures. Of many it is first estimated from one of each prompt, before all of them are made."""
        samples = [len(self._shrunk(some[-1], size) or b"") for some in chosen if some]
        estimate = sum(weight * len(some) for weight, some in zip(samples, filter(None, chosen), strict=True))
        if estimate > 1.5 * budget:
            return estimate
        return sum(len(self._shrunk(preview, size) or b"") for some in chosen for preview in some)

    def _files(self) -> Iterable[tuple[Preview, int]]:
        try:
            paths = sorted(self.folder.iterdir())
        except OSError:
            return
        for path in paths:
            match = self._pattern.fullmatch(path.name)
            if match is None:
                continue
            try:
                status = path.stat()
            except OSError:
                continue  # removed in this moment
            yield Preview(path, int(match.group(1)), (status.st_mtime_ns, status.st_size)), int(match.group(2))

    def _texts_of(self, preview: Preview) -> Mapping[str, str] | None:
        """What the PNG says of its prompt; None for a damaged file."""
        if preview not in self._texts:
            try:
                with Image.open(preview.path) as image:  # header and text chunks, no pixels
                    self._texts[preview] = {key: str(value) for key, value in image.info.items()
                                            if isinstance(key, str) and isinstance(value, str) and key != "step"}
            except (OSError, ValueError):
                self._texts[preview] = None
        return self._texts[preview]

    def _shrunk(self, preview: Preview, size: int) -> bytes | None:
        key = (preview, size)
        if key not in self._small:
            try:
                with Image.open(preview.path) as image:
                    small = image.convert("RGB")
                small.thumbnail((size, size), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
                self._small[key] = buffer.getvalue()
            except (OSError, ValueError):
                self._small[key] = None  # its header was read, its pixels are damaged
        return self._small[key]


def _every(previews: Sequence[Preview], every: int) -> list[Preview]:
    """The first, each ``every``-th after it, and the last."""
    chosen = list(previews[::every])
    return chosen if not previews or chosen[-1] is previews[-1] else [*chosen, previews[-1]]


def _url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
