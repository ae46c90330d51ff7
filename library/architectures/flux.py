"""FLUX.1 (dev and schnell): the adapter.

Latents are (B, 16, H/8, W/8) = (z - 0.1159) * 0.3611. Facts stand once: calling the transformer in ``flux_call.py``, its
files in ``flux_parts.py``, modules and their configurations in ``flux_models.py``, text in ``flux_text.py``, previews in
``flux_preview.py``, key names in ``checkpoint/flux_keys.py``. This page puts them together for one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from library.architectures.attention import route
from library.architectures.base import DENOISER, TextEncoders
from library.architectures.clip import load_clip
from library.architectures.flux_call import keep_time_exact, predict
from library.architectures.flux_models import build_transformer, load_transformer, load_vae
from library.architectures.flux_options import FluxOptions
from library.architectures.flux_parts import TOKENIZERS, open_parts, open_tokenizers
from library.architectures.flux_preview import sample
from library.architectures.flux_text import Tokenizers, encode_text
from library.architectures.flux_tokens import read_token_meter
from library.architectures.loading import parameter_count, without_weights
from library.architectures.t5 import load_t5
from library.architectures.tokenizers import load_tokenizer, tokenizer_identity
from library.architectures.vae import encode_image
from library.checkpoint.export import Export, carry, export_module
from library.checkpoint.flux_keys import TRANSFORMER
from library.checkpoint.keymap import module_shapes
from library.checkpoint.metadata import HASH_KEY
from library.checkpoint.writer import file_bytes, write_safetensors
from library.config.flow_options import FlowOptions
from library.config.loss_options import LossOptions
from library.config.schema import ModelOptions
from library.data.tokens import TokenMeter
from library.errors import UserError
from library.objectives.flow import Flow
from library.objectives.noise import Draws
from library.optim.groups import Group
from library.prompts import Prompt

T5_TOKENS = {"dev": 512, "schnell": 256}  # the context lengths of the two releases


class Flux:
    """The adapter of one run. Construction reads headers only and refuses wrong, missing or unsupported files at once."""

    latent = FluxOptions.latent
    base_version = "flux1"  # in the metadata of saved files
    text_encoders = ("clip", "t5")
    save_format = "safetensors"

    def __init__(self, model: ModelOptions, options: FluxOptions, objective: FlowOptions):
        self.attention, self.options, self.objective_options = model.attention, options, objective
        self.parts = open_parts(
            str(model.pretrained_model_name_or_path), ae=options.ae, clip_l=options.clip_l, t5xxl=options.t5xxl,
            clip_l_tokenizer=options.clip_l_tokenizer, t5xxl_tokenizer=options.t5xxl_tokenizer,
        )
        self.file = self.parts.transformer
        if self.file.variant == "schnell" and options.guidance_scale != 1.0:
            raise UserError(f"--guidance_scale {options.guidance_scale} given, but {self.file.source.path} is FLUX.1-schnell, "
                            "which has no guidance embedding", remedy="remove --guidance_scale or use a FLUX.1-dev checkpoint")
        self.text_tokens = options.t5xxl_max_token_length or T5_TOKENS[self.file.variant]
        self.text_trim = {"t5": "t5_mask"} if options.apply_t5_attn_mask else {}

    def files(self) -> frozenset[Path]:
        parts = (self.file.whole, self.parts.ae, self.parts.clip_l, self.parts.t5xxl)
        return frozenset(path for part in parts for path in part.files)

    def describe(self) -> str:
        return self.parts.summary()

    def objective(self, loss: LossOptions) -> Flow:
        return Flow(self.objective_options, loss)

    def encoder_rates(self, learning_rate: float) -> Mapping[str, float]:
        return {}

    def vae_identity(self, dtype: torch.dtype) -> str:
        return f"{self.parts.ae.identity()}/{dtype}/posterior-mean"

    def text_identity(self, names: Sequence[str], dtype: torch.dtype) -> str:
        files = {"clip": (self.parts.clip_l, self.parts.clip_l_tokenizer), "t5": (self.parts.t5xxl, self.parts.t5xxl_tokenizer)}
        encoders = [f"{name}={files[name][0].identity()}/{tokenizer_identity(files[name][1])}" for name in names]
        return "/".join([*encoders, str(dtype), str(self.text_tokens), f"masked={self.options.apply_t5_attn_mask}"])

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(self.parts.ae, dtype, device)

    def load_text_encoders(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> TextEncoders:
        load = {"clip": lambda: load_clip(self.parts.clip_l, dtype, device),
                "t5": lambda: load_t5(self.parts.t5xxl, dtype, device)}
        modules = {name: load[name]() for name in names}
        tokenizers = Tokenizers(load_tokenizer(TOKENIZERS["clip_l_tokenizer"], self.parts.clip_l_tokenizer),
                                load_tokenizer(TOKENIZERS["t5xxl_tokenizer"], self.parts.t5xxl_tokenizer))
        return TextEncoders(modules, tokenizers)

    def load_denoiser(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        denoiser = load_transformer(self.file, dtype, device)
        keep_time_exact(denoiser)
        return denoiser if self.attention == "torch" else route(denoiser, self.attention)

    def meta_denoiser(self, dtype: torch.dtype) -> nn.Module:
        denoiser = without_weights(lambda: build_transformer(self.file), dtype)
        keep_time_exact(denoiser)
        return denoiser

    def meta_text(self, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"t5": torch.zeros(batch, self.text_tokens, self.file.text_width, dtype=dtype),
                "t5_mask": torch.ones(batch, self.text_tokens, dtype=torch.bool),
                "clip_pooled": torch.zeros(batch, self.file.pooled_width, dtype=dtype)}

    def encoder_parameters(self) -> Mapping[str, int]:
        parts = {"vae": self.parts.ae, "clip": self.parts.clip_l, "t5": self.parts.t5xxl}
        return {name: parameter_count(source) for name, source in parts.items()}

    def encode_image(self, vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return encode_image(vae, pixels)

    def encode_text(self, encoders: TextEncoders, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        return encode_text(encoders.modules, encoders.tokenizers, captions, self.text_tokens, self.options.apply_t5_attn_mask)

    def vary_text(self, text: Mapping[str, torch.Tensor], draws: Draws) -> Mapping[str, torch.Tensor]:
        return text

    def predict(self, denoiser: nn.Module, x_t: torch.Tensor, level: torch.Tensor, text: Mapping[str, torch.Tensor],
                geometry: torch.Tensor) -> torch.Tensor:
        return predict(denoiser, x_t, level, text, self.options.guidance_scale, self.options.apply_t5_attn_mask)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]

    def text_blocks(self, name: str, encoder: nn.Module) -> list[nn.Module]:
        raise AssertionError(f"{name} does not train")

    def groups(self, denoiser: nn.Module, encoders: TextEncoders, learning_rate: float) -> list[Group]:
        denoiser.requires_grad_(True)
        return [Group(DENOISER, tuple(denoiser.named_parameters()), learning_rate)]

    def sample(self, denoiser: nn.Module, vae: nn.Module, prompts: Sequence[Prompt], positive: Mapping[str, torch.Tensor],
               negative: Mapping[str, torch.Tensor], compute_dtype: torch.dtype) -> list[Image.Image]:
        return sample(denoiser, vae, prompts, positive, negative, compute_dtype, self.file.variant == "schnell",
                      self.options.apply_t5_attn_mask)

    def export(self, modules: Mapping[str, nn.Module], path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str],
               save_format: str) -> None:
        tensors = self._tensors(modules[DENOISER], dtype)
        write_safetensors(path, tensors.entries, tensors.get, metadata, add_hash_key=HASH_KEY if metadata else None)

    def saved_bytes(self, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, save_format: str) -> int:
        return file_bytes(self._tensors(modules[DENOISER], dtype).entries)

    def _tensors(self, denoiser: nn.Module, dtype: torch.dtype | None) -> Export:
        """The names of the original release, with the prefix of the input; an all-in-one file keeps its other parts."""
        bound = TRANSFORMER.bind(module_shapes(denoiser))
        order = self.file.source.layout_order if self.file.layout == "bfl" else ()
        tensors = export_module(denoiser, bound, dtype=dtype, prefix=self.file.prefix, order=order)
        if self.file.extras:
            tensors = (tensors + carry(self.file.whole, self.file.extras)).in_order(self.file.whole.layout_order)
        return tensors

    def modelspec(self) -> Mapping[str, str]:
        return {"architecture": f"flux-1-{self.file.variant}", "implementation": "https://github.com/black-forest-labs/flux"}


def open_architecture(model: ModelOptions, options: FluxOptions, objective: FlowOptions) -> Flux:
    """What ``run.py`` calls: the adapter of this module."""
    return Flux(model, options, objective)


def open_token_meter(model: ModelOptions, options: FluxOptions) -> TokenMeter:
    """What captions are counted with: reads the transformer's header and the tokenizers. UserError without them."""
    variant, clip, t5 = open_tokenizers(
        str(model.pretrained_model_name_or_path), clip_l=options.clip_l, t5xxl=options.t5xxl,
        clip_l_tokenizer=options.clip_l_tokenizer, t5xxl_tokenizer=options.t5xxl_tokenizer)
    return read_token_meter(clip, t5, options.t5xxl_max_token_length or T5_TOKENS[variant])
