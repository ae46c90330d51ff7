"""T5's encoder: its module from a file, and captions to its token states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from library.architectures.loading import count, load
from library.architectures.tokenizers import padded, refuse_unknown_tokens
from library.checkpoint.source import Source
from library.checkpoint.t5_keys import T5

LAYOUTS = (T5,)
FLAG = "--t5xxl_tokenizer"


def load_t5(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """``T5EncoderModel`` in eval mode, frozen, embeddings tied.

    In float16 the second projection of every feed-forward stays float32: its sums overflow half precision (transformers'
    ``_keep_in_fp32_modules`` does the same).
    """
    model = load(lambda: build_t5(source), source, LAYOUTS, dtype, device, "t5xxl")
    for name, module in model.named_modules():
        if name.endswith("DenseReluDense.wo") and module.weight.dtype == torch.float16:
            module.float()
    return model


def build_t5(source: Source) -> nn.Module:
    """``T5EncoderModel`` as the file's shapes ask for, with weights of its own."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**t5_config(source)))


def t5_config(source: Source) -> dict[str, Any]:
    """Arguments of ``T5Config`` for a gated (v1.1) encoder; the width of a key comes from the relative bias's heads."""
    names = source.tensors
    key = "shared.weight" if "shared.weight" in names else "encoder.embed_tokens.weight"
    vocabulary, width = names[key].shape
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = names[f"{attention}.relative_attention_bias.weight"].shape
    layers = count(names, r"encoder\.block\.(\d+)\.")
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": names[f"{attention}.q.weight"].shape[0] // heads, "num_heads": heads,
        "d_ff": names["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": layers, "num_decoder_layers": layers,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6, "dropout_rate": 0.0, "is_encoder_decoder": False, "use_cache": False,
        "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
    }


def encode_t5(encoder: nn.Module, tokenizer: Any, captions: Sequence[str], length: int,
              apply_mask: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """States (B, length, D) in the encoder's dtype, and which of them are tokens: (B, length) bool on the CPU.

    ``apply_mask`` hides padding from the encoder; without, it attends to padding as the published models do. Captions that
    are too long are cut, with their end token kept. UserError when the encoder has no row for a token.
    """
    module = getattr(encoder, "module", encoder)  # the plain module under DistributedDataParallel
    words = module.get_input_embeddings().weight  # (V, D)
    ids, mask = padded(tokenizer, captions, length)
    refuse_unknown_tokens(int(ids.max()), words.shape[0], "T5", FLAG)
    shown = mask.to(words.device) if apply_mask else None
    return encoder(input_ids=ids.to(words.device), attention_mask=shown).last_hidden_state, mask.bool()


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The encoder's layers in the order they run, to be recomputed."""
    return list(encoder.encoder.block)
