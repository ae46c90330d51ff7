"""The toy SDXL that the quickstart trains: the structure and the names of the published file, small and the same every time."""

import json
import re
from pathlib import Path

import pytest
import torch

from library.architectures.sdxl_models import load_clip_g, load_clip_l, load_unet, load_vae, unet_config
from library.architectures.sdxl_parts import TOKENIZER, TOKENIZER_2, open_parts
from library.architectures.sdxl_text import Tokenizers, encode_text
from library.architectures.tokenizers import load_tokenizer
from library.checkpoint.hub import Hub
from library.checkpoint.source import open_source
from tools import make_toy_sdxl

ROOT = Path(__file__).parents[2]
LAYOUT = ROOT / "tests/data/layouts/sdxl_base_1.0.json"
VAE = ROOT / "configs/quickstart/toy/sdxl_vae.safetensors"


@pytest.fixture(scope="module", params=sorted(make_toy_sdxl.SIZES))
def toy(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_toy_sdxl.make(folder, make_toy_sdxl.SIZES[request.param], seed=0)
    return folder


def families(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Names without the numbers of repeated layers -> dimensions of the tensor."""
    numbers = r"(transformer_blocks|resblocks|layers|(?:down|up)\.\d\.block)\.\d+\."
    return {re.sub(numbers, r"\1.N.", name): len(shape) for name, shape in shapes.items()}


def test_names_are_those_of_the_published_file_but_for_the_number_of_layers(toy):
    tensors = open_source(toy / make_toy_sdxl.NAME).tensors
    mine = families({name: one.shape for name, one in tensors.items()})
    theirs = families({name: tuple(shape) for name, shape in json.loads(LAYOUT.read_text(encoding="utf-8")).items()})
    # the small autoencoder has one width throughout, so no residual block of it changes the number of channels
    assert mine == {name: count for name, count in theirs.items() if "nin_shortcut" not in name}
    assert {one.dtype for name, one in tensors.items() if not name.endswith("position_ids")} == {"F16"}


def test_structure_is_read_off_the_file(toy):
    size = make_toy_sdxl.SIZES[toy.name.rstrip("0123456789")]
    parts = open_parts(str(toy / make_toy_sdxl.NAME), hub=Hub(cache=toy / "no hub", offline=True))
    assert parts.unet.layout == "ldm" and not parts.unet.predicts_velocity
    config = unet_config(parts.unet)
    assert config["block_out_channels"] == size.widths and config["layers_per_block"] == 2
    assert config["down_block_types"] == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    assert config["transformer_layers_per_block"] == tuple(max(depth, 1) for depth in size.depths)
    modules = [load_unet(parts.unet, None), load_clip_l(parts.clip_l, None), load_clip_g(parts.clip_g, None),
               load_vae(parts.vae, torch.float32)]
    for module in modules:  # strictly: nothing missing, nothing left over
        assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    built = make_toy_sdxl.make_unet(size)
    assert {name: p.shape for name, p in modules[0].named_parameters()} == {name: p.shape for name, p in built.named_parameters()}
    assert dict(built.config)["attention_head_dim"] == config["attention_head_dim"]


def test_text_encoders_tell_the_captions_apart(toy):
    parts = open_parts(str(toy / make_toy_sdxl.NAME), hub=Hub(cache=toy / "no hub", offline=True))
    encoders = {"clip_l": load_clip_l(parts.clip_l, torch.float32), "clip_g": load_clip_g(parts.clip_g, torch.float32)}
    tokenizers = Tokenizers(load_tokenizer(TOKENIZER, parts.tokenizer), load_tokenizer(TOKENIZER_2, parts.tokenizer_2))
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted((ROOT / "configs/quickstart/photos").glob("*.txt"))]
    with torch.no_grad():
        text = encode_text(encoders, tokenizers, captions, 1, False)
    for name, tensor in text.items():
        vectors = torch.nn.functional.normalize(tensor.flatten(1) - tensor.flatten(1).mean(0), dim=1)
        alike = vectors @ vectors.T - 2 * torch.eye(len(captions))
        assert alike.max() < 0.8, name


def test_an_untrained_unet_answers_nothing_yet(toy):
    """Closed at its end, so that the first steps of training go the right way."""
    unet = load_unet(open_parts(str(toy / make_toy_sdxl.NAME), hub=Hub(cache=toy / "no hub", offline=True)).unet, torch.float32)
    assert not unet.conv_out.weight.any() and not unet.conv_out.bias.any()


def test_same_seed_same_files_and_another_seed_another_file(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_toy_sdxl.make(tmp_path / name, make_toy_sdxl.SIZES["tiny"], seed=seed)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.*"))]
    assert [path.name for path in files].count("vocab.json") == 2 and Path(make_toy_sdxl.NAME) in files
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    assert (tmp_path / "a" / make_toy_sdxl.NAME).read_bytes() != (tmp_path / "c" / make_toy_sdxl.NAME).read_bytes()


def test_it_is_small_and_its_autoencoder_is_the_shipped_one(toy):
    assert (toy / make_toy_sdxl.NAME).stat().st_size < 60e6 and VAE.stat().st_size <= 4e6
    whole, shipped = open_source(toy / make_toy_sdxl.NAME).view("first_stage_model."), open_source(VAE)
    assert set(whole.tensors) == set(shipped.tensors)
    assert all(torch.equal(whole.read(name), shipped.read(name)) for name in shipped.tensors)
