"""Captions as the model is to read them: wildcards, tags shuffled and dropped, whole captions dropped.

Everything is a pure function of the words, the rules, the seed, the epoch and the sample id, so it is the same for any number
of workers and ranks and after a resume. The rules are those of the dialect (``reference/peer-census.md`` 2.6), repaired: the
prefix and suffix belong to the line that was chosen, not to the first and last of the file; a ``keep_tokens_separator`` never
stays in the text; choices ``{a|b}`` may stand inside choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.data.keyed import Keyed

_JOINT = ", "  # between tags, as in the dialect, whatever separated them in the file


@dataclass(frozen=True)
class CaptionRules:
    """How one subset's captions are changed. Counts and rates of 0, empty texts and False mean: not at all.

    ``warmup_step``: steps over which the number of free tags grows from ``warmup_min`` to all; below 1 a share of the run.
    """

    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    wildcard: bool = False
    shuffle: bool = False
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0
    warmup_min: int = 1
    warmup_step: float = 0.0

    @property
    def varies(self) -> bool:
        """One caption gives different texts at different showings. Dropping it whole is not counted: that gives one text more."""
        return self.shuffle or self.wildcard or self.tag_dropout_rate > 0 or self.follows_step

    @property
    def follows_step(self) -> bool:
        """The text depends on how far the training is: no number of texts made beforehand can stand for it."""
        return self.warmup_step > 0

    @property
    def splits_tags(self) -> bool:
        """Tags are looked at one by one; otherwise a line stays as it was written."""
        return self.shuffle or self.tag_dropout_rate > 0 or self.follows_step


def dropped(rules: CaptionRules, seed: int, epoch: int, sample_id: str) -> bool:
    """True when this showing has an empty caption. ``epoch`` counts from 0 here and from 1 in the dialect's rule, by which
    every n-th epoch (n, 2n, ...) has none."""
    every = rules.dropout_every_n_epochs
    if every and (epoch + 1) % every == 0:
        return True
    return rules.dropout_rate > 0 and Keyed(seed, epoch, sample_id, "dropout").uniform() < rules.dropout_rate


def render(text: str, rules: CaptionRules, seed: int, epoch: int, sample_id: str, step: int, total_steps: int) -> str:
    """The words of one showing. ``text``: the caption source's lines; ``step`` counts from 0."""
    share = 1.0
    if rules.follows_step:
        steps = rules.warmup_step if rules.warmup_step >= 1 else rules.warmup_step * total_steps
        share = min(step / steps, 1.0) if steps > 0 else 1.0
    return _compose(text, rules, Keyed(seed, epoch, sample_id, "caption"), share)


def variant(text: str, rules: CaptionRules, seed: int, item_id: str, number: int) -> str:
    """The ``number``-th (from 0) of the texts that stand for one caption in a cache. It does not depend on how many there are, so
    raising that encodes only the new ones. Token warm-up plays no part. Without ``rules.varies`` all are the same."""
    return _compose(text, rules, Keyed(seed, "variant", number, item_id), 1.0)


def _compose(text: str, rules: CaptionRules, draws: Keyed, share: float) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    line = lines[0]
    if rules.wildcard:
        line = _expand(lines[draws.below(len(lines))], draws)
    line = " ".join(part for part in (rules.prefix, line, rules.suffix) if part)
    if rules.splits_tags:
        line = _tags(line, rules, draws, share)
    elif rules.keep_tokens_separator:
        line = _without_marks(line, rules)
    return line.replace(rules.secondary_separator, rules.separator) if rules.secondary_separator else line


def _tags(line: str, rules: CaptionRules, draws: Keyed, share: float) -> str:
    """Shorten, shuffle and thin out the tags that are free; those at the head and the tail stay as they are."""
    head, free, tail = _split(line, rules)
    if share < 1.0:
        least = min(rules.warmup_min, len(free))
        free = free[:math.floor(share * (len(free) - least)) + least]
    if rules.shuffle:
        draws.shuffle(free)
    if rules.tag_dropout_rate > 0:
        free = [tag for tag in free if draws.uniform() >= rules.tag_dropout_rate]
    return _JOINT.join(head + free + tail)


def _split(line: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """(tags that stay in front, free ones, tags that stay at the end)."""
    mark = rules.keep_tokens_separator
    if mark and mark in line:
        head, _, rest = line.partition(mark)
        rest, _, tail = rest.partition(mark)
        return _tag_list(head, rules), _tag_list(rest, rules), _tag_list(tail.replace(mark, rules.separator), rules)
    tags = _tag_list(line, rules)
    return tags[:rules.keep_tokens], tags[rules.keep_tokens:], []


def _without_marks(line: str, rules: CaptionRules) -> str:
    """The line in its own order with every mark replaced by what separates tags."""
    parts = [part.strip() for part in line.split(rules.keep_tokens_separator)]
    edge = rules.separator.strip()
    stripped = [part.strip(edge + " ") if edge and len(parts) > 1 else part for part in parts]
    return _JOINT.join(part for part in stripped if part)


def _tag_list(text: str, rules: CaptionRules) -> list[str]:
    return [tag.strip() for tag in text.split(rules.separator) if tag.strip()]


def _expand(line: str, draws: Keyed) -> str:
    """``{a|b|c}`` becomes one of its parts, inside out, and ``{a}`` becomes a; ``{{`` and ``}}`` are literal braces; ``{}`` and
    braces without a partner stay as they are.

    Two opening braces always are a literal one, so a choice that begins with a choice needs a blank between them; two closing
    ones end two choices where two are open.
    """
    opened: list[list[str]] = [[]]  # the parts of what is read at each depth; the bottom one is the line itself
    texts: list[str] = [""]
    index = 0
    while index < len(line):
        pair, letter = line[index:index + 2], line[index]
        if pair == "{{" or (pair == "}}" and len(texts) < 3):
            texts[-1] += letter
            index += 2
            continue
        if letter == "{":
            opened.append([])
            texts.append("")
        elif letter == "}" and len(texts) > 1:
            parts, last = opened.pop(), texts.pop()
            parts.append(last)
            texts[-1] += parts[draws.below(len(parts))] if any(parts) else "{" + "|".join(parts) + "}"
        elif letter == "|" and len(texts) > 1:
            opened[-1].append(texts[-1])
            texts[-1] = ""
        else:
            texts[-1] += letter
        index += 1
    while len(texts) > 1:  # an opening brace without its partner
        rest = "|".join([*opened.pop(), texts.pop()])
        texts[-1] += "{" + rest
    return texts[0]
