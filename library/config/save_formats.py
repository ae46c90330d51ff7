"""The kinds of file that ``--save_model_as`` chooses between."""

from __future__ import annotations

from pathlib import Path

# kind -> what follows the name; nothing: the name of a diffusers folder, with .bin or with .safetensors files in it
SUFFIXES = {"safetensors": ".safetensors", "ckpt": ".ckpt", "diffusers": "", "diffusers_safetensors": ""}
PIPELINE_INDEX = "model_index.json"  # by which a diffusers folder is known

BESIDE = ("clip_l", "clip_g", "t5xxl")  # text encoders that a run may write beside the model, in files of their own


def beside(path: Path, part: str) -> Path:
    """Where a text encoder (of ``BESIDE``) lies that belongs to the model saved at ``path``: ``model_clip_l.safetensors``."""
    return path.with_name(f"{path.stem}_{part}.safetensors")


def is_pipeline(path: Path) -> bool:
    """Whether this is a diffusers folder: the only kind of folder that a run replaces or removes."""
    return (path / PIPELINE_INDEX).is_file()


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything in a folder."""
    return sum(entry.stat().st_size for entry in (path, *path.rglob("*")) if entry.is_file())
