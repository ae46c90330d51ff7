"""Key maps of Lumina-Image 2.0: the names in the files people trade and those in diffusers' ``Lumina2Transformer2DModel``.

Sources of the names: Alpha-VLLM/Lumina-Image-2.0 (`models/model.py`) for the file; diffusers (`transformer_lumina2.py`) for the
module. Lumina-Next, an older model, has tables of its own (``lumina_next_keys.py``); so has their text encoder
(``gemma_keys.py``).
"""

from library.checkpoint.keymap import Drop, Fuse, KeyMap, Rename, Rule

TRANSFORMER_PREFIX = "model.diffusion_model."  # in ComfyUI's all-in-one files
# In every published file, and used by no one: the network ends without it. It is kept when a file is written again.
UNUSED_NORM = "norm_final.weight"

_BLOCKS = ("noise_refiner", "context_refiner", "layers")


def _block(name: str) -> tuple[Rule, ...]:
    block = f"{name}.{{i}}"
    return (
        Fuse(f"{block}.attention.qkv.weight", tuple(f"{block}.attn.{part}.weight" for part in ("to_q", "to_k", "to_v"))),
        Rename(f"{block}.attention.out.weight", f"{block}.attn.to_out.0.weight"),
        Rename(f"{block}.attention.q_norm.weight", f"{block}.attn.norm_q.weight"),
        Rename(f"{block}.attention.k_norm.weight", f"{block}.attn.norm_k.weight"),
        Rename(f"{block}.feed_forward.w{{n}}.weight", f"{block}.feed_forward.linear_{{n}}.weight"),
        Rename(f"{block}.ffn_norm{{n}}.weight", f"{block}.ffn_norm{{n}}.weight"),
        Rename(f"{block}.attention_norm2.weight", f"{block}.norm2.weight"),
    )


def _modulated(name: str) -> tuple[Rule, ...]:
    """Blocks that are told the noise level: their first norm carries the modulation. The context's blocks are not told."""
    block = f"{name}.{{i}}"
    return (Rename(f"{block}.attention_norm1.weight", f"{block}.norm1.norm.weight"),
            Rename(f"{block}.adaLN_modulation.1.{{leaf}}", f"{block}.norm1.linear.{{leaf}}"))


TRANSFORMER = KeyMap((
    Rename("x_embedder.{leaf}", "x_embedder.{leaf}"),
    Rename("t_embedder.mlp.0.{leaf}", "time_caption_embed.timestep_embedder.linear_1.{leaf}"),
    Rename("t_embedder.mlp.2.{leaf}", "time_caption_embed.timestep_embedder.linear_2.{leaf}"),
    Rename("cap_embedder.{n}.{leaf}", "time_caption_embed.caption_embedder.{n}.{leaf}"),
    *(rule for name in _BLOCKS for rule in _block(name)),
    *_modulated("noise_refiner"),
    *_modulated("layers"),
    Rename("context_refiner.{i}.attention_norm1.weight", "context_refiner.{i}.norm1.weight"),
    Rename("final_layer.adaLN_modulation.1.{leaf}", "norm_out.linear_1.{leaf}"),
    Rename("final_layer.linear.{leaf}", "norm_out.linear_2.{leaf}"),
    Drop(UNUSED_NORM),
))
