"""What a saved file says of the training that made it: the ``ss_*`` fields that tools read, each from one record of ``TABLE``.

Names and forms are those of the dialect (``reference/peer-census.md`` 7.4). What is not known, or is not so, is left out: no
field holds a guess, and none a path, only names of files and folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from library.checkpoint.writer import DIGEST
from library.config.parse import Config
from library.data.items import Items
from library.data.plan import group_facts
from library.data.spec import DatasetSpec, SubsetSpec

MOST_TAGS = 1000  # of a folder
MOST_TAG_BYTES = 64 << 10  # of all folders together
LONGEST_TAG = 100  # letters: what is longer is a sentence


@dataclass(frozen=True)
class Facts:
    """One training run. ``items``: what is trained on; ``rates`` and ``encoder_rates``: learning rates before the schedule, of
    the denoiser's groups and of the text encoders that train."""

    config: Config
    items: Items
    held_out: int
    rates: Mapping[str, float]
    encoder_rates: Mapping[str, float]
    batches_per_epoch: int
    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    world_size: int
    objective: Any  # the options in force: a checkpoint may overrule the flags
    base_version: str | None = None  # the dialect's name of the kind of model
    started: float = field(default_factory=time.time)
    session: int = field(default_factory=lambda: secrets.randbits(32))  # not from the generators that training seeds

    @cached_property
    def tags(self) -> tuple[dict[str, dict[str, int]], int]:
        """(folder -> tag -> pictures that have it, tags left out). Counted once, when the first file is written."""
        return tag_frequency(self.items)

    @cached_property
    def model_hash(self) -> str | None:
        return short_hash(self.model_file)

    @property
    def model_file(self) -> Path | None:
        given = self.config.model.pretrained_model_name_or_path
        return Path(given).expanduser() if given else None

    @property
    def vae_file(self) -> Path | None:
        options = self.config.architecture
        given = getattr(options, "vae", None) or getattr(options, "ae", None)
        return Path(given) if given else None

    @property
    def only(self) -> DatasetSpec | None:
        """The dataset when there is one: what tools expect of fields that cannot tell several apart."""
        return self.items.specs[0] if len(self.items.specs) == 1 else None

    @property
    def bucketed(self) -> DatasetSpec | None:
        """The only dataset, if it has buckets."""
        return self.only if self.only is not None and self.only.enable_bucket else None

    def shared(self, read: Callable[[SubsetSpec], Any]) -> Any:
        """A setting that all subsets have alike; None where they differ."""
        return same(read(subset) for subset in self.items.subsets)


@dataclass(frozen=True)
class Moment:
    """When a file is written: after ``step`` steps, in ``epoch`` (from 1); ``now`` in seconds since 1970. ``averaged``: it holds
    the running average of the weights."""

    step: int
    epoch: int
    now: float
    averaged: bool = False


@dataclass(frozen=True)
class Field:
    """``value(facts, moment)``: None is left out, a mapping or list becomes JSON, all else its Python form (``True``)."""

    name: str
    group: str
    source: str
    value: Callable[[Facts, Moment], Any]


def fields(facts: Facts, moment: Moment) -> dict[str, str]:
    """Every field of ``TABLE`` and of ``SECTIONS`` that is known, as strings."""
    values = {one.name: one.value(facts, moment) for one in TABLE} | _section_values(facts)
    return {name: _text(value) for name, value in values.items() if value is not None}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


# --- what the values are made of --------------------------------------------------------------------------------------------

def short_hash(path: Path | None) -> str | None:
    """The 8 digits by which older tools know a model file: sha256 of the 64 KiB at 1 MiB. Cheap at any size."""
    try:
        with open(path, "rb") as file:  # type: ignore[arg-type]
            file.seek(1 << 20)
            return hashlib.sha256(file.read(1 << 16)).hexdigest()[:8]
    except (OSError, TypeError):
        return None  # a folder, or a model of the hub


def source_name(subset: SubsetSpec) -> str:
    """The last part of where the pictures come from: never a path."""
    place = subset.image_dir or subset.metadata_file
    return place.resolve().name if place is not None else str(subset.source).rpartition(".")[2]


