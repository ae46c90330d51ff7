"""SD3's key maps: the single file of Stability AI and diffusers' ``SD3Transformer2DModel``, for SD3 and SD3.5.

Sources of the names: Stability-AI/sd3.5 (`mmditx.py`, `sd3_impls.py`) for the file; diffusers (`transformer_sd3.py`,
`attention.py`) for the module. The autoencoder and the text encoders have tables of their own, which other models share.
"""

from library.checkpoint.keymap import Fuse, KeyMap, Rename, Rule, SwapHalves

# Where the parts stand in the single file.
MMDIT_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
ENCODER_PREFIXES = {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}

_BLOCK, _MODULE = "joint_blocks.{i}", "transformer_blocks.{i}"


def _embedder(original: str, module: str) -> tuple[Rule, ...]:
    return (Rename(f"{original}.mlp.0.{{leaf}}", f"time_text_embed.{module}.linear_1.{{leaf}}"),
            Rename(f"{original}.mlp.2.{{leaf}}", f"time_text_embed.{module}.linear_2.{{leaf}}"))


def _attention(original: str, module: str, names: tuple[str, str, str], out: str, norms: tuple[str, str]) -> tuple[Rule, ...]:
    """Queries, keys and values are one matrix in the file; the norms of queries and keys are SD3.5's."""
    return (Fuse(f"{original}.qkv.{{leaf}}", tuple(f"{module}.{name}.{{leaf}}" for name in names)),
            Rename(f"{original}.proj.{{leaf}}", f"{module}.{out}.{{leaf}}"),
            Rename(f"{original}.ln_q.{{leaf}}", f"{module}.{norms[0]}.{{leaf}}"),
            Rename(f"{original}.ln_k.{{leaf}}", f"{module}.{norms[1]}.{{leaf}}"))


def _stream(original: str, modulation: str, feed_forward: str) -> tuple[Rule, ...]:
    return (Rename(f"{_BLOCK}.{original}.adaLN_modulation.1.{{leaf}}", f"{_MODULE}.{modulation}.linear.{{leaf}}"),
            Rename(f"{_BLOCK}.{original}.mlp.fc1.{{leaf}}", f"{_MODULE}.{feed_forward}.net.0.proj.{{leaf}}"),
            Rename(f"{_BLOCK}.{original}.mlp.fc2.{{leaf}}", f"{_MODULE}.{feed_forward}.net.2.{{leaf}}"))


def mmdit(depth: int) -> KeyMap:
    """The table of a transformer with so many blocks. Widths, norms and second attentions are free.

    The last block hands its text to nobody, so there the text is only normed with a shift and a scale; diffusers takes
    these two, like those of the output, in the other order.
    """
    last = depth - 1
    picture, own, words = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), ("add_q_proj", "add_k_proj", "add_v_proj")
    return KeyMap((
        SwapHalves(f"joint_blocks.{last}.context_block.adaLN_modulation.1.{{leaf}}",
                   f"transformer_blocks.{last}.norm1_context.linear.{{leaf}}"),
        SwapHalves("final_layer.adaLN_modulation.1.{leaf}", "norm_out.linear.{leaf}"),
        Rename("final_layer.linear.{leaf}", "proj_out.{leaf}"),
        Rename("pos_embed", "pos_embed.pos_embed"),
        Rename("x_embedder.proj.{leaf}", "pos_embed.proj.{leaf}"),
        Rename("context_embedder.{leaf}", "context_embedder.{leaf}"),
        *_embedder("t_embedder", "timestep_embedder"),
        *_embedder("y_embedder", "text_embedder"),
        *_attention(f"{_BLOCK}.x_block.attn", f"{_MODULE}.attn", picture, "to_out.0", own),
        *_attention(f"{_BLOCK}.x_block.attn2", f"{_MODULE}.attn2", picture, "to_out.0", own),
        *_attention(f"{_BLOCK}.context_block.attn", f"{_MODULE}.attn", words, "to_add_out", ("norm_added_q", "norm_added_k")),
        *_stream("x_block", "norm1", "ff"),
        *_stream("context_block", "norm1_context", "ff_context"),
    ))
