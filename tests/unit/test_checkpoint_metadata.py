import base64
from datetime import datetime, timezone

import pytest

from library.checkpoint.metadata import modelspec, thumbnail_url
from library.errors import UserError

REQUIRED = {"architecture": "flux-1-dev", "implementation": "https://github.com/black-forest-labs/flux", "title": "mine",
            "resolution": (1024, 768), "date": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc)}


def test_required_fields_alone():
    assert modelspec(**REQUIRED) == {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "flux-1-dev", "modelspec.title": "mine",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux", "modelspec.resolution": "1024x768",
        "modelspec.date": "2026-01-02T03:04:05+00:00"}


def test_every_field_is_a_string_and_empty_ones_are_left_out():
    fields = modelspec(**REQUIRED, author="me", license="", tags="a,b", timestep_range=(0, 1000), extra={"kiln_version": "0.1"})
    assert fields["modelspec.timestep_range"] == "0,1000" and fields["modelspec.author"] == "me"
    assert fields["kiln_version"] == "0.1"
    assert "modelspec.license" not in fields and all(isinstance(value, str) for value in fields.values())


def test_extra_fields_cannot_overwrite_the_standard():
    with pytest.raises(AssertionError):
        modelspec(**REQUIRED, extra={"modelspec.title": "other"})


def test_thumbnail(tmp_path):
    picture = tmp_path / "x.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\nrest")
    kind, data = thumbnail_url(picture).split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == picture.read_bytes()


@pytest.mark.parametrize("content, words", [(None, "cannot read"), (b"text", "no PNG"), (b"\x89PNG" + bytes(2 << 20), "2.1 MB")])
def test_bad_thumbnails(content, words, tmp_path):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=words):
        thumbnail_url(tmp_path / "x")