def tag_frequency(items: Items) -> tuple[dict[str, dict[str, int]], int]:
    """(folder -> tag -> pictures that have it, most frequent first; tags that were left out to keep it small).

    As in the dialect captions are cut at commas, and counted once for each picture, repeats or not.
    """
    counts: dict[str, Counter[str]] = {}
    for number, (subset, listing) in enumerate(zip(items.subsets, items.listings, strict=True)):
        counter = counts.setdefault(source_name(subset), Counter())
        for row in items.row[items.listing == number].tolist():
            counter.update({tag for part in listing.captions[row].splitlines() for tag in map(_tag, part.split(",")) if tag})
    kept: dict[str, dict[str, int]] = {}
    room, left_out = MOST_TAG_BYTES, 0
    for name, counter in counts.items():
        kept[name] = {}
        for tag, count in sorted(counter.items(), key=lambda item: (-item[1], item[0])):
            size = len(tag.encode("utf-8", "replace")) + 12
            if len(kept[name]) < MOST_TAGS and len(tag) <= LONGEST_TAG and size <= room:
                kept[name][tag] = count
                room -= size
            else:
                left_out += 1
    return kept, left_out


def _tag(text: str) -> str:
    """JSON in a file's header cannot hold bytes that are no text."""
    return text.strip().lower().encode("utf-8", "replace").decode("utf-8")


def _bucket_info(facts: Facts, dataset: int) -> dict[str, Any] | None:
    """``{"buckets": {"0": {"resolution": [w, h], "count": n}}, "mean_img_ar_error": x}``; count: pictures with repeats."""
    if not facts.items.specs[dataset].enable_bucket:
        return None
    found = [one for one in group_facts(facts.items, [spec.batch_size for spec in facts.items.specs]) if one.dataset == dataset]
    rows = facts.items.dataset == dataset
    sizes, buckets = facts.items.sizes[rows].astype(numpy.float64), facts.items.buckets[rows].astype(numpy.float64)
    error = numpy.abs(sizes[:, 0] / sizes[:, 1] - buckets[:, 0] / buckets[:, 1])
    return {"buckets": {str(index): {"resolution": list(one.bucket), "count": one.showings} for index, one in enumerate(found)},
            "mean_img_ar_error": round(float(error.mean()), 6)}


def _shown(facts: Facts, regular: bool, dataset: int | None = None) -> int:
    """Pictures of an epoch, repeats counted; of regularisation or not."""
    items = facts.items
    wanted = numpy.array([subset.is_reg == regular and dataset in (None, subset.dataset) for subset in items.subsets])
    return int(items.repeats[wanted[items.listing]].sum())


def _folders(facts: Facts, regular: bool) -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = {}
    for number, subset in enumerate(facts.items.subsets):
        if subset.is_reg == regular:
            entry = result.setdefault(source_name(subset), {"n_repeats": subset.num_repeats, "img_count": 0})
            entry["img_count"] += int((facts.items.listing == number).sum())
    return result


def _datasets(facts: Facts) -> list[dict[str, Any]]:
    found = []
    for number, spec in enumerate(facts.items.specs):
        limits = {"min_bucket_reso": spec.min_bucket_reso, "max_bucket_reso": spec.max_bucket_reso} if spec.enable_bucket else {}
        found.append({
            "is_dreambooth": all(subset.metadata_file is None for subset in spec.subsets),
            "batch_size_per_device": spec.batch_size,
            "num_train_images": _shown(facts, False, number), "num_reg_images": _shown(facts, True, number),
            "resolution": list(spec.resolution), "enable_bucket": spec.enable_bucket, **limits,
            "bucket_info": _bucket_info(facts, number), "subsets": [_subset(facts, subset) for subset in spec.subsets]})
    return found


def _subset(facts: Facts, subset: SubsetSpec) -> dict[str, Any]:
    index = next(number for number, one in enumerate(facts.items.subsets) if one is subset)
    rules, changes = subset.captions, subset.augment
    place = {"metadata_file": subset.metadata_file.name} if subset.metadata_file else {"image_dir": source_name(subset)}
    return {**place, "img_count": int((facts.items.listing == index).sum()), "num_repeats": subset.num_repeats,
            "is_reg": subset.is_reg, "class_tokens": subset.class_tokens, "color_aug": changes.color, "flip_aug": changes.flip,
            "random_crop": changes.random_crop, "shuffle_caption": rules.shuffle, "keep_tokens": rules.keep_tokens,
            "keep_tokens_separator": rules.keep_tokens_separator, "secondary_separator": rules.secondary_separator,
            "enable_wildcard": rules.wildcard, "caption_prefix": rules.prefix, "caption_suffix": rules.suffix,
            "caption_dropout_rate": rules.dropout_rate, "caption_tag_dropout_rate": rules.tag_dropout_rate,
            "resize_interpolation": subset.interpolation}


def same(values: Iterable[Any]) -> Any:
    """What all of them are; None where they differ."""
    first, *rest = values
    return first if all(value == first for value in rest) else None


def _optimizer(facts: Facts) -> str:
    options = facts.config.optimizer
    arguments = ",".join(one for one in options.optimizer_args if not any(mark in one for mark in "/\\"))  # no paths
    return f"{options.chosen_type}({arguments})" if arguments else options.chosen_type


