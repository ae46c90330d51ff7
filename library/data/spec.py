"""What is trained on, as the user said it: datasets of subsets, read from a file or the command line and completely checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.config.data_options import CachingOptions, DatasetOptions
from library.data.augment import Augment
from library.data.bucket import Rule
from library.data.caption import CaptionRules
from library.data.spec_check import (RULE_KEYS, check_buckets, check_captions, check_multiples, check_pictures, check_run,
                                     check_subsets)
from library.data.spec_lookup import Found, Lookup, Steps
from library.data.spec_sources import choose, find_path
from library.errors import raise_all
from library.log import log

# The dialect's own default is ".caption"; nearly every folder of captions people have holds ".txt".
CAPTION_SUFFIXES = (".txt", ".caption")
MIN_BUCKET_SIDE = 256
BUCKET_STEP = 64


@dataclass(frozen=True)
class SubsetSpec:
    """One source of pictures and the rules for them. ``place`` is where the user wrote it down (``file:line``, or a flag).

    Exactly one source is given: ``source`` (``package.module.Class``), ``metadata_file`` (then ``image_dir`` is the folder that
    its names are looked up in, the file's own folder when None), or ``image_dir`` alone. All folders and files exist.
    """

    place: str
    dataset: int  # both count from 0; ``number`` within its dataset
    number: int
    image_dir: Path | None
    recursive: bool
    metadata_file: Path | None
    source: str | None
    caption_suffixes: tuple[str, ...]  # put behind a picture's stem, tried in this order; ".json" holds {"caption", "tags"}
    class_tokens: str | None
    num_repeats: int
    is_reg: bool
    loss_weight: float  # above 0
    mask: Literal["none", "alpha", "files"]
    mask_dir: Path | None  # set exactly when ``mask`` is "files"
    captions: CaptionRules
    augment: Augment
    interpolation: str  # one of augment.INTERPOLATIONS
    cache_info: bool  # keep the index of this subset even when nothing else is kept on disk


@dataclass(frozen=True)
class DatasetSpec:
    """Subsets that share batches. Sizes are (width, height) in pixels; bucket limits are sides in pixels."""

    resolution: tuple[int, int]
    batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int | None
    bucket_reso_steps: int
    bucket_no_upscale: bool
    subsets: tuple[SubsetSpec, ...]
    place: str
    validation_split: float = 0.0  # in [0, 1)
    validation_seed: int | None = None
    skip_image_resolution: tuple[int, int] | None = None  # pictures of at most this area are left out
    prior_loss_weight: float = 1.0  # of regularisation pictures; the same for all datasets

    @property
    def rule(self) -> Rule:
        """Turns the size of a picture into its place in a bucket."""
        return Rule(self.resolution, self.enable_bucket, self.min_bucket_reso, self.max_bucket_reso, self.bucket_reso_steps,
                    self.bucket_no_upscale)


def load(options: DatasetOptions, caching: CachingOptions, pixel_step: int,
         place: Callable[[str], str] = "--{}".format) -> tuple[DatasetSpec, ...]:
    """Read and check what the flags name: a dataset file, folders of folders, a metadata file or a class.

    ``pixel_step`` is what the architecture needs every side to be a multiple of; ``place`` says where a flag was given.
    Raises UserError, or UserErrors with everything that is wrong. No picture is looked at.
    """
    source = choose(options, place)
    lookup = Lookup(source.values, source.places, options, place)
    lookup.notes += source.notes
    specs: list[DatasetSpec] = []
    if lookup.check_structure():
        for index in range(len(source.values["datasets"])):
            specs += _dataset(lookup, ("datasets", index), pixel_step, source.python, caching)
        check_run(lookup, specs, caching)
    raise_all(list({str(error): error for error in lookup.errors}.values()))  # a shared value may be looked up twice
    for note in dict.fromkeys(lookup.notes):
        log.info(note)
    return tuple(specs)


def _dataset(lookup: Lookup, path: Steps, pixel_step: int, python: str | None, caching: CachingOptions) -> list[DatasetSpec]:
    """The dataset at ``path``; none when something is wrong with it."""
    before = len(lookup.errors)

    def value(name: str, default: Any) -> Any:
        return lookup.get(name, path).or_else(default)

    size = lookup.get("resolution", path)
    step = value("bucket_reso_steps", max(BUCKET_STEP // pixel_step, 1) * pixel_step)
    if not size.given:
        lookup.error("this dataset has no resolution", size.place,
                     "add --resolution 1024" if lookup.places.folder is None else "add for instance resolution = 1024")
    check_multiples(lookup, path, size, step, pixel_step)
    subsets = _subsets(lookup, path, python, caching)
    if size.value is None:
        return []
    short = min(size.value)
    smallest = value("min_bucket_reso", min(MIN_BUCKET_SIDE, max(short // 2, step), short))
    spec = DatasetSpec(
        size.value, value("batch_size", 1), value("enable_bucket", False), smallest, value("max_bucket_reso", None), step,
        value("bucket_no_upscale", False), subsets, lookup.places.table(*path), value("validation_split", 0.0),
        value("validation_seed", None), value("skip_image_resolution", None), lookup.get("prior_loss_weight").or_else(1.0))
    check_buckets(lookup, path, spec)
    return [spec] if len(lookup.errors) == before else []


def _subsets(lookup: Lookup, path: Steps, python: str | None, caching: CachingOptions) -> tuple[SubsetSpec, ...]:
    specs: list[SubsetSpec] = []
    for number in range(len(lookup.values["datasets"][path[1]]["subsets"])):
        here = (*path, "subsets", number)
        before = len(lookup.errors)
        image_dir, metadata_file = _sources(lookup, here, python)
        mask, mask_dir = _mask(lookup, here)
        rules, changes = _caption_rules(lookup, here), _augment(lookup, here)
        check_captions(lookup, here, rules, caching)
        check_pictures(lookup, here, changes, caching)
        if len(lookup.errors) > before:
            continue
        tokens = lookup.get("class_tokens", here).or_else("").strip()
        specs.append(SubsetSpec(
            lookup.places.table(*here), path[1], number, image_dir, lookup.get("recursive", here).or_else(False), metadata_file,
            python, lookup.get("caption_extension", here).or_else(None) or _misspelt_suffixes(lookup) or CAPTION_SUFFIXES,
            tokens or None, lookup.get("num_repeats", here).or_else(1), lookup.get("is_reg", here).or_else(False),
            lookup.get("loss_weight", here).or_else(1.0), mask, mask_dir, rules, changes,
            lookup.get("resize_interpolation", here).or_else("auto"), lookup.get("cache_info", here).or_else(False)))
    check_subsets(lookup, path, specs)
    return tuple(specs)


def _misspelt_suffixes(lookup: Lookup) -> tuple[str, ...]:
    """The dialect's old flag --caption_extention."""
    return tuple(suffixes.split(",")) if (suffixes := lookup.flag("caption_extention")) else ()


def _sources(lookup: Lookup, here: Steps, python: str | None) -> tuple[Path | None, Path | None]:
    """(image_dir, metadata_file); mistakes are reported."""
    folder, metadata = lookup.get("image_dir", here), lookup.get("metadata_file", here)
    if python is None and not folder.given and not metadata.given:
        lookup.error("this subset has no image_dir", folder.place, 'add image_dir = "folder of pictures", or metadata_file')
    if metadata.value is not None:
        if lookup.get("is_reg", here).value:
            lookup.error("regularisation pictures cannot come from a metadata file", lookup.get("is_reg", here).place,
                         "put them into a folder and name it as image_dir")
        if Path(metadata.value).suffix.lower() not in (".json", ".jsonl"):
            lookup.error(f"{metadata.value} is neither .json nor .jsonl", metadata.place,
                         "name the file of pictures and captions")
            metadata = Found(None, metadata.place, metadata.section)
    return (find_path(lookup, folder, "folder", "that holds the pictures"),
            find_path(lookup, metadata, "file", "of pictures and captions"))


def _mask(lookup: Lookup, here: Steps) -> tuple[Literal["none", "alpha", "files"], Path | None]:
    alpha, files = lookup.get("alpha_mask", here), lookup.get("conditioning_data_dir", here)
    if files.section == "flag" and lookup.get("is_reg", here).value:
        files = Found(None, files.place, "")  # regularisation pictures have no masks, unless they are named one by one
    if files.given and alpha.value:
        lookup.error("a subset takes its masks from pictures or from transparency, not from both", files.place,
                     "write alpha_mask = false, or leave out conditioning_data_dir")
    if files.given and not lookup.flag("masked_loss"):
        lookup.error("mask pictures are not used without --masked_loss", files.place, "add --masked_loss, or remove it")
    folder = find_path(lookup, files, "folder", "of the mask pictures")
    return ("files" if folder else "alpha" if alpha.value else "none"), folder


def _caption_rules(lookup: Lookup, here: Steps) -> CaptionRules:
    given = {name: lookup.get(key, here).value for name, key in RULE_KEYS.items()}
    return CaptionRules(**{name: value for name, value in given.items() if value is not None})


def _augment(lookup: Lookup, here: Steps) -> Augment:
    flip, color, crop = (lookup.get(name, here).or_else(False) for name in ("flip_aug", "color_aug", "random_crop"))
    return Augment(flip, color, crop, lookup.get("face_crop_aug_range", here).value)
