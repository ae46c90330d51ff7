"""The tiny SDXL that the golden records were made on: U-Net and text encoders with their initial weights."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.checkpoint.clip_keys import CLIP, OPEN_CLIP
from library.checkpoint.keymap import BoundMap, KeyMap, module_shapes
from library.checkpoint.sdxl_keys import CLIP_G_PREFIX, CLIP_L_PREFIX, UNET, UNET_PREFIX
from library.config.ddpm_options import DdpmOptions
from tests.golden.records import Record
from tests.golden.weights import fill

VOCABULARY = 1026
BOS, EOS = 1024, 1025
_CLIP_L = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 12, "projection_dim": 24,
           "hidden_act": "quick_gelu"}
_CLIP_G = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "projection_dim": 32,
           "hidden_act": "gelu"}
_NUMBERS = ("min_snr_gamma", "noise_offset", "adaptive_noise_scale")
_SWITCHES = ("v_parameterization", "zero_terminal_snr")


def options(record: Record) -> DdpmOptions:
    numbers = {name: float(record.settings[name]) for name in _NUMBERS if name in record.settings}
    return DdpmOptions(**numbers, **{name: record.settings.get(name) == "True" for name in _SWITCHES})


def tiny_unet(record: Record) -> tuple[UNet2DConditionModel, BoundMap]:
    """diffusers' module with the record's initial weights, and the key map that put them there."""
    module = UNet2DConditionModel(
        block_out_channels=(32, 64, 128), layers_per_block=2, transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=56,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=32 + 6 * 256)
    bound = fill_module(module, UNET, UNET_PREFIX)
    assert {name: list(shape) for name, shape in bound.original_shapes().items()} == record.shapes
    return module, bound


def tiny_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    special = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS}
    clip_l = CLIPTextModel(CLIPTextConfig(**_CLIP_L, **special)).eval()
    clip_g = CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, **special)).eval()
    fill_module(clip_l, CLIP, CLIP_L_PREFIX)
    fill_module(clip_g, OPEN_CLIP, CLIP_G_PREFIX)
    return clip_l, clip_g


def fill_module(module: nn.Module, keymap: KeyMap, prefix: str) -> BoundMap:
    """Give ``module`` the weights that go by its names in the single file; returns the map to those names."""
    bound = keymap.bind(module_shapes(module))
    for original, shape in bound.original_shapes().items():
        for name, tensor in bound.to_module(original, fill(prefix + original, shape)):
            module.get_parameter(name).data.copy_(tensor)
    return bound
