"""What a saved file says of itself: the Stability AI model metadata standard, version 1.0.1 (Stability-AI/ModelSpec)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from library.errors import UserError

VERSION = "1.0.1"
HASH_KEY = "modelspec.hash_sha256"  # filled in by the writer, which is the first to know it
_IMAGE_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def modelspec(*, architecture: str, implementation: str, title: str, resolution: str | tuple[int, int], date: datetime,
              implementation_version: str | None = None, author: str | None = None, description: str | None = None,
              license: str | None = None, tags: str | None = None, usage_hint: str | None = None, thumbnail: str | None = None,
              merged_from: str | None = None, trigger_phrase: str | None = None, prediction_type: str | None = None,
              timestep_range: tuple[int, int] | None = None, encoder_layer: str | None = None,
              extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The ``modelspec.*`` fields; what is None or empty is left out. Pure: the date is an argument.

    ``resolution``: ``"1024x1024"`` or (width, height). ``timestep_range``: on 0..1000. ``thumbnail``: a data URL
    (``thumbnail_url``). ``extra``: further fields under their whole names, which must not be the standard's own.
    """
    fields = {
        "sai_model_spec": VERSION, "architecture": architecture, "implementation": implementation,
        "implementation_version": implementation_version, "title": title,
        "resolution": resolution if isinstance(resolution, str) else f"{resolution[0]}x{resolution[1]}",
        "date": date.isoformat(timespec="seconds"), "author": author, "description": description, "license": license,
        "tags": tags, "usage_hint": usage_hint, "thumbnail": thumbnail, "merged_from": merged_from,
        "trigger_phrase": trigger_phrase, "prediction_type": prediction_type,
        "timestep_range": f"{timestep_range[0]},{timestep_range[1]}" if timestep_range else None, "encoder_layer": encoder_layer,
    }
    standard = {f"modelspec.{name}": value for name, value in fields.items() if value}
    extra = dict(extra or {})
    assert not standard.keys() & extra.keys(), standard.keys() & extra.keys()
    return standard | extra


def thumbnail_url(path: Path) -> str:
    """A small picture as the data URL that ``modelspec.thumbnail`` holds. UserError for a file that is no such picture."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", place="--metadata_thumbnail", remedy="check the path") from error
    kind = next((kind for start, kind in _IMAGE_KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise UserError(f"{path} is no PNG, JPEG or WebP picture", place="--metadata_thumbnail",
                        remedy="use one of these formats")
    if len(data) > 1 << 20:
        raise UserError(f"{path} has {len(data) / 1e6:.1f} MB; it is stored in every saved file", place="--metadata_thumbnail",
                        remedy="use a picture under 1 MB, for instance a JPEG of 256x256")
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
