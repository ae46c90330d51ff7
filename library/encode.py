"""Pictures and captions become latents and text tensors: once into the cache, or for each batch while training."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy
import torch
from torch import nn

from library.architectures.base import Architecture
from library.config.data_options import CachingOptions
from library.data.dataset import Batch, LatentCache, TextCache, TrainingData
from library.data.fill import Remember, fill_latents
from library.data.fill_text import fill_text
from library.data.filling import Ranks, mask_to_bytes
from library.data.image import mask_to_cells, to_signal
from library.data.items import Items
from library.data.keys import cache_folders
from library.data.select import Selection
from library.data.showing import Course, variant_count, variant_text
from library.data.store import Store
from library.dist import Runtime
from library.log import log
from library.prompts import Prompt

Text = Mapping[str, torch.Tensor]


class Lazy:
    """A model that is loaded when something really has to be encoded: a second start with full caches loads nothing."""

    def __init__(self, load: Callable[[], object]):
        self.load, self.value = load, None

    def get(self):
        if self.value is None:
            self.value = self.load()
        return self.value

    def free(self) -> None:
        """Drop the model and give its device memory back before the denoiser needs it."""
        self.value = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Inputs:
    """What a step reads of a batch, on the device: latents (B, C, h, w), text of the encoders that do not train, geometry (B, 6)
    int64, the mask (B, 1, h, w) in 0..1 or None."""

    latents: torch.Tensor
    text: Text
    geometry: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Encoded:
    """What training reads: the pictures with what is cached of them, the function that encodes the rest of each batch, the
    preview prompts, and the autoencoder that draws previews (on the CPU where latents are cached). Text is that of the
    encoders that do not train.

    ``validation``: the held-out pictures, None when there are none.
    """

    train: TrainingData
    validation: TrainingData | None
    prompts: Mapping[str, Text]
    vae: nn.Module | None
    batch: Callable[[Batch], Inputs]


def encoding_dtype(runtime: Runtime) -> torch.dtype:
    """In which the autoencoder and the text encoders run. Half precision overflows in some autoencoders and in T5: float16 runs
    encode in bfloat16."""
    fast = runtime.compute_dtype is not torch.float32 and runtime.device.type == "cuda"
    return torch.bfloat16 if fast else torch.float32


def encode_all(arch: Architecture, runtime: Runtime, caching: CachingOptions, selection: Selection, course: Course,
               batch_size: int, prompts: Sequence[Prompt], training: Collection[str] = (),
               remember: Remember | None = None) -> Encoded:
    """Fill the caches that were asked for, encode the preview prompts, and free every model that training does not need.

    ``course.variants`` says in how many variants captions are cached; ``training`` names the text encoders that train: they
    are left to the steps; ``remember`` keeps the content hashes of pictures and masks for the next start.
    """
    dtype = encoding_dtype(runtime)
    vae = Lazy(lambda: arch.load_vae(runtime.device, dtype))
    names = [name for name in arch.text_encoders if name not in training]
    encoders = Lazy(lambda: arch.load_text_encoders(names, runtime.device, dtype))
    train = TrainingData(selection.train, course)
    held_out = TrainingData(selection.validation, replace(course, augmented=False)) if len(selection.validation) else None
    parts = [train] if held_out is None else [train, held_out]

    if caching.latents_cached:
        parts = _cache_latents(arch, runtime, caching, vae, dtype, parts, remember)
    previewer = vae.get() if prompts and runtime.rank < runtime.beside_main else None
    if caching.latents_cached:
        previewer = previewer.to("cpu") if previewer is not None else None
        vae.free()  # before the text encoders come
    encoded_prompts: Mapping[str, Text] = {words: {} for prompt in prompts for words in (prompt.text, prompt.negative)}
    if names:
        text = _Texts(arch, runtime, caching, encoders, arch.text_identity(names, dtype),
                      caching.text_encoder_batch_size or batch_size, selection.train)
        encoded_prompts = text.of_prompts(prompts) if prompts else {}
        if caching.text_cached:
            parts = text.cache(parts)
            encoders.free()
    return Encoded(parts[0], parts[1] if held_out is not None else None, encoded_prompts, previewer,
                   _batch_encoder(arch, runtime.device, vae, encoders if names else None))


def _cache_latents(arch: Architecture, runtime: Runtime, caching: CachingOptions, vae: Lazy, dtype: torch.dtype,
                   parts: Sequence[TrainingData], remember: Remember | None) -> list[TrainingData]:
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return arch.encode_image(vae.get(), to_signal(pixels.to(runtime.device, non_blocking=True)))

    places, folders = cache_folders(parts[0].items, caching.cache_dir)
    store = Store(places if caching.cache_latents_to_disk else (), "latents")
    filled = []
    for part in parts:
        told = Announce("latents" if part is parts[0] else "latents of held-out pictures")
        rows = fill_latents(part.items, store, encode, arch.vae_identity(dtype), caching.vae_batch_size, folders=folders,
                            flips=part.course.augmented, ranks=ranks_of(runtime), progress=told, remember=remember)
        told.close(len(part.items))
        filled.append(replace(part, latents=LatentCache(store, rows)))
    return filled


class _Texts:
    """Encodes texts into one store."""

    def __init__(self, arch: Architecture, runtime: Runtime, caching: CachingOptions, encoders: Lazy, identity: str,
                 batch_size: int, items: Items):
        self.arch, self.runtime, self.encoders = arch, runtime, encoders
        self.identity, self.batch_size = identity, batch_size
        places, self.folders = cache_folders(items, caching.cache_dir)
        self.first = int(self.folders[items.listing[0]])  # what belongs to no picture lies with the first one
        self.store = Store(places if caching.cache_text_encoder_outputs_to_disk else (), "text")

    def of_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Text]:
        """Every prompt and negative prompt -> its tensors with a batch dimension of 1."""
        words = sorted({words for prompt in prompts for words in (prompt.text, prompt.negative)})
        rows = self._rows(words, numpy.full(len(words), self.first), "preview prompts")
        return {text: self.store.read_many([row]) for text, row in zip(words, rows, strict=True)}

    def cache(self, parts: Sequence[TrainingData]) -> list[TrainingData]:
        empty = -1
        if any(subset.captions.dropout_rate or subset.captions.dropout_every_n_epochs for subset in parts[0].items.subsets):
            empty = int(self._rows([""], numpy.array([self.first]), "the empty caption")[0])
        filled = []
        for part in parts:
            variants = CaptionVariants(part.items, part.course)
            folders = numpy.repeat(self.folders[part.items.listing], variants.count)
            what = "text outputs" if part is parts[0] else "text outputs of held-out pictures"
            rows = self._rows(variants, folders, what).reshape(-1, variants.count)
            filled.append(replace(part, text=TextCache(self.store, rows, empty)))
        return filled

    def _rows(self, texts: Sequence[str], folders: numpy.ndarray, what: str) -> numpy.ndarray:
        told = Announce(what)
        rows = fill_text(texts, folders, self.store, lambda words: self.arch.encode_text(self.encoders.get(), words),
                         self.identity, self.batch_size, trim=self.arch.text_trim, ranks=ranks_of(self.runtime), progress=told)
        told.close(len(texts))
        return rows


class CaptionVariants(Sequence[str]):
    """The texts that showings of ``items`` can have, ``count`` for each item one after the other; made when they are asked for.
    An item with fewer variants repeats them."""

    def __init__(self, items: Items, course: Course):
        assert course.variants is not None, "captions that are cached have a number of variants"
        self.items, self.course = items, course
        self.count = course.variants if course.augmented else 1

    def __len__(self) -> int:
        return len(self.items) * self.count

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices: nobody needs them
        item, number = divmod(index, self.count)
        rules = self.items.subset(item).captions
        return variant_text(self.items.caption(item), rules, self.items.sample_id(item), self.course,
                            number % variant_count(rules, self.course))

    def __iter__(self) -> Iterator[str]:
        for item in range(len(self.items)):
            words, rules, item_id = self.items.caption(item), self.items.subset(item).captions, self.items.sample_id(item)
            made = [variant_text(words, rules, item_id, self.course, number)
                    for number in range(variant_count(rules, self.course))]
            yield from (made[number % len(made)] for number in range(self.count))


def as_cached(value: torch.Tensor) -> torch.Tensor:
    """``value`` with the rounding that a trip through the cache would give it: float32 of float16; masks as they are."""
    return value.to(torch.float16).float() if value.is_floating_point() else value


def without_padding(text: Text, trim: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The padding of trimmed tensors (B, L, ...) is zero, as it is when they come from a cache."""
    result = dict(text)
    for name, mask in trim.items():
        if name not in text:
            continue  # of an encoder that trains
        real = text[mask].bool()
        last = real.flip(1).cumsum(1).flip(1) > 0  # up to the last real token
        last[:, 0] = True  # a text without any keeps its first one, as in the cache
        result[name] = text[name].masked_fill(~last.reshape(*last.shape, *[1] * (text[name].ndim - 2)), 0)
    return result


