"""SDXL written back: every tensor of the input again, what trained in its place, and files that diffusers reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.clip import build_clip, build_projected_clip
from library.architectures.sdxl_export import save, saved_bytes, single_file, write_folder
from library.architectures.sdxl_models import build_unet, load_clip_g, load_clip_l, load_unet, load_vae
from library.architectures.sdxl_parts import SdxlParts, describe, open_parts, part_specs
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub
from library.checkpoint.known_keys import recognise
from library.checkpoint.locate import find
from library.checkpoint.reader import build_on_meta
from library.checkpoint.source import Source, open_source
from library.checkpoint.writer import write_safetensors
from library.config.save_formats import SUFFIXES, size_of
from library.errors import UserError
from tests import tiny, tiny_sdxl
from tests.tiny_sdxl import make_sdxl_files

F32 = torch.float32
NOWHERE = Hub(cache=Path("no such folder"), offline=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def parts(files):
    return open_parts(files.checkpoint, hub=NOWHERE)


def write(path, export):
    write_safetensors(path, export.entries, export.get)
    return open_source(path)


def assert_equal(first, second, but=()):
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        assert first.tensors[name].dtype == second.tensors[name].dtype, name
        assert torch.equal(first.read(name), second.read(name)) != (name in but), name


def trained_modules(parts):
    return {"unet": load_unet(parts.unet, F32), "clip_l": load_clip_l(parts.clip_l, F32),
            "clip_g": load_clip_g(parts.clip_g, F32)}


@pytest.mark.parametrize("names", [(), ("unet",), ("unet", "clip_l", "clip_g"), ("clip_g",)])
def test_nothing_changed_is_the_same_file_again(tmp_path, files, parts, names):
    trained = {name: module for name, module in trained_modules(parts).items() if name in names}
    export = single_file(parts, trained, None)
    original = open_source(files.checkpoint)
    assert [entry.name for entry in export.entries] == list(original.layout_order)
    assert_equal(original, write(tmp_path / "again.safetensors", export))


def test_what_trained_is_saved_and_nothing_else(tmp_path, files, parts):
    trained = trained_modules(parts)
    with torch.no_grad():
        trained["unet"].mid_block.attentions[0].proj_in.weight += 1
        trained["clip_l"].get_parameter("encoder.layers.0.mlp.fc1.bias" if hasattr(trained["clip_l"], "encoder") else
                                        "text_model.encoder.layers.0.mlp.fc1.bias").add_(1)
        trained["clip_g"].text_projection.weight[0] += 1
        trained["clip_g"].text_model.encoder.layers[1].self_attn.v_proj.weight += 1
    saved = write(tmp_path / "trained.safetensors", single_file(parts, trained, None))
    prefix_g = tiny_sdxl.CLIP_G
    assert_equal(open_source(files.checkpoint), saved, but={
        f"{tiny_sdxl.UNET}middle_block.1.proj_in.weight", f"{tiny_sdxl.CLIP_L}text_model.encoder.layers.0.mlp.fc1.bias",
        f"{prefix_g}text_projection", f"{prefix_g}transformer.resblocks.1.attn.in_proj_weight"})
    before, after = (source.read(f"{prefix_g}text_projection") for source in (open_source(files.checkpoint), saved))
    assert torch.equal(after[:, 1:], before[:, 1:]) and torch.equal(after[:, 0], before[:, 0] + 1)  # a row there, a column here


def test_other_precision_spares_integers(tmp_path, parts):
    export = single_file(parts, {"unet": load_unet(parts.unet, F32)}, torch.float16)
    saved = write(tmp_path / "half.safetensors", export)
    kinds = {name: info.dtype for name, info in saved.tensors.items()}
    assert kinds.pop(f"{tiny_sdxl.CLIP_L}text_model.embeddings.position_ids") == "I64"
    assert set(kinds.values()) == {"F16"}


def test_velocity_models_are_marked_and_recognised(tmp_path, files, parts):
    saved = write(tmp_path / "v.safetensors", single_file(parts, {}, None, predicts_velocity=True, zero_terminal_snr=True))
    assert set(saved.tensors) - set(open_source(files.checkpoint).tensors) == {"v_pred", "ztsnr"}
    assert saved.tensors["v_pred"].shape == (0,)
    again = open_parts(tmp_path / "v.safetensors", tokenizer_cache_dir=files.folder, hub=NOWHERE)
    assert again.unet.predicts_velocity and again.unet.zero_terminal_snr
    twice = single_file(again, {}, None, predicts_velocity=True, zero_terminal_snr=True)
    assert_equal(saved, write(tmp_path / "again.safetensors", twice))


def test_another_autoencoder_takes_the_place_of_the_first(tmp_path, files):
    tiny.save(tmp_path / "vae.safetensors", tiny_sdxl.vae_shapes(layers=2), torch.float16, seed=9)
    parts = open_parts(files.checkpoint, vae=tmp_path / "vae.safetensors", hub=NOWHERE)
    saved = write(tmp_path / "saved.safetensors", single_file(parts, {}, None))
    assert_equal(saved.view(tiny_sdxl.VAE), open_source(tmp_path / "vae.safetensors"))
    assert_equal(saved.view(tiny_sdxl.UNET), open_source(files.checkpoint).view(tiny_sdxl.UNET))


def test_a_bare_unet_becomes_a_whole_checkpoint(tmp_path, files, parts):
    """A file of the U-Net alone, whose encoders and autoencoder stand beside it as in a diffusers folder."""
    write_folder(tmp_path, parts, {}, None)
    view = open_source(files.checkpoint).view(tiny_sdxl.UNET)
    save_file({name: view.read(name) for name in view.tensors}, str(tmp_path / "bare.safetensors"))
    bare = open_parts(tmp_path / "bare.safetensors", hub=NOWHERE)
    saved = write(tmp_path / "whole.safetensors", single_file(bare, {"unet": load_unet(bare.unet, F32)}, None))
    lost = {f"{tiny_sdxl.CLIP_L}text_model.embeddings.position_ids", f"{tiny_sdxl.CLIP_G}logit_scale"}
    assert set(open_source(files.checkpoint).tensors) - set(saved.tensors) == lost
    assert not set(saved.tensors) & set(view.tensors)


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("folder")
    write_folder(folder, parts, {"unet": load_unet(parts.unet, F32)}, None, predicts_velocity=True, zero_terminal_snr=True)
    return folder


def test_folder_is_the_same_model(tmp_path, files, parts, folder):
    other = open_parts(folder, hub=NOWHERE)
    assert other.unet.layout == "diffusers" and other.unet.predicts_velocity and other.unet.zero_terminal_snr
    saved = write(tmp_path / "back.safetensors", single_file(other, {}, None))
    original = open_source(files.checkpoint)
    lost = {f"{tiny_sdxl.CLIP_L}text_model.embeddings.position_ids", f"{tiny_sdxl.CLIP_G}logit_scale"}
    assert set(original.tensors) - set(saved.tensors) == lost
    assert all(torch.equal(original.read(name), saved.read(name)) for name in saved.tensors)


def test_folder_is_read_by_diffusers(folder, parts):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    mine = trained_modules(parts) | {"vae": load_vae(parts.vae, F32)}
    theirs = {"unet": pipeline.unet, "clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2, "vae": pipeline.vae}
    for name, module in mine.items():
        expected, found = module.state_dict(), theirs[name].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    assert pipeline.tokenizer_2.pad_token_id == 0 and pipeline.tokenizer.pad_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and pipeline.scheduler.config.rescale_betas_zero_snr


def test_single_file_components_are_read_by_diffusers(tmp_path, parts, folder):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    path = tmp_path / "saved.safetensors"
    write(path, single_file(parts, trained_modules(parts), None))
    for cls, place, mine in ((UNet2DConditionModel, "unet", load_unet(parts.unet, F32)),
                             (AutoencoderKL, "vae", load_vae(parts.vae, F32))):
        module = cls.from_single_file(str(path), config=str(folder), subfolder=place, local_files_only=True)
        expected, found = mine.state_dict(), module.state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


# --- what --save_model_as chooses ---------------------------------------------------------------------------------------


def save_as(path, kind, parts, trained=None, metadata=None):
    facts = {"predicts_velocity": True, "zero_terminal_snr": False}
    save(path, parts, trained_modules(parts) if trained is None else trained, None, metadata or {}, kind, **facts)


def everything(parts):
    """Every weight of every part by module and name."""
    modules = trained_modules(parts) | {"vae": load_vae(parts.vae, F32)}
    return {f"{part} {name}": tensor for part, module in modules.items() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("kind", SUFFIXES)
def test_every_kind_reloads_here_bit_for_bit(tmp_path, files, parts, kind):
    path = tmp_path / f"model{SUFFIXES[kind]}"
    save_as(path, kind, parts, metadata={"modelspec.title": "test"})
    saved = open_parts(path, tokenizer_cache_dir=files.folder, hub=NOWHERE)
    expected, found = everything(parts), everything(saved)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert saved.unet.predicts_velocity and not saved.unet.zero_terminal_snr
    assert (saved.unet.source.metadata.get("modelspec.title") == "test") == ("safetensors" in kind)
    assert size_of(path) <= saved_bytes(parts, None) * 1.1 + 100_000  # texts of tokenizers and configurations come on top
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_ckpt_holds_what_the_safetensors_file_holds(tmp_path, parts):
    for kind in ("safetensors", "ckpt"):
        save_as(tmp_path / f"model{SUFFIXES[kind]}", kind, parts)
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert list(content) == ["state_dict"]
    other = open_source(tmp_path / "model.safetensors")
    assert content["state_dict"].keys() == other.tensors.keys()
    assert all(torch.equal(content["state_dict"][name], other.read(name)) for name in other.tensors)


def test_pickled_folder_is_read_by_diffusers(tmp_path, parts):
    from diffusers import StableDiffusionXLPipeline

    save_as(tmp_path / "model", "diffusers", parts)
    assert not list((tmp_path / "model").rglob("*.safetensors")) and len(list((tmp_path / "model").rglob("*.bin"))) == 4
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", local_files_only=True, use_safetensors=False)
    modules = {"unet": pipeline.unet, "clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2, "vae": pipeline.vae}
    found = {f"{part} {name}": tensor for part, module in modules.items() for name, tensor in module.state_dict().items()}
    expected = everything(parts)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_ckpt_components_are_read_by_diffusers(tmp_path, parts, folder):
    from diffusers import UNet2DConditionModel

    save_as(tmp_path / "model.ckpt", "ckpt", parts)
    module = UNet2DConditionModel.from_single_file(str(tmp_path / "model.ckpt"), config=str(folder), subfolder="unet",
                                                   local_files_only=True)
    expected = load_unet(parts.unet, F32).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in module.state_dict().items())


def test_only_a_saved_model_is_replaced_and_only_by_a_whole_one(tmp_path, parts):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is there already, and is no diffusers model"):
        save_as(tmp_path / "pictures", "diffusers_safetensors", parts, {})
    assert (tmp_path / "pictures" / "a.jpg").exists()
    save_as(tmp_path / "model", "diffusers_safetensors", parts, {})
    (tmp_path / "model" / "old").write_bytes(b"")
    trained = {"clip_g": load_clip_g(parts.clip_g, F32)}
    with torch.no_grad():
        trained["clip_g"].text_projection.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="text_projection.weight.*not finite"):
        save_as(tmp_path / "model", "diffusers_safetensors", parts, trained)
    assert (tmp_path / "model" / "old").exists()
    save_as(tmp_path / "model", "diffusers_safetensors", parts, {})
    assert not (tmp_path / "model" / "old").exists() and sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "pictures"]


# --- full size --------------------------------------------------------------------------------------------------------


def test_the_published_file_is_found_and_listed_again_exactly(files):
    """2,515 tensors on meta: parts recognised, modules configured, and every name and shape in the file to be written."""
    layout = json.loads((Path(__file__).parents[1] / "data/layouts/sdxl_base_1.0.json").read_text())
    path = Path("sd_xl_base_1.0.safetensors")
    tensors = {name: TensorInfo("F16", tuple(shape), path, 0, 0) for name, shape in layout.items()}
    whole = Source(path, tensors, {}, {})
    unet = describe(whole)
    specs = part_specs(unet, None)
    found, errors = find(whole, specs, recognise, NOWHERE)
    assert not errors
    parts = SdxlParts(unet, *(found[name].source for name in ("clip_l", "clip_g", "vae")), files.tokenizer, files.tokenizer_2, {})
    trained = {"unet": build_on_meta(lambda: build_unet(unet)), "clip_l": build_on_meta(lambda: build_clip(parts.clip_l)),
               "clip_g": build_on_meta(lambda: build_projected_clip(parts.clip_g))}
    for dtype in (torch.bfloat16, torch.float32):
        export = single_file(parts, trained, dtype)
        assert [entry.name for entry in export.entries] == list(layout)
        assert {entry.name: list(entry.shape) for entry in export.entries} == layout
    assert trained["clip_g"].config.num_attention_heads == 20 and trained["clip_l"].config.num_hidden_layers == 12
    assert trained["clip_g"].config.hidden_act == "gelu" and trained["clip_l"].config.hidden_act == "quick_gelu"
