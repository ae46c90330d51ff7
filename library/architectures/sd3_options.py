"""SD3's own flags, and its defaults for the flags that all architectures share. Light: no torch, no diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.architectures.base import LatentSpec, NpzLayout
from library.config.check import Problem, conflict, missing_file
from library.config.dialect import ELSEWHERE, INERT, Record, records
from library.config.schema import flag
from library.prompts import Prompt

if TYPE_CHECKING:
    from library.config.parse import Config

SCALING, SHIFT = 1.5305, 0.0609  # of the latents; Stability AI's autoencoder configuration
NO_ENCODER = "none"
DEFAULTS: dict[str, object] = {
    "huber_schedule": "exponential",  # snr, the dialect's default, fails there with a flow
}
_FILE = {"metavar": "PATH", "default_text": "in the checkpoint, beside it, or from the hub"}
_TOKENIZER = {"metavar": "PATH", "default_text": "beside the encoder, or from the hub"}
_DIALECT: tuple[Record, ...] = (
    *records(INERT, "tokenizer_cache_dir=", "tokenizers are found beside the models; --clip_l_tokenizer, --clip_g_tokenizer and "
             "--t5xxl_tokenizer name others"),
    *records(INERT, "max_token_length=", "CLIP reads 77 tokens; the length for T5 is --t5xxl_max_token_length",
             neutral=(75, 150, 225)),
    *records(ELSEWHERE, "discrete_flow_shift=", "SD3 has a flag of its own", "write --training_shift", (1,)),
    *records(ELSEWHERE, "timestep_sampling= sigmoid_scale= model_prediction_type=", "belongs to the script of another kind of "
             "model", "leave it out: --weighting_scheme and --training_shift set the levels"),
    *records(INERT, "ip_noise_gamma= ip_noise_gamma_random_strength", "not part of SD3's objective", neutral=(0,)),
)


def read_device(value: Any) -> str:
    """``t5xxl_device``: a device as torch names it."""
    if not isinstance(value, str) or not re.fullmatch(r"(cpu|cuda|xpu|mps)(:\d+)?", value):
        raise ValueError("a device", "write cpu, cuda, or cuda:1 for the second card")
    return value


@dataclass(frozen=True)
class Sd3Options:
    title: ClassVar[str] = "SD3 and SD3.5"
    dialect: ClassVar[tuple[Record, ...]] = _DIALECT
    latent: ClassVar[LatentSpec] = LatentSpec(channels=16, factor=8, patch=2)
    npz: ClassVar[NpzLayout] = NpzLayout(("{stem}_{width:04d}x{height:04d}_sd3.npz",), sized_keys=True, shift=SHIFT,
                                         scale=SCALING)
    save_formats: ClassVar[tuple[str, ...]] = ("safetensors", "diffusers_safetensors")
    preview: ClassVar[Prompt] = Prompt("", steps=30, cfg=7.5)  # what a prompt file leaves out
    # 2 to 8 billion weights: --mixed_precision bf16 alone keeps them in 16 bits, as the dialect does
    weights_follow_mixed_precision: ClassVar[bool] = True

    clip_l: str | None = flag(None, "CLIP-L text encoder; none trains without it", **_FILE)
    clip_g: str | None = flag(None, "CLIP-G text encoder; none trains without it", **_FILE)
    t5xxl: str | None = flag(None, "T5-XXL text encoder (fp32, fp16, bf16 or fp8); none trains without it", **_FILE)
    vae: Path | None = flag(None, "autoencoder", exists=True, **_FILE)
    clip_l_tokenizer: str | None = flag(None, "tokenizer of CLIP-L: folder, file or hub id", **_TOKENIZER)
    clip_g_tokenizer: str | None = flag(None, "tokenizer of CLIP-G: folder, file or hub id", **_TOKENIZER)
    t5xxl_tokenizer: str | None = flag(None, "tokenizer of T5: folder, file or hub id", **_TOKENIZER)
    t5xxl_device: str | None = flag(None, "device that T5 runs on", metavar="DEVICE", read=read_device,
                                    default_text="that of the training")
    t5xxl_dtype: str | None = flag(None, "dtype that T5 runs in", choices=("float", "fp32", "fp16", "bf16"),
                                   default_text="that of the other encoders")
    t5xxl_max_token_length: int = flag(256, "T5 tokens per caption; longer ones are cut", minimum=2)
    apply_lg_attn_mask: bool = flag(False, "zeros in place of what CLIP-L and CLIP-G say of the padding of captions")
    apply_t5_attn_mask: bool = flag(False, "hide the padding of captions from T5, and zeros in place of what it says of it")
    clip_l_dropout_rate: float = flag(0.0, "share of samples that are shown zeros in place of CLIP-L", minimum=0, maximum=1)
    clip_g_dropout_rate: float = flag(0.0, "share of samples that are shown zeros in place of CLIP-G", minimum=0, maximum=1)
    t5_dropout_rate: float = flag(0.0, "share of samples that are shown zeros in place of T5", minimum=0, maximum=1)
    pos_emb_random_crop_rate: float = flag(0.0, "share of samples that lie anywhere on the table of positions, not in its middle",
                                           minimum=0, maximum=1)
    enable_scaled_pos_embed: bool = flag(False, "rescale positions, so that pictures of every size cover what 1024 x 1024 covers")
    train_text_encoder: bool = flag(False, "train CLIP-L and CLIP-G too")
    train_t5xxl: bool = flag(False, "train T5 too")
    learning_rate_te1: float | None = flag(None, "learning rate of CLIP-L; 0 leaves it as it is", minimum=0,
                                           default_text="--learning_rate")
    learning_rate_te2: float | None = flag(None, "learning rate of CLIP-G; 0 leaves it as it is", minimum=0,
                                           default_text="--learning_rate")
    learning_rate_te3: float | None = flag(None, "learning rate of T5; 0 leaves it as it is", minimum=0,
                                           default_text="--learning_rate")
    num_last_block_to_freeze: int | None = flag(None, "leave the last N blocks of the transformer as they are", minimum=0,
                                                off="0")
    use_t5xxl_cache_only: bool = flag(False, "with --cache_text_encoder_outputs: cache T5 while the CLIPs train")
    save_clip: bool = flag(False, "put CLIP-L and CLIP-G into the saved file, wherever they came from")
    save_t5xxl: bool = flag(False, "put T5 into the saved file, wherever it came from")

    @property
    def given(self) -> dict[str, Path | str | None]:
        """Parts that the user named, or left out with ``none``."""
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5xxl": self.t5xxl, "vae": self.vae}

    @property
    def tokenizers(self) -> dict[str, str | None]:
        return {"clip_l": self.clip_l_tokenizer, "clip_g": self.clip_g_tokenizer, "t5xxl": self.t5xxl_tokenizer}

    @property
    def dropout_rates(self) -> dict[str, float]:
        return {"clip_l": self.clip_l_dropout_rate, "clip_g": self.clip_g_dropout_rate, "t5xxl": self.t5_dropout_rate}

    @property
    def present(self) -> tuple[str, ...]:
        """Encoders that are not left out."""
        return tuple(name for name in ("clip_l", "clip_g", "t5xxl") if getattr(self, name) != NO_ENCODER)

    def encoder_rates(self, learning_rate: float) -> Mapping[str, float]:
        """Encoder -> learning rate above 0 of those that train."""
        given = {"clip_l": (self.train_text_encoder, self.learning_rate_te1),
                 "clip_g": (self.train_text_encoder, self.learning_rate_te2), "t5xxl": (self.train_t5xxl, self.learning_rate_te3)}
        rates = {name: learning_rate if rate is None else rate for name, (trains, rate) in given.items()
                 if trains and name in self.present}
        return {name: rate for name, rate in rates.items() if rate > 0}

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts that only this architecture can have; ``library.config.check`` asks for them."""
        yield from self._path_problems(config)
        yield from self._training_problems(config)
        rates = self.encoder_rates(config.optimizer.learning_rate)
        cached = config.caching.text_cached
        if cached and rates and set(rates) == set(self.present):
            yield conflict(config, "train_text_encoder train_t5xxl cache_text_encoder_outputs", "there is nothing to cache: "
                           "encoders that train give other outputs at every step", "leave out --cache_text_encoder_outputs, or "
                           "train fewer encoders; the others are cached then")
        if self.use_t5xxl_cache_only and not cached:
            yield conflict(config, "use_t5xxl_cache_only cache_text_encoder_outputs", "has no effect without caching",
                           "add --cache_text_encoder_outputs: what does not train is cached")
        if self.use_t5xxl_cache_only and "t5xxl" in rates:
            yield conflict(config, "use_t5xxl_cache_only train_t5xxl", "T5 cannot be cached while it trains",
                           "leave one of the two out")
        if self.t5xxl_device is not None and "t5xxl" in rates:
            yield conflict(config, "t5xxl_device train_t5xxl", "an encoder that trains stands where the training runs",
                           "leave one of the two out")
        if self.t5xxl_dtype is not None and "t5xxl" in rates:
            yield conflict(config, "t5xxl_dtype train_t5xxl", "an encoder that trains is kept in --weights_dtype",
                           "leave one of the two out")

    def _path_problems(self, config: Config) -> Iterator[Problem]:
        if not self.present:
            yield conflict(config, "clip_l clip_g t5xxl", "no text encoder is left: nothing would tell captions apart",
                           "leave at least one of them in")
        for name in ("clip_l", "clip_g", "t5xxl"):
            path = getattr(self, name)
            problem = missing_file(config, name, Path(path)) if path and path != NO_ENCODER else None
            if problem:
                yield problem
        needs = {"clip_l": ("learning_rate_te1", "clip_l_dropout_rate", "clip_l_tokenizer"),
                 "clip_g": ("learning_rate_te2", "clip_g_dropout_rate", "clip_g_tokenizer"),
                 "t5xxl": ("learning_rate_te3", "t5_dropout_rate", "t5xxl_tokenizer", "t5xxl_device", "t5xxl_dtype",
                           "train_t5xxl", "use_t5xxl_cache_only", "apply_t5_attn_mask", "save_t5xxl")}
        for encoder, names in needs.items():
            for name in names:
                if encoder not in self.present and getattr(self, name):
                    yield conflict(config, f"{name} {encoder}", f"has no effect with --{encoder} none",
                                   "leave one of the two out")

        if self.apply_lg_attn_mask and self.present == ("t5xxl",):
            yield conflict(config, "apply_lg_attn_mask clip_l clip_g", "has no effect without CLIP-L and CLIP-G", "leave it out")

    def _training_problems(self, config: Config) -> Iterator[Problem]:
        if self.train_text_encoder and self.present == ("t5xxl",):
            yield conflict(config, "train_text_encoder clip_l clip_g", "there is no CLIP-L and no CLIP-G to train",
                           "leave it out")
        switches = {"learning_rate_te1": "train_text_encoder", "learning_rate_te2": "train_text_encoder",
                    "learning_rate_te3": "train_t5xxl"}
        for name, switch in switches.items():
            if getattr(self, name) and not getattr(self, switch):
                yield conflict(config, f"{name} {switch}", f"has no effect without --{switch}", f"add --{switch} or leave it out")
        rates = self.encoder_rates(config.optimizer.learning_rate)
        for switch, names in (("train_text_encoder", ("clip_l", "clip_g")), ("train_t5xxl", ("t5xxl",))):
            if getattr(self, switch) and set(names) & set(self.present) and not rates:
                yield conflict(config, switch, "every text encoder has a learning rate of 0",
                               "give one of them a learning rate, or leave it out")
