"""What contradicts what: multiples and buckets, caption rules, masks, caches, the held-out part. Mistakes go to the Lookup."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.data_options import VALIDATION_SCHEDULE, CachingOptions
from library.data.augment import Augment
from library.data.bucket import bucket_sizes
from library.data.caption import CaptionRules
from library.data.spec_lookup import Found, Lookup, Steps

if TYPE_CHECKING:
    from library.data.spec import DatasetSpec, SubsetSpec

# Field of CaptionRules -> key
RULE_KEYS: dict[str, str] = {
    "prefix": "caption_prefix", "suffix": "caption_suffix", "separator": "caption_separator", "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator", "secondary_separator": "secondary_separator",
    "wildcard": "enable_wildcard", "shuffle": "shuffle_caption", "dropout_rate": "caption_dropout_rate",
    "dropout_every_n_epochs": "caption_dropout_every_n_epochs", "tag_dropout_rate": "caption_tag_dropout_rate",
    "warmup_min": "token_warmup_min", "warmup_step": "token_warmup_step",
}
_VARYING = ("shuffle_caption", "caption_tag_dropout_rate", "enable_wildcard", "token_warmup_step")
_UNCACHEABLE = ("color_aug", "random_crop", "face_crop_aug_range")


def check_multiples(lookup: Lookup, path: Steps, size: Found, step: int, pixel_step: int) -> None:
    """Sides and bucket steps fit the model's patches."""
    if size.value is not None and any(side % pixel_step for side in size.value):
        near = [max(round(side / pixel_step), 1) * pixel_step for side in size.value]
        lookup.error(f"{size.value[0]} x {size.value[1]} is not a multiple of {pixel_step} pixels, which this model needs",
                     size.place, f"use {near[0] if near[0] == near[1] else near}")
    if step % pixel_step:
        lookup.error(f"{step} is not a multiple of {pixel_step}, which this model needs",
                     lookup.get("bucket_reso_steps", path).place, f"use {max(round(step / pixel_step), 1) * pixel_step}")


def check_buckets(lookup: Lookup, path: Steps, spec: DatasetSpec) -> None:
    """The limits leave buckets, and those that have no effect are named."""
    if not spec.enable_bucket:
        for name in ("bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"):
            lookup.acts(lookup.get(name, path), False, "enable_bucket is false")
        return
    step_place = lookup.get("bucket_reso_steps", path).place
    area_side = math.isqrt(spec.resolution[0] * spec.resolution[1])
    if spec.bucket_reso_steps > area_side:
        lookup.error(f"{spec.bucket_reso_steps} is larger than the resolution", step_place,
                     f"set a smaller bucket_reso_steps than {spec.bucket_reso_steps}")
        return
    for name in ("min_bucket_reso", "max_bucket_reso", "bucket_no_upscale", "bucket_reso_steps"):
        limit = name in ("min_bucket_reso", "max_bucket_reso")
        why = "bucket_no_upscale makes a bucket of any side" if limit and spec.bucket_no_upscale else "enable_bucket is false"
        lookup.acts(lookup.get(name, path), not (limit and spec.bucket_no_upscale), why)
    if spec.bucket_no_upscale:
        return
    short, long = sorted(spec.resolution)
    if spec.min_bucket_reso > short:
        lookup.error(f"{spec.min_bucket_reso} is larger than the resolution's shorter side {short}",
                     lookup.get("min_bucket_reso", path).place, f"use at most {short}, or leave it out")
    elif spec.max_bucket_reso is not None and spec.max_bucket_reso < long:
        lookup.error(f"{spec.max_bucket_reso} is smaller than the resolution's longer side {long}",
                     lookup.get("max_bucket_reso", path).place, f"use at least {long}, better {2 * long}, or leave it out")
    elif not bucket_sizes(spec.resolution, spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps):
        lookup.error(f"no bucket has sides that are multiples of {spec.bucket_reso_steps}, keep to min_bucket_reso and "
                     "max_bucket_reso and fit into the resolution's area", step_place, "use a smaller step or wider limits")


def check_captions(lookup: Lookup, here: Steps, rules: CaptionRules, caching: CachingOptions) -> None:
    """Rules that contradict each other, that would be frozen by a cache, or that cannot act."""
    found = {key: lookup.get(key, here) for key in RULE_KEYS.values()}
    if rules.keep_tokens and rules.keep_tokens_separator:
        lookup.error("keep_tokens and keep_tokens_separator both say which tags stay", found["keep_tokens"].place,
                     "keep one of them")
    for name, separator in (("keep_tokens_separator", rules.keep_tokens_separator),
                            ("secondary_separator", rules.secondary_separator)):
        if separator and separator.strip() == rules.separator.strip():
            lookup.error(f"{separator!r} is the caption_separator as well", found[name].place,
                         'choose another one, such as "|||"')
    if rules.secondary_separator and rules.secondary_separator == rules.keep_tokens_separator:
        lookup.error(f"{rules.secondary_separator!r} is the keep_tokens_separator as well", found["secondary_separator"].place,
                     'choose another one, such as ";;;"')
    if caching.text_cached and rules.follows_step:
        lookup.error("captions that grow with the steps cannot be cached", found["token_warmup_step"].place,
                     "remove it, or leave out --cache_text_encoder_outputs to encode captions while training")
    elif caching.text_cached and rules.varies and not caching.text_cache_variants:
        first = next(found[name] for name in _VARYING if found[name].value)
        lookup.error("cached text would freeze each caption in one form", first.place,
                     "add --text_cache_variants 8, or leave out --cache_text_encoder_outputs to encode captions while training")
    lookup.acts(found["keep_tokens"], rules.splits_tags, "captions are neither shuffled nor shortened")
    lookup.acts(found["token_warmup_min"], rules.follows_step, "there is no token_warmup_step")
    lookup.acts(found["caption_separator"], rules.splits_tags or bool(rules.secondary_separator) or _joins_tags(lookup, here),
                "captions are neither shuffled nor shortened")
    lookup.acts(_flag(lookup, "text_cache_variants", caching.text_cache_variants), caching.text_cached and rules.varies,
                "no caption varies, so each has one text" if caching.text_cached else "text encoder outputs are not cached")
    for name, always in (("caption_dropout_rate", rules.dropout_rate == 1),
                         ("caption_dropout_every_n_epochs", rules.dropout_every_n_epochs == 1)):
        if always:
            lookup.note(found[name].place, "no caption is ever shown")


