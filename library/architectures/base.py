"""What the loop asks of an architecture: a protocol without behaviour, and the small records it speaks in.

Every fact about a model stands in its own adapter (``library/architectures/<name>.py``): a module with the two functions of
``ArchitectureModule``, one for the model and one that counts the tokens of captions before anything is loaded. ``run.py`` and
``step.py`` know only this page. The module imports neither torch nor diffusers, so that ``--help`` and dataset errors stay fast.

Letters: B batch, C latent channels, h w latent height and width, H W picture height and width, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from library.config.schema import ModelOptions
    from library.data.tokens import TokenMeter
    from library.prompts import Prompt


@dataclass(frozen=True)
class LatentSpec:
    """Geometry of the latent space: ``channels``, pixels per latent cell and side, latent cells per token and side."""

    channels: int
    factor: int
    patch: int

    @property
    def pixel_step(self) -> int:
        """Every picture side must be a multiple of this many pixels."""
        return self.factor * self.patch

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of a latent of ``height`` x ``width`` cells."""
        return (height // self.patch) * (width // self.patch)


@dataclass(frozen=True)
class TextEncoders:
    """Loaded encoders with the tokenizers they need to be called; only the adapter looks inside ``tokenizers``."""

    modules: Mapping[str, nn.Module]
    tokenizers: Any


@dataclass(frozen=True)
class NpzLayout:
    """Latents that another trainer left beside the pictures, for ``tools/cache.py import`` (an architecture's options have it
    as ``npz``).

    ``files``: names beside the picture, of ``{stem}``, ``{width}`` and ``{height}`` (the picture's pixels). ``sized_keys``: names
    in the file end in ``_<h>x<w>``, the latent's cells. Our latents are (theirs - ``shift``) * ``scale``.
    """

    files: tuple[str, ...]
    sized_keys: bool
    shift: float = 0.0
    scale: float = 1.0


class ArchitectureModule(Protocol):
    """What ``run.py`` asks of the module that an entry script names as its architecture."""

    def open_architecture(self, model: ModelOptions, options: Any) -> Architecture:
        """The adapter of one run, with the architecture's own ``options``. Reads headers only; UserError for wrong files."""

    def open_token_meter(self, model: ModelOptions, options: Any) -> TokenMeter:
        """Counts the tokens of texts as ``encode_text`` will, with tokenizers alone: no weights are read, and encoders may be
        missing. UserError where the tokenizers cannot be opened."""


class Architecture(Protocol):
    """One model family with this run's settings. Construction reads file headers only and refuses wrong files."""

    latent: LatentSpec
    text_trim: Mapping[str, str]
    """Name of a text tensor (B, L, ...) -> name of its mask (B, L), for those of which ``predict`` never reads the padding: a
    cache keeps their real tokens only, and what is padding reads as zeros."""

    def vae_identity(self, dtype: torch.dtype) -> str:
        """Changes when the autoencoder's weights or its arithmetic do; part of every latent's cache key."""

    def text_identity(self, dtype: torch.dtype) -> str:
        """The same for the text encoders, their tokenizers and the settings of ``encode_text``."""

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> TextEncoders: ...

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def encode_image(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32, shifted and scaled as the denoiser expects."""

    def encode_text(self, encoders: TextEncoders, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Captions -> named tensors, each (B, ...): exactly what ``predict`` takes as ``text``."""

    def predict(self, denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor,
                text: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, C, h, w), (B,) noise level in [0, 1], text -> (B, C, h, w) float32: the velocity noise - latents."""

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks in the order in which they run."""

    def sample(self, denoiser: nn.Module, vae: nn.Module, prompt: Prompt, positive: Mapping[str, torch.Tensor],
               negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> Image.Image:
        """One preview picture from encoded text (batch of one), with matrix products in ``compute_dtype``."""

    def export(self, denoiser: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write the trained weights in the layout of the input file; ``dtype`` None keeps the trained one."""

    def modelspec(self) -> Mapping[str, str]:
        """Architecture and conditioning facts for the file's metadata."""

    def files(self) -> frozenset[Path]:
        """Every file of weights that this run reads; none of them may be written over."""

    def describe(self) -> str:
        """For the log: the variant, and a line per part that says where it was found."""