def _denoiser_rates(facts: Facts) -> Any:
    """One number where all groups learn at the same rate, else a number for each group."""
    return next(iter(facts.rates.values())) if len(set(facts.rates.values())) == 1 else dict(facts.rates) or None


def _size(size: Iterable[int]) -> str:
    return f"({', '.join(map(str, size))})"


# --- the table ----------------------------------------------------------------------------------------------------------------

SECTIONS = ("objective", "loss", "architecture")  # of Config: every setting there is a field ss_<flag>


def _section_values(facts: Facts) -> dict[str, Any]:
    """Noise, loss and the model's own settings under the dialect's names. Without paths, and names that may be paths."""
    config, found = facts.config, {}
    for name, setting in config.entry.settings().items():
        if setting.section in SECTIONS and setting.kind is not Path and not setting.meta["secret"]:
            value = getattr(facts.objective if setting.section == "objective" else getattr(config, setting.section), name)
            if value is not None and not any(mark in str(value) for mark in "/\\"):
                found[f"ss_{name}"] = " ".join(value) if isinstance(value, tuple) else value
    return found


def _records(group: str, *rows: tuple[str, str, Callable[[Facts, Moment], Any]]) -> tuple[Field, ...]:
    return tuple(Field(name, group, source, value) for name, source, value in rows)


def _flags(group: str, section: str, names: str) -> tuple[Field, ...]:
    """Fields that are a flag's value as it is."""
    return tuple(Field(f"ss_{name}", group, f"`--{name}`",
                       lambda facts, moment, name=name: getattr(getattr(facts.config, section), name)) for name in names.split())


