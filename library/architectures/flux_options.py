"""FLUX.1's own flags, and its defaults for the flags that all architectures share. Light: no torch, no diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.architectures.base import LatentSpec, NpzLayout
from library.config.check import Problem, conflict
from library.config.dialect import INERT, LATER, Record, records
from library.config.schema import flag
from library.prompts import Prompt

if TYPE_CHECKING:
    from library.config.parse import Config

# The recipe that works for FLUX.1 (docs/migrating.md says how the dialect differs, and why)
DEFAULTS: dict[str, object] = {
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.1582,  # exp(1.15): the shift of the model's own schedule for 1024 x 1024
    "model_prediction_type": "raw",
    "huber_schedule": "exponential",  # snr, the dialect's default, fails there with a flow
}

_DIALECT: tuple[Record, ...] = (
    *records(LATER, "double_blocks_to_swap= single_blocks_to_swap=", "blocks of both kinds are counted together, in the order "
             "they run", "use --blocks_to_swap N, of 57 in all", (0,)),
    *records(LATER, "vae=", "the autoencoder of FLUX has a flag of its own", "write --ae FILE"),
    *records(INERT, "tokenizer_cache_dir=",
             "tokenizers are found beside the models; --clip_l_tokenizer and --t5xxl_tokenizer name others"),
    *records(INERT, "max_token_length=", "the length of prompts is --t5xxl_max_token_length", neutral=(75, 150, 225)),
)


@dataclass(frozen=True)
class FluxOptions:
    title: ClassVar[str] = "FLUX.1"
    dialect: ClassVar[tuple[Record, ...]] = _DIALECT
    latent: ClassVar[LatentSpec] = LatentSpec(channels=16, factor=8, patch=2)
    npz: ClassVar[NpzLayout] = NpzLayout(("{stem}_{width:04d}x{height:04d}_flux.npz",), sized_keys=True)  # scaled already
    preview: ClassVar[Prompt] = Prompt("", guidance=3.5)  # what a prompt file leaves out
    # 12 billion weights: --mixed_precision bf16 alone keeps them in bf16, as the dialect does
    weights_follow_mixed_precision: ClassVar[bool] = True

    ae: Path | None = flag(None, "autoencoder", metavar="PATH", exists=True,
                           default_text="in the checkpoint, beside it, or from the hub")
    clip_l: Path | None = flag(None, "CLIP-L text encoder", metavar="PATH", exists=True,
                               default_text="in the checkpoint, beside it, or from the hub")
    t5xxl: Path | None = flag(None, "T5-XXL text encoder (fp32, fp16, bf16 or fp8)", metavar="PATH", exists=True,
                              default_text="in the checkpoint, beside it, or from the hub")
    clip_l_tokenizer: str | None = flag(None, "tokenizer of CLIP-L: folder, file or hub id", metavar="PATH",
                                        default_text="beside the encoder, or from the hub")
    t5xxl_tokenizer: str | None = flag(None, "tokenizer of T5: folder, file or hub id", metavar="PATH",
                                       default_text="beside the encoder, or from the hub")
    t5xxl_max_token_length: int | None = flag(None, "T5 tokens per caption; longer ones are cut", minimum=1,
                                              default_text="512 for dev, 256 for schnell")
    apply_t5_attn_mask: bool = flag(False, "hide the padding of captions from T5 and from the transformer")
    guidance_scale: float = flag(1.0, "guidance value the model is told while it trains (dev only)", minimum=0)
    model_type: str = flag("flux", "kind of model", choices=("flux", "chroma"))

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts that only FLUX can have; ``library.config.check`` asks for them."""
        if self.model_type == "chroma":
            yield conflict(config, "model_type", "not built yet: Chroma", "train a FLUX.1 dev or schnell model")
