"""What the planner found out, as text for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from library.errors import UserError
from library.memory.cards import Card
from library.memory.needs import Needs, Time
from library.memory.planner import Planner, gigabytes

WIDTH = 100
_MEANING = {
    "weights": "weights that stay on the card",
    "ring": "slots through which streamed blocks pass",
    "gradients": "gradients that wait to be used",
    "states": "optimizer states that stay on the card",
    "activations": "what the forward pass keeps for the backward pass",
    "casts": "copies of float32 weights in the dtype of products",
    "workspace": "results and gradients on their way, temporary copies",
    "average": "averaged weights",
    "encoders": "autoencoder and text encoders that are not cached",
    "context": "CUDA itself, and gaps between allocations (estimate)",
}
_PINNED = {"weights": "pinned: streamed blocks", "states": "pinned: their optimizer states",
           "gradients": "pinned: their gradients between micro-batches", "activations": "pinned: inputs of recomputed blocks"}
_ORDINARY = {"program": "Python, torch and its libraries (estimate)", "average": "averaged weights",
             "caches": "caches in memory"}


def describe(needs: Needs, card: Card | None) -> list[str]:
    """The table of one setting; with ``card`` also how long a step takes there."""
    lines = [*_section(f"On the card, at the fullest moment ({moment(needs.worst)})", needs.device, _MEANING)]
    if needs.encoding_bytes:
        lines.append(f"  {'before training, while caches are filled, at least':<58}{gigabytes(needs.encoding_bytes):>12}")
    host = {**{f"pinned {name}": size for name, size in needs.pinned.items()}, **needs.ordinary}
    lines += _section("In main memory, per process", host,
                      {**{f"pinned {name}": text for name, text in _PINNED.items()}, **_ORDINARY})
    disk = {name: size for name, size in needs.disk.items() if size}
    if disk:
        count = needs.fixed.checkpoints
        files = f"{count} file{'s' if count != 1 else ''} of the model"
        lines += _section("On disk", disk, {"caches": "caches", "checkpoints": files})
    bus, per = needs.bus, f"{needs.flops / 1e12:.1f}" if needs.flops >= 1e11 else f"{needs.flops / 1e12:.4f}"
    lines += ["", f"A step: {per} TFLOP; over the bus {gigabytes(bus.into)} to the card and {gigabytes(bus.out)} from it"]
    if card is not None:
        lines += ["", f"Predicted on {card.name}: {seconds(needs.time(card))}", *_explain(needs, card)]
    return lines


def _section(title: str, sizes: Mapping[str, int], meaning: Mapping[str, str]) -> Iterator[str]:
    yield ""
    yield f"{title}:"
    for name, size in sizes.items():
        if size:
            yield f"  {meaning[name]:<58}{gigabytes(size):>12}"
    yield f"  {'in all':<58}{gigabytes(sum(sizes.values())):>12}"


def moment(name: str) -> str:
    """In words."""
    if name.startswith("backward "):
        return f"the backward pass of {name.removeprefix('backward ')}"
    return {"forward": "the end of the forward pass", "update": "the optimizer's step"}[name]


def seconds(time: Time) -> str:
    """One line about the time of a step."""
    parts = f"forward {time.forward:.3g}, backward {time.backward:.3g}, optimizer {time.update:.3g}"
    return f"{time.total:.3g} s a step ({parts})"


def _explain(needs: Needs, card: Card) -> list[str]:
    time = needs.time(card)
    if not needs.bus.into and not needs.bus.out:
        return ["  nothing is copied over the bus"]
    word = "computing hides all copies" if time.hidden else "computing does NOT hide all copies: a larger batch would"
    return [f"  copies take {time.copies:.3g} s of bus time; {word}"]


def cards_table(planner: Planner, needs: Needs, cards: Sequence[Card]) -> list[str]:
    """For each card whether the setting fits, and what would fit with the least loss of speed."""
    head = ("card", "memory", "this run", "the fastest that fits", "s/step", "copies")
    rows = []
    for card in cards:
        fits = "fits" if needs.device_bytes <= card.memory else "no"
        try:
            best = planner.choose(card.memory, card).needs
        except UserError:
            rows.append((card.name, gigabytes(card.memory), fits, "nothing", "", ""))
            continue
        time = best.time(card)
        copies = "none" if not (best.bus.into or best.bus.out) else "hidden" if time.hidden else "waited for"
        rows.append((card.name, gigabytes(card.memory), fits, best.setting.words(), f"{time.total:.3g}", copies))
    return ["", "On common cards (predictions, not measurements):", *table(head, rows, wrapped=3)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], wrapped: int) -> list[str]:
    """Columns side by side, at most ``WIDTH`` wide: what is too long in column ``wrapped`` goes on in the next line."""
    rows = [head, *rows]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    rest = sum(width + 2 for at, width in enumerate(widths) if at != wrapped) + 2
    widths[wrapped] = min(widths[wrapped], WIDTH - rest)
    lines = []
    for row in rows:
        pieces = textwrap.wrap(row[wrapped], widths[wrapped]) or [""]
        for index, piece in enumerate(pieces):
            cells = [piece if at == wrapped else row[at] if index == 0 else "" for at in range(len(head))]
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return lines
