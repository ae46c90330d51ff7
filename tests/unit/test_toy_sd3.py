"""The toy SD3 that the quickstart trains: the structure and the names of the published files, small and the same every time."""

import json
import re
from pathlib import Path

import pytest
import torch

from library.architectures.sd3_models import load_encoder, load_transformer, load_vae, transformer_config
from library.architectures.sd3_parts import open_parts
from library.architectures.vae import decode_image, encode_image
from library.checkpoint.hub import Hub
from library.checkpoint.source import open_source
from library.config.data_options import CachingOptions, DatasetOptions
from library.data import image, scan, spec
from library.data.augment import plain_view
from tools import make_toy_sd3

ROOT = Path(__file__).parents[2]
LAYOUTS = ROOT / "tests/data/layouts"
PUBLISHED = {"sd3-medium": "sd3_medium", "sd3.5-medium": "sd3.5_medium", "sd3.5-large": "sd3.5_large"}


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def toy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_sd3.make(folder, make_toy_sd3.SIZES["quickstart"], 0, request.param)
    return request.param, folder


def parts_of(toy):
    variant, folder = toy
    return open_parts(folder / make_toy_sd3.NAMES[variant], {}, hub=Hub(cache=folder / "no hub", offline=True))


def families(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Names without the numbers of repeated layers (the last block of all is another) -> dimensions of the tensor."""
    last = max(int(match[1]) for name in shapes if (match := re.search(r"joint_blocks\.(\d+)\.", name)))
    renamed = {}
    for name, shape in shapes.items():
        name = name.replace(f"joint_blocks.{last}.", "joint_blocks.LAST.")
        renamed[re.sub(r"(joint_blocks|(?:down|up)\.\d\.block)\.\d+\.", r"\1.N.", name)] = len(shape)
    return renamed


def test_names_are_those_of_the_published_file_but_for_the_number_of_layers(toy):
    variant, folder = toy
    tensors = open_source(folder / make_toy_sd3.NAMES[variant]).tensors
    theirs = json.loads((LAYOUTS / f"{PUBLISHED[variant]}.json").read_text(encoding="utf-8"))
    mine = families({name: one.shape for name, one in tensors.items()})
    # the small autoencoder has one width throughout, so no residual block of it changes the number of channels
    assert mine == {name: count for name, count in families(theirs).items() if "nin_shortcut" not in name}
    assert {one.dtype for one in tensors.values()} == {"F16"}


def test_structure_is_read_off_the_files(toy):
    parts = parts_of(toy)
    assert parts.transformer.variant == toy[0]
    built = make_toy_sd3.make_transformer(make_toy_sd3.SIZES["quickstart"], toy[0])
    config = transformer_config(parts.transformer)
    assert all(config[name] == built.config[name] for name in config)
    module = load_transformer(parts.transformer, torch.float32)
    assert not module.proj_out.weight.any()  # an untrained transformer answers nothing yet
    assert [load_encoder(name, source, None) is not None for name, source in parts.encoders.items()] == [True] * 3


def test_latents_are_as_wide_as_the_models_units_want_and_pictures_are_those_of_the_fitted_autoencoder(toy):
    if toy[0] != "sd3-medium":
        pytest.skip("the same autoencoder in all variants")
    specs = spec.load(DatasetOptions(dataset_config=ROOT / "configs/quickstart/dataset.toml"), CachingOptions(), 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        items = scan.scan(specs).items
    vae, latents, decibels = load_vae(parts_of(toy).vae, torch.float32), [], []
    for item in items:
        pixels = image.to_signal(image.load_view(item.path, plain_view(item), str(item.path))[0])[None]
        latent = encode_image(vae, pixels)
        decibels.append(-10 * (decode_image(vae, latent) - pixels).div(2).square().mean().log10().item())
        latents.append(latent.flatten(2)[0])
    assert min(decibels) > 22 and sum(decibels) / len(decibels) > 28
    values = torch.cat(latents, dim=1)  # (16, all cells)
    assert values.mean().abs() < 0.15 and (values.std(1) - 1).abs().max() < 0.1


def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_toy_sd3.make(tmp_path / name, make_toy_sd3.SIZES["tiny"], seed)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.*"))]
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    main = make_toy_sd3.NAMES["sd3-medium"]
    assert (tmp_path / "a" / main).read_bytes() != (tmp_path / "c" / main).read_bytes()
