"""What the quickstart ships: photographs with captions and credits, the fitted autoencoder, the makers of the toy set."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.architectures import flux_models, sdxl_models
from library.architectures.flux_parts import TOKENIZERS, open_parts
from library.architectures.tokenizers import load_tokenizer
from library.architectures.vae import decode_image, encode_image
from library.checkpoint.hub import Hub
from library.checkpoint.source import open_source
from library.config.data_options import CachingOptions, DatasetOptions
from library.data import image, scan, spec
from library.data.augment import plain_view
from library.prompts import parse_prompts
from tools import make_photos, make_toy_flux, toy_parts, toy_tokenizers

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart"


@pytest.fixture(scope="module")
def items():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return scan.scan(specs()).items


def specs():
    return spec.load(DatasetOptions(dataset_config=QUICKSTART / "dataset.toml"), CachingOptions(), 16)


def test_every_photograph_is_captioned_credited_and_small(items):
    credits = (QUICKSTART / "CREDITS.md").read_text(encoding="utf-8")
    assert len(items) == 12 and len({item.caption for item in items}) == 12
    for item, photo in zip(items, make_photos.PHOTOS, strict=True):
        assert item.path.stem.endswith(photo.name) and item.caption == photo.caption
        row = next(line for line in credits.splitlines() if item.path.name in line)
        assert photo.author in row and photo.licence in row and photo.origin in row
        with Image.open(item.path) as picture:
            assert picture.size == photo.size and max(picture.size) <= 320


def test_three_shapes_and_full_batches(items):
    counts: dict[tuple[int, int], int] = {}
    for item in items:
        assert item.placement.crop == (0, 0)  # nothing of a photograph is lost
        counts[item.placement.bucket] = counts.get(item.placement.bucket, 0) + item.repeats
    assert set(counts) == {(96, 160), (128, 128), (160, 96)}
    batch, = {s.batch_size for s in specs()}
    assert all(count % batch == 0 for count in counts.values())


def test_prompts_are_captions_in_the_shape_of_their_picture(items):
    prompts, notes = parse_prompts(QUICKSTART / "prompts.txt", 16)
    shapes = {item.caption: item.placement.bucket for item in items}
    assert not notes and 6 <= len(prompts) <= 8
    assert all(shapes[prompt.text] == (prompt.width, prompt.height) for prompt in prompts)


# file, how it is loaded, its latent channels, and what it must reach in dB on the worst photograph and on average
AUTOENCODERS = {"flux": ("ae.safetensors", flux_models.load_vae, 16, 22, 28),
                "sdxl": ("sdxl_vae.safetensors", sdxl_models.load_vae, 4, 24, 28)}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_autoencoder_reconstructs_the_photographs(items, name):
    file, load_vae, channels, worst, average = AUTOENCODERS[name]
    path = QUICKSTART / "toy" / file
    assert path.stat().st_size <= 4_000_000
    vae = load_vae(open_source(path), torch.float32)
    assert vae.config.norm_num_groups == 32
    latents, decibels = [], []
    for item in items:
        pixels = image.to_signal(image.load_view(item.path, plain_view(item), str(item.path))[0])[None]
        latent = encode_image(vae, pixels)
        decibels.append(-10 * (decode_image(vae, latent) - pixels).div(2).square().mean().log10().item())
        latents.append(latent.flatten(2)[0])
    assert min(decibels) > worst and sum(decibels) / len(decibels) > average
    values = torch.cat(latents, dim=1)  # (channels, all cells)
    assert len(values) == channels
    assert values.mean().abs() < 0.1 and (values.std(1) - 1).abs().max() < 0.1


def test_the_toy_set_is_complete_and_the_same_for_the_same_seed(tmp_path):
    for name in ("a", "b"):
        make_toy_flux.make(tmp_path / name, make_toy_flux.SIZES["tiny"], seed=0)
    parts = open_parts(str(tmp_path / "a/flux1-dev.safetensors"), hub=Hub(cache=tmp_path / "no hub", offline=True))
    assert parts.transformer.variant == "dev" and parts.transformer.layout == "bfl" and parts.transformer.head_dim == 32
    assert parts.transformer.text_width == toy_parts.T5_WIDTH and parts.transformer.pooled_width == make_toy_flux.CLIP_WIDTH
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_tokenizers_know_words_spell_the_rest_and_end_last(tmp_path):
    clip_size = toy_tokenizers.write_clip_tokenizer(tmp_path / "clip", ["cat", "coffee"])
    t5_size = toy_tokenizers.write_t5_tokenizer(tmp_path / "t5", ["cat", "coffee"])
    clip, t5 = (load_tokenizer(TOKENIZERS[kind], tmp_path / name) for kind, name in
                (("clip_l_tokenizer", "clip"), ("t5xxl_tokenizer", "t5")))
    ids = clip("Coffee, cats")["input_ids"]
    assert len(clip) == clip_size and ids[0] == clip_size - 2 and ids[-1] == clip_size - 1 == clip.eos_token_id == max(ids)
    assert clip.convert_ids_to_tokens(ids[1:-1]) == ["coffee</w>", ",</w>", "ca", "t", "s</w>"]
    assert t5.convert_ids_to_tokens(t5("cat coffees")["input_ids"]) == ["▁cat", "▁coffee", "s", "</s>"]
    assert t5_size % 8 == 0 and t5.pad_token_id == 0
    assert len(json.loads((tmp_path / "clip/vocab.json").read_text(encoding="utf-8"))) == clip_size
