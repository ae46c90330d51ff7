"""``.ckpt`` files: read like any other source when they hold weights and nothing else, refused in one line otherwise."""

import os
import pickle

import pytest
import torch

from library.checkpoint.source import open_source
from library.errors import UserError

WEIGHTS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "ids": torch.arange(7)[None],
           "empty": torch.tensor([]), "scalar": torch.tensor(2.5, dtype=torch.float16)}


def saved(tmp_path, content, name="model.ckpt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt", "MODEL.PT", "model.pth", "model.bin"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_come_back_bit_for_bit(tmp_path, name, wrapped):
    path = saved(tmp_path, {"state_dict": WEIGHTS, "epoch": 1, "global_step": 2} if wrapped else WEIGHTS, name)
    source = open_source(path)
    assert set(source.tensors) == set(WEIGHTS) and source.files == (path,)
    for key, tensor in WEIGHTS.items():
        assert source.read(key).dtype == tensor.dtype and torch.equal(source.read(key), tensor)
    assert torch.equal(source.read("b", torch.float32), WEIGHTS["b"].float())
    assert source.identity() == open_source(path).identity()


def test_views_of_one_storage(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    source = open_source(saved(tmp_path, {"whole": whole, "rows": whole[1:], "row": whole[2]}))
    assert torch.equal(source.read("rows"), whole[1:]) and torch.equal(source.read("row"), whole[2])


class Command:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_pickle_that_would_run_something_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"state_dict": WEIGHTS, "callbacks": Command()})
    assert refusal(path).startswith(f"{path}: holds more than weights, and opening the rest could run code; use ")
    assert not (tmp_path / "hacked").exists()


def test_damaged_and_strange_files(tmp_path):
    path = saved(tmp_path, WEIGHTS)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    assert "damaged PyTorch file" in refusal(path)
    assert "holds no tensors" in refusal(saved(tmp_path, {"epoch": 3}))
    assert "holds no tensors" in refusal(saved(tmp_path, [torch.ones(2)]))
    assert "tensor 'a' is stored in an unusual way" in refusal(saved(tmp_path, {"a": torch.ones(3, 4).t()}))
    torch.save(WEIGHTS, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "a PyTorch pickle (.ckpt, .pt, .bin), which can run code when opened" in refusal(tmp_path / "old.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Command()))
    assert "a PyTorch pickle" in refusal(tmp_path / "plain.ckpt")
    assert "file not found" in refusal(tmp_path / "none.ckpt")


def test_an_entry_that_is_not_where_the_pickle_says(tmp_path):
    """Bytes are read at offsets that PyTorch computes; they are checked against the archive's own directory."""
    path = saved(tmp_path, {"a": torch.ones(1000)})
    data = path.read_bytes()
    # the directory's entry of the weights says that they are compressed
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    path.write_bytes(data[:entry + 10] + b"\x08\x00" + data[entry + 12:])
    assert "damaged PyTorch file" in refusal(path)
