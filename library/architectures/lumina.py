"""Lumina-Image 2.0 and Lumina-Next: the adapter of either, told apart by the checkpoint's header.

Latents are (B, 16, H/8, W/8) = (z - 0.1159) * 0.3611 in 2.0, and (B, 4, H/8, W/8) = z * 0.13025 in Lumina-Next. Facts stand once:
calling the transformers in ``lumina_call.py``, their files in ``lumina_parts.py``, modules and their configurations in
``lumina_models.py`` and ``gemma.py``, text in ``lumina_text.py``, saving in ``lumina_export.py``, previews in
``lumina_preview.py``, key names in ``checkpoint/lumina_keys.py``, ``lumina_next_keys.py`` and ``gemma_keys.py``. This page puts
them together for one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from library.architectures import lumina_call, lumina_text
from library.architectures.attention import route, route_unmasked
from library.architectures.base import DENOISER, TextEncoders
from library.architectures.gemma import load_gemma
from library.architectures.loading import parameter_count, without_weights
from library.architectures.lumina_export import save, saved_bytes
from library.architectures.lumina_models import build_transformer, load_transformer, load_vae, prepare
from library.architectures.lumina_options import LuminaOptions
from library.architectures.lumina_parts import CHANNELS, IMAGE_2, TOKENIZER, open_parts, open_tokenizer
from library.architectures.lumina_preview import sample
from library.architectures.tokenizers import load_tokenizer, tokenizer_identity
from library.architectures.vae import encode_image
from library.checkpoint.lumina_next_keys import PAD_TOKEN
from library.config.flow_options import FlowOptions
from library.config.loss_options import LossOptions
from library.config.schema import ModelOptions
from library.data.tokens import TokenMeter
from library.errors import UserError
from library.objectives.flow import Flow
from library.objectives.noise import Draws
from library.optim.groups import Group
from library.prompts import Prompt


class Lumina:
    """The adapter of one run. Construction reads headers only and refuses wrong, missing or unsupported files at once."""

    text_trim = lumina_text.TRIM
    text_encoders = (lumina_text.NAME,)
    base_version = "lumina"  # in the metadata of saved files

    def __init__(self, model: ModelOptions, options: LuminaOptions, objective: FlowOptions):
        self.attention, self.options, self.objective_options = model.attention, options, objective
        self.parts = open_parts(str(model.pretrained_model_name_or_path), gemma2=options.gemma2, ae=options.autoencoder,
                                ae_flag=options.autoencoder_flag, gemma2_tokenizer=options.gemma2_tokenizer)
        self.file = self.parts.transformer
        self.latent = replace(options.latent, channels=CHANNELS[self.file.family])
        self.save_format = "safetensors" if self.file.layout == "original" else "diffusers_safetensors"

    def files(self) -> frozenset[Path]:
        return frozenset(path for part in (self.file.whole, self.parts.ae, self.parts.gemma) for path in part.files)

    def describe(self) -> str:
        return self.parts.summary()

    def objective(self, loss: LossOptions) -> Flow:
        return Flow(self.objective_options, loss)

    def encoder_rates(self, learning_rate: float) -> Mapping[str, float]:
        return {}

    def vae_identity(self, dtype: torch.dtype) -> str:
        return f"{self.parts.ae.identity()}/{dtype}/posterior-mean"

    def text_identity(self, names: Sequence[str], dtype: torch.dtype) -> str:
        return "/".join([self.parts.gemma.identity(), tokenizer_identity(self.parts.tokenizer), str(dtype),
                         str(self.options.gemma2_max_token_length), self.options.system_prompt])

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(self.file, self.parts.ae, dtype, device)

    def load_text_encoders(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> TextEncoders:
        modules = {name: load_gemma(self.parts.gemma, dtype, device) for name in names}
        return TextEncoders(modules, load_tokenizer(TOKENIZER, self.parts.tokenizer))

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        # routed in any case: both modules hand masks to attention that hide nothing
        return route(load_transformer(self.file, dtype, device, self.options.gemma2_max_token_length), self.attention)

    def meta_denoiser(self, dtype: torch.dtype) -> nn.Module:
        module = without_weights(lambda: build_transformer(self.file, self.options.gemma2_max_token_length), dtype)
        return route_unmasked(prepare(module, self.file, "cpu"))

    def meta_text(self, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        length = self.options.gemma2_max_token_length
        return {lumina_text.NAME: torch.zeros(batch, length, self.file.text_width, dtype=dtype),
                lumina_text.TRIM[lumina_text.NAME]: torch.ones(batch, length, dtype=torch.bool)}

    def encoder_parameters(self) -> Mapping[str, int]:
        return {"vae": parameter_count(self.parts.ae), "gemma": parameter_count(self.parts.gemma)}

    def encode_image(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return encode_image(vae, pixels)

    def encode_text(self, encoders: TextEncoders, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        if lumina_text.NAME not in encoders.modules:
            return {}
        return lumina_text.encode_text(encoders.modules[lumina_text.NAME], encoders.tokenizers, captions,
                                       self.options.gemma2_max_token_length, self.options.system_prompt)

    def vary_text(self, text: Mapping[str, torch.Tensor], draws: Draws) -> Mapping[str, torch.Tensor]:
        return text

    def predict(self, denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
                geometry: torch.Tensor) -> torch.Tensor:
        return lumina_call.predict(denoiser, x_t, level, text)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return lumina_call.blocks(denoiser)

    def text_blocks(self, name: str, encoder: nn.Module) -> list[nn.Module]:
        raise AssertionError(f"{name} does not train")

    def groups(self, denoiser: nn.Module, encoders: TextEncoders, learning_rate: float) -> list[Group]:
        """The whole transformer, but for the padding of Lumina-Next, which is never used: data-parallel training would wait for
        its gradient."""
        denoiser.requires_grad_(False)
        trained = tuple((name, parameter) for name, parameter in denoiser.named_parameters() if name != PAD_TOKEN)
        for _, parameter in trained:
            parameter.requires_grad_(True)
        return [Group(DENOISER, trained, learning_rate)]

    def sample(self, denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
               negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> list[Image.Image]:
        return sample(denoiser, vae, prompts, positive, negative, compute_dtype, self.file.family, self.latent)

    def export(self, modules: Mapping[str, nn.Module], path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str],
               save_format: str) -> None:
        save(path, self.parts, modules[DENOISER], dtype, metadata, save_format)

    def saved_bytes(self, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, save_format: str) -> int:
        return saved_bytes(self.parts, modules[DENOISER], dtype, save_format)

    def modelspec(self) -> Mapping[str, str]:
        if self.file.family == IMAGE_2:
            return {"architecture": "lumina-2", "implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0"}
        return {"architecture": "lumina-next", "implementation": "https://github.com/Alpha-VLLM/Lumina-T2X"}


def open_architecture(model: ModelOptions, options: LuminaOptions, objective: FlowOptions) -> Lumina:
    """What ``run.py`` calls: the adapter of this module, for either family."""
    return Lumina(model, options, objective)


def open_token_meter(model: ModelOptions, options: LuminaOptions) -> TokenMeter:
    """What captions are counted with: reads the transformer's header and the tokenizer. UserError without them."""
    folder = open_tokenizer(str(model.pretrained_model_name_or_path), gemma2=options.gemma2,
                            gemma2_tokenizer=options.gemma2_tokenizer)
    return lumina_text.token_meter(load_tokenizer(TOKENIZER, folder), options.gemma2_max_token_length, options.system_prompt)
