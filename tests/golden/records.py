"""Reading the golden records (``README.md``) and the tiny model that they were made on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from library.checkpoint.flux_keys import TRANSFORMER
from library.checkpoint.keymap import BoundMap, module_shapes
from library.config.flow_options import FlowOptions
from tests.golden.weights import fill_all

DATA = Path(__file__).parent / "data"
STEPS = 4
_NUMBERS = ("discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale")


@dataclass(frozen=True)
class Record:
    """One recorded configuration."""

    settings: dict[str, str]
    tensors: dict[str, torch.Tensor]
    shapes: dict[str, list[int]]

    def step(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"step{index}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def mask(self, index: int) -> torch.Tensor | None:
        """(B, 1, h, w) loss mask of a step, or None. The pixel mask is averaged over the pixels of each latent cell."""
        if f"step{index}.alpha_masks" not in self.tensors:
            return None
        # noted one batch early (README); step 0's own is lost, but has the shape and rows of step 3's batch
        noted = self.tensors[f"step{2 if index == 0 else index - 1}.alpha_masks"]
        return F.interpolate(noted[:, None], size=self.tensors[f"step{index}.latents"].shape[2:], mode="area")

    @property
    def options(self) -> FlowOptions:
        chosen = {name: float(self.settings[name]) for name in _NUMBERS if name in self.settings}
        words = {name: self.settings[name] for name in ("timestep_sampling", "weighting_scheme", "model_prediction_type")}
        return FlowOptions(**chosen, **words)


def names(model: str) -> list[str]:
    """The recorded configurations of one model."""
    return sorted(path.stem for path in DATA.glob(f"{model}_*.safetensors"))


def read(name: str) -> Record:
    path = DATA / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        settings = dict(file.metadata())
    return Record(settings, load_file(path), json.loads(path.with_suffix(".shapes.json").read_text()))


def tiny_transformer(record: Record) -> tuple[FluxTransformer2DModel, BoundMap]:
    """diffusers' module with the record's initial weights, and the key map that put them there."""
    module = FluxTransformer2DModel(
        in_channels=64, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=64,
        pooled_projection_dim=24, axes_dims_rope=(4, 6, 6), guidance_embeds="guidance_in.in_layer.weight" in record.shapes)
    bound = TRANSFORMER.bind(module_shapes(module))
    assert {name: list(shape) for name, shape in bound.original_shapes().items()} == record.shapes
    weights = {}
    for original, tensor in fill_all(record.shapes).items():
        weights.update(bound.to_module(original, tensor))
    module.load_state_dict(weights, strict=True)
    return module, bound
