"""Checkpoints of the published sizes that take no room: true headers in front of a hole. What reads weights finds zeros."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from tools.toy_tokenizers import write_clip_tokenizer, write_gemma_tokenizer, write_t5_tokenizer

LAYOUTS = Path(__file__).parent / "data" / "layouts"


def write_hole(path: Path, layout: str, dtype: str = "BF16", itemsize: int = 2) -> Path:
    """A safetensors file with the names and shapes of ``layout`` and no data on the disk (where the file system knows holes)."""
    header, offset = {}, 0
    for name, shape in json.loads((LAYOUTS / f"{layout}.json").read_text(encoding="utf-8")).items():
        size = math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)
    return path


def write_flux(folder: Path) -> Path:
    """FLUX.1-dev with all its parts; returns the path of the transformer."""
    _write_encoders(folder, "clip_l")
    write_hole(folder / "ae.safetensors", "ae", "F32", 4)
    return write_hole(folder / "flux1-dev.safetensors", "flux1-dev")


def write_sdxl(folder: Path) -> Path:
    """SDXL base 1.0; returns the path of the file."""
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2")
    return write_hole(folder / "sd_xl_base_1.0.safetensors", "sdxl_base_1.0", "F16")


def write_sd3(folder: Path) -> Path:
    """SD3.5-large with all its encoders; returns the path of the transformer."""
    _write_encoders(folder, "clip_l", "clip_g")
    return write_hole(folder / "sd3.5_large.safetensors", "sd3.5_large")


def write_lumina(folder: Path) -> Path:
    """Lumina-Image 2.0 with all its parts; returns the path of the transformer."""
    write_gemma_tokenizer(folder / "tokenizer")
    write_hole(folder / "gemma_2_2b_fp16.safetensors", "gemma_2_2b", "F16")
    write_hole(folder / "ae.safetensors", "ae", "F32", 4)
    return write_hole(folder / "lumina_2_model_bf16.safetensors", "lumina_image_2.0")


def _write_encoders(folder: Path, *clips: str) -> None:
    """T5-XXL and what is named of CLIP, with tokenizers."""
    for name in clips:
        write_clip_tokenizer(folder / f"{name}_tokenizer")
        write_hole(folder / f"{name}.safetensors", name, "F16")
    write_t5_tokenizer(folder / "t5xxl_tokenizer")
    write_hole(folder / "t5xxl_fp16.safetensors", "t5xxl", "F16")
