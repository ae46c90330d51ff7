"""SDXL: the adapter.

Latents are (B, 4, H/8, W/8) = z * 0.13025. Facts stand once: calling the U-Net in ``sdxl_call.py``, its files in
``sdxl_parts.py``, modules and their configurations in ``sdxl_models.py``, text in ``sdxl_text.py``, saving in ``sdxl_export.py``,
previews in ``sdxl_preview.py``, key names in ``checkpoint/sdxl_keys.py`` and the tables it shares. This page puts them together
for one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from library.architectures import clip_chunks, clip_states, sdxl_call, sdxl_text
from library.architectures.attention import route
from library.architectures.base import DENOISER, TextEncoders
from library.architectures.loading import parameter_count, without_weights
from library.architectures.sdxl_export import save, saved_bytes
from library.architectures.sdxl_models import build_unet, load_clip_g, load_clip_l, load_unet, load_vae
from library.architectures.sdxl_options import SdxlOptions
from library.architectures.sdxl_parts import TOKENIZER, TOKENIZER_2, open_parts, open_tokenizer
from library.architectures.sdxl_preview import sample
from library.architectures.sdxl_tokens import read_token_meter
from library.architectures.tokenizers import load_tokenizer, tokenizer_identity
from library.architectures.vae import encode_image
from library.config.ddpm_options import DdpmOptions
from library.config.loss_options import LossOptions
from library.config.schema import ModelOptions
from library.data.tokens import TokenMeter
from library.errors import UserError
from library.objectives.ddpm import Ddpm
from library.objectives.noise import Draws
from library.optim.groups import Group
from library.prompts import Prompt


class Sdxl:
    """The adapter of one run. Construction reads headers only and refuses wrong, missing or unsupported files at once."""

    latent = SdxlOptions.latent
    text_trim: Mapping[str, str] = {}  # the U-Net attends to padding
    text_encoders = sdxl_text.NAMES
    base_version = "sdxl_base_v1-0"  # in the metadata of saved files

    def __init__(self, model: ModelOptions, options: SdxlOptions, objective: DdpmOptions):
        self.attention, self.options = model.attention, options
        self.parts = open_parts(str(model.pretrained_model_name_or_path), vae=options.vae,
                                tokenizer_cache_dir=options.tokenizer_cache_dir)
        self.file = self.parts.unet
        self.objective_options = self._in_force(objective)
        # as the input, but no pickles
        self.save_format = "safetensors" if self.file.layout == "ldm" else "diffusers_safetensors"

    def files(self) -> frozenset[Path]:
        parts = (self.file.whole, self.parts.clip_l, self.parts.clip_g, self.parts.vae)
        return frozenset(path for part in parts for path in part.files)

    def describe(self) -> str:
        return self.parts.summary()

    def objective(self, loss: LossOptions) -> Ddpm:
        return Ddpm(self.objective_options, loss)

    def encoder_rates(self, learning_rate: float) -> Mapping[str, float]:
        return self.options.encoder_rates(learning_rate)

    def _in_force(self, options: DdpmOptions) -> DdpmOptions:
        """``options`` with what the checkpoint says of itself: velocity prediction and zero terminal SNR go together with it.

        UserError for a setting that belongs to the other kind of prediction.
        """
        velocity = options.v_parameterization or self.file.predicts_velocity
        if options.scale_v_pred_loss_like_noise_pred and not velocity:
            raise UserError("acts on velocity prediction only, and this model predicts noise",
                            place="--scale_v_pred_loss_like_noise_pred", remedy="leave it out, or add --v_parameterization")
        if options.v_pred_like_loss and velocity:
            raise UserError(f"{self.file.whole.path} predicts velocity, so its loss is one already", place="--v_pred_like_loss",
                            remedy="leave it out")
        return replace(options, v_parameterization=velocity,
                       zero_terminal_snr=options.zero_terminal_snr or self.file.zero_terminal_snr)

    def _vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.options.no_half_vae or dtype == torch.float16 else dtype

    def vae_identity(self, dtype: torch.dtype) -> str:
        return f"{self.parts.vae.identity()}/{self._vae_dtype(dtype)}/posterior-mean"

    def text_identity(self, names: Sequence[str], dtype: torch.dtype) -> str:
        files = {"clip_l": (self.parts.clip_l, self.parts.tokenizer), "clip_g": (self.parts.clip_g, self.parts.tokenizer_2)}
        encoders = [f"{name}={files[name][0].identity()}/{tokenizer_identity(files[name][1])}" for name in names]
        return "/".join([*encoders, str(dtype), str(self.options.max_token_length), f"weighted={self.options.weighted_captions}"])

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(self.parts.vae, self._vae_dtype(dtype), device)

    def load_text_encoders(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> TextEncoders:
        load = {"clip_l": lambda: load_clip_l(self.parts.clip_l, dtype, device),
                "clip_g": lambda: load_clip_g(self.parts.clip_g, dtype, device)}
        modules = {name: load[name]() for name in names}
        return TextEncoders(modules, sdxl_text.Tokenizers(load_tokenizer(TOKENIZER, self.parts.tokenizer),
                                                          load_tokenizer(TOKENIZER_2, self.parts.tokenizer_2)))

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        denoiser = load_unet(self.file, dtype, device)
        return denoiser if self.attention == "torch" else route(denoiser, self.attention)

    def meta_denoiser(self, dtype: torch.dtype) -> nn.Module:
        return without_weights(lambda: build_unet(self.file), dtype)

    def meta_text(self, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        length, pooled = clip_chunks.length(self.options.chunks), self.file.pooled_width
        # the second encoder's states are as wide as its pooled vector; only the sum of both widths matters
        return {"clip_l": torch.zeros(batch, length, self.file.text_width - pooled, dtype=dtype),
                "clip_g": torch.zeros(batch, length, pooled, dtype=dtype), "pooled": torch.zeros(batch, pooled, dtype=dtype)}

    def encoder_parameters(self) -> Mapping[str, int]:
        parts = {"vae": self.parts.vae, "clip_l": self.parts.clip_l, "clip_g": self.parts.clip_g}
        return {name: parameter_count(source) for name, source in parts.items()}

    def encode_image(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return encode_image(vae, pixels)

    def encode_text(self, encoders: TextEncoders, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        return sdxl_text.encode_text(encoders.modules, encoders.tokenizers, captions, self.options.chunks,
                                     self.options.weighted_captions)

    def vary_text(self, text: Mapping[str, torch.Tensor], draws: Draws) -> Mapping[str, torch.Tensor]:
        return text

    def predict(self, denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
                geometry: torch.Tensor) -> torch.Tensor:
        return sdxl_call.predict(denoiser, x_t, level, text, geometry)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return sdxl_call.blocks(denoiser)

    def text_blocks(self, name: str, encoder: nn.Module) -> list[nn.Module]:
        return clip_states.blocks(encoder)

    def groups(self, denoiser: nn.Module, encoders: TextEncoders, learning_rate: float) -> list[Group]:
        """What trains, named, with gradients switched on for it and off for all else.

        The U-Net whole or, with ``--block_lr``, in its 23 blocks; a learning rate of 0 leaves a part out for good. (Without
        anything else to train the U-Net stays in at 0: a run that changes nothing is a way to convert a file.)
        """
        rates = self.options.encoder_rates(learning_rate)
        denoiser.requires_grad_(False)
        found: list[Group] = []
        if self.options.block_rates is not None:
            blocks = sdxl_call.block_groups(denoiser)
            found += [Group(f"unet block {index}", tuple(named), rate)
                      for index, (named, rate) in enumerate(zip(blocks, self.options.block_rates, strict=True)) if rate > 0]
        elif learning_rate > 0 or not rates:
            found.append(Group("unet", tuple(denoiser.named_parameters()), learning_rate))
        for name, rate in rates.items():
            encoders.modules[name].requires_grad_(False)
            named = sdxl_text.trained_parameters(name, encoders.modules[name])
            found.append(Group(name, tuple((f"{name}.{key}", parameter) for key, parameter in named), rate))
        for group in found:
            for _, parameter in group.params:
                parameter.requires_grad_(True)
        return found

    def sample(self, denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
               negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> list[Image.Image]:
        return sample(denoiser, vae, prompts, positive, negative, compute_dtype, self.objective_options.v_parameterization,
                      self.objective_options.zero_terminal_snr)

    def export(self, modules: Mapping[str, nn.Module], path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str],
               save_format: str) -> None:
        """The whole model, marked where it predicts velocity."""
        trained = {"unet" if name == DENOISER else name: module for name, module in modules.items()}
        save(path, self.parts, trained, dtype, metadata, save_format,
             predicts_velocity=self.objective_options.v_parameterization,
             zero_terminal_snr=self.objective_options.zero_terminal_snr)

    def saved_bytes(self, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, save_format: str) -> int:
        return saved_bytes(self.parts, dtype)

    def modelspec(self) -> Mapping[str, str]:
        return {"architecture": "stable-diffusion-xl-v1-base",
                "implementation": "https://github.com/Stability-AI/generative-models",
                "prediction_type": "v" if self.objective_options.v_parameterization else "epsilon"}


def open_architecture(model: ModelOptions, options: SdxlOptions, objective: DdpmOptions) -> Sdxl:
    """What ``run.py`` calls: the adapter of this module."""
    return Sdxl(model, options, objective)


def open_token_meter(model: ModelOptions, options: SdxlOptions) -> TokenMeter:
    """What ``page.py`` counts captions with: reads the first tokenizer and no weights. UserError without it."""
    folder = open_tokenizer(str(model.pretrained_model_name_or_path), options.tokenizer_cache_dir)
    return read_token_meter(load_tokenizer(TOKENIZER, folder), options.chunks, options.weighted_captions)
