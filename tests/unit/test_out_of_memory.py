"""Running out of memory is told in one line, on the device and on the host, in every phase of a run."""

import errno
import os

import pytest
import torch

import flux_train
from library import build, encode, outputs, previewing, validation
from library.app import main
from library.out_of_memory import out_of_memory, told
from tests.contract.conftest import dataset_file, make_pictures
from tests.tiny import make_flux_files

CUDA = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.60 GiB of which 1.10 GiB is free. Including "
        "non-PyTorch memory, this process has 6.40 GiB memory in use. Of the allocated memory 6.00 GiB is allocated by PyTorch.")


@pytest.mark.parametrize("error, where", [
    (torch.OutOfMemoryError(CUDA), "the device"), (RuntimeError("CUDA error: out of memory\nmore"), "the device"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the device"),
    (MemoryError(), "main memory"), (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "main memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 1000 bytes."), "main memory"),
    (RuntimeError("shapes do not match"), None), (ValueError("CUDA out of memory"), None), (OSError(errno.ENOENT, "x"), None)])
def test_what_is_running_out_of_memory(error, where):
    assert out_of_memory(error) == where
    line = told(error)
    assert (line is None) == (where is None)
    if line is not None:
        assert "\n" not in str(line) and line.remedy


def test_details_for_programmers_are_left_out():
    assert str(told(torch.OutOfMemoryError(CUDA), "while x", "do y")) == (
        "out of memory on the device while x: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.60 GiB "
        "of which 1.10 GiB is free; do y")


def test_a_real_lack_of_main_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(raised.value) == "main memory"


def fail(*_args, **_more):
    raise torch.OutOfMemoryError(CUDA)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_flux_files(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def start(files, tmp_path):
    """Train two steps with more flags; returns the exit status."""
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 3), validation_split=0.34)
    (tmp_path / "prompts.txt").write_text("a red box --w 64 --h 64 --s 1\n", encoding="utf-8")
    return lambda *flags: main(flux_train.ENTRY, [
        "--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(data), "--output_dir", str(tmp_path / "out"),
        "--max_train_steps", "2", "--t5xxl_max_token_length", "16", "--sample_prompts", str(tmp_path / "prompts.txt"), *flags])


@pytest.mark.parametrize("place, name, flags, words", [
    (encode, "encode_all", (), "while pictures and captions were encoded"),
    (build, "open_engine", (), "while the model was loaded"),
    (previewing.preview, "render_all", ("--sample_at_first",), "while previews were drawn"),
    (outputs.Outputs, "after_step", (), "add --"),
    (validation.Validation, "measure", ("--validate_every_n_steps", "1"), "add --")])
def test_each_phase_ends_with_one_line(start, monkeypatch, capfd, place, name, flags, words):
    monkeypatch.setattr(place, name, fail)
    assert start(*flags) == 2
    text = capfd.readouterr().err
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Tried to allocate 2.00 GiB" in errors[0] and "Traceback" not in text


def test_previews_during_training_can_be_missed(start, monkeypatch, capfd):
    monkeypatch.setattr(previewing.preview, "render_all", fail)
    assert start("--sample_every_n_steps", "1") == 0
    text = capfd.readouterr().err
    assert text.count("no previews at step") == 2 and "smaller sizes (--w, --h)" in text and "Traceback" not in text