def _batch_encoder(arch: Architecture, device: torch.device, vae: Lazy, encoders: Lazy | None):
    """See ``Encoded.batch``; ``encoders`` None: all of them train. What is encoded here is rounded as the cache rounds it, so
    that a run with caches and one without see the same numbers."""

    def on_device(value: torch.Tensor) -> torch.Tensor:
        value = value.to(device, non_blocking=True)
        return value.float() if value.is_floating_point() else value

    def encode(batch: Batch) -> Inputs:
        mask = None if batch.mask is None else on_device(batch.mask)
        with torch.no_grad():
            if batch.latents is not None:
                latents = on_device(batch.latents)
            else:
                pixels = to_signal(batch.pixels.to(device, non_blocking=True))
                latents = as_cached(arch.encode_image(vae.get(), pixels))
            if batch.pixel_mask is not None:
                cells = mask_to_cells(batch.pixel_mask.to(device, non_blocking=True), *latents.shape[2:])
                mask = mask_to_bytes(cells).float() / 255
            text: Text = {}
            if batch.text is not None:
                text = {name: on_device(value) for name, value in batch.text.items()}
            elif encoders is not None:
                encoded = without_padding(arch.encode_text(encoders.get(), batch.captions), arch.text_trim)
                text = {name: as_cached(value.to(device)) for name, value in encoded.items()}
        return Inputs(latents, text, batch.geometry.to(device, non_blocking=True), mask)

    return encode


def ranks_of(runtime: Runtime) -> Ranks:
    return Ranks(runtime.rank, runtime.world_size, runtime.exchange)


class Announce:
    """Progress of one cache: a line every ten seconds and one at the end; one line when everything was there already."""

    def __init__(self, what: str):
        self.what, self.started, self.spoke, self.encoded = what, time.monotonic(), time.monotonic(), 0

    def __call__(self, seen: int, total: int, encoded: int) -> None:
        now, self.encoded = time.monotonic(), encoded
        if now - self.spoke > 10 or (seen == total and encoded):
            self.spoke = now
            # What is still to be looked at may turn out to be there already: the total only falls.
            log.info("encoded %s %d/%d, %.3g a second", self.what, encoded, encoded + total - seen,
                     encoded / max(now - self.started, 1e-9))

    def close(self, total: int) -> None:
        """All ``total`` are cached now."""
        if not self.encoded:
            log.info("cached %s: all %d are there already", self.what, total)
