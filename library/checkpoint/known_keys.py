"""What a file of tensors looks like, told by a few keys of each kind: for error messages, and to tell variants apart.

Key names follow the published files (the lists of single-file checkpoints) and diffusers' module names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from library.checkpoint.header import TensorInfo

Tensors = Mapping[str, TensorInfo]
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")

# (all of these patterns occur among the names, what it is); the first match counts
MODELS = [
    ((r"lora_(down|up|A|B)\.", ), "a LoRA, which only adds to a checkpoint"),
    ((r"\.(hada_w1_a|lokr_w1|lokr_w1_a|dora_scale)$", ), "a LyCORIS adapter, which only adds to a checkpoint"),
    ((r"controlnet_", ), "a ControlNet"),
    ((r"^distilled_guidance_layer\.", r"^double_blocks\."), "a Chroma transformer"),
    ((r"^distilled_guidance_layer\.", ), "a Chroma transformer"),
    ((r"^double_stream_modulation_img\.", ), "a FLUX.2 transformer"),
    ((r"^double_blocks\.\d+\.img_attn_qkv\.", ), "a HunyuanVideo transformer"),
    ((r"^double_blocks\.0\.img_attn\.qkv\.weight$", r"^img_in\.weight$"), "a FLUX.1 transformer"),
    ((r"^single_transformer_blocks\.0\.proj_mlp\.weight$", r"^x_embedder\.weight$"), "a FLUX.1 transformer in diffusers layout"),
    ((r"^joint_blocks\.\d+\.x_block\.", ), "an SD3 / SD3.5 checkpoint"),
    ((r"^transformer_blocks\.0\.attn\.add_k_proj\.", r"^pos_embed\.proj\."), "an SD3 / SD3.5 transformer in diffusers layout"),
    ((r"^transformer_blocks\.\d+\.img_mod\.", ), "a Qwen-Image transformer"),
    ((r"^input_blocks\.\d+\.", r"^label_emb\."), "an SDXL checkpoint"),
    ((r"^input_blocks\.\d+\.", ), "an SD 1.x / 2.x checkpoint"),
    ((r"^down_blocks\.\d+\.", r"^add_embedding\."), "an SDXL UNet in diffusers layout"),
    ((r"^down_blocks\.\d+\.", r"^time_embedding\."), "a Stable Diffusion UNet in diffusers layout"),
    ((r"^ref_image_refiner\.", ), "an OmniGen2 transformer"),
    ((r"^(x_pad_token|cap_pad_token)$", r"^noise_refiner\."), "a Z-Image transformer"),
    ((r"^(noise_refiner|context_refiner)\.", ), "a Lumina-Image 2.0 transformer (or a relative of it)"),
    ((r"^layers\.0\.attention\.wk_y\.", ), "a Lumina-Next transformer"),
    ((r"^layers\.0\.attn2\.to_k\.", r"^patch_embedder\.proj\."), "a Lumina-Next transformer in diffusers layout"),
    ((r"^blocks\.\d+\.self_attn\.", r"^patch_embedding\."), "a Wan video transformer"),
    ((r"^model\.layers\.\d+\.(self_attn|mlp)\.", ), "a language model"),
    ((r"^layers\.\d+\.self_attn\.", ), "a language model"),
]
# how a title begins -> what trains such a model
SCRIPTS = {"a FLUX.1": "flux_train.py", "an SDXL": "sdxl_train.py", "an SD3": "sd3_train.py", "a Lumina-": "lumina_train.py"}
QUANTISED = [
    (r"\.quant_state\.bitsandbytes__|\.absmax$|\.quant_map$", "bitsandbytes 4-bit (nf4 / fp4)"),
    (r"\.SCB$", "bitsandbytes 8-bit"),
    (r"\.(qweight|qzeros|wscales)$", "GPTQ / AWQ / SVDQuant 4-bit"),
]


def recognise(tensors: Tensors) -> str:
    """A noun phrase such as ``an SDXL checkpoint`` or ``a T5 encoder (width 4096)``, for messages and for telling kinds apart."""
    bare = bare_transformer_names(tensors)
    for patterns, title in MODELS:
        if all(any(re.search(pattern, name) for name in bare) for pattern in patterns):
            return title
    for kind in (_text_encoder, _autoencoder):
        if title := kind(tensors):
            return title
    few = ", ".join(list(tensors)[:3])
    return f"something unknown ({len(tensors)} tensors: {few}{', ...' if len(tensors) > 3 else ''})"


def other_script(title: str, instead: str) -> str:
    """The remedy for a file that is ``title`` (see ``recognise``) where another kind was expected: ``instead`` says which."""
    script = next((script for start, script in SCRIPTS.items() if title.startswith(start)), "")
    return f"train it with {script}, or {instead}" if script else instead


def quantisation(tensors: Tensors) -> str:
    """The name of a quantisation that weights cannot be trained from, or an empty string."""
    for pattern, title in QUANTISED:
        if any(re.search(pattern, name) for name in tensors):
            return title
    packed = [name for name, info in tensors.items() if info.dtype in ("U8", "I8") and name.endswith(".weight")]
    return "packed 8-bit integers" if packed else ""


def transformer_prefix(tensors: Tensors) -> str:
    """The prefix before the transformer's keys in single files (``model.diffusion_model.``), or an empty string."""
    return next((prefix for prefix in TRANSFORMER_PREFIXES if any(name.startswith(prefix) for name in tensors)), "")


def bare_transformer_names(tensors: Tensors) -> set[str]:
    """Names with the transformer's prefix stripped; all names when there is none."""
    prefix = transformer_prefix(tensors)
    return {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}


def _text_encoder(tensors: Tensors) -> str:
    names = set(tensors)
    for prefix in ("", "encoder."):  # the second: a T5 saved from inside another module
        if f"{prefix}encoder.block.0.layer.0.SelfAttention.q.weight" in names:
            width = tensors[f"{prefix}encoder.block.0.layer.0.SelfAttention.q.weight"].shape[1]
            whole = " with its decoder" if any(name.startswith("decoder.") for name in names) else ""
            return f"a T5 encoder (width {width}){whole}"
    for prefix in ("text_model.", ""):
        key = f"{prefix}embeddings.token_embedding.weight"
        if key in names:
            width = tensors[key].shape[1]
            kind = {768: "CLIP-L", 1280: "CLIP-G"}.get(width, "CLIP")
            vision = " together with its vision half" if any(name.startswith("vision_model.") for name in names) else ""
            return f"a {kind} text encoder (width {width}){vision}"
    return ""


def _autoencoder(tensors: Tensors) -> str:
    if "decoder.conv_in.weight" not in tensors or "encoder.conv_in.weight" not in tensors:
        return ""
    channels = tensors["decoder.conv_in.weight"].shape[1]
    owner = {4: "SD 1.x / SDXL", 16: "FLUX.1 or SD3", 32: "FLUX.2"}.get(channels, "another model")
    return f"an autoencoder with {channels} latent channels (of {owner})"