TABLE: tuple[Field, ...] = (
    *_records(
        "run",
        ("ss_session_id", "drawn at the start of the run", lambda f, m: f.session),
        ("ss_training_started_at", "clock, seconds since 1970", lambda f, m: f.started),
        ("ss_training_finished_at", "clock, when the file was written", lambda f, m: m.now),
        ("ss_output_name", "`--output_name`", lambda f, m: f.config.saving.output_name),
        ("ss_seed", "`--seed`", lambda f, m: f.config.general.seed)),
    *_records(
        "length",
        ("ss_steps", "optimizer steps done", lambda f, m: m.step),
        ("ss_epoch", "epoch of the last step, from 1", lambda f, m: m.epoch),
        ("ss_max_train_steps", "steps of the whole run, whichever flag set them", lambda f, m: f.total_steps),
        ("ss_num_epochs", "epochs of the whole run, a last short one included",
         lambda f, m: -(-f.total_steps // f.steps_per_epoch)),
        ("ss_num_batches_per_epoch", "the batch plan, over all devices", lambda f, m: f.batches_per_epoch)),
    *_flags("length", "training", "gradient_accumulation_steps"),
    *_flags("length", "memory", "gradient_checkpointing"),
    *_records(
        "optimizer",
        ("ss_optimizer", "`--optimizer_type` with `--optimizer_args`", lambda f, m: _optimizer(f)),
        ("ss_learning_rate", "`--learning_rate`", lambda f, m: f.config.optimizer.learning_rate),
        ("ss_unet_lr", "rate of the denoiser; JSON of its groups where they differ", lambda f, m: _denoiser_rates(f)),
        ("ss_text_encoder_lr", "JSON: rates of the text encoders that train",
         lambda f, m: list(f.encoder_rates.values()) or None),
        ("ss_lr_warmup_steps", "`--lr_warmup_steps` in steps", lambda f, m: f.warmup_steps),
        ("ss_lr_scheduler", "`--lr_scheduler`, or `--lr_scheduler_type` where that is given",
         lambda f, m: f.config.optimizer.lr_scheduler_type or f.config.optimizer.lr_scheduler)),
    *_flags("optimizer", "optimizer", "max_grad_norm"),
    *_records(
        "optimizer",
        ("ss_ema_decay", "`--ema_decay`, in files of averaged weights",
         lambda f, m: f.config.ema.ema_decay if m.averaged else None)),
    *_flags("precision", "precision", "mixed_precision full_bf16"),
    *_records(
        "precision",
        ("ss_full_fp16", "never: weights are not kept in fp16", lambda f, m: False),
        ("ss_weights_dtype", "in what trained weights are kept", lambda f, m: f.config.weights_dtype)),
    *_records(
        "data",
        ("ss_num_train_images", "pictures of an epoch, repeats counted", lambda f, m: _shown(f, False)),
        ("ss_num_reg_images", "regularisation pictures of an epoch", lambda f, m: _shown(f, True)),
        ("ss_num_validation_images", "held-out pictures", lambda f, m: f.held_out),
        ("ss_validation_split", "share held out, where all datasets agree",
         lambda f, m: f.held_out and same(spec.validation_split for spec in f.items.specs) or None),
        ("ss_datasets", "JSON: the datasets with their subsets", lambda f, m: _datasets(f)),
        ("ss_dataset_dirs", "JSON: folder -> repeats and pictures", lambda f, m: _folders(f, False)),
        ("ss_reg_dataset_dirs", "the same of regularisation", lambda f, m: _folders(f, True)),
        ("ss_tag_frequency", "JSON: folder -> tag -> pictures", lambda f, m: f.tags[0]),
        ("ss_tag_frequency_left_out", f"tags not listed: beyond {MOST_TAGS} of a folder, longer than {LONGEST_TAG} letters, or "
         f"beyond {MOST_TAG_BYTES >> 10} KiB in all", lambda f, m: f.tags[1] or None)),
    *_records(
        "data, of a single dataset",
        ("ss_batch_size_per_device", "its batch size", lambda f, m: f.only and f.only.batch_size),
        ("ss_total_batch_size", "pictures of an optimizer step",
         lambda f, m: f.only and f.only.batch_size * f.world_size * f.config.training.gradient_accumulation_steps),
        ("ss_resolution", "(width, height)", lambda f, m: f.only and _size(f.only.resolution)),
        ("ss_enable_bucket", "its setting", lambda f, m: f.only and f.only.enable_bucket),
        ("ss_bucket_no_upscale", "its setting", lambda f, m: f.only and f.only.bucket_no_upscale),
        ("ss_min_bucket_reso", "its setting, with buckets", lambda f, m: f.bucketed and f.bucketed.min_bucket_reso),
        ("ss_max_bucket_reso", "its setting, with buckets", lambda f, m: f.bucketed and f.bucketed.max_bucket_reso),
        ("ss_bucket_info", "JSON: buckets with their pictures", lambda f, m: f.only and _bucket_info(f, 0))),
    *_records(
        "captions and changes, where all subsets agree",
        ("ss_shuffle_caption", "dataset", lambda f, m: f.shared(lambda s: s.captions.shuffle)),
        ("ss_keep_tokens", "dataset", lambda f, m: f.shared(lambda s: s.captions.keep_tokens)),
        ("ss_caption_dropout_rate", "dataset", lambda f, m: f.shared(lambda s: s.captions.dropout_rate)),
        ("ss_caption_dropout_every_n_epochs", "dataset", lambda f, m: f.shared(lambda s: s.captions.dropout_every_n_epochs)),
        ("ss_caption_tag_dropout_rate", "dataset", lambda f, m: f.shared(lambda s: s.captions.tag_dropout_rate)),
        ("ss_color_aug", "dataset", lambda f, m: f.shared(lambda s: s.augment.color)),
        ("ss_flip_aug", "dataset", lambda f, m: f.shared(lambda s: s.augment.flip)),
        ("ss_random_crop", "dataset", lambda f, m: f.shared(lambda s: s.augment.random_crop)),
        ("ss_face_crop_aug_range", "dataset",
         lambda f, m: (crop := f.shared(lambda s: s.augment.face_crop)) and f"{crop[0]},{crop[1]}"),
        ("ss_resize_interpolation", "dataset", lambda f, m: f.shared(lambda s: s.interpolation)),
        ("ss_prior_loss_weight", "dataset", lambda f, m: f.items.specs[0].prior_loss_weight)),
    *_records(
        "caches",
        ("ss_cache_latents", "`--cache_latents`, on disk or not", lambda f, m: f.config.caching.latents_cached),
        ("ss_cache_text_encoder_outputs", "`--cache_text_encoder_outputs`, on disk or not",
         lambda f, m: f.config.caching.text_cached)),
    *_records(
        "model",
        ("ss_base_model_version", "the kind of model, by the dialect's name", lambda f, m: f.base_version),
        ("ss_sd_model_name", "name of the model that it started from",
         lambda f, m: f.model_file and Path(os.path.abspath(f.model_file)).name),
        ("ss_sd_model_hash", "sha256 of the 64 KiB at 1 MiB of that file, 8 digits; none for folders and hub ids",
         lambda f, m: f.model_hash),
        ("ss_vae_name", "name of the autoencoder's file, where a flag gives it", lambda f, m: f.vae_file and f.vae_file.name),
        ("ss_vae_hash", "the same hash of that file", lambda f, m: short_hash(f.vae_file)),
        ("sshs_model_hash", "sha256 of all bytes behind the header, filled in while they are written", lambda f, m: DIGEST)),
)
