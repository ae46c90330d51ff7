"""The vocabulary of the dataset file: which key may stand where, what it holds, and which ones are not built yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from library.errors import UserError

EVERYWHERE = ("general", "datasets", "subsets")


@dataclass(frozen=True)
class Key:
    """``option``: the attribute of the command line's dataset section that supplies the value when the file does not."""

    name: str
    sections: tuple[str, ...]
    check: Callable[[Any], str | None]  # -> what it should be, or None when it is fine
    option: str | None = None


def _at_least_one(value: Any) -> str | None:
    return None if type(value) is int and value >= 1 else "a whole number of at least 1"


def _switch(value: Any) -> str | None:
    return None if type(value) is bool else "true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "a text in quotes"


def _side_or_sides(value: Any) -> str | None:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return None if all(type(side) is int and side >= 1 for side in sides) else "a whole number or [width, height]"


def _suffix(value: Any) -> str | None:
    fine = isinstance(value, str) and len(value) > 1 and value.startswith(".") and not set(value) & set("/\\")
    return None if fine else 'a file name suffix such as ".txt"'


KEYS = {key.name: key for key in (
    Key("batch_size", ("general", "datasets"), _at_least_one, "train_batch_size"),
    Key("resolution", ("general", "datasets"), _side_or_sides, "resolution"),
    Key("enable_bucket", ("general", "datasets"), _switch, "enable_bucket"),
    Key("min_bucket_reso", ("general", "datasets"), _at_least_one, "min_bucket_reso"),
    Key("max_bucket_reso", ("general", "datasets"), _at_least_one, "max_bucket_reso"),
    Key("bucket_reso_steps", ("general", "datasets"), _at_least_one, "bucket_reso_steps"),
    Key("bucket_no_upscale", ("general", "datasets"), _switch, "bucket_no_upscale"),
    Key("caption_extension", EVERYWHERE, _suffix, "caption_extension"),
    Key("class_tokens", EVERYWHERE, _text),
    Key("num_repeats", EVERYWHERE, _at_least_one, "dataset_repeats"),
    Key("image_dir", ("subsets",), _text),
)}


@dataclass(frozen=True)
class Unbuilt:
    """A key of the dialect without effect here. Values in ``off`` ask for nothing and pass; with ``inert`` every value
    does, because the key only tunes something that is off or already done otherwise."""

    off: tuple[Any, ...] = ()
    inert: str = ""
    instead: str = ""


_CAPTION_FILES = "write the captions as you want them into the caption files"
UNBUILT = {
    "is_reg": Unbuilt((False,)),
    "metadata_file": Unbuilt(instead="put each caption beside its picture, as name.txt"),
    "conditioning_data_dir": Unbuilt(),
    "alpha_mask": Unbuilt((False,), instead="transparent pixels are laid on white"),
    "cache_info": Unbuilt(inert="picture sizes are read from the headers at every start"),
    "network_multiplier": Unbuilt(inert="nothing reads it"),
    "validation_split": Unbuilt((0,)),
    "validation_seed": Unbuilt(inert="there is no validation split"),
    "resize_interpolation": Unbuilt(instead="pictures are shrunk by area and enlarged with Lanczos"),
    "shuffle_caption": Unbuilt((False,), instead=_CAPTION_FILES),
    "enable_wildcard": Unbuilt((False,), instead=_CAPTION_FILES),
    "keep_tokens": Unbuilt(inert="captions are not shuffled"),
    "caption_separator": Unbuilt(inert="captions are not shuffled"),
    "keep_tokens_separator": Unbuilt(("",), instead=_CAPTION_FILES),
    "secondary_separator": Unbuilt(("",), instead=_CAPTION_FILES),
    "caption_prefix": Unbuilt(("",), instead=_CAPTION_FILES),
    "caption_suffix": Unbuilt(("",), instead=_CAPTION_FILES),
    "color_aug": Unbuilt((False,)),
    "flip_aug": Unbuilt((False,)),
    "random_crop": Unbuilt((False,), instead="pictures are cropped at the centre"),
    "face_crop_aug_range": Unbuilt(),
    "token_warmup_min": Unbuilt(inert="there is no token warm-up"),
    "token_warmup_step": Unbuilt((0,)),
    "caption_dropout_rate": Unbuilt((0,)),
    "caption_dropout_every_n_epochs": Unbuilt((0,)),
    "caption_tag_dropout_rate": Unbuilt((0,)),
    "custom_attributes": Unbuilt(({},)),
    "debug_dataset": Unbuilt((False,)),
    "prior_loss_weight": Unbuilt((1,)),
    "max_token_length": Unbuilt(instead="the length of the text is an option of the command line"),
}


def check_unbuilt(name: str, value: Any, place: str) -> UserError | str:
    """The refusal of a key that is not built yet, or the note that it changes nothing."""
    key = UNBUILT[name]
    if key.inert:
        return f"{place}: without effect here: {key.inert}"
    if any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in key.off):
        return ""
    return UserError("this key is not built yet", place=place,
                     remedy=f"remove it; {key.instead}" if key.instead else "remove it")