def _joins_tags(lookup: Lookup, here: Steps) -> bool:
    """Captions and tags come from a file that holds them apart."""
    suffixes = lookup.get("caption_extension", here).or_else(())
    return lookup.get("metadata_file", here).given or any(suffix.endswith(".json") for suffix in suffixes)


def check_pictures(lookup: Lookup, here: Steps, augment: Augment, caching: CachingOptions) -> None:
    """Nothing that changes pixels is frozen by a cache; rules for folders are not given to lists."""
    if caching.latents_cached and augment.changes_pixels:
        for name in _UNCACHEABLE:
            if (found := lookup.get(name, here)).value:
                lookup.error("cached latents would freeze this augmentation", found.place,
                             "remove it, or leave out --cache_latents to encode pictures while training")
    listed = lookup.get("metadata_file", here).given or lookup.flag("dataset_class") is not None
    for name in ("recursive", "caption_extension"):
        lookup.acts(lookup.get(name, here), not listed, "the pictures come from a list")


def check_subsets(lookup: Lookup, path: Steps, subsets: Sequence[SubsetSpec]) -> None:
    """Nothing stands in a dataset twice, and there is something to train on."""
    seen: dict[str, SubsetSpec] = {}
    for subset in subsets:
        source = subset.metadata_file or subset.image_dir
        if source is None:
            continue
        place = lookup.get("metadata_file" if subset.metadata_file else "image_dir", (*path, "subsets", subset.number)).place
        first = seen.setdefault(os.path.normcase(source.resolve()), subset)
        if first is not subset:
            kind = "file" if subset.metadata_file else "folder"
            lookup.error(f"this {kind} stands in the dataset twice, first at {first.place}", place,
                         "remove one of them and set num_repeats on the other")
    for subset in subsets:
        around = next((seen[os.path.normcase(parent)] for parent in _parents(subset) if os.path.normcase(parent) in seen), None)
        if around is not None and around.recursive:
            lookup.note(subset.place, f"{subset.image_dir} lies in {around.image_dir}, which is searched with its subfolders "
                        f"({around.place}), so its pictures are shown twice")
    if subsets and all(subset.is_reg for subset in subsets):
        lookup.error("all subsets of this dataset hold regularisation pictures", lookup.places.table(*path),
                     "add a subset with the pictures to learn")


def _parents(subset: SubsetSpec) -> Sequence[Path]:
    return subset.image_dir.resolve().parents if subset.image_dir is not None and subset.metadata_file is None else ()


def check_run(lookup: Lookup, specs: Sequence[DatasetSpec], caching: CachingOptions) -> None:
    """What only all datasets together can tell. Says nothing while some of them are wrong."""
    if lookup.errors:
        return
    subsets = [subset for spec in specs for subset in spec.subsets]
    if lookup.flag("masked_loss") and all(subset.mask == "none" and subset.source is None for subset in subsets):
        lookup.error("no subset has masks", lookup.flag_place("masked_loss"),
                     "give mask pictures with conditioning_data_dir, or use transparency with alpha_mask")
    if caching.cache_dir is not None and not (caching.on_disk or any(subset.cache_info for subset in subsets)):
        lookup.error("nothing is kept on disk", lookup.flag_place("cache_dir"), "add --cache_latents_to_disk, "
                     "--cache_text_encoder_outputs_to_disk or --cache_info, or leave it out")
    splits = any(spec.validation_split for spec in specs)
    for name in VALIDATION_SCHEDULE:
        if lookup.flag(name) is not None and not splits:
            lookup.error("there is nothing to validate on", lookup.flag_place(name),
                         "add --validation_split 0.1, or leave it out")
    for index, spec in enumerate(specs):
        seed = lookup.get("validation_seed", ("datasets", index))
        lookup.acts(seed, bool(spec.validation_split), "there is no validation_split")
    weight = lookup.get("prior_loss_weight")
    if weight.given and weight.value != 1:
        lookup.acts(Found(True, weight.place, weight.section), any(subset.is_reg for subset in subsets),
                    "there are no regularisation pictures")
    lookup.finish()


def _flag(lookup: Lookup, name: str, value: int | None) -> Found:
    return Found(value, lookup.flag_place(name), "flag" if value is not None else "")
