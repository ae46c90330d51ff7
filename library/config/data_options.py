"""The settings that say what is trained on: pictures, captions, what is done to both, the held-out part, and caches.

Most of them are values that the dataset file may leave out; a value is looked for in the subset, the dataset, ``[general]``,
and then here. ``docs/dataset.md`` describes the keys together.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from library.config.values import flag, read_class_name, read_range, read_size, read_suffixes

# The same names as library.data.augment.INTERPOLATIONS, which cannot be imported here: --help must not wait for numpy
INTERPOLATIONS = ("auto", "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
# They say when and how much to measure, and mean nothing without a held-out part
VALIDATION_SCHEDULE = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
_CAPTIONS, _PICTURES, _VALIDATION = "Captions", "Pictures: augmentation, masks, sampling", "Validation"


@dataclass(frozen=True)
class DatasetOptions:
    title: ClassVar[str] = "Dataset"

    dataset_config: Path | None = flag(None, "TOML or JSON file that lists the picture folders (docs/dataset.md)",
                                       metavar="FILE", default_text="one of the four sources is needed")
    train_data_dir: Path | None = flag(None, "instead of it: folder of folders named by repeats and caption, such as 10_a cat; "
                                       "with --in_json the folder that its pictures are looked up in", metavar="DIR")
    reg_data_dir: Path | None = flag(None, "folder of folders with regularisation pictures, named in the same way", metavar="DIR")
    in_json: Path | None = flag(None, "instead of it: .json or .jsonl file of pictures and captions", metavar="FILE")
    dataset_class: str | None = flag(None, "instead of it: your own Python sequence of pictures and captions",
                                     metavar="PACKAGE.MODULE.CLASS", read=read_class_name)
    resolution: str | None = flag(None, "training size in pixels, N or W,H; buckets keep its area", metavar="N|W,H",
                                  read=read_size, default_text="the dataset file's")
    train_batch_size: int = flag(1, "pictures per device and micro-batch", minimum=1)
    enable_bucket: bool = flag(False, "group pictures by aspect ratio instead of cropping all to one shape")
    min_bucket_reso: int | None = flag(None, "shortest side of a bucket in pixels", minimum=1,
                                       default_text="256, or half the shorter side where that is less")
    max_bucket_reso: int | None = flag(None, "longest side of a bucket in pixels", minimum=1,
                                       default_text="no limit, so that every bucket has the full area")
    bucket_reso_steps: int | None = flag(None, "bucket sides are multiples of this many pixels", minimum=1, default_text="64")
    bucket_no_upscale: bool = flag(False, "never enlarge a picture: small ones get buckets of their own size")
    dataset_repeats: int = flag(1, "times each picture is shown per epoch", minimum=1, maximum=1_000_000)
    recursive: bool = flag(False, "look for pictures in subfolders too")
    skip_image_resolution: str | None = flag(None, "leave out pictures of at most this many pixels, N x N or W x H",
                                             metavar="N|W,H", read=read_size)
    cache_info: bool = flag(False, "keep the sizes and captions of all pictures in an index, so that the next start only looks "
                            "at what changed (always so with caches on disk)")
    max_data_loader_n_workers: int = flag(
        8, "processes that read pictures (never more than CPUs; none when latents are cached)", minimum=0, off="0")
    debug_dataset: bool = flag(False, "write a page that shows what the model will see and what is wrong with the data, and exit",
                               saved=False)

    caption_extension: str | None = flag(None, "ending of caption files, several in order of preference; .json reads caption and "
                                         "tags from a JSON file", metavar="SUFFIX[,SUFFIX]", read=read_suffixes,
                                         default_text=".txt, else .caption", title=_CAPTIONS)
    caption_extention: str | None = flag(None, "old misspelling of --caption_extension", metavar="SUFFIX[,SUFFIX]",
                                         read=read_suffixes, title=_CAPTIONS)
    caption_separator: str = flag(",", "what stands between the tags of a caption", metavar="TEXT", title=_CAPTIONS)
    caption_prefix: str | None = flag(None, "words before every caption", metavar="TEXT", title=_CAPTIONS)
    caption_suffix: str | None = flag(None, "words after every caption", metavar="TEXT", title=_CAPTIONS)
    enable_wildcard: bool = flag(False, "draw one line of a caption file, and one choice of each {a|b}", title=_CAPTIONS)
    shuffle_caption: bool = flag(False, "shuffle the tags of a caption at each showing", title=_CAPTIONS)
    keep_tokens: int = flag(0, "tags at the beginning that are neither shuffled nor dropped", minimum=0, off="0", title=_CAPTIONS)
    keep_tokens_separator: str = flag("", "text such as ||| after the tags that stay, and before those that stay at the end",
                                      metavar="TEXT", default_text="none", title=_CAPTIONS)
    secondary_separator: str | None = flag(None, "text such as ;;; that glues tags together while they are shuffled",
                                           metavar="TEXT", title=_CAPTIONS)
    caption_dropout_rate: float = flag(0.0, "share of showings with an empty caption", minimum=0, maximum=1, off="0",
                                       title=_CAPTIONS)
    caption_dropout_every_n_epochs: int = flag(0, "all captions are empty in every N-th epoch", minimum=0, off="0",
                                               title=_CAPTIONS)
    caption_tag_dropout_rate: float = flag(0.0, "share of tags left out at each showing", minimum=0, maximum=1, off="0",
                                           title=_CAPTIONS)
    token_warmup_min: int = flag(1, "with --token_warmup_step: tags shown at the first step", minimum=0, title=_CAPTIONS)
    token_warmup_step: float = flag(0.0, "show more and more tags over this many steps (below 1: share of the run)", minimum=0,
                                    off="0", title=_CAPTIONS)

    color_aug: bool = flag(False, "change hue or brightness of a third of the showings a little", title=_PICTURES)
    flip_aug: bool = flag(False, "mirror half of the showings", title=_PICTURES)
    random_crop: bool = flag(False, "crop anywhere instead of in the middle", title=_PICTURES)
    face_crop_aug_range: str | None = flag(
        None, "crop around the face given by file names such as x_320_210_90_120.png (centre, size): the crop's short side "
        "is LO to HI times the face", metavar="LO,HI", read=read_range, title=_PICTURES)
    alpha_mask: bool = flag(False, "transparent parts of a picture count less in the loss", title=_PICTURES)
    masked_loss: bool = flag(False, "weight the loss by mask pictures or by transparency", title=_PICTURES)
    conditioning_data_dir: Path | None = flag(None, "folder of mask pictures with the names of the pictures (for --masked_loss)",
                                              metavar="DIR", title=_PICTURES)
    resize_interpolation: str = flag("auto", "how pictures are scaled; auto: by area when they shrink, Lanczos when they grow",
                                     choices=INTERPOLATIONS, title=_PICTURES)
    prior_loss_weight: float = flag(1.0, "weight of regularisation pictures in the loss", minimum=0, off="1", title=_PICTURES)

    validation_split: float = flag(0.0, "share of pictures that is held out to measure the loss on", minimum=0,
                                   off="0", title=_VALIDATION)
    validation_seed: int | None = flag(None, "another choice of held-out pictures", minimum=0, maximum=2**32 - 1,
                                       default_text="one fixed choice, the same for every --seed", title=_VALIDATION)
    validate_every_n_steps: int | None = flag(None, "measure after every N steps", minimum=0, off="0", title=_VALIDATION)
    validate_every_n_epochs: int | None = flag(None, "measure after every N epochs", minimum=0, off="0",
                                               default_text="every epoch, without --validate_every_n_steps", title=_VALIDATION)
    max_validation_steps: int | None = flag(None, "batches to measure at most", minimum=0, off="0", title=_VALIDATION)

    def workers(self, latents_cached: bool) -> int:
        """Processes to start: cached latents need none."""
        return 0 if latents_cached else min(self.max_data_loader_n_workers, os.cpu_count() or 1)


@dataclass(frozen=True)
class CachingOptions:
    title: ClassVar[str] = "Caching"

    cache_latents: bool = flag(False, "encode every picture once and keep the result in memory")
    cache_latents_to_disk: bool = flag(False, "the same, kept on disk for later runs (implies --cache_latents)")
    cache_text_encoder_outputs: bool = flag(False, "encode every caption once, then free the text encoders")
    cache_text_encoder_outputs_to_disk: bool = flag(
        False, "the same, kept on disk for later runs (implies --cache_text_encoder_outputs)")
    text_cache_variants: int | None = flag(None, "texts to encode for each caption that is shuffled, shortened or has wildcards",
                                           minimum=0, maximum=65536, metavar="K", off="0")
    vae_batch_size: int = flag(1, "pictures encoded together", minimum=1)
    text_encoder_batch_size: int | None = flag(None, "captions encoded together", minimum=1, default_text="--train_batch_size")
    cache_dir: Path | None = flag(None, "folder of the disk caches", metavar="DIR",
                                  default_text=".kiln_cache in each picture folder")
    cache_check: str = flag("fast", "how changed pictures are noticed: by their bytes (full), by size and time of the file "
                            "(fast), or not at all (none)", choices=("full", "fast", "none"))
    skip_cache_check: bool = flag(False, "the same as --cache_check none")
    skip_latents_validity_check: bool = flag(False, "old name of --skip_cache_check")

    @property
    def latents_cached(self) -> bool:
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text_cached(self) -> bool:
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    @property
    def on_disk(self) -> bool:
        """Something is kept for later runs."""
        return self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk

    @property
    def variants(self) -> int | None:
        """Texts to cache for each caption that varies; None when text is not cached."""
        return (self.text_cache_variants or 1) if self.text_cached else None

    @property
    def check(self) -> Literal["full", "fast", "none"]:
        """``cache_check``, with the dialect's two flags taken into account."""
        return "none" if self.skip_cache_check or self.skip_latents_validity_check else self.cache_check  # type: ignore
