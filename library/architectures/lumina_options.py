"""The flags of Lumina-Image 2.0 and Lumina-Next, and their defaults for the flags that all architectures share. Light."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.architectures.base import LatentSpec, NpzLayout
from library.config.check import Problem, conflict
from library.config.dialect import INERT, Record, records
from library.config.schema import flag
from library.prompts import Prompt

if TYPE_CHECKING:
    from library.config.parse import Config

# The recipe of Lumina-Image 2.0 (docs/lumina.md has that of Lumina-Next)
DEFAULTS: dict[str, object] = {
    "timestep_sampling": "shift",
    "discrete_flow_shift": 6.0,  # the shift that its pictures are drawn with
    "model_prediction_type": "raw",
    "huber_schedule": "exponential",  # snr, the dialect's default, fails there with a flow
}

_DIALECT: tuple[Record, ...] = (
    *records(INERT, "tokenizer_cache_dir=", "the tokenizer is found beside the model; --gemma2_tokenizer names another"),
    *records(INERT, "max_token_length=", "the length of prompts is --gemma2_max_token_length", neutral=(75, 150, 225)),
)


@dataclass(frozen=True)
class LuminaOptions:
    title: ClassVar[str] = "Lumina"
    dialect: ClassVar[tuple[Record, ...]] = _DIALECT
    # That of Lumina-Image 2.0. Lumina-Next has 4 channels, in cells and patches of the same size: which of the two is trained is
    # known when its file is opened, and until then only the size of a patch in pixels counts.
    latent: ClassVar[LatentSpec] = LatentSpec(channels=16, factor=8, patch=2)
    npz: ClassVar[NpzLayout] = NpzLayout(("{stem}_{width:04d}x{height:04d}_lumina.npz",), sized_keys=True)  # scaled already
    preview: ClassVar[Prompt] = Prompt("", steps=36, cfg=3.5)  # what a prompt file leaves out
    save_formats: ClassVar[tuple[str, ...]] = ("safetensors", "diffusers_safetensors")
    # as the dialect does: --mixed_precision bf16 alone keeps the weights in bf16
    weights_follow_mixed_precision: ClassVar[bool] = True

    gemma2: Path | None = flag(None, "text encoder: Gemma-2-2B, for Lumina-Next Gemma-2B", metavar="PATH", exists=True,
                               default_text="in the checkpoint, beside it, or from the hub")
    ae: Path | None = flag(None, "autoencoder: that of FLUX, for Lumina-Next that of SDXL", metavar="PATH", exists=True,
                           default_text="in the checkpoint, beside it, or from the hub")
    vae: Path | None = flag(None, "another name of --ae", metavar="PATH", exists=True)
    gemma2_tokenizer: str | None = flag(None, "tokenizer of Gemma: folder, file or hub id", metavar="PATH",
                                        default_text="beside the encoder, or from the hub")
    gemma2_max_token_length: int = flag(256, "tokens per caption, system prompt included; longer ones are cut", minimum=2,
                                        maximum=8192)
    system_prompt: str = flag("", "instruction before every caption, as Lumina-Image 2.0 was trained with; not before empty ones",
                              metavar="TEXT")

    @property
    def autoencoder(self) -> Path | None:
        return self.ae or self.vae

    @property
    def autoencoder_flag(self) -> str:
        return "--vae" if self.vae and not self.ae else "--ae"

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts that only this architecture can have; ``library.config.check`` asks for them."""
        if self.ae and self.vae and self.ae != self.vae:
            yield conflict(config, "vae ae", f"{self.vae} names another autoencoder than --ae {self.ae}", "give one of the two")
