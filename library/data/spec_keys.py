"""The vocabulary of the dataset file: which key may stand where, what it holds, and which flag stands in for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from library.config.values import read_range, read_size, read_suffixes
from library.data.augment import INTERPOLATIONS
from library.errors import nearest

GENERAL, DATASET, SUBSET = "general", "datasets", "subsets"
SECTIONS = {GENERAL: "[general]", DATASET: "[[datasets]]", SUBSET: "[[datasets.subsets]]"}
MAX_REPEATS = 1_000_000


@dataclass(frozen=True)
class Key:
    """``read`` turns a value of the file, or of the flag ``option``, into what is used, or raises ValueError(what it should
    be[, remedy])."""

    name: str
    sections: tuple[str, ...]
    read: Callable[[Any], Any]
    option: str | None = None


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            small = type(value) is not int or value < low
            limit, other = (f"at least {low}", f"{low} or more") if small else (f"at most {high}", f"{high} or less")
            plain = type(value) in (str, float) and re.fullmatch(r"([0-9]+)(\.0*)?", str(value).strip())
            raise ValueError(f"a whole number of {limit}", f"write {plain[1]}" if plain else f"give {other}")
        return value
    return read


def _number(low: float, high: float = math.inf, above: bool = False, below: bool = False) -> Callable[[Any], float]:
    """``above`` and ``below``: the limit itself is not allowed."""
    least = f"above {low:g}" if above else f"of at least {low:g}"
    most = "" if high == math.inf else f" and below {high:g}" if below else f" and at most {high:g}"
    words = f"a number {least}{most}"

    def read(value: Any) -> float:
        fits = type(value) in (int, float) and math.isfinite(value) and (low < value if above else low <= value)
        if not fits or not (value < high if below else value <= high):
            percent = high == 1 and type(value) in (int, float) and 2 <= value < 100
            raise ValueError(words, f"write {value / 100:g} for {value:g} percent" if percent else _plain_number(value))
        return float(value)
    return read


def _plain_number(value: Any) -> str:
    """What to write for a number in quotes or in percent."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%?)", value.strip()) if isinstance(value, str) else None
    return f"write {float(found[1]) / (100 if found[2] else 1):g}" if found else ""


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        word = str(value).lower()
        meant = "true" if word in ("true", "yes", "1") else "false" if word in ("false", "no", "0") else ""
        raise ValueError("true or false", f"write {meant}, without quotes" if meant else "")
    return value


