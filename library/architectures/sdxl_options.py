"""SDXL's own flags, and its defaults for the flags that all architectures share. Light: no torch, no diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.architectures.base import LatentSpec, NpzLayout
from library.config.check import Problem, conflict
from library.config.dialect import ELSEWHERE, Record, records
from library.config.save_formats import SUFFIXES
from library.config.schema import flag
from library.config.values import show
from library.prompts import Prompt

if TYPE_CHECKING:
    from library.config.parse import Config

BLOCK_RATES = 23
ENCODERS = 2
SCALING = 0.13025  # of the latents; they are not shifted
CHUNK_TOKENS = 75
TOKEN_LENGTHS = (75, 150, 225)
SAMPLERS = ("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
            "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a")
_DIALECT: tuple[Record, ...] = tuple(records(ELSEWHERE, "v2", "belongs to SD 2.x models", "leave it out"))


def read_block_rates(value: Any) -> str:
    """``block_lr`` from ``"0,1e-5,..."`` or a TOML list: 23 learning rates in the canonical form of the first."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    rates = [_rate(part) for part in parts]
    wrong = next((index for index, rate in enumerate(rates) if rate is None), None)
    if len(rates) != BLOCK_RATES or wrong is not None:  # so many values: say which one, or how many there are
        why = (f"it has {len(rates)}" if wrong is None
               else f"value {wrong + 1} is {str(parts[wrong]).strip()!r}, not a number of 0 or more")
        raise ValueError(f"{BLOCK_RATES} learning rates: {why}",
                         "write them with commas: one for the embeddings, 9 down, 3 in the middle, 9 up, one for the output")
    return ",".join(show(rate) for rate in rates)


def _rate(part: Any) -> float | None:
    """``part`` as a learning rate; None when it is none."""
    try:
        rate = float(part)
    except (TypeError, ValueError):
        return None
    return rate if not isinstance(part, bool) and math.isfinite(rate) and rate >= 0 else None


def read_token_length(value: Any) -> int:
    """``max_token_length``: as many tokens as one, two or three pieces have."""
    length = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(length, bool) or length not in TOKEN_LENGTHS:
        raise ValueError("75, 150 or 225", "choose one of those")
    return length


@dataclass(frozen=True)
class SdxlOptions:
    title: ClassVar[str] = "SDXL"
    dialect: ClassVar[tuple[Record, ...]] = _DIALECT
    # a cell of the coarsest level is 4 x 4 latent cells: sides are multiples of 32 pixels
    latent: ClassVar[LatentSpec] = LatentSpec(channels=4, factor=8, patch=4)
    npz: ClassVar[NpzLayout] = NpzLayout(("{stem}_{width:04d}x{height:04d}_sdxl.npz",), sized_keys=False, scale=SCALING)
    save_formats: ClassVar[tuple[str, ...]] = tuple(SUFFIXES)
    samplers: ClassVar[tuple[str, ...]] = SAMPLERS

    vae: str | None = flag(None, "autoencoder: file, folder or hub id", metavar="PATH", default_text="the checkpoint's own")
    no_half_vae: bool = flag(False, "run the autoencoder in float32 where bfloat16 would do (it never runs in float16)")
    tokenizer_cache_dir: Path | None = flag(None, "folder with CLIP tokenizers, such as DIR/openai_clip-vit-large-patch14",
                                            metavar="DIR", exists=True, default_text="beside the checkpoint, or from the hub")
    max_token_length: int = flag(75, "tokens of a caption that are read: 75, 150 or 225; longer ones are cut",
                                 read=read_token_length)
    weighted_captions: bool = flag(False, "brackets in captions weigh words: (more:1.3), [less]")
    train_text_encoder: bool = flag(False, "train both text encoders too")
    learning_rate_te1: float | None = flag(None, "learning rate of CLIP-L; 0 leaves it as it is", minimum=0,
                                           default_text="--learning_rate")
    learning_rate_te2: float | None = flag(None, "learning rate of CLIP-G; 0 leaves it as it is", minimum=0,
                                           default_text="--learning_rate")
    block_lr: str | None = flag(None, "learning rates of the U-Net's 23 blocks in place of --learning_rate; 0 freezes a block",
                                metavar="N,N,...", read=read_block_rates)
    sample_sampler: str = flag("ddim", "sampler of the previews", choices=SAMPLERS)

    @property
    def preview(self) -> Prompt:
        """What a prompt file may leave out."""
        return Prompt("", steps=30, cfg=7.5, sampler=self.sample_sampler)

    @property
    def chunks(self) -> int:
        """Pieces of 75 tokens that a caption is read in."""
        return self.max_token_length // CHUNK_TOKENS

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        return None if self.block_lr is None else tuple(float(rate) for rate in self.block_lr.split(","))

    def encoder_rates(self, learning_rate: float) -> dict[str, float]:
        """Encoder -> learning rate above 0 of those that train."""
        if not self.train_text_encoder:
            return {}
        given = {"clip_l": self.learning_rate_te1, "clip_g": self.learning_rate_te2}
        rates = {name: learning_rate if rate is None else rate for name, rate in given.items()}
        return {name: rate for name, rate in rates.items() if rate > 0}

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts that only this architecture can have; ``library.config.check`` asks for them."""
        for name in ("learning_rate_te1", "learning_rate_te2"):
            if getattr(self, name) and not self.train_text_encoder:
                yield conflict(config, f"{name} train_text_encoder", "has no effect without --train_text_encoder",
                               "add --train_text_encoder or leave it out")
        rates = self.encoder_rates(config.optimizer.learning_rate)
        if config.caching.text_cached and len(rates) == ENCODERS:
            yield conflict(config, "train_text_encoder cache_text_encoder_outputs", "there is nothing to cache: encoders that "
                           "train give other outputs at every step", "leave out --cache_text_encoder_outputs, or train one "
                           "encoder only with --learning_rate_te1 0 or --learning_rate_te2 0; the other one is cached then")
        if self.train_text_encoder and not rates:
            yield conflict(config, "train_text_encoder learning_rate_te1 learning_rate_te2",
                           "both text encoders have a learning rate of 0", "give one of them a learning rate, or leave it out")
        if self.block_rates is not None and not any(self.block_rates) and not rates:
            yield conflict(config, "block_lr", "every block has a learning rate of 0", "give one of them a learning rate")
