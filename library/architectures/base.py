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

    from library.config.loss_options import LossOptions
    from library.config.schema import ModelOptions
    from library.data.tokens import TokenMeter
    from library.objectives.base import Objective
    from library.objectives.noise import Draws
    from library.optim.groups import Group
    from library.prompts import Prompt

DENOISER = "denoiser"  # its name beside those of the text encoders


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
    """Some or all of the text encoders, loaded, with the tokenizers they need to be called; only the adapter looks inside
    ``tokenizers``. ``modules`` may hold a replicated module in place of the bare one."""

    modules: Mapping[str, nn.Module]
    tokenizers: Any


NO_ENCODERS = TextEncoders({}, None)


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

    def open_architecture(self, model: ModelOptions, options: Any, objective: Any) -> Architecture:
        """The adapter of one run, with the architecture's own ``options`` and those of its ``objective``. Reads headers only;
        UserError for wrong files and for settings that the files contradict."""

    def open_token_meter(self, model: ModelOptions, options: Any) -> TokenMeter:
        """Counts the tokens of texts as ``encode_text`` will, with tokenizers alone: no weights are read, and encoders may be
        missing. UserError where the tokenizers cannot be opened."""


class Architecture(Protocol):
    """One model family with this run's settings. Construction reads file headers only and refuses wrong files."""

    latent: LatentSpec
    text_trim: Mapping[str, str]
    """Name of a text tensor (B, L, ...) -> name of its mask (B, L), for those of which ``predict`` never reads the padding: a
    cache keeps their real tokens only, and what is padding reads as zeros."""
    text_encoders: tuple[str, ...]
    """Names of the text encoders that this run has, in the order in which they are loaded."""
    base_version: str
    """The kind of model as ``ss_base_model_version`` of saved files names it: what the dialect writes there."""
    save_format: str
    """What ``--save_model_as`` is when it is not given."""

    def objective(self, loss: LossOptions) -> Objective:
        """The objective in force: what the flags say, with what the checkpoint says of itself."""

    def encoder_rates(self, learning_rate: float) -> Mapping[str, float]:
        """Learning rates of the text encoders that train, by name; empty when none does."""

    def vae_identity(self, dtype: torch.dtype) -> str:
        """Changes when the autoencoder's weights or its arithmetic do; part of every latent's cache key."""

    def text_identity(self, names: Sequence[str], dtype: torch.dtype) -> str:
        """The same for the text encoders ``names``, their tokenizers and the settings of ``encode_text``."""

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def load_text_encoders(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> TextEncoders: ...

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module: ...

    def meta_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """What ``load_denoiser`` gives, without weights: parameters on meta, in ``dtype``. Takes no memory worth mentioning."""

    def meta_text(self, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors like those of ``encode_text`` for ``batch`` captions, of all encoders together, with any values."""

    def encoder_parameters(self) -> Mapping[str, int]:
        """How many numbers the autoencoder (``vae``) and each text encoder consist of, from their headers."""

    def encode_image(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32, shifted and scaled as the denoiser expects."""

    def encode_text(self, encoders: TextEncoders, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Captions -> named tensors, each (B, ...), of the encoders that ``encoders`` holds; those of all encoders together are
        what ``predict`` takes as ``text``. Gradients flow into parameters that require them."""

    def vary_text(self, text: Mapping[str, torch.Tensor], draws: Draws) -> Mapping[str, torch.Tensor]:
        """What training, and only training, changes at random in encoded text, as dropout of one encoder; mostly ``text``."""

    def predict(self, denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
                geometry: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w), (B,) noise level as the objective gives it, text, geometry (B, 6) -> (B, C, h, w) float32 in the
        convention of the objective's target.

        ``geometry``: int64, see ``data.dataset.Batch``; models that are not conditioned on sizes do not read it.
        """

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks in the order in which they run."""

    def text_blocks(self, name: str, encoder: nn.Module) -> list[nn.Module]:
        """The blocks of text encoder ``name`` in the order in which they run."""

    def groups(self, denoiser: nn.Module, encoders: TextEncoders, learning_rate: float) -> list[Group]:
        """What trains, named, with gradients switched on for it and off for all else. ``encoders`` holds those of
        ``encoder_rates``; names of their parameters begin with ``{name}.``."""

    def sample(self, denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
               negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> list[Image.Image]:
        """A preview picture of each prompt, drawn together, with matrix products in ``compute_dtype``.

        ``positive`` and ``negative``: their encoded text, (B, ...) of B prompts. ``prompts``, which have seeds, differ in nothing
        but texts and seed (``prompts.batches``), and no picture depends on the others but for the rounding of matrix products.
        """

    def export(self, modules: Mapping[str, nn.Module], path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str],
               save_format: str) -> None:
        """Write the model: ``modules`` are those that trained, ``DENOISER`` and names of text encoders; what else the format
        holds comes from the input. ``dtype`` None keeps the trained one; ``save_format`` by the names of ``--save_model_as``."""

    def saved_bytes(self, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, save_format: str) -> int:
        """About how much room ``export`` of the same arguments takes."""

    def modelspec(self) -> Mapping[str, str]:
        """Architecture and conditioning facts for the file's metadata."""

    def files(self) -> frozenset[Path]:
        """Every file of weights that this run reads; none of them may be written over."""

    def describe(self) -> str:
        """For the log: the variant, and a line per part that says where it was found."""
