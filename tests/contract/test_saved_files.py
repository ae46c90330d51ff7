"""What is saved reloads strictly: in the layout of the input by our reader, and in diffusers."""

import importlib

import pytest
import torch
from safetensors import safe_open

from library.architectures.base import DENOISER
from library.config.parse import parse
from tests.contract.conftest import CACHED, dataset_file, make_pictures


@pytest.fixture
def data(tmp_path):
    return dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 3))


def header(path):
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}, file.metadata()


def bring_neighbours(checkpoint, saved):
    """The other parts are found beside the checkpoint."""
    for neighbour in checkpoint.parent.iterdir():
        if neighbour != checkpoint and not (saved.parent / neighbour.name).exists():
            (saved.parent / neighbour.name).symlink_to(neighbour)


@pytest.mark.parametrize(("precision", "dtype"), [("float", "F32"), ("bf16", "BF16"), ("fp16", "F16")])
def test_saved_file_has_the_layout_of_the_input(case, train, checkpoint, data, tmp_path, precision, dtype):
    train(tmp_path / "out", data, "--max_train_steps", "1", *CACHED, "--save_precision", precision)
    wanted, _ = header(checkpoint)
    saved, metadata = header(tmp_path / "out" / "last.safetensors")
    assert {name: shape for name, (_, shape) in saved.items()} == {name: shape for name, (_, shape) in wanted.items()}
    assert {kind for kind, _ in saved.values()} - {"I64"} == {dtype}  # counts of positions stay integers
    assert metadata["modelspec.title"] == "last" and metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.hash_sha256"].startswith("0x") and len(metadata["modelspec.hash_sha256"]) == 66


def test_nothing_trained_is_saved_bit_for_bit(case, train, checkpoint, data, tmp_path):
    """Learning rate 0: the file that comes out holds the tensors that went in."""
    train(tmp_path / "out", data, "--max_train_steps", "1", *CACHED, "--learning_rate", "0", "--optimizer_args", "weight_decay=0")
    with safe_open(checkpoint, "pt") as before, safe_open(tmp_path / "out" / "last.safetensors", "pt") as after:
        for name in before.keys():
            assert torch.equal(before.get_tensor(name), after.get_tensor(name)), name


def test_every_weight_of_the_denoiser_trains_and_nothing_else(case, train, checkpoint, data, tmp_path):
    train(tmp_path / "out", data, "--max_train_steps", "3", *CACHED)
    with safe_open(checkpoint, "pt") as before, safe_open(tmp_path / "out" / "last.safetensors", "pt") as after:
        moved = {name for name in before.keys() if not torch.equal(before.get_tensor(name), after.get_tensor(name))}
        assert moved == {name for name in before.keys() if case.trains(name)}


def test_saved_file_is_read_strictly_and_written_again_bit_for_bit(case, train, checkpoint, data, tmp_path):
    """The strict reader takes the saved file, and what it made of it is the same file again (float32 saved as float32)."""
    train(tmp_path / "out", data, "--max_train_steps", "2", *CACHED)
    saved = tmp_path / "out" / "last.safetensors"
    bring_neighbours(checkpoint, saved)

    def opened(path):
        config = parse(case.entry, ["--pretrained_model_name_or_path", str(path), "--dataset_config", str(path),
                                    "--output_dir", "unused"])
        module = importlib.import_module(case.entry.architecture)
        return module.open_architecture(config.model, config.architecture, config.objective)

    arch = opened(saved)
    denoiser = arch.load_denoiser(torch.device("cpu"), torch.float32)
    arch.export({DENOISER: denoiser}, tmp_path / "again.safetensors", torch.float32, {}, arch.save_format)
    expected = arch.saved_bytes({DENOISER: denoiser}, torch.float32, arch.save_format)
    assert (tmp_path / "again.safetensors").stat().st_size == pytest.approx(expected, rel=0.05)
    with safe_open(saved, "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as two:
        assert sorted(one.keys()) == sorted(two.keys())
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())


def test_saved_file_is_taken_by_the_diffusers_converter(case, train, checkpoint, data, tmp_path):
    """diffusers' own single-file converter reads the file into its model without a key left over on either side."""
    train(tmp_path / "out", data, "--max_train_steps", "1", *CACHED)
    bring_neighbours(checkpoint, tmp_path / "out" / "last.safetensors")
    theirs, ours = case.diffusers(tmp_path / "out" / "last.safetensors")
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
