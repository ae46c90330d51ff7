"""The tiny SD3 models that the golden records were made on, with their initial weights."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from library.checkpoint.clip_keys import CLIP, CLIP_PROJECTED
from library.checkpoint.keymap import BoundMap, module_shapes
from library.checkpoint.sd3_keys import MMDIT_PREFIX, mmdit
from library.config.weighted_flow_options import WeightedFlowOptions
from tests.golden.records import Record
from tests.golden.records_sdxl import _CLIP_G, _CLIP_L, BOS, EOS, VOCABULARY
from tests.golden.weights import fill

DEPTH, HEAD, POSITIONS, TEXT, POOLED = 2, 64, 16, 64, 56
CLIP_TOKENS, T5_TOKENS = 77, 32
_NUMBERS = ("training_shift", "logit_mean", "logit_std", "mode_scale")


def options(record: Record) -> WeightedFlowOptions:
    numbers = {name: float(record.settings[name]) for name in _NUMBERS if name in record.settings}
    return WeightedFlowOptions(weighting_scheme=record.settings["weighting_scheme"], **numbers)


def tiny_mmdit(record: Record) -> tuple[SD3Transformer2DModel, BoundMap]:
    """diffusers' module with the record's initial weights, and the key map that put them there."""
    dual = {int(name.split(".")[1]) for name in record.shapes if ".attn2." in name}
    module = SD3Transformer2DModel(
        num_layers=DEPTH, num_attention_heads=DEPTH, attention_head_dim=HEAD, caption_projection_dim=DEPTH * HEAD,
        joint_attention_dim=TEXT, pooled_projection_dim=POOLED, pos_embed_max_size=POSITIONS,
        qk_norm="rms_norm" if any(".ln_q." in name for name in record.shapes) else None, dual_attention_layers=tuple(dual))
    bound = mmdit(DEPTH).bind(module_shapes(module))
    assert {name: list(shape) for name, shape in bound.original_shapes().items()} == record.shapes
    weights = {}
    for original, shape in bound.original_shapes().items():
        weights.update(bound.to_module(original, fill(MMDIT_PREFIX + original, shape)))
    module.load_state_dict(weights, strict=True)
    return module, bound


def tiny_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP-L, whose pooled vector is not projected, and CLIP-G, filled by their names in files of their own."""
    special = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS}
    modules = (CLIPTextModel(CLIPTextConfig(**_CLIP_L, **special)).eval(),
               CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, **special)).eval())
    for module, keymap in zip(modules, (CLIP, CLIP_PROJECTED), strict=True):
        bound = keymap.bind(module_shapes(module))
        for original, shape in bound.original_shapes().items():
            for name, tensor in bound.to_module(original, fill(original, shape)):
                module.get_parameter(name).data.copy_(tensor)
    return modules
