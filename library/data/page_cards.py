"""The cards of the data page's contact sheet as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from library.data.page_sheet import Card, Shot
from library.data.tokens import TokenCount

_OVER = ' class="over"'


def sheet(cards: Sequence[Card], variants: int | None) -> Iterable[str]:
    """What is shown, in words, and the cards: first those that show a picture several times."""
    if not cards:
        yield '<p class="soft">There is no picture to show.</p>'
        return
    words = ["Each picture is cut and scaled as in training; the frame in the small picture is the part that is used."]
    if any(shot.mask is not None for card in cards for shot in card.shots):
        words.append("What lies under the red tint does not count in the loss.")
    if any(len(card.shots) > 1 for card in cards):
        words.append("Pictures that are shown in several ways come first, as they are in the first epochs.")
    if variants is not None:
        words.append(f"Captions that vary are cached in {variants} texts each." if variants > 1 else "Captions are cached.")
    if any(count.lost for card in cards for shot in card.shots for count in shot.counts):
        words.append("Struck words are read by no text encoder, underlined ones not by all.")
    yield f'<p class="soft">{escape(" ".join(words))}</p>'
    yield '<div class="sheet">'
    for card in sorted(cards, key=lambda each: len(each.shots) == 1):  # stable
        yield _card(card)
    yield "</div>"


def _card(card: Card) -> str:
    item = card.item
    name = item.sample_id.partition("/")[2]
    several = len(card.shots) > 1
    raw = escape(item.caption)
    source = ""
    if any(shot.caption != item.caption for shot in card.shots) and raw:
        source = f"<details><summary>the caption as written</summary><pre>{raw}</pre></details>"
    shots = "".join(_shot(card, shot, several) for shot in card.shots)
    return (f'<article class="card{" wide" if several else ""}"><h3 title="{escape(str(item.path))}">{escape(name)}</h3>'
            f'<div class="shots">{shots}</div>{_facts(card)}{source}</article>')


def _shot(card: Card, shot: Shot, several: bool) -> str:
    done = [f"epoch {shot.epoch + 1}"] if several else []
    if shot.view.flip:
        done.append("mirrored")
    if shot.view.color is not None:
        done += [f"hue {shot.view.color.hue:+.0f}°"] if shot.view.color.hue else []
        done += [f"gamma {shot.view.color.gamma:.2f}"] if shot.view.color.gamma != 1 else []
    if several and card.item.subset.augment.changes_pixels:
        done.append("from {},{} of {}x{}".format(*shot.view.placement.crop, *shot.view.placement.resized))
    if shot.mask is not None:
        done.append(f"{shot.mask:.0%} counts")
    note = f'<div class="soft small">{escape(", ".join(done))}</div>' if done else ""
    return (f'<div class="shot"><img src="{shot.picture}" alt="" loading="lazy">{note}'
            f'<p class="caption">{_caption(shot)}</p>{_tokens(shot.counts)}</div>')


def _caption(shot: Shot) -> str:
    if not shot.caption:
        return f'<span class="soft">(no caption{", dropped" if shot.dropped else ""})</span>'
    whole = shot.caption.rstrip()
    cuts = {count.encoder: len(whole) - len(count.lost) for count in shot.counts if count.lost and whole.endswith(count.lost)}
    edges = sorted({*cuts.values(), len(whole)})
    parts = [escape(whole[:edges[0]])]
    for start, stop in zip(edges, edges[1:], strict=False):
        unread = [encoder for encoder, cut in cuts.items() if cut <= start]
        kind = "lost" if len(unread) == len(shot.counts) else "partly"
        parts.append(f'<mark class="{kind}" title="not read by {escape(", ".join(unread))}">{escape(whole[start:stop])}</mark>')
    return "".join(parts)


def _tokens(counts: Sequence[TokenCount]) -> str:
    if not counts:
        return ""
    words = [f'<span{_OVER if count.tokens > count.limit else ""}>{escape(count.encoder)} {count.tokens} of {count.limit}</span>'
             for count in counts]
    return f'<div class="small soft">{" · ".join(words)} tokens</div>'


def _facts(card: Card) -> str:
    """The whole picture with the frame of the first showing's crop, and where the numbers come from."""
    item, place = card.item, card.shots[0].view.placement
    (wide, high), (left, top), (width, height) = place.resized, place.crop, place.bucket
    frame = (f'<svg viewBox="0 0 {wide} {high}" preserveAspectRatio="none" aria-hidden="true"><rect x="{left}" y="{top}" '
             f'width="{width}" height="{height}"/></svg>')
    whole = f'<div class="whole"><img src="{card.whole}" alt="" loading="lazy">{frame}</div>' if card.whole else ""
    scale = max(wide, high) / max(item.size)
    lines = [f"{item.size[0]}x{item.size[1]}", f"{'enlarged' if scale > 1 else 'scaled'} to {wide}x{high} ({scale:.2f})",
             f"cut to {width}x{height}"]
    if item.repeats != 1:
        lines.append(f"shown {item.repeats} times an epoch")
    if item.weight != 1:
        lines.append(f"loss weight {item.weight:g}")
    if item.subset.is_reg:
        lines.append("regularisation")
    return f'<div class="facts">{whole}<div>{"<br>".join(map(escape, lines))}</div></div>'
