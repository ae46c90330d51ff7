"""The four denoisers at true size, or tiny, with random weights and inputs made where they are needed: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """``build(toy)`` on meta, ``inputs(module, batch, device)`` of 1024 pixels (64 for a toy), ``blocks`` in the order they run."""

    name: str
    build: Callable[[bool], nn.Module]
    blocks: Callable[[nn.Module], list[nn.Module]]
    inputs: Callable[[nn.Module, int, torch.device, bool], Inputs]


def materialize(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights: zeros would make matrix products about 13 % faster."""
    module = nn.Module.to(module, dtype).to_empty(device=device)  # diffusers' own to() warns of what does not concern us
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=generator)
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.fill_(1)
    return module.requires_grad_(True).train()


def _noise(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _flux(toy: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    sizes = dict(num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
                 pooled_projection_dim=32, axes_dims_rope=(4, 14, 14)) if toy else {}
    return FluxTransformer2DModel(guidance_embeds=True, **sizes)


def _flux_inputs(module: nn.Module, batch: int, device: torch.device, toy: bool) -> Inputs:
    side, text = (4, 8) if toy else (64, 512)
    ids = torch.zeros(side * side, 3, device=device)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(ids)
    return dict(hidden_states=_noise(device, batch, side * side, 64), timestep=torch.full((batch,), 0.5, device=device),
                encoder_hidden_states=_noise(device, batch, text, module.config.joint_attention_dim),
                pooled_projections=_noise(device, batch, module.config.pooled_projection_dim), img_ids=ids,
                txt_ids=torch.zeros(text, 3, device=device), guidance=torch.ones(batch, device=device))


def _sd3(toy: bool) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = dict(num_layers=3, num_attention_heads=2, attention_head_dim=32, caption_projection_dim=64, joint_attention_dim=32,
                 pooled_projection_dim=32, pos_embed_max_size=16, sample_size=8) if toy else \
        dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)
    return SD3Transformer2DModel(qk_norm="rms_norm", **sizes)


def _sd3_inputs(module: nn.Module, batch: int, device: torch.device, toy: bool) -> Inputs:
    side, text = (8, 8) if toy else (128, 333)
    return dict(hidden_states=_noise(device, batch, 16, side, side), timestep=torch.full((batch,), 500.0, device=device),
                encoder_hidden_states=_noise(device, batch, text, module.config.joint_attention_dim),
                pooled_projections=_noise(device, batch, module.config.pooled_projection_dim))


def _lumina(toy: bool) -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    sizes = dict(hidden_size=96, num_layers=3, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
                 axes_dim_rope=(16, 16, 16), axes_lens=(32, 32, 32), cap_feat_dim=32, sample_size=8) if toy else \
        dict(cap_feat_dim=2304)
    module = Lumina2Transformer2DModel(**sizes)
    with torch.device("cpu"):  # its tables are no buffers
        module.rope_embedder = type(module.rope_embedder)(theta=10000, axes_dim=module.config.axes_dim_rope,
                                                          axes_lens=module.config.axes_lens)
    return module


def _lumina_inputs(module: nn.Module, batch: int, device: torch.device, toy: bool) -> Inputs:
    side, text = (8, 8) if toy else (128, 256)
    return dict(hidden_states=_noise(device, batch, 16, side, side), timestep=torch.full((batch,), 0.5, device=device),
                encoder_hidden_states=_noise(device, batch, text, module.config.cap_feat_dim),
                encoder_attention_mask=torch.ones(batch, text, dtype=torch.bool, device=device))


def _sdxl(toy: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    sizes = dict(block_out_channels=(32, 64, 64), transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 1, 1),
                 cross_attention_dim=32, projection_class_embeddings_input_dim=1568, sample_size=8) if toy else \
        dict(block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
             cross_attention_dim=2048, projection_class_embeddings_input_dim=2816, sample_size=128)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, **sizes)


def _sdxl_inputs(module: nn.Module, batch: int, device: torch.device, toy: bool) -> Inputs:
    side = 8 if toy else 128
    pooled = module.config.projection_class_embeddings_input_dim - 6 * 256
    return dict(sample=_noise(device, batch, 4, side, side), timestep=torch.full((batch,), 500, device=device),
                encoder_hidden_states=_noise(device, batch, 77, module.config.cross_attention_dim),
                added_cond_kwargs=dict(text_embeds=_noise(device, batch, pooled),
                                       time_ids=torch.full((batch, 6), 1024.0, device=device)))


def _sdxl_blocks(module: nn.Module) -> list[nn.Module]:
    from library.architectures.sdxl_call import blocks

    return blocks(module)


MODELS = (
    Model("FLUX.1-dev", _flux, lambda m: [*m.transformer_blocks, *m.single_transformer_blocks], _flux_inputs),
    Model("SD3.5-large", _sd3, lambda m: list(m.transformer_blocks), _sd3_inputs),
    Model("Lumina 2", _lumina, lambda m: [*m.context_refiner, *m.noise_refiner, *m.layers], _lumina_inputs),
    Model("SDXL", _sdxl, _sdxl_blocks, _sdxl_inputs),
)
