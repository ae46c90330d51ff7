#!/usr/bin/env python
"""Write an untrained toy SD3: every file of the real set, in its layout and with its structure, a thousandth of the size.

    python tools/make_toy_sd3.py --output output/quickstart/toy --variant sd3.5-medium

makes the single file of the variant (transformer, position table, autoencoder), `clip_l.safetensors`, `clip_g.safetensors`,
`t5xxl.safetensors`, and three tokenizers in folders beside them; `sd3_train.py` finds the parts beside the checkpoint. The text
encoders are random: all they have to do is to tell captions apart, and they can be trained like the real ones. The autoencoder
is the fitted one of FLUX's toy with its latents in SD3's units. Same seed, same files.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import toy_parts  # noqa: E402

NAMES = {"sd3-medium": "sd3_medium.safetensors", "sd3.5-medium": "sd3.5_medium.safetensors",
         "sd3.5-large": "sd3.5_large.safetensors"}
HEAD_WIDTH = 64  # as in the real ones
CLIP_L_WIDTH, CLIP_G_WIDTH, CLIP_LAYERS = 64, 128, 3  # SD3: 768, 1280; 12 and 32 layers
T5_WIDTH = CLIP_L_WIDTH + CLIP_G_WIDTH  # both CLIPs side by side must fit into T5's width; SD3: 4096
POSITIONS, SPACING = 32, 1.0  # SD3-medium: 192 cells a side, a third apart; here pictures are an eighth of the size


@dataclass(frozen=True)
class Size:
    """Heads and depth of a toy transformer (its width is ``heads`` times 64). SD3-medium: 24 and 24."""

    heads: int
    depth: int


SIZES = {"tiny": Size(1, 2), "quickstart": Size(2, 4)}


def make_transformer(size: Size, variant: str):
    """SD3Transformer2DModel as its authors start one: modulation and output closed, everything else Xavier."""
    import torch
    from diffusers import SD3Transformer2DModel

    from library.architectures.sd3_positions import table

    width = size.heads * HEAD_WIDTH
    # SD3.5-medium has a second attention in the first 13 of its 24 blocks
    dual = tuple(range(math.ceil(size.depth * 13 / 24))) if variant == "sd3.5-medium" else ()
    model = SD3Transformer2DModel(
        num_layers=size.depth, num_attention_heads=size.heads, attention_head_dim=HEAD_WIDTH, caption_projection_dim=width,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH, pos_embed_max_size=POSITIONS,
        qk_norm=None if variant == "sd3-medium" else "rms_norm", dual_attention_layers=dual)
    model.pos_embed.pos_embed = table(POSITIONS, SPACING, width)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Blocks then start as the identity and the first prediction is zero (Peebles & Xie 2022, adaLN-Zero).
            closed = name == "proj_out" or (name.endswith(".linear") and "norm" in name)
            torch.nn.init.zeros_(module.weight) if closed else torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def autoencoder():
    """The fitted autoencoder with latents ``FACTOR`` times as large, so that (z - 0.0609) * 1.5305 is as wide as FLUX's
    (z - 0.1159) * 0.3611 was. (It is a twentieth off the middle: an offset in place of it would show at the borders, where
    convolutions see zeros.) Name -> tensor."""
    from library.architectures import flux_models, sd3_options
    from library.checkpoint.source import open_source

    factor = flux_models.SCALING / sd3_options.SCALING
    source = open_source(toy_parts.FITTED / "ae.safetensors")
    tensors = {name: source.read(name) for name in source.tensors}
    channels = tensors["decoder.conv_in.weight"].shape[1]
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        tensors[name][:channels] *= factor  # means; what follows are logarithms of variances
    tensors["encoder.conv_out.bias"][channels:] += 2 * math.log(factor)
    tensors["decoder.conv_in.weight"] /= factor
    return tensors


def make(folder: Path, size: Size, seed: int, variant: str = "sd3-medium") -> None:
    """Write the whole set below ``folder``."""
    import torch

    from library.checkpoint import clip_keys, sd3_keys, t5_keys
    from library.checkpoint.export import export_module
    from library.checkpoint.keymap import module_shapes
    from library.checkpoint.writer import write_safetensors
    from tools.toy_tokenizers import write_clip_tokenizer, write_t5_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = toy_parts.caption_words()
    clip_words = [write_clip_tokenizer(folder / f"{name}_tokenizer", words) for name in ("clip_l", "clip_g")][0]
    t5_words = write_t5_tokenizer(folder / "t5xxl_tokenizer", words)
    torch.manual_seed(seed)
    clip_l = toy_parts.make_clip(clip_words, CLIP_L_WIDTH, CLIP_LAYERS)
    clip_g = toy_parts.make_clip(clip_words, CLIP_G_WIDTH, CLIP_LAYERS, CLIP_G_WIDTH)
    toy_parts.write(folder / "clip_l.safetensors", clip_l, clip_keys.CLIP, torch.float16)
    toy_parts.write(folder / "clip_g.safetensors", clip_g, clip_keys.CLIP_PROJECTED, torch.float16)
    toy_parts.write(folder / "t5xxl.safetensors", toy_parts.make_t5(t5_words, T5_WIDTH), t5_keys.T5, torch.float16,
                    also=("encoder.embed_tokens.weight",))  # the published file holds the embedding twice
    transformer = make_transformer(size, variant)
    tensors = export_module(transformer, sd3_keys.mmdit(size.depth).bind(module_shapes(transformer)), dtype=torch.float16,
                            prefix=sd3_keys.MMDIT_PREFIX)
    tensors += export_module(autoencoder(), None, dtype=torch.float16, prefix=sd3_keys.VAE_PREFIX)
    tensors = tensors.in_order(sorted(entry.name for entry in tensors.entries))
    metadata = {"modelspec.architecture": f"stable-diffusion-{variant.removeprefix('sd')}", "modelspec.title": f"Kiln toy {variant}",
                "modelspec.license": "Apache-2.0"}
    write_safetensors(folder / NAMES[variant], tensors.entries, tensors.get, metadata)


if __name__ == "__main__":
    toy_parts.main("toy SD3", SIZES, make, tuple(NAMES))
