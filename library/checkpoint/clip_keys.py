"""Key maps of CLIP's text tower: the names in files and in transformers' ``CLIPTextModel`` and ``CLIPTextModelWithProjection``.

Sources of the names: transformers (`modeling_clip.py`) and mlfoundations/open_clip (`model.py`, `transformer.py`).
"""

from library.checkpoint.keymap import Drop, Fuse, KeyMap, Rename, Transpose

# What CLIP files carry beside the text tower: the projection, the other tower, and a fixed count 0..76.
_EXTRAS = (Drop("text_projection.weight"), Drop("text_projection"), Drop("logit_scale"), Drop("vision_model.{rest}"),
                Drop("visual_projection.weight"), Drop("text_model.embeddings.position_ids"), Drop("embeddings.position_ids"))

# clip_l.safetensors and text_encoder/ of diffusers folders. transformers 5 dropped the module's `text_model.`, files keep it.
CLIP = KeyMap((Rename("text_model.{rest}", "text_model.{rest}"), Rename("text_model.{rest}", "{rest}"), *_EXTRAS))
# The same module saved by transformers 5 without the prefix.
CLIP_FLAT = KeyMap((Rename("{rest}", "text_model.{rest}"), Rename("{rest}", "{rest}"), *_EXTRAS))

# The module with a projection, whose names never lost `text_model.`, as transformers saves it.
CLIP_PROJECTED = KeyMap((
    Rename("{rest}", "{rest}"),
    Drop("text_model.embeddings.position_ids"), Drop("logit_scale"), Drop("vision_model.{rest}"),
    Drop("visual_projection.weight"),
))

_LAYER, _LAYER_MODULE = "transformer.resblocks.{i}", "text_model.encoder.layers.{i}"

# open_clip: positions are a bare parameter, queries, keys and values one matrix, and the projection is used as x @ P where
# transformers' linear layer computes x @ W^T.
OPEN_CLIP = KeyMap((
    Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rename(f"{_LAYER}.ln_1.{{leaf}}", f"{_LAYER_MODULE}.layer_norm1.{{leaf}}"),
    Rename(f"{_LAYER}.ln_2.{{leaf}}", f"{_LAYER_MODULE}.layer_norm2.{{leaf}}"),
    Fuse(f"{_LAYER}.attn.in_proj_{{leaf}}",
         tuple(f"{_LAYER_MODULE}.self_attn.{name}.{{leaf}}" for name in ("q_proj", "k_proj", "v_proj"))),
    Rename(f"{_LAYER}.attn.out_proj.{{leaf}}", f"{_LAYER_MODULE}.self_attn.out_proj.{{leaf}}"),
    Rename(f"{_LAYER}.mlp.c_fc.{{leaf}}", f"{_LAYER_MODULE}.mlp.fc1.{{leaf}}"),
    Rename(f"{_LAYER}.mlp.c_proj.{{leaf}}", f"{_LAYER_MODULE}.mlp.fc2.{{leaf}}"),
    Rename("ln_final.{leaf}", "text_model.final_layer_norm.{leaf}"),
    Transpose("text_projection", "text_projection.weight"),
    Drop("logit_scale"), Drop("attn_mask"), Drop("visual.{rest}"), Drop("text_model.embeddings.position_ids"),
))
