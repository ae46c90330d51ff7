"""Files that were damaged after they were written are found; good ones, of every kind, pass."""

import pytest
import torch

from library.checkpoint.export import Entry
from library.checkpoint.pickle_writer import write_pickle
from library.checkpoint.verify import Damaged, verify
from library.checkpoint.writer import DIGEST, write_safetensors

TENSORS = {"a": torch.arange(4096.0), "b": torch.ones(7)}
ENTRIES = [Entry(name, tuple(tensor.shape), "F32") for name, tensor in TENSORS.items()]


def write(path, **settings):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        write_safetensors(path, ENTRIES, TENSORS.__getitem__, **settings)
    else:
        write_pickle(path, ENTRIES, TENSORS.__getitem__)
    return path


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("settings", [{}, {"add_hash_key": "modelspec.hash_sha256"}, {"metadata": {"sshs_model_hash": DIGEST}}])
def test_whole_files_pass_and_short_ones_do_not(tmp_path, settings):
    path = write(tmp_path / "x.safetensors", **settings)
    verify(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Damaged, match="older files were kept"):
        verify(path)


@pytest.mark.parametrize("settings", [{"add_hash_key": "modelspec.hash_sha256"}, {"metadata": {"sshs_model_hash": DIGEST}}])
def test_one_wrong_bit_is_found_where_there_is_a_hash(tmp_path, settings):
    path = write(tmp_path / "x.safetensors", **settings)
    flip(path, -3)
    with pytest.raises(Damaged, match="do not fit the hash"):
        verify(path)


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin"])
def test_archives_have_checksums_of_their_own(tmp_path, name):
    path = write(tmp_path / name)
    verify(path)
    at = path.read_bytes().index(TENSORS["a"].numpy().tobytes()) + 9
    flip(path, at)
    with pytest.raises(Damaged):
        verify(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Damaged):
        verify(path)


def test_every_file_of_a_folder_is_looked_at(tmp_path):
    write(tmp_path / "unet" / "x.safetensors")
    bad = write(tmp_path / "vae" / "y.bin")
    verify(tmp_path)
    bad.write_bytes(b"")
    with pytest.raises(Damaged, match="y.bin"):
        verify(tmp_path)


def test_a_file_that_vanished(tmp_path):
    with pytest.raises(Damaged):
        verify(tmp_path / "gone.safetensors")
    with pytest.raises(Damaged):
        verify(tmp_path / "gone.ckpt")
