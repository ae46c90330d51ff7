"""Files that are not what they should be: one line that says what they are and what to do."""

import json
import pickle
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoint.header import read_header
from library.checkpoint.source import open_source
from library.errors import UserError


def good(path, **tensors):
    save_file(tensors or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, str(path), {"k": "v"})
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and "; " in line, line
    return line


def with_header(path, fields, data=b"", length=None):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_good_file(tmp_path):
    header = read_header(good(tmp_path / "x.safetensors"))
    assert {name: (info.dtype, info.shape, info.nbytes, info.numel) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3), 24, 6), "b": ("BF16", (2,), 4, 2)}
    assert header.metadata == {"k": "v"}


def test_header_needs_no_torch():
    import subprocess

    code = "import sys, library.checkpoint.header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


OTHER_FORMATS = {
    "empty": (b"", "empty"),
    "short": (b"abc", "only 3 bytes"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n", "git-lfs pointer"),
    "html": (b"<!DOCTYPE html><html><head><title>Access denied</title></head></html>", "web page"),
    "html with blank lines": (b"\n\n  <HTML><body>401</body></HTML>", "web page"),
    "json error": (b'{"error":"Access to model black-forest-labs/FLUX.1-dev is restricted"}', "error message"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(range(1, 60)), "GGUF"),
    "old pickle": (pickle.dumps({"state_dict": {}}, protocol=2), "pickle"),
    "zeros": (bytes(4096), "download did not finish"),
    "garbage": (bytes((7 * index + 13) % 251 for index in range(4096)), "not a safetensors file"),
    "text": (b"this is my model, please train it well and carefully", "not a safetensors file"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_told(name, tmp_path):
    data, words = OTHER_FORMATS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert words in refusal(path)


def test_torch_zip_checkpoint_under_a_wrong_name_is_told(tmp_path):
    """(Under its own name it is read: test_checkpoint_pickled.py.)"""
    torch.save({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert zipfile.is_zipfile(tmp_path / "model.safetensors")
    assert "pickle" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x04034B50 % 100_000])
def test_a_header_length_that_looks_like_a_pickle_is_read(length, tmp_path):
    """0x0280 little-endian begins with the bytes of a pickle of protocol 2."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    with_header(tmp_path / "x.safetensors", text, bytes(4))
    assert open_source(tmp_path / "x.safetensors").read("a").tolist() == [0.0]


@pytest.mark.parametrize("keep", [9, 40, -1, -20])
def test_truncated(keep, tmp_path):
    path = good(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    assert any(words in refusal(path) for words in ("truncated", "only 9 bytes"))


def test_bytes_after_the_end(tmp_path):
    path = good(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes() + b"more")
    assert "4 bytes after the last tensor" in refusal(path)


F32 = {"dtype": "F32", "shape": [1]}
BAD_HEADERS = {
    "not json": b'{"a": }',
    "not utf-8": b'{"\xff\xfe": 1}',
    "no offsets": {"a": F32},
    "offsets do not fit the shape": {"a": {**F32, "data_offsets": [0, 3]}},
    "negative": {"a": {**F32, "data_offsets": [-4, 0]}},
    "backwards": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
    "hole": {"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [8, 12]}},
    "overlap": {"a": {**F32, "data_offsets": [0, 4]}, "b": {**F32, "data_offsets": [0, 4]}},
    "shape is text": {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
    "entry is a number": {"a": 3},
    "three offsets": {"a": {**F32, "data_offsets": [0, 4, 8]}},
    "metadata is a number": {"__metadata__": 3, "a": {**F32, "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_damaged_header(name, tmp_path):
    assert "damaged" in refusal(with_header(tmp_path / "x.safetensors", BAD_HEADERS[name], bytes(12)))


def test_unknown_number_format(tmp_path):
    path = with_header(tmp_path / "x.safetensors", {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0")
    assert "'F4'" in refusal(path)


def test_file_without_tensors(tmp_path):
    assert "no tensors" in refusal(with_header(tmp_path / "x.safetensors", {}))


def test_missing_file_names_its_neighbour(tmp_path):
    good(tmp_path / "flux1-dev.safetensors")
    assert "did you mean 'flux1-dev.safetensors'?" in refusal(tmp_path / "flux1_dev.safetensors")
    assert "folder" in refusal(tmp_path / "nowhere" / "flux1-dev.safetensors")


def test_dangling_link(tmp_path):
    link = tmp_path / "x.safetensors"
    try:
        link.symlink_to(tmp_path / "blob")
    except OSError:
        pytest.skip("no links on this system")
    assert "link" in refusal(link)
