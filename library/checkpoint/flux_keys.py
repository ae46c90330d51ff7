"""FLUX.1's key maps: the names in the files people trade and those in the diffusers and transformers modules.

Sources of the names: black-forest-labs/flux (`model.py`, `modules/layers.py`) for the files; diffusers (`transformer_flux.py`)
for the modules. Its autoencoder and text encoders have tables of their own, which other models share.
"""

from library.checkpoint.keymap import Fuse, KeyMap, Rename, Rule, SwapHalves

_DOUBLE, _DOUBLE_MODULE = "double_blocks.{i}", "transformer_blocks.{i}"
_SINGLE, _SINGLE_MODULE = "single_blocks.{i}", "single_transformer_blocks.{i}"


def _embedder(original: str, module: str) -> tuple[Rule, ...]:
    return (Rename(f"{original}.in_layer.{{leaf}}", f"time_text_embed.{module}.linear_1.{{leaf}}"),
            Rename(f"{original}.out_layer.{{leaf}}", f"time_text_embed.{module}.linear_2.{{leaf}}"))


# flux1-dev and flux1-schnell. Only dev's module has a guidance embedder, so its rules act on dev alone.
TRANSFORMER = KeyMap((
    Rename("img_in.{leaf}", "x_embedder.{leaf}"),
    Rename("txt_in.{leaf}", "context_embedder.{leaf}"),
    *_embedder("time_in", "timestep_embedder"),
    *_embedder("vector_in", "text_embedder"),
    *_embedder("guidance_in", "guidance_embedder"),

    Rename(f"{_DOUBLE}.img_mod.lin.{{leaf}}", f"{_DOUBLE_MODULE}.norm1.linear.{{leaf}}"),
    Rename(f"{_DOUBLE}.txt_mod.lin.{{leaf}}", f"{_DOUBLE_MODULE}.norm1_context.linear.{{leaf}}"),
    Fuse(f"{_DOUBLE}.img_attn.qkv.{{leaf}}",
         tuple(f"{_DOUBLE_MODULE}.attn.{name}.{{leaf}}" for name in ("to_q", "to_k", "to_v"))),
    Fuse(f"{_DOUBLE}.txt_attn.qkv.{{leaf}}",
         tuple(f"{_DOUBLE_MODULE}.attn.{name}.{{leaf}}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))),
    Rename(f"{_DOUBLE}.img_attn.norm.query_norm.scale", f"{_DOUBLE_MODULE}.attn.norm_q.weight"),
    Rename(f"{_DOUBLE}.img_attn.norm.key_norm.scale", f"{_DOUBLE_MODULE}.attn.norm_k.weight"),
    Rename(f"{_DOUBLE}.txt_attn.norm.query_norm.scale", f"{_DOUBLE_MODULE}.attn.norm_added_q.weight"),
    Rename(f"{_DOUBLE}.txt_attn.norm.key_norm.scale", f"{_DOUBLE_MODULE}.attn.norm_added_k.weight"),
    Rename(f"{_DOUBLE}.img_attn.proj.{{leaf}}", f"{_DOUBLE_MODULE}.attn.to_out.0.{{leaf}}"),
    Rename(f"{_DOUBLE}.txt_attn.proj.{{leaf}}", f"{_DOUBLE_MODULE}.attn.to_add_out.{{leaf}}"),
    Rename(f"{_DOUBLE}.img_mlp.0.{{leaf}}", f"{_DOUBLE_MODULE}.ff.net.0.proj.{{leaf}}"),
    Rename(f"{_DOUBLE}.img_mlp.2.{{leaf}}", f"{_DOUBLE_MODULE}.ff.net.2.{{leaf}}"),
    Rename(f"{_DOUBLE}.txt_mlp.0.{{leaf}}", f"{_DOUBLE_MODULE}.ff_context.net.0.proj.{{leaf}}"),
    Rename(f"{_DOUBLE}.txt_mlp.2.{{leaf}}", f"{_DOUBLE_MODULE}.ff_context.net.2.{{leaf}}"),

    Rename(f"{_SINGLE}.modulation.lin.{{leaf}}", f"{_SINGLE_MODULE}.norm.linear.{{leaf}}"),
    Fuse(f"{_SINGLE}.linear1.{{leaf}}",
         tuple(f"{_SINGLE_MODULE}.{name}.{{leaf}}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))),
    Rename(f"{_SINGLE}.linear2.{{leaf}}", f"{_SINGLE_MODULE}.proj_out.{{leaf}}"),
    Rename(f"{_SINGLE}.norm.query_norm.scale", f"{_SINGLE_MODULE}.attn.norm_q.weight"),
    Rename(f"{_SINGLE}.norm.key_norm.scale", f"{_SINGLE_MODULE}.attn.norm_k.weight"),

    # BFL's last layer computes (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    SwapHalves("final_layer.adaLN_modulation.1.{leaf}", "norm_out.linear.{leaf}"),
    Rename("final_layer.linear.{leaf}", "proj_out.{leaf}"),
))
