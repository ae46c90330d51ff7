"""The tiny Lumina-Image 2.0 that the golden records were made on, with its initial weights."""

from __future__ import annotations

from diffusers import Lumina2Transformer2DModel

from library.checkpoint.keymap import BoundMap, module_shapes
from library.checkpoint.lumina_keys import TRANSFORMER, UNUSED_NORM
from tests.golden.records import Record
from tests.golden.weights import fill

# The recorded program normalises queries and keys with another epsilon than diffusers' module (1e-5).
RECORDED_EPSILON = 1e-6


def tiny_transformer(record: Record) -> tuple[Lumina2Transformer2DModel, BoundMap]:
    """diffusers' module with the record's initial weights and epsilon, and the key map that put them there."""
    module = Lumina2Transformer2DModel(
        hidden_size=48, num_layers=4, num_refiner_layers=2, num_attention_heads=3, num_kv_heads=1, axes_dim_rope=(4, 6, 6),
        cap_feat_dim=40)
    for name, part in module.named_modules():
        if name.endswith((".norm_q", ".norm_k")):
            part.eps = RECORDED_EPSILON
    bound = TRANSFORMER.bind(module_shapes(module))
    named = {name: list(shape) for name, shape in bound.original_shapes().items()}
    assert named == {name: shape for name, shape in record.shapes.items() if name != UNUSED_NORM}
    for original, shape in bound.original_shapes().items():
        for name, tensor in bound.to_module(original, fill(original, shape)):
            module.get_parameter(name).data.copy_(tensor)
    return module, bound


def original_names(record: Record) -> list[str]:
    """Of the recorded parameters those that train: all but the norm that no one uses."""
    return [name for name in record.settings["param_names"].split(",") if name != UNUSED_NORM]
