#!/usr/bin/env python
"""Write an untrained toy FLUX.1-dev: every file of the real set, in its layout and with its structure, a thousandth as wide.

    python tools/make_toy_flux.py --output output/quickstart/toy

makes `flux1-dev.safetensors` (BFL names, fused qkv, guidance embedding), `clip_l.safetensors`, `t5xxl.safetensors`, both
tokenizers in folders beside them, and copies the fitted `ae.safetensors` from `configs/quickstart/toy`. `flux_train.py`
finds the parts beside the checkpoint. The text encoders are random and stay so: all they have to do is to tell captions
apart. Same seed, same files.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import toy_parts  # noqa: E402

HEAD_DIM, ROPE_AXES = 32, (4, 14, 14)  # FLUX.1 has heads of 128 with axes (16, 56, 56): the same proportions
CLIP_WIDTH, CLIP_LAYERS = 64, 2


@dataclass(frozen=True)
class Size:
    """Heads and depth of a toy transformer (its width is ``heads`` times 32)."""

    heads: int
    double_blocks: int
    single_blocks: int


SIZES = {"tiny": Size(2, 1, 1), "quickstart": Size(4, 2, 4)}


def make_transformer(size: Size):
    """FluxTransformer2DModel as its authors start one: modulation and output closed, everything else Xavier."""
    import torch
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64, num_layers=size.double_blocks, num_single_layers=size.single_blocks, attention_head_dim=HEAD_DIM,
        num_attention_heads=size.heads, joint_attention_dim=toy_parts.T5_WIDTH, pooled_projection_dim=CLIP_WIDTH, guidance_embeds=True,
        axes_dims_rope=ROPE_AXES,
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Blocks then start as the identity and the first prediction is zero, which trains far faster than noise
            # (Peebles & Xie 2022, adaLN-Zero).
            closed = name == "proj_out" or (name.endswith(".linear") and "norm" in name)
            torch.nn.init.zeros_(module.weight) if closed else torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def make(folder: Path, size: Size, seed: int) -> None:
    """Write the whole set below ``folder``."""
    import torch

    from library.checkpoint import clip_keys, flux_keys, t5_keys
    from tools.toy_tokenizers import write_clip_tokenizer, write_t5_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = toy_parts.caption_words()
    vocabularies = write_clip_tokenizer(folder / "clip_l_tokenizer", words), write_t5_tokenizer(folder / "t5xxl_tokenizer", words)
    torch.manual_seed(seed)
    clip_l = toy_parts.make_clip(vocabularies[0], CLIP_WIDTH, CLIP_LAYERS)
    toy_parts.write(folder / "clip_l.safetensors", clip_l, clip_keys.CLIP, torch.float16)
    toy_parts.write(folder / "t5xxl.safetensors", toy_parts.make_t5(vocabularies[1]), t5_keys.T5, torch.float16,
                    also=("encoder.embed_tokens.weight",))  # the published file holds the embedding twice
    toy_parts.write(folder / "flux1-dev.safetensors", make_transformer(size), flux_keys.TRANSFORMER, torch.bfloat16)
    shutil.copyfile(toy_parts.FITTED / "ae.safetensors", folder / "ae.safetensors")


if __name__ == "__main__":
    toy_parts.main("toy FLUX.1-dev", SIZES, make)
