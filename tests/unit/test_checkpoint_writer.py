"""Files written tensor by tensor: what the official library reads back, whole or not at all."""

import hashlib
import json
import math
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.checkpoint import writer as writer_module
from library.checkpoint.export import Export, carry, export_module
from library.checkpoint.keymap import Fuse, KeyMap, Rename, module_shapes
from library.checkpoint.metadata import HASH_KEY
from library.checkpoint.source import open_source
from library.checkpoint.writer import write_safetensors
from library.errors import UserError

TENSORS = {"b.weight": torch.arange(12.0).reshape(3, 4), "a": torch.ones(5), "none": torch.empty(0, 2),
           "scalar": torch.tensor(2.5), "Grüße \"x\"": torch.ones(2)}


def write(path, tensors, dtype="F32", metadata=None, **settings):
    return write_safetensors(path, [(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()], tensors.__getitem__,
                             metadata, **settings)


@pytest.mark.parametrize("dtype, name", [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16"),
                                         (torch.float8_e4m3fn, "F8_E4M3")], ids=str)
def test_the_official_library_reads_it(dtype, name, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "CHUNK_ELEMENTS", 5)
    path, done = tmp_path / "x.safetensors", []
    size = write(path, TENSORS, name, {"title": "ä \"quoted\"\n"}, on_progress=lambda *counts: done.append(counts))
    again = load_file(path)
    assert set(again) == set(TENSORS) and size == path.stat().st_size
    assert all(again[key].dtype == dtype and torch.equal(again[key].float(), TENSORS[key].to(dtype).float()) for key in TENSORS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"title": "ä \"quoted\"\n"}
    total = sum(tensor.numel() for tensor in TENSORS.values()) * dtype.itemsize
    assert done[-1] == (total, total) and int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_order_is_kept_and_wide_formats_come_first(tmp_path):
    tensors = {"z": torch.ones(3), "half": torch.ones(3), "a": torch.ones(1)}
    entries = [("half", (3,), "F16"), ("z", (3,), "F32"), ("a", (1,), "F32")]
    write_safetensors(tmp_path / "x.safetensors", entries, tensors.__getitem__)
    assert open_source(tmp_path / "x.safetensors").layout_order == ("z", "a", "half")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_stay(dtype, tmp_path):
    export = export_module({"x": torch.tensor([1, 0, 1]).to(dtype)}, None, dtype=torch.bfloat16)
    write_safetensors(tmp_path / "x.safetensors", export.entries, export.get)
    assert load_file(tmp_path / "x.safetensors")["x"].dtype == dtype


def test_hash_is_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "CHUNK_ELEMENTS", 5)
    path = tmp_path / "x.safetensors"
    trap = '"modelspec.hash_sha256":"0x' + "0" * 64 + '"'  # a title cannot pass for the place of the hash
    write(path, TENSORS, "BF16", {"modelspec.title": trap}, add_hash_key=HASH_KEY)
    data = path.read_bytes()
    data = data[8 + int.from_bytes(data[:8], "little"):]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"modelspec.title": trap, HASH_KEY: "0x" + hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_the_old_file(value, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(UserError, match="'a' holds values that are not finite") as caught:
        write(path, TENSORS | {"a": torch.tensor([1.0, value, 1.0])}, "BF16")
    assert "\n" not in str(caught.value) and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype, value", [("F16", 70000.0), ("F8_E4M3", 1000.0), ("BF16", 3.4e38)])
def test_values_too_large_for_the_format(dtype, value, tmp_path):
    with pytest.raises(UserError, match=f"beyond {dtype}"):
        write(tmp_path / "x.safetensors", {"a": torch.tensor([1.0, value])}, dtype)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1000, 900, 100))
    with pytest.raises(UserError, match="not enough space on the disk"):
        write(tmp_path / "new" / "x.safetensors", TENSORS)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_nothing(tmp_path):
    def get(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", [("a", (1,), "F32")], get)
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_ours_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="announced"):
        write_safetensors(tmp_path / "x.safetensors", [("a", (2,), "F32")], {"a": torch.ones(3)}.__getitem__)
    with pytest.raises(AssertionError, match="written twice"):
        write_safetensors(tmp_path / "x.safetensors", [("a", (2,), "F32")] * 2, {"a": torch.ones(2)}.__getitem__)


def test_export_fuses_one_tensor_at_a_time():
    keymap = KeyMap((Fuse("qk.weight", ("q.weight", "k.weight")), Rename("embed", "embed.weight", also=("copy",))))
    module = nn.ModuleDict({"q": nn.Linear(2, 3, bias=False), "k": nn.Linear(2, 1, bias=False), "embed": nn.Embedding(4, 2)})
    bound = keymap.bind(module_shapes(module))
    export = export_module(module, bound, dtype=torch.bfloat16, prefix="model.", also=["model.copy", "other"],
                           order=["model.embed", "model.qk.weight"])
    assert [tuple(entry) for entry in export.entries] == [
        ("model.embed", (4, 2), "BF16"), ("model.qk.weight", (4, 2), "BF16"), ("model.copy", (4, 2), "BF16")]
    by_view = export_module(module, bound, prefix="model.", also=["copy"], order=["embed", "qk.weight"])  # names of a view
    assert [entry.name for entry in by_view.entries] == [entry.name for entry in export.entries]
    with torch.no_grad():
        module["k"].weight.fill_(7)  # after the export was announced: what is written is what the module holds then
    fused = export.get("model.qk.weight")
    assert torch.equal(fused, torch.cat([module["q"].weight, module["k"].weight])) and not fused.requires_grad
    assert export.get("model.embed").data_ptr() == module["embed"].weight.data_ptr()  # nothing to fuse, nothing copied
    assert [entry.name for entry in export_module(module, bound).entries] == ["qk.weight", "embed"]


def test_an_average_is_exported_in_place_of_the_module():
    module = nn.Linear(2, 2)
    average = {name: parameter.detach() * 2 for name, parameter in module.named_parameters()}
    assert torch.equal(export_module(average, None).get("weight"), module.weight * 2)


def test_what_is_carried_over_is_unchanged(tmp_path):
    save_file({"vae.a": torch.ones(3).half(), "vae.n": torch.tensor([1, 2]), "rest": torch.ones(1)},
              str(tmp_path / "x.safetensors"))
    source = open_source(tmp_path / "x.safetensors")
    both = export_module({"w": torch.ones(2)}, None) + carry(source.view("vae."), prefix="vae.")
    both += carry(source, ["rest"], dtype=torch.bfloat16)
    write_safetensors(tmp_path / "y.safetensors", both.entries, both.get)
    again = load_file(tmp_path / "y.safetensors")
    assert {name: tensor.dtype for name, tensor in again.items()} == {
        "w": torch.float32, "vae.a": torch.float16, "vae.n": torch.int64, "rest": torch.bfloat16}
    assert again["vae.n"].tolist() == [1, 2]
    with pytest.raises(AssertionError, match="written twice"):
        Export.__add__(both, carry(source, ["rest"]))


def test_header_is_compact_json(tmp_path):
    write(tmp_path / "x.safetensors", {"a": torch.ones(1)}, metadata={"k": "v"})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert json.loads(data[8:8 + int.from_bytes(data[:8], "little")]) == {
        "__metadata__": {"k": "v"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
