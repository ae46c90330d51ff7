"""``.ckpt`` and ``.bin`` files written in a stream: what PyTorch, zip programs and our reader find in them."""

import zipfile

import pytest
import torch

from library.checkpoint.dtypes import DTYPE_NAMES
from library.checkpoint.export import Entry
from library.checkpoint.pickle_writer import archive_bytes, write_pickle
from library.checkpoint.source import open_source
from library.errors import UserError

WEIGHTS = {"b.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(5, dtype=torch.bfloat16), "ids": torch.arange(7)[None],
           "empty": torch.tensor([]), "scalar": torch.tensor(2.5, dtype=torch.float16)}


def entries(tensors=WEIGHTS):
    return [Entry(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]) for name, tensor in tensors.items()]


@pytest.mark.parametrize(("key", "memory_mapped"), [("state_dict", False), ("state_dict", True), (None, False)])
def test_pytorch_reads_it_without_running_code(tmp_path, key, memory_mapped):
    path = tmp_path / "m.ckpt"
    size = write_pickle(path, entries(), WEIGHTS.__getitem__, key=key)
    assert size == path.stat().st_size <= archive_bytes(entries())
    content = torch.load(path, weights_only=True, mmap=memory_mapped)
    weights = content if key is None else content["state_dict"]
    assert list(weights) == list(WEIGHTS) and (key is None or list(content) == [key])
    for name, tensor in WEIGHTS.items():
        assert weights[name].dtype == tensor.dtype and weights[name].shape == tensor.shape and torch.equal(weights[name], tensor)


def test_our_reader_and_zip_programs_read_it(tmp_path):
    write_pickle(tmp_path / "m.ckpt", entries(), WEIGHTS.__getitem__)
    source = open_source(tmp_path / "m.ckpt")
    assert source.layout_order == tuple(WEIGHTS)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in WEIGHTS.items())
    assert all(info.start % 64 == 0 for info in source.tensors.values())
    assert zipfile.ZipFile(tmp_path / "m.ckpt").testzip() is None


def test_tensors_are_cast_as_announced_and_the_same_weights_give_the_same_file(tmp_path):
    wanted = [Entry("x", (3,), "F16")]
    for name in ("a", "b"):
        write_pickle(tmp_path / name, wanted, lambda name: torch.tensor([1.0, 2.0, 3.0]))
    assert torch.load(tmp_path / "a", weights_only=True)["state_dict"]["x"].dtype == torch.float16
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_value_that_does_not_fit_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.ckpt"
    path.write_bytes(b"old")
    for tensor, dtype, expected in ((torch.tensor([1e9]), "F16", "beyond F16"), (torch.tensor([float("nan")]), "F32", "not finite"),
                                    (torch.zeros(1), "F8_E4M3", "cannot hold; use --save_model_as safetensors")):
        with pytest.raises(UserError, match=expected):
            write_pickle(path, [Entry("x", (1,), dtype)], lambda name, tensor=tensor: tensor)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
