#!/usr/bin/env python
"""Write an untrained toy Lumina: every file of the real set, in its layout and with its structure, a thousandth of the size.

    python tools/make_toy_lumina.py --output output/quickstart_lumina/toy                  Lumina-Image 2.0
    python tools/make_toy_lumina.py --output output/quickstart_lumina/toy --variant next    Lumina-Next

makes `lumina_2_model_bf16.safetensors` and `gemma_2_2b_fp16.safetensors`, or `consolidated.00-of-01.safetensors` and
`gemma_2b.safetensors` (the names of the releases), a tokenizer in a folder beside them, and copies the fitted autoencoder from
`configs/quickstart/toy`. `lumina_train.py` finds the parts beside the checkpoint. The text encoder is random and stays so: all
it has to do is to tell captions apart. Same seed, same files.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import toy_parts  # noqa: E402

TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_KEY_HEADS, TEXT_INNER = 64, 3, 8, 4, 128
# 2.0: 24 heads of 96, three to a key; Lumina-Next: 32 heads of 72, four to a key
HEAD_DIM = {"2.0": 48, "next": 36}
HEADS_PER_KEY = {"2.0": 3, "next": 4}
REFINERS = 2


@dataclass(frozen=True)
class Size:
    """Key heads and depth of a toy transformer (2.0 has two refining layers for text and picture besides)."""

    key_heads: int
    layers: int


SIZES = {"tiny": Size(1, 1), "quickstart": Size(1, 4)}


def make_transformer(size: Size, family: str):
    """Lumina2Transformer2DModel or LuminaNextDiT2DModel as their authors start one: modulation and output closed, the rest Xavier."""
    import torch
    from diffusers import Lumina2Transformer2DModel, LuminaNextDiT2DModel

    from library.architectures.lumina_models import tie_queries

    heads = size.key_heads * HEADS_PER_KEY[family]
    shared = {"hidden_size": heads * HEAD_DIM[family], "num_layers": size.layers, "num_attention_heads": heads,
              "num_kv_heads": size.key_heads}
    if family == "2.0":
        axes = (HEAD_DIM[family] // 3,) * 3
        model = Lumina2Transformer2DModel(**shared, num_refiner_layers=REFINERS, axes_dim_rope=axes, cap_feat_dim=TEXT_WIDTH)
    else:
        model = tie_queries(LuminaNextDiT2DModel(**shared, cross_attention_dim=TEXT_WIDTH))
        torch.nn.init.normal_(model.pad_token, std=0.02)
        for layer in model.layers:
            # The release starts at 0 and learns to read texts over many steps. Here there are few.
            torch.nn.init.ones_(layer.gate)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Blocks then start as the identity and the first prediction is zero (Peebles & Xie 2022, adaLN-Zero).
            closed = name.endswith(("norm1.linear", "norm_out.linear_1", "norm_out.linear_2"))
            torch.nn.init.zeros_(module.weight) if closed else torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return model


def make_gemma(vocabulary: int, family: str):
    """Gemma2Model or GemmaModel whose layers mix neighbouring words."""
    import torch
    from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

    settings = {"vocab_size": vocabulary, "hidden_size": TEXT_WIDTH, "head_dim": TEXT_WIDTH // TEXT_HEADS, "pad_token_id": 0,
                "num_attention_heads": TEXT_HEADS, "num_key_value_heads": TEXT_KEY_HEADS, "num_hidden_layers": TEXT_LAYERS,
                "intermediate_size": TEXT_INNER}
    model = Gemma2Model(Gemma2Config(**settings)) if family == "2.0" else GemmaModel(GemmaConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # the model itself multiplies its table by the root of the width
            embedding = "embed_tokens" in name
            torch.nn.init.normal_(parameter, std=TEXT_WIDTH**-0.5) if embedding else torch.nn.init.xavier_uniform_(parameter)
    return model


def make(folder: Path, size: Size, seed: int, family: str = "2.0") -> None:
    """Write the whole set below ``folder``."""
    import torch

    from library.checkpoint import gemma_keys, lumina_keys, lumina_next_keys
    from library.checkpoint.dtypes import DTYPE_NAMES
    from library.checkpoint.export import Entry, Export, export_module
    from library.checkpoint.keymap import module_shapes
    from library.checkpoint.writer import write_safetensors
    from tools.toy_tokenizers import write_gemma_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_gemma_tokenizer(folder / "tokenizer", toy_parts.caption_words())
    torch.manual_seed(seed)
    second = family == "2.0"
    gemma, transformer = make_gemma(vocabulary, family), make_transformer(size, family)
    text = export_module(gemma, gemma_keys.GEMMA.bind(module_shapes(gemma)), dtype=torch.float16)
    write_safetensors(folder / ("gemma_2_2b_fp16.safetensors" if second else "gemma_2b.safetensors"), text.entries, text.get)
    table = lumina_keys.TRANSFORMER if second else lumina_next_keys.TRANSFORMER
    tensors = export_module(transformer, table.bind(module_shapes(transformer)), dtype=torch.bfloat16)
    if second:  # the published file holds a norm that no one uses
        ones = torch.ones(transformer.config.hidden_size, dtype=torch.bfloat16)
        tensors += Export((Entry(lumina_keys.UNUSED_NORM, tuple(ones.shape), DTYPE_NAMES[ones.dtype]),), lambda name: ones)
    write_safetensors(folder / ("lumina_2_model_bf16.safetensors" if second else "consolidated.00-of-01.safetensors"),
                      tensors.entries, tensors.get)
    autoencoder = "ae.safetensors" if second else "sdxl_vae.safetensors"
    shutil.copyfile(toy_parts.FITTED / autoencoder, folder / autoencoder)


if __name__ == "__main__":
    toy_parts.main("toy Lumina", SIZES, make, variants=("2.0", "next"))
