"""SD3-medium, SD3.5-medium and SD3.5-large: the adapter.

Latents are (B, 16, H/8, W/8) = (z - 0.0609) * 1.5305. Facts stand once: calling the transformer in ``sd3_call.py``, its
positions in ``sd3_positions.py``, files in ``sd3_parts.py``, modules and their configurations in ``sd3_models.py``, text in
``sd3_text.py``, saving in ``sd3_export.py``, previews in ``sd3_preview.py``, key names in ``checkpoint/sd3_keys.py`` and the
tables it shares. This page puts them together for one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from library.architectures import sd3_call, sd3_text
from library.architectures.attention import route
from library.architectures.base import TextEncoders
from library.architectures.loading import parameter_count, without_weights
from library.architectures.sd3_export import save, saved_bytes
from library.architectures.sd3_models import build_transformer, load_encoder, load_transformer, load_vae, text_blocks
from library.architectures.sd3_options import Sd3Options
from library.architectures.sd3_parts import TOKENIZERS, open_parts, open_tokenizers
from library.architectures.sd3_preview import sample
from library.architectures.sd3_tokens import read_token_meter
from library.architectures.tokenizers import load_tokenizer, tokenizer_identity
from library.architectures.vae import encode_image
from library.config.loss_options import LossOptions
from library.config.schema import ModelOptions
from library.config.weighted_flow_options import WeightedFlowOptions
from library.data.tokens import TokenMeter
from library.errors import UserError
from library.objectives.noise import Draws
from library.objectives.weighted_flow import WeightedFlow
from library.optim.groups import Group
from library.prompts import Prompt

_DTYPES = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MODELSPEC = {"sd3-medium": "stable-diffusion-3-medium", "sd3.5-medium": "stable-diffusion-3.5-medium",
              "sd3.5-large": "stable-diffusion-3.5-large"}


class Sd3:
    """The adapter of one run. Construction reads headers only and refuses wrong, missing or unsupported files at once."""

    latent = Sd3Options.latent
    base_version = "sd3"  # in the metadata of saved files

    def __init__(self, model: ModelOptions, options: Sd3Options, objective: WeightedFlowOptions):
        self.attention, self.options, self.objective_options = model.attention, options, objective
        self.parts = open_parts(str(model.pretrained_model_name_or_path), options.given, options.tokenizers)
        self.file = self.parts.transformer
        self.text_encoders = tuple(self.parts.encoders)
        self.masks = sd3_text.Masks(options.apply_lg_attn_mask, options.apply_t5_attn_mask)
        self.text_trim = {name: mask for name, mask in self.masks.trim.items() if name in self.text_encoders}
        self.save_format = "safetensors" if self.file.layout == "mmdit" else "diffusers_safetensors"
        self.frozen_blocks = options.num_last_block_to_freeze or 0
        if self.frozen_blocks > self.file.depth:
            raise UserError(f"{self.frozen_blocks} blocks, but {self.file.whole.path} has {self.file.depth}",
                            place="--num_last_block_to_freeze", remedy=f"give a number up to {self.file.depth}")

    def files(self) -> frozenset[Path]:
        parts = (self.file.whole, self.parts.vae, *self.parts.encoders.values())
        return frozenset(path for part in parts for path in part.files)

    def describe(self) -> str:
        return self.parts.summary()

    def objective(self, loss: LossOptions) -> WeightedFlow:
        return WeightedFlow(self.objective_options, loss)

    def encoder_rates(self, learning_rate: float) -> Mapping[str, float]:
        return self.options.encoder_rates(learning_rate)

    def vae_identity(self, dtype: torch.dtype) -> str:
        return f"{self.parts.vae.identity()}/{dtype}/posterior-mean"

    def text_identity(self, names: Sequence[str], dtype: torch.dtype) -> str:
        settings = {"clip_l": f"hidden={self.masks.clip}", "clip_g": f"hidden={self.masks.clip}",
                    "t5xxl": f"hidden={self.masks.t5}/{self.options.t5xxl_max_token_length}"}
        return "/".join(f"{name}={self.parts.encoders[name].identity()}/{tokenizer_identity(self.parts.tokenizers[name])}/"
                        f"{self._encoder_dtype(name, dtype)}/{settings[name]}" for name in names)

    def _encoder_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return _DTYPES.get(self.options.t5xxl_dtype or "", dtype) if name == "t5xxl" else dtype

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(self.parts.vae, dtype, device)

    def load_text_encoders(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> TextEncoders:
        places = {name: device for name in names}
        if self.options.t5xxl_device is not None and "t5xxl" in places:
            places["t5xxl"] = torch.device(self.options.t5xxl_device)
        modules = {name: load_encoder(name, self.parts.encoders[name], self._encoder_dtype(name, dtype), place)
                   for name, place in places.items()}
        return TextEncoders(modules, sd3_text.Tokenizers(**{name: load_tokenizer(TOKENIZERS[name], folder)
                                                            for name, folder in self.parts.tokenizers.items()}))

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        denoiser = load_transformer(self.file, dtype, device)
        sd3_call.install_positions(denoiser, self.options.enable_scaled_pos_embed)
        return denoiser if self.attention == "torch" else route(denoiser, self.attention)

    def meta_denoiser(self, dtype: torch.dtype) -> nn.Module:
        denoiser = without_weights(lambda: build_transformer(self.file), dtype)
        sd3_call.install_positions(denoiser, self.options.enable_scaled_pos_embed)
        return denoiser

    def meta_text(self, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """T5's states; ``context`` makes zeros of the right shapes of what is not there."""
        shape = (batch, self.options.t5xxl_max_token_length, self.file.text_width)
        return {"t5xxl": torch.zeros(shape, dtype=dtype)} if "t5xxl" in self.text_encoders else {}

    def encoder_parameters(self) -> Mapping[str, int]:
        return {name: parameter_count(source) for name, source in {"vae": self.parts.vae, **self.parts.encoders}.items()}

    def encode_image(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return encode_image(vae, pixels)

    def encode_text(self, encoders: TextEncoders, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        return sd3_text.encode_text(encoders.modules, encoders.tokenizers, captions, self.options.t5xxl_max_token_length,
                                    self.masks)

    def vary_text(self, text: Mapping[str, torch.Tensor], draws: Draws) -> Mapping[str, torch.Tensor]:
        return sd3_text.vary(text, draws, self.options.dropout_rates, self.options.pos_emb_random_crop_rate)

    def predict(self, denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
                geometry: torch.Tensor) -> torch.Tensor:
        return sd3_call.predict(denoiser, x_t, level, text, self.options.t5xxl_max_token_length)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(denoiser.transformer_blocks)

    def text_blocks(self, name: str, encoder: nn.Module) -> list[nn.Module]:
        return text_blocks(name, encoder)

    def groups(self, denoiser: nn.Module, encoders: TextEncoders, learning_rate: float) -> list[Group]:
        """What trains, named, with gradients switched on for it and off for all else: the transformer but for its last
        ``--num_last_block_to_freeze`` blocks, and the encoders with a learning rate above 0. A learning rate of 0 leaves the
        transformer out when an encoder trains. (Without one it stays in: a run that changes nothing is a way to convert a file.)
        """
        rates = self.encoder_rates(learning_rate)
        denoiser.requires_grad_(False)
        found: list[Group] = []
        if learning_rate > 0 or not rates:
            frozen = {id(parameter) for block in sd3_call.frozen_blocks(denoiser, self.frozen_blocks)
                      for parameter in block.parameters()}
            trained = tuple((name, parameter) for name, parameter in denoiser.named_parameters() if id(parameter) not in frozen)
            found.append(Group("transformer", trained, learning_rate))
        for name, rate in rates.items():
            encoders.modules[name].requires_grad_(False)
            named = encoders.modules[name].named_parameters()
            found.append(Group(name, tuple((f"{name}.{key}", parameter) for key, parameter in named), rate))
        for group in found:
            for _, parameter in group.params:
                parameter.requires_grad_(True)
        return found

    def sample(self, denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
               negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> list[Image.Image]:
        return sample(denoiser, vae, prompts, positive, negative, compute_dtype, self.options.t5xxl_max_token_length)

    @property
    def _inside(self) -> tuple[str, ...]:
        """Encoders that go into the saved file in any case."""
        wanted = {"clip_l": self.options.save_clip, "clip_g": self.options.save_clip, "t5xxl": self.options.save_t5xxl}
        return tuple(name for name in self.text_encoders if wanted[name])

    def export(self, modules: Mapping[str, nn.Module], path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str],
               save_format: str) -> None:
        save(path, self.parts, modules, dtype, metadata, save_format, self._inside)

    def saved_bytes(self, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, save_format: str) -> int:
        return saved_bytes(self.parts, modules, dtype, save_format, self._inside)

    def modelspec(self) -> Mapping[str, str]:
        return {"architecture": _MODELSPEC[self.file.variant], "implementation": "https://github.com/Stability-AI/sd3.5"}


def open_architecture(model: ModelOptions, options: Sd3Options, objective: WeightedFlowOptions) -> Sd3:
    """What ``run.py`` calls: the adapter of this module."""
    return Sd3(model, options, objective)


def open_token_meter(model: ModelOptions, options: Sd3Options) -> TokenMeter:
    """What captions are counted with: reads the transformer's header and the tokenizers. UserError without them."""
    folders = open_tokenizers(str(model.pretrained_model_name_or_path), options.given, options.tokenizers)
    return read_token_meter(folders, options.t5xxl_max_token_length)
