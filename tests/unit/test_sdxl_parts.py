"""SDXL's files: recognised, refused, found, loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.sdxl_models import load_clip_g, load_clip_l, load_unet, load_vae, unet_config
from library.architectures.sdxl_parts import describe, open_parts
from library.architectures.vae import decode_image, encode_image
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub
from library.checkpoint.source import Source, open_source
from library.errors import UserError
from tests import tiny, tiny_sdxl
from tests.tiny_sdxl import CLIP_G, CLIP_L, UNET, VAE, make_sdxl_files

F32 = torch.float32
NOWHERE = Hub(cache=Path("no such folder"), offline=True)
LOADERS = {"clip_l": load_clip_l, "clip_g": load_clip_g, "vae": load_vae}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def parts(files):
    return open_parts(files.checkpoint, hub=NOWHERE)


def headers(shapes, dtype="F16", path="x.safetensors"):
    """A source of names and shapes without data."""
    return Source(Path(path), {name: TensorInfo(dtype, shape, Path(path), 0, 0) for name, shape in shapes.items()}, {}, {})


def prefixed(shapes, prefix=UNET):
    return {prefix + name: shape for name, shape in shapes.items()}


FULL = {"channels": (320, 640, 1280), "depths": (0, 2, 10), "text": 2048, "pooled": 1280}


# --- what a header says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", UNET])
def test_prefix_and_widths(prefix):
    file = describe(headers(prefixed(tiny_sdxl.unet_shapes(), prefix)))
    assert (file.layout, file.text_width, file.pooled_width) == ("ldm", 128, 64)
    assert set(file.source.tensors) == set(tiny_sdxl.unet_shapes())
    assert not file.predicts_velocity and not file.zero_terminal_snr


@pytest.mark.parametrize("markers", [(), ("v_pred",), ("v_pred", "ztsnr")])
def test_markers_of_velocity_prediction(tmp_path, markers):
    parts = open_parts(make_sdxl_files(tmp_path, markers).checkpoint, hub=NOWHERE)
    assert (parts.unet.predicts_velocity, parts.unet.zero_terminal_snr) == ("v_pred" in markers, "ztsnr" in markers)
    assert ("predicts velocity" in parts.summary()) == ("v_pred" in markers)


OTHERS = {
    "an SD 1.x / 2.x checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "a LoRA, which only adds": ["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"],
    "a FLUX.1 transformer": ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "an SD3 / SD3.5 checkpoint": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "the SDXL refiner, which is another model": [UNET + "input_blocks.0.0.weight", UNET + "label_emb.0.0.weight",
                                                 "conditioner.embedders.0.model.token_embedding.weight"],
    "an SDXL checkpoint trained on the EDM noise schedule": [UNET + "input_blocks.0.0.weight", UNET + "label_emb.0.0.weight",
                                                             "edm_vpred.sigma_max"],
    "a Stable Diffusion UNet in diffusers layout": ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
    "something unknown": ["foo.bar"],
}


@pytest.mark.parametrize("title", OTHERS)
def test_other_checkpoints_are_refused_by_name(title):
    with pytest.raises(UserError) as caught:
        describe(headers({name: (4, 4) for name in OTHERS[title]}))
    assert f"is not an SDXL base checkpoint: it looks like {title}" in str(caught.value)
    assert str(caught.value).startswith("--pretrained_model_name_or_path: ")


def test_a_refiner_without_its_encoder_is_refused():
    shapes = tiny_sdxl.unet_shapes(channels=(32, 64, 64, 64), depths=(0, 1, 1, 0))
    with pytest.raises(UserError, match="the SDXL refiner"):
        describe(headers(prefixed(shapes)))


@pytest.mark.parametrize("channels, text", [(9, "an inpainting model"), (8, "a second picture")])
def test_variants_with_more_inputs_are_refused(channels, text):
    with pytest.raises(UserError, match=f"takes {channels} latent channels where SDXL takes 4: it is .*{text}"):
        describe(headers(prefixed(tiny_sdxl.unet_shapes(latent=channels))))


def test_quantised_and_incomplete_files_are_refused():
    shapes = prefixed(tiny_sdxl.unet_shapes())
    with pytest.raises(UserError, match="quantised .bitsandbytes 4-bit"):
        describe(headers(shapes | {f"{UNET}input_blocks.4.1.proj_in.weight.quant_state.bitsandbytes__nf4": (9,)}))
    del shapes[f"{UNET}label_emb.0.0.weight"]
    with pytest.raises(UserError, match="lacks label_emb.0.0.weight"):
        describe(headers(shapes))


# --- settings from shapes ---------------------------------------------------------------------------------------------


def test_settings_of_the_published_file():
    config = unet_config(describe(headers(prefixed(tiny_sdxl.unet_shapes(**FULL)))))
    assert config == {
        "in_channels": 4, "out_channels": 4, "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True, "norm_num_groups": 32,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}


def test_relatives_of_another_structure_are_refused():
    """SSD-1B keeps the names and takes whole blocks out."""
    shapes = tiny_sdxl.unet_shapes()
    pruned = {name: shape for name, shape in shapes.items() if "input_blocks.8.1.transformer_blocks.1." not in name}
    headless = {name: shape for name, shape in shapes.items() if not name.startswith("middle_block.1.")}
    for wrong in (pruned, headless):
        with pytest.raises(UserError, match="another structure.*SSD-1B"):
            unet_config(describe(headers(prefixed(wrong))))


def test_widths_that_do_not_divide_into_heads():
    with pytest.raises(UserError, match="width 96 does not divide into heads of 64"):
        unet_config(describe(headers(prefixed(tiny_sdxl.unet_shapes(channels=(32, 96, 128))))))


# --- finding ----------------------------------------------------------------------------------------------------------


def test_everything_inside_one_file(files, parts):
    assert {parts.origins[name] for name in ("clip_l", "clip_g", "vae")} == {"inside sd_xl_tiny.safetensors"}
    assert (parts.tokenizer, parts.tokenizer_2) == (files.tokenizer, files.tokenizer_2)
    assert str(files.checkpoint) in parts.summary() and "single-file layout" in parts.summary()


def test_one_tokenizer_serves_both_encoders(tmp_path, files):
    checkpoint = shutil.copy(files.checkpoint, tmp_path / "model.safetensors")
    shutil.copytree(files.tokenizer, tmp_path / "cache" / "openai_clip-vit-large-patch14")
    parts = open_parts(checkpoint, tokenizer_cache_dir=tmp_path / "cache", hub=NOWHERE)
    assert parts.tokenizer == parts.tokenizer_2 == tmp_path / "cache" / "openai_clip-vit-large-patch14"
    assert parts.origins["tokenizer_2"] == "the same files"


def test_everything_missing_is_told_at_once(tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in prefixed(tiny_sdxl.unet_shapes()).items()},
              str(tmp_path / "unet.safetensors"))
    with pytest.raises(UserError) as caught:
        open_parts(tmp_path / "unet.safetensors", hub=NOWHERE)
    problems = caught.value.problems
    assert len(problems) == 4
    wanted = ("CLIP-L text encoder was not found", "CLIP-G text encoder", "SDXL autoencoder was not found",
              "the CLIP tokenizer was not found")
    for problem, text in zip(problems, wanted, strict=True):
        assert text in problem and str(tmp_path) in problem and "HF_HUB_OFFLINE" in problem
    assert problems[0].endswith("give a checkpoint or folder that holds it") and problems[2].endswith("give its path with --vae")


def test_a_bad_checkpoint_does_not_hide_a_missing_autoencoder(tmp_path):
    with pytest.raises(UserError) as caught:
        open_parts(tmp_path / "none.safetensors", vae=tmp_path / "vae.safetensors", hub=NOWHERE)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--pretrained_model_name_or_path", "--vae"]


def test_encoders_of_another_width_do_not_count(tmp_path, files):
    tensors = {name: open_source(files.checkpoint).read(name) for name in open_source(files.checkpoint).tensors}
    tensors[f"{CLIP_G}text_projection"] = torch.zeros(64, 32)
    save_file(tensors, str(tmp_path / "odd.safetensors"))
    with pytest.raises(UserError, match="CLIP-G text encoder .projection to 64. was not found"):
        open_parts(tmp_path / "odd.safetensors", tokenizer_cache_dir=files.folder, hub=NOWHERE)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "my_vae.safetensors"
    tiny.save(path, tiny_sdxl.vae_shapes(), F32, seed=7)
    return path


def test_another_autoencoder(files, vae_file, tmp_path):
    parts = open_parts(files.checkpoint, vae=vae_file, hub=NOWHERE)
    assert parts.origins["vae"] == "--vae" and parts.vae.path == vae_file
    assert torch.equal(load_vae(parts.vae, F32).decoder.conv_in.weight, open_source(vae_file).read("decoder.conv_in.weight"))
    snapshot = tmp_path / "models--some-one--vae" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    shutil.copy(vae_file, snapshot / "diffusion_pytorch_model.safetensors")
    from_hub = open_parts(files.checkpoint, vae="some-one/vae", hub=Hub(cache=tmp_path, offline=True))
    assert from_hub.vae.path == snapshot / "diffusion_pytorch_model.safetensors"
    flux = tmp_path / "ae.safetensors"
    tiny.save(flux, tiny.autoencoder_shapes((32, 32, 32, 32), 1), F32)
    with pytest.raises(UserError, match="--vae: .*is not the SDXL autoencoder: it looks like an autoencoder with 16 latent"):
        open_parts(files.checkpoint, vae=flux, hub=NOWHERE)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_all_modules_load_frozen(parts, dtype):
    modules = {name: load(getattr(parts, name), dtype) for name, load in LOADERS.items()} | {"unet": load_unet(parts.unet, dtype)}
    for name, module in modules.items():
        expected = F32 if (name, dtype) == ("vae", torch.float16) else dtype  # it would overflow
        assert {parameter.dtype for parameter in module.parameters()} == {expected}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(child.training for child in module.modules())
    assert torch.equal(modules["unet"].conv_in.weight, parts.unet.source.read("input_blocks.0.0.weight", dtype))
    assert torch.equal(modules["clip_g"].text_projection.weight, parts.clip_g.read("text_projection", dtype).t())
    assert torch.equal(modules["clip_g"].text_model.encoder.layers[1].self_attn.k_proj.weight,
                       parts.clip_g.read("transformer.resblocks.1.attn.in_proj_weight", dtype)[64:128])


def test_left_over_and_missing_keys_are_errors(parts):
    shapes = tiny_sdxl.unet_shapes()
    del shapes["time_embed.2.bias"]
    file = describe(headers(prefixed(shapes | {"time_embed.4.bias": (128,)})))
    with pytest.raises(UserError) as caught:
        load_unet(file, F32)
    assert "time_embed.2.bias" in str(caught.value) and "time_embed.4.bias" in str(caught.value)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory, files, parts):
    """The same models as diffusers and transformers save them."""
    folder = tmp_path_factory.mktemp("diffusers")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    load_unet(parts.unet, F32).save_pretrained(folder / "unet")
    for name, place in {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "vae": "vae"}.items():
        LOADERS[name](getattr(parts, name), F32).save_pretrained(folder / place)
    shutil.copytree(files.tokenizer, folder / "tokenizer")
    shutil.copytree(files.tokenizer_2, folder / "tokenizer_2")
    (folder / "scheduler").mkdir()
    return folder


def assert_same_models(mine, theirs):
    pairs = [(load_unet(mine.unet, F32), load_unet(theirs.unet, F32))]
    pairs += [(load(getattr(mine, name), F32), load(getattr(theirs, name), F32)) for name, load in LOADERS.items()]
    for first, second in pairs:
        first, second = first.state_dict(), second.state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_diffusers_folder(pipeline_folder, parts):
    for name in (pipeline_folder, pipeline_folder / "unet", pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"):
        other = open_parts(name, hub=NOWHERE)
        assert other.unet.layout == "diffusers" and other.tokenizer_2 == pipeline_folder / "tokenizer_2"
    assert_same_models(parts, other)


def test_half_precision_variant_of_a_folder(tmp_path, pipeline_folder, parts):
    """Folders and hub repositories may hold nothing but `*.fp16.safetensors`."""
    folder = tmp_path / "models--some-one--xl" / "snapshots" / "1"
    shutil.copytree(pipeline_folder, folder)
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert_same_models(parts, open_parts(folder, hub=NOWHERE))
    assert_same_models(parts, open_parts("some-one/xl", hub=Hub(cache=tmp_path, offline=True)))


def test_scheduler_of_a_folder_tells_what_is_predicted(tmp_path, pipeline_folder):
    shutil.copytree(pipeline_folder, tmp_path / "xl")
    file = tmp_path / "xl" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}))
    unet = open_parts(tmp_path / "xl", hub=NOWHERE).unet
    assert unet.predicts_velocity and unet.zero_terminal_snr
    file.write_text("{")
    with pytest.raises(UserError, match="scheduler_config.json is not valid JSON"):
        open_parts(tmp_path / "xl", hub=NOWHERE)


def test_ckpt_holds_the_same_models(tmp_path, files, parts):
    source = open_source(files.checkpoint)
    weights = {name: source.read(name) for name in source.tensors}
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 1000}, tmp_path / "model.ckpt")
    other = open_parts(tmp_path / "model.ckpt", tokenizer_cache_dir=files.folder, hub=NOWHERE)
    assert_same_models(parts, other)
    assert set(other.unet.whole.tensors) == set(source.tensors)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_and_not_shifted(parts):
    vae = load_vae(parts.vae, F32)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_image(vae, pixels)
    assert latents.shape == (2, 4, 4, 6) and latents.dtype == F32
    moments = vae.quant_conv(vae.encoder(pixels))
    torch.testing.assert_close(latents, moments[:, :4] * 0.13025)
    torch.testing.assert_close(decode_image(vae, latents), vae.decoder(vae.post_quant_conv(moments[:, :4])).clamp(-1, 1))


def test_encoding_survives_activations_beyond_half_precision(parts, tmp_path):
    """With the encoder's last convolution fed by values above 65,504: NaN in float16, the right latents as we load it."""
    shapes = tiny_sdxl.vae_shapes()
    tensors = {name: tiny_sdxl.weight(name, shape, 0) for name, shape in shapes.items()}
    tensors["encoder.conv_in.weight"] *= 1e6
    save_file(tensors, str(tmp_path / "vae.safetensors"))
    vae = load_vae(open_source(tmp_path / "vae.safetensors"), torch.float16)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.float16):  # a run in fp16 must not reach into it
        latents = encode_image(vae, pixels)
    assert latents.isfinite().all() and latents.dtype == F32
    with torch.no_grad():
        assert vae.encoder.conv_in(pixels).abs().max() > 65504
        assert not vae.half().encode(pixels.half()).latent_dist.mode().isfinite().all()


def test_prefixes_are_those_of_the_published_file():
    assert (UNET, CLIP_L, CLIP_G, VAE) == ("model.diffusion_model.", "conditioner.embedders.0.transformer.",
                                           "conditioner.embedders.1.model.", "first_stage_model.")
