"""Pictures and captions become latents and text tensors: once into the cache, or for each batch while training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from library.architectures.base import Architecture, TextEncoders
from library.config.schema import CachingOptions
from library.data.cache import Stored, opener
from library.data.dataset import Batch
from library.data.fill import fill_latents, fill_text
from library.data.scan import Item
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
class Encoded:
    """What training reads: ``latents`` per item and ``text`` per caption (None: encoded for each batch by ``batch``),
    the encoded preview prompts, and the autoencoder that draws previews (on the CPU until it is used)."""

    latents: Sequence[Stored] | None
    text: Mapping[str, Stored] | None
    prompts: Mapping[str, Text]
    vae: nn.Module | None
    batch: Callable[[Batch], tuple[torch.Tensor, Text]]


def encode_all(arch: Architecture, runtime: Runtime, caching: CachingOptions, items: Sequence[Item], batch_size: int,
               prompts: Sequence[Prompt]) -> Encoded:
    """Fill the caches that were asked for, encode the preview prompts, and free every model that training does not need."""
    # Half precision overflows in some autoencoders and in T5: float16 runs encode in bfloat16 or float32 instead.
    dtype = torch.bfloat16 if runtime.compute_dtype is not torch.float32 and runtime.device.type == "cuda" else torch.float32
    vae = Lazy(lambda: arch.load_vae(runtime.device, dtype))
    encoders = Lazy(lambda: arch.load_text_encoders(runtime.device, dtype))

    latents = None
    if caching.latents_cached:
        latents_at = opener(caching.cache_dir, caching.cache_latents_to_disk)

        def encode_pictures(pixels: torch.Tensor) -> torch.Tensor:
            return arch.encode_image(vae.get(), pixels.to(runtime.device)).cpu()

        latents = _ranks_in_turn(runtime, caching.cache_latents_to_disk, lambda: fill_latents(
            items, latents_at, encode_pictures, arch.vae_identity(dtype), caching.vae_batch_size, _Announce("latents")))
    previewer = vae.get() if prompts and runtime.is_main else None
    if caching.latents_cached:
        previewer = previewer.to("cpu") if previewer is not None else None
        vae.free()  # before the text encoders come
    text, encoded_prompts = None, {}
    wanted = sorted({words for prompt in prompts for words in (prompt.text, prompt.negative)})
    prompt_items = [replace(items[0], caption=words) for words in wanted]  # stored beside the first folder's captions
    to_disk = caching.cache_text_encoder_outputs_to_disk

    def encode_captions(captions: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: value.cpu() for name, value in arch.encode_text(encoders.get(), captions).items()}

    def fill(some: Sequence[Item], announce: _Announce) -> Mapping[str, Stored]:
        text_at = opener(caching.cache_dir, to_disk)
        size = caching.text_encoder_batch_size or batch_size
        return _ranks_in_turn(runtime, to_disk, lambda: fill_text(
            some, text_at, encode_captions, arch.text_identity(dtype), size, announce))

    if prompts:
        stored = fill(prompt_items, _Announce("preview prompts"))
        encoded_prompts = {words: {name: value[None] for name, value in one.read().items()} for words, one in stored.items()}
    if caching.text_cached:
        text = fill(items, _Announce("text outputs"))
        if encoders.value is not None and (note := arch.truncation_note(encoders.value)):
            log.warning(note)
        encoders.free()
    return Encoded(latents, text, encoded_prompts, previewer, _batch_encoder(arch, runtime.device, vae, encoders))


def as_cached(value: torch.Tensor) -> torch.Tensor:
    """``value`` with the rounding that a trip through the cache would give it: float32 of float16; masks as they are."""
    return value.to(torch.float16).float() if value.is_floating_point() else value


def _batch_encoder(arch: Architecture, device: torch.device, vae: Lazy, encoders: Lazy):
    """(B, C, h, w) latents and text of one batch on the device. What is encoded here is rounded as the cache rounds it,
    so that a run with caches and one without see the same numbers."""

    told: list[str] = []  # captions that are too long are worth one warning, not one per batch

    def encode(batch: Batch) -> tuple[torch.Tensor, Text]:
        with torch.no_grad():
            if batch.latents is not None:
                latents = batch.latents.to(device, non_blocking=True)
            else:
                latents = as_cached(arch.encode_image(vae.get(), batch.pixels.to(device, non_blocking=True)))
            if batch.text is not None:
                text = {name: value.to(device, non_blocking=True) for name, value in batch.text.items()}
            else:
                encoded: TextEncoders = encoders.get()
                text = {name: as_cached(value.to(device)) for name, value in
                        arch.encode_text(encoded, batch.captions).items()}
                if not told and (note := arch.truncation_note(encoded)):
                    log.warning("in this batch %s", note)
                    told.append(note)
        return latents, text

    return encode


def _ranks_in_turn(runtime: Runtime, shared: bool, fill: Callable):
    """On a shared disk the first rank encodes and the others then find everything done; in RAM each fills its own."""
    if shared and not runtime.is_main:
        runtime.wait()
        return fill()
    filled = fill()
    if shared:
        runtime.wait()
    return filled


class _Announce:
    """Progress of one cache: a line every ten seconds and one at the end; silence when there was nothing to encode."""

    def __init__(self, what: str):
        self.what, self.started, self.spoke = what, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self.spoke > 10:
            self.spoke = now
            log.info("encoded %s %d/%d, %.3g a second", self.what, done, total, done / max(now - self.started, 1e-9))