def _text(value: Any) -> str:
    """A text that may not be empty: names of folders and files."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text in quotes")
    return value


def _path(value: Any) -> str:
    found = set(_text(value)) & set("\t\n\r\b\f\0")
    if found:  # "C:\new\train" in double quotes is C:, line break, ew, tab, rain
        raise ValueError("a path: it holds a tab or a line break", "write Windows paths with / or between 'single quotes'")
    return value


def _separator(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text in quotes, such as \",\"")
    return value


def _words(value: Any) -> str:
    """A text that is switched off by leaving it empty."""
    if not isinstance(value, str):
        raise ValueError("a text in quotes", f'write "{value}"' if type(value) in (int, float) else "")
    return value


def _size(value: Any) -> tuple[int, int]:
    sides = [int(side) for side in read_size(value).split(",")]
    return sides[0], sides[-1]


def _suffixes(value: Any) -> tuple[str, ...]:
    return tuple(read_suffixes(value).split(","))


def _range(value: Any) -> tuple[float, float]:
    low, high = read_range(value).split(",")
    return float(low), float(high)


def _interpolation(value: Any) -> str:
    if value not in INTERPOLATIONS:
        raise ValueError(f"one of {', '.join(INTERPOLATIONS)}", nearest(value, INTERPOLATIONS) if isinstance(value, str) else "")
    return value


_SHARED, _ANYWHERE, _OWN = (GENERAL, DATASET), (GENERAL, DATASET, SUBSET), (SUBSET,)

KEYS: dict[str, Key] = {key.name: key for key in (
    Key("resolution", _SHARED, _size, "resolution"),
    Key("batch_size", _SHARED, _whole(1), "train_batch_size"),
    Key("enable_bucket", _SHARED, _switch, "enable_bucket"),
    Key("min_bucket_reso", _SHARED, _whole(1), "min_bucket_reso"),
    Key("max_bucket_reso", _SHARED, _whole(1), "max_bucket_reso"),
    Key("bucket_reso_steps", _SHARED, _whole(1), "bucket_reso_steps"),
    Key("bucket_no_upscale", _SHARED, _switch, "bucket_no_upscale"),
    Key("skip_image_resolution", _SHARED, _size, "skip_image_resolution"),
    Key("validation_split", _SHARED, _number(0, 1, below=True), "validation_split"),
    Key("validation_seed", _SHARED, _whole(0, 2**32 - 1), "validation_seed"),
    Key("prior_loss_weight", (GENERAL,), _number(0), "prior_loss_weight"),
    Key("image_dir", _OWN, _path),
    Key("metadata_file", _OWN, _path),
    Key("conditioning_data_dir", _OWN, _path, "conditioning_data_dir"),
    Key("is_reg", _OWN, _switch),
    Key("recursive", _ANYWHERE, _switch, "recursive"),
    Key("num_repeats", _ANYWHERE, _whole(1, MAX_REPEATS), "dataset_repeats"),
    Key("loss_weight", _ANYWHERE, _number(0, above=True)),
    Key("class_tokens", _ANYWHERE, _words),
    Key("caption_extension", _ANYWHERE, _suffixes, "caption_extension"),
    Key("cache_info", _ANYWHERE, _switch, "cache_info"),
    Key("alpha_mask", _ANYWHERE, _switch, "alpha_mask"),
    Key("resize_interpolation", _ANYWHERE, _interpolation, "resize_interpolation"),
    Key("flip_aug", _ANYWHERE, _switch, "flip_aug"),
    Key("color_aug", _ANYWHERE, _switch, "color_aug"),
    Key("random_crop", _ANYWHERE, _switch, "random_crop"),
    Key("face_crop_aug_range", _ANYWHERE, _range, "face_crop_aug_range"),
    Key("caption_prefix", _ANYWHERE, _words, "caption_prefix"),
    Key("caption_suffix", _ANYWHERE, _words, "caption_suffix"),
    Key("caption_separator", _ANYWHERE, _separator, "caption_separator"),
    Key("keep_tokens", _ANYWHERE, _whole(0), "keep_tokens"),
    Key("keep_tokens_separator", _ANYWHERE, _words, "keep_tokens_separator"),
    Key("secondary_separator", _ANYWHERE, _words, "secondary_separator"),
    Key("enable_wildcard", _ANYWHERE, _switch, "enable_wildcard"),
    Key("shuffle_caption", _ANYWHERE, _switch, "shuffle_caption"),
    Key("caption_dropout_rate", _ANYWHERE, _number(0, 1), "caption_dropout_rate"),
    Key("caption_dropout_every_n_epochs", _ANYWHERE, _whole(0), "caption_dropout_every_n_epochs"),
    Key("caption_tag_dropout_rate", _ANYWHERE, _number(0, 1), "caption_tag_dropout_rate"),
    Key("token_warmup_min", _ANYWHERE, _whole(0), "token_warmup_min"),
    Key("token_warmup_step", _ANYWHERE, _number(0), "token_warmup_step"),
)}

# Keys of the dialect that nothing reads, there or here: accepted, and named once
LEFTOVERS: dict[str, tuple[tuple[str, ...], str]] = {
    "network_multiplier": (_SHARED, "no script reads it"),
    "custom_attributes": (_ANYWHERE, "its one use belongs to another kind of training"),
}

# Keys of [general] that are settings of the run: (values that ask for nothing, what to do)
ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "debug_dataset": ((False,), "remove it and give --debug_dataset on the command line"),
    "max_token_length": ((), "remove it; how much text is read is an option of the command line (see --help)"),
}


def problem(key: Key, value: Any) -> tuple[str, str] | None:
    """What is wrong with ``value`` and how to write it, or None when it is fine."""
    try:
        key.read(value)
    except ValueError as error:
        expected, remedy = (*error.args, "")[:2]
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        return f"{shown} is not {expected}", remedy or f"give {expected}"
    return None
