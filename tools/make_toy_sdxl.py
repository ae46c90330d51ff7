#!/usr/bin/env python
"""Write an untrained toy SDXL: the single file of the release with every part in its layout, a three-hundredth of the size.

    python tools/make_toy_sdxl.py --output output/quickstart/toy

makes `sd_xl_base_1.0.safetensors` (U-Net with all kinds of blocks, CLIP-L, OpenCLIP-bigG with packed attention and transposed
projection, the fitted autoencoder from `configs/quickstart/toy`) and both tokenizers in folders beside it. The text encoders
are random: all they have to do is to tell captions apart, and they can be trained like the real ones. Same seed, same files.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import toy_parts  # noqa: E402

CLIP_L_WIDTH, CLIP_G_WIDTH, CLIP_LAYERS = 64, 128, 3  # SDXL: 768, 1280; 12 and 32 layers
SIZE_WIDTH = 256  # of each of the six sizes, as in the real one
NAME = "sd_xl_base_1.0.safetensors"


@dataclass(frozen=True)
class Size:
    """Channels of the three levels and depth of their attention. SDXL: (320, 640, 1280) and (0, 2, 10).

    Heads are 64 wide, and norms have as many groups, up to 32, as divide all levels: both are read off the widths.
    """

    widths: tuple[int, int, int]
    depths: tuple[int, int, int]


SIZES = {"tiny": Size((32, 64, 128), (0, 1, 1)), "quickstart": Size((48, 64, 128), (0, 1, 2))}


def make_unet(size: Size):
    """UNet2DConditionModel as its authors start one: the last convolution of each branch and of the whole is zero."""
    import torch
    from diffusers import UNet2DConditionModel

    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in size.depths)
    model = UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=128, block_out_channels=size.widths, layers_per_block=2, down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        transformer_layers_per_block=tuple(max(depth, 1) for depth in size.depths),
        attention_head_dim=tuple(max(width // 64, 1) for width in size.widths), use_linear_projection=True,
        cross_attention_dim=CLIP_L_WIDTH + CLIP_G_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=CLIP_G_WIDTH + 6 * SIZE_WIDTH, norm_num_groups=math.gcd(32, *size.widths),
    )
    for name, parameter in model.named_parameters():
        if ".conv2." in name or ".proj_out." in name or name.startswith("conv_out."):
            torch.nn.init.zeros_(parameter)
    return model


def make(folder: Path, size: Size, seed: int) -> None:
    """Write the whole set below ``folder``."""
    import torch

    from library.checkpoint import clip_keys, sdxl_keys
    from library.checkpoint.export import Entry, Export, carry, export_module
    from library.checkpoint.keymap import module_shapes
    from library.checkpoint.source import open_source
    from library.checkpoint.writer import write_safetensors
    from tools.toy_tokenizers import write_clip_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [write_clip_tokenizer(folder / name, toy_parts.caption_words()) for name in ("tokenizer", "tokenizer_2")][0]
    torch.manual_seed(seed)
    parts = (
        (sdxl_keys.CLIP_L_PREFIX, clip_keys.CLIP, toy_parts.make_clip(vocabulary, CLIP_L_WIDTH, CLIP_LAYERS)),
        (sdxl_keys.CLIP_G_PREFIX, clip_keys.OPEN_CLIP, toy_parts.make_clip(vocabulary, CLIP_G_WIDTH, CLIP_LAYERS, CLIP_G_WIDTH)),
        (sdxl_keys.UNET_PREFIX, sdxl_keys.UNET, make_unet(size)),
    )
    tensors = carry(open_source(toy_parts.FITTED / "sdxl_vae.safetensors"), prefix=sdxl_keys.VAE_PREFIX)
    for prefix, table, module in parts:
        tensors += export_module(module, table.bind(module_shapes(module)), dtype=torch.float16, prefix=prefix)
    # two that belong to no module here, as in the release
    others = {f"{sdxl_keys.CLIP_L_PREFIX}text_model.embeddings.position_ids": torch.arange(toy_parts.CLIP_POSITIONS)[None],
              f"{sdxl_keys.CLIP_G_PREFIX}logit_scale": torch.tensor(4.6055, dtype=torch.float16)}
    kinds = {torch.int64: "I64", torch.float16: "F16"}
    tensors += Export(tuple(Entry(name, tuple(value.shape), kinds[value.dtype]) for name, value in others.items()),
                      others.__getitem__)
    tensors = tensors.in_order(sorted(entry.name for entry in tensors.entries))
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.title": "Kiln toy SDXL",
                "modelspec.license": "Apache-2.0"}
    write_safetensors(folder / NAME, tensors.entries, tensors.get, metadata)


if __name__ == "__main__":
    toy_parts.main("toy SDXL", SIZES, make)
