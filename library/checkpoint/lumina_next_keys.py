"""Key maps of Lumina-Next: the original release and diffusers' ``LuminaNextDiT2DModel``.

Sources of the names: Alpha-VLLM/Lumina-T2X (`lumina_next_t2i/models/model.py`) for the file; diffusers
(`lumina_nextdit2d.py`) for the module.

One query matrix, and its norm, serves a layer twice: for attention within the picture and to the text. diffusers' module holds it
twice; here the two are tied (``architectures/lumina_models.py``), so that the module has what the file has.
"""

from library.checkpoint.keymap import KeyMap, Rename, Rule

PAD_TOKEN = "pad_token"  # fills pictures of different sizes in one batch, which does not happen here: it never trains

_LAYER = "layers.{i}"
# part of a layer's attention in the file -> the module's
_ATTENTION = {"wq": "attn1.to_q", "wk": "attn1.to_k", "wv": "attn1.to_v", "wk_y": "attn2.to_k", "wv_y": "attn2.to_v",
              "wo": "attn2.to_out.0", "q_norm": "attn1.norm_q", "k_norm": "attn1.norm_k", "ky_norm": "attn2.norm_k"}
_SHARED = ("to_q", "norm_q")

_LAYERS: tuple[Rule, ...] = (
    Rename(f"{_LAYER}.attention.gate", f"{_LAYER}.gate"),
    *(Rename(f"{_LAYER}.attention.{file}.{{leaf}}", f"{_LAYER}.{module}.{{leaf}}") for file, module in _ATTENTION.items()),
    Rename(f"{_LAYER}.attention_norm1.weight", f"{_LAYER}.norm1.norm.weight"),
    Rename(f"{_LAYER}.adaLN_modulation.1.{{leaf}}", f"{_LAYER}.norm1.linear.{{leaf}}"),
    Rename(f"{_LAYER}.attention_norm2.weight", f"{_LAYER}.norm2.weight"),
    Rename(f"{_LAYER}.attention_y_norm.weight", f"{_LAYER}.norm1_context.weight"),
    Rename(f"{_LAYER}.feed_forward.w{{n}}.weight", f"{_LAYER}.feed_forward.linear_{{n}}.weight"),
    Rename(f"{_LAYER}.ffn_norm{{n}}.weight", f"{_LAYER}.ffn_norm{{n}}.weight"),
)

TRANSFORMER = KeyMap((
    Rename("x_embedder.{leaf}", "patch_embedder.proj.{leaf}"),
    Rename("t_embedder.mlp.0.{leaf}", "time_caption_embed.timestep_embedder.linear_1.{leaf}"),
    Rename("t_embedder.mlp.2.{leaf}", "time_caption_embed.timestep_embedder.linear_2.{leaf}"),
    Rename("cap_embedder.{n}.{leaf}", "time_caption_embed.caption_embedder.{n}.{leaf}"),
    *_LAYERS,
    Rename("final_layer.adaLN_modulation.1.{leaf}", "norm_out.linear_1.{leaf}"),
    Rename("final_layer.linear.{leaf}", "norm_out.linear_2.{leaf}"),
    Rename(PAD_TOKEN, PAD_TOKEN),
))

# diffusers' own names, where files hold the shared matrix under both of them
DIFFUSERS = KeyMap((
    *(Rename(f"{_LAYER}.attn1.{part}.{{leaf}}", f"{_LAYER}.attn1.{part}.{{leaf}}", also=(f"{_LAYER}.attn2.{part}.{{leaf}}",))
      for part in _SHARED),
    Rename("{rest}", "{rest}"),
))
