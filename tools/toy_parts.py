"""What the makers of toy checkpoints share: a small CLIP, the words of the quickstart's captions, and the command line."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FITTED = ROOT / "configs/quickstart/toy"  # the autoencoders that tools/fit_toy_vae.py made
CAPTIONS = ROOT / "configs/quickstart/photos"
CLIP_POSITIONS, CLIP_HEAD_WIDTH = 77, 64
T5_WIDTH, T5_LAYERS, T5_HEADS, T5_KEY_WIDTH, T5_INNER = 64, 2, 4, 16, 128


def make_clip(vocabulary: int, width: int, layers: int, projection: int | None = None):
    """CLIPTextModel (with ``projection``: CLIPTextModelWithProjection) whose pooled vector depends on all words: the end token,
    where it is read, adds little of itself, and neither does padding."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, projection_dim=projection or width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=width // CLIP_HEAD_WIDTH, max_position_embeddings=CLIP_POSITIONS,
        hidden_act="quick_gelu" if projection is None else "gelu",
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )
    model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    for name, parameter in model.named_parameters():
        if "embedding.weight" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "token" in name else 0.3)
            if "token" in name:
                parameter.data[-2:] *= 0.1
                parameter.data[0] *= 1.0 if projection is None else 0.1  # what the larger CLIP is padded with
        elif parameter.dim() == 2:
            torch.nn.init.xavier_uniform_(parameter, gain=1.5)
    return model


def make_t5(vocabulary: int, width: int = T5_WIDTH):
    """T5EncoderModel (gated) with embeddings of unit size and sublayers that mix neighbouring words."""
    import torch
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=T5_KEY_WIDTH, num_heads=T5_HEADS, d_ff=T5_INNER, num_layers=T5_LAYERS,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0.0,
    ))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            if "shared" in name or "relative" in name:
                torch.nn.init.normal_(parameter, std=1.0)
            else:
                torch.nn.init.xavier_uniform_(parameter)
    return model


def write(path: Path, module, keymap, dtype, **options) -> None:
    """``module`` as the file of ``keymap``'s layout."""
    from library.checkpoint.export import export_module
    from library.checkpoint.keymap import module_shapes
    from library.checkpoint.writer import write_safetensors

    tensors = export_module(module, keymap.bind(module_shapes(module)), dtype=dtype, **options)
    write_safetensors(path, tensors.entries, tensors.get)


def caption_words() -> list[str]:
    """Every word of the quickstart's captions, most frequent first: what the toy tokenizers know as one token."""
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(CAPTIONS.glob("*.txt"))).split()
    return sorted(set(text), key=lambda word: (-text.count(word), word))


def main(title: str, sizes: Mapping[str, Any], make: Callable[..., None], variants: Sequence[str] = ()) -> None:
    """The command line of a maker: ``make(folder, size, seed)``, and with ``variants`` (the first is the default) one of them."""
    parser = argparse.ArgumentParser(description=f"Write an untrained {title} for trying things out.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=sorted(sizes), default="quickstart")
    parser.add_argument("--seed", type=int, default=0)
    if variants:
        parser.add_argument("--variant", choices=variants, default=variants[0])
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by diffusers; advises packages of no use here
    chosen = [arguments.variant] if variants else []
    make(arguments.output, sizes[arguments.size], arguments.seed, *chosen)
    print(f"{' '.join([title, *chosen])} ({arguments.size}) in {arguments.output}")
