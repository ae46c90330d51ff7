"""FLUX.1's files: recognised, refused, found, loaded, and called on text and pictures."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from library.architectures.clip import clip_config, load_clip
from library.architectures.flux_models import SCALING, SHIFT, load_transformer, load_vae, rope_axes, transformer_config
from library.architectures.flux_parts import CHECKPOINT, TOKENIZERS, describe, open_parts
from library.architectures.flux_text import Tokenizers, encode_text
from library.architectures.opening import open_checkpoint
from library.architectures.t5 import load_t5, t5_config
from library.architectures.tokenizers import load_tokenizer, tokenizer_identity
from library.architectures.vae import decode_image, encode_image, vae_config
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub
from library.checkpoint.known_keys import quantisation, recognise
from library.checkpoint.source import Source, open_source
from library.errors import UserError
from tests import tiny

F32 = torch.float32
CLIP, T5 = TOKENIZERS["clip_l_tokenizer"], TOKENIZERS["t5xxl_tokenizer"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny.make_flux_files(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def parts(files):
    return open_parts(files.checkpoint, hub=NOWHERE)


@pytest.fixture(scope="module")
def encoders(parts):
    tokenizers = Tokenizers(load_tokenizer(CLIP, parts.clip_l_tokenizer), load_tokenizer(T5, parts.t5xxl_tokenizer))
    return load_clip(parts.clip_l, F32), load_t5(parts.t5xxl, F32), tokenizers


NOWHERE = Hub(cache=Path("no such folder"), offline=True)


def headers(shapes, dtype="BF16", path="x.safetensors"):
    """A source of names and shapes without data."""
    return Source(Path(path), {name: TensorInfo(dtype, shape, Path(path), 0, 0) for name, shape in shapes.items()}, {}, {})


def dev(hidden=64, head_dim=32, **extra):
    return tiny.transformer_shapes(hidden, head_dim, 1, 1, True, **extra)


# --- what a header says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dev", "schnell"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_variant_and_prefix(variant, prefix):
    shapes = tiny.transformer_shapes(64, 32, 2, 2, variant == "dev")
    file = describe(headers({prefix + name: shape for name, shape in shapes.items()}))
    assert (file.variant, file.prefix, file.layout) == (variant, prefix, "bfl")
    assert set(file.source.tensors) == set(shapes) and file.extras == ()
    assert (file.width, file.head_dim, file.text_width, file.pooled_width) == (64, 32, 64, 64)


OTHERS = {
    "an SDXL checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight",
                           "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"],
    "an SD 1.x": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.x"],
    "an SD3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "text_encoders.clip_l.x"],
    "a Lumina-Image 2.0": ["noise_refiner.0.attention.qkv.weight", "cap_embedder.0.weight"],
    "a Lumina-Next": ["layers.0.attention.wk_y.weight"],
    "a LoRA": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_single_blocks_0_linear1.lora_up.weight"],
    "a Chroma": ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "a FLUX.2": ["double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "a ControlNet": ["controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight", "img_in.weight"],
    "an SDXL UNet in diffusers layout": ["down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"],
    "something unknown (1 tensors: foo.bar)": ["foo.bar"],
}


@pytest.mark.parametrize("title", OTHERS)
def test_other_checkpoints_are_refused_by_name(title):
    with pytest.raises(UserError) as caught:
        describe(headers({name: (4, 4) for name in OTHERS[title]}))
    assert f"is not a FLUX.1 checkpoint: it looks like {title}" in str(caught.value)
    assert "--pretrained_model_name_or_path" in str(caught.value)


def test_parts_are_recognised(files):
    assert recognise(open_source(files.t5xxl).tensors) == "a T5 encoder (width 64)"
    assert recognise(open_source(files.clip_l).tensors) == "a CLIP text encoder (width 64)"
    assert recognise(open_source(files.ae).tensors) == "an autoencoder with 16 latent channels (of FLUX.1 or SD3)"
    assert recognise(headers(tiny.clip_shapes(9, 768, 1)).tensors).startswith("a CLIP-L")


@pytest.mark.parametrize("width", [128, 384])
def test_control_variants_are_refused(width):
    with pytest.raises(UserError, match=rf"takes {width} inputs per image token but predicts 64.*Fill, Canny, Depth"):
        describe(headers(dev(tokens_in=width)))


def test_quantised_files_are_refused():
    shapes = dev() | {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": (9,)}
    with pytest.raises(UserError, match="quantised .bitsandbytes 4-bit"):
        describe(headers(shapes))
    assert quantisation(headers({"a.weight": (4, 1)}, "U8").tensors) == "packed 8-bit integers"
    assert quantisation(headers(dev(), "F8_E4M3").tensors) == ""


def test_incomplete_transformer_is_refused():
    shapes = dev()
    del shapes["final_layer.linear.weight"]
    with pytest.raises(UserError, match="lacks final_layer.linear.weight"):
        describe(headers(shapes))


# --- settings from shapes ---------------------------------------------------------------------------------------------


def test_settings_of_the_published_files():
    transformer = transformer_config(describe(headers(tiny.transformer_shapes(3072, 128, 19, 38, True, 4096, 768))))
    assert transformer == {"in_channels": 64, "patch_size": 1, "num_layers": 19, "num_single_layers": 38,
                           "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
                           "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56)}
    vae = vae_config(headers(tiny.autoencoder_shapes((128, 256, 512, 512), 2)), SCALING, SHIFT)
    assert vae["block_out_channels"] == (128, 256, 512, 512) and vae["layers_per_block"] == 2 and vae["latent_channels"] == 16
    assert (vae["norm_num_groups"], vae["scaling_factor"], vae["shift_factor"]) == (32, 0.3611, 0.1159)
    assert not vae["use_quant_conv"] and not vae["use_post_quant_conv"]
    clip = clip_config(headers(tiny.clip_shapes(49408, 768, 12)))
    assert (clip["num_attention_heads"], clip["num_hidden_layers"], clip["hidden_act"]) == (12, 12, "quick_gelu")
    assert (clip["bos_token_id"], clip["eos_token_id"]) == (49406, 49407)
    t5 = t5_config(headers(tiny.t5_shapes(32128, 4096, 64, 64, 10240, 24)))
    assert (t5["num_heads"], t5["d_kv"], t5["d_ff"], t5["num_layers"]) == (64, 64, 10240, 24)
    assert t5["relative_attention_num_buckets"] == 32


def test_rope_axes():
    assert rope_axes(128) == (16, 56, 56) and rope_axes(32) == (4, 14, 14)
    with pytest.raises(UserError, match="heads of width 16"):
        rope_axes(16)
    file = describe(headers(tiny.transformer_shapes(48, 16, 1, 1, True)))
    assert transformer_config(file, axes_dims_rope=(4, 6, 6))["axes_dims_rope"] == (4, 6, 6)


def test_group_counts_of_small_autoencoders():
    assert vae_config(headers(tiny.autoencoder_shapes((16, 32, 64, 96), 1)), SCALING, SHIFT)["norm_num_groups"] == 16


# --- finding ----------------------------------------------------------------------------------------------------------


def test_everything_beside_the_checkpoint(files, parts):
    assert (parts.ae.path, parts.clip_l.path, parts.t5xxl.path) == (files.ae, files.clip_l, files.t5xxl)
    assert (parts.clip_l_tokenizer, parts.t5xxl_tokenizer) == (files.clip_l_tokenizer, files.t5xxl_tokenizer)
    assert "FLUX.1-dev" in parts.summary() and str(files.ae) in parts.summary()


def test_all_in_one_file(tmp_path):
    path = tiny.make_all_in_one(tmp_path / "all.safetensors", "schnell")
    parts = open_parts(path, hub=NOWHERE)
    assert parts.transformer.variant == "schnell" and parts.transformer.prefix == "model.diffusion_model."
    assert {parts.origins[name] for name in ("ae", "clip_l", "t5xxl")} == {"inside all.safetensors"}
    assert "vae.decoder.conv_in.weight" in parts.transformer.extras
    assert not any(name.startswith("model.") for name in parts.transformer.extras)
    load_clip(parts.clip_l, F32)  # strict, although the file also holds a projection
    load_t5(parts.t5xxl, F32)
    load_vae(parts.ae, F32)


def test_comfyui_folders(tmp_path, files):
    places = {files.checkpoint: "models/unet", files.ae: "models/vae", files.clip_l: "models/clip",
              files.t5xxl: "models/text_encoders", files.clip_l_tokenizer: "models/clip/clip_l_tokenizer",
              files.t5xxl_tokenizer: "models/unet/t5xxl_tokenizer"}
    for source, place in places.items():
        target = tmp_path / place
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    parts = open_parts(tmp_path / "models/unet" / files.checkpoint.name, hub=NOWHERE)
    assert parts.ae.path == tmp_path / "models/vae/ae.safetensors"
    assert parts.t5xxl.path == tmp_path / "models/text_encoders/t5xxl_fp16.safetensors"
    assert parts.clip_l_tokenizer == tmp_path / "models/clip/clip_l_tokenizer"  # beside its encoder


def test_everything_missing_is_told_at_once(tmp_path, files):
    shutil.copy(files.checkpoint, tmp_path / "lonely.safetensors")
    with pytest.raises(UserError) as caught:
        open_parts(tmp_path / "lonely.safetensors", hub=NOWHERE)
    problems = caught.value.problems
    assert len(problems) == 5
    for problem, flag in zip(problems, ("--ae", "--clip_l", "--t5xxl", "--clip_l_tokenizer", "--t5xxl_tokenizer"), strict=True):
        assert problem.endswith(flag) and str(tmp_path) in problem and "HF_HUB_OFFLINE" in problem


def test_a_bad_checkpoint_does_not_hide_missing_parts(tmp_path):
    with pytest.raises(UserError) as caught:
        open_parts(tmp_path / "none.safetensors", ae=tmp_path / "ae.safetensors", t5xxl=tmp_path / "t5.safetensors", hub=NOWHERE)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--pretrained_model_name_or_path", "--ae", "--t5xxl"]


@pytest.mark.parametrize("flag, wrong, text", [
    ("ae", "t5xxl", "a T5 encoder (width 64)"), ("clip_l", "ae", "an autoencoder with 16"),
    ("t5xxl", "clip_l", "a CLIP text encoder"), ("ae", "checkpoint", "a FLUX.1 transformer")])
def test_a_part_of_the_wrong_kind(files, flag, wrong, text):
    with pytest.raises(UserError) as caught:
        open_parts(files.checkpoint, **{flag: getattr(files, wrong)}, hub=NOWHERE)
    assert str(caught.value).startswith(f"--{flag}: ") and f"it looks like {text}" in str(caught.value)


def test_encoders_of_another_width_or_kind(tmp_path, files):
    tiny.save(tmp_path / "clip_g.safetensors", tiny.clip_shapes(16, 128, 1), F32)
    tiny.save(tmp_path / "sdxl_vae.safetensors", tiny.autoencoder_shapes((32, 32, 32, 32), 1, latent=4), F32)
    with pytest.raises(UserError) as caught:
        open_parts(files.checkpoint, clip_l=tmp_path / "clip_g.safetensors", ae=tmp_path / "sdxl_vae.safetensors", hub=NOWHERE)
    assert "4 latent channels (of SD 1.x / SDXL)" in caught.value.problems[0]
    assert "is not the CLIP-L text encoder (width 64): it looks like a CLIP text encoder (width 128)" in caught.value.problems[1]


def test_hub_repository_from_the_cache(tmp_path, files):
    folder = tmp_path / "models--some-one--my-flux" / "snapshots" / "c0ffee"
    shutil.copytree(files.folder, folder)
    hub = Hub(cache=tmp_path, offline=True)
    for name in ("some-one/my-flux", "some-one/my-flux/flux1-dev.safetensors"):
        parts = open_parts(name, hub=hub)
        assert parts.transformer.whole.path == folder / "flux1-dev.safetensors" and parts.ae.path == folder / "ae.safetensors"


@pytest.mark.parametrize("name, text", [("some-one/other", "nor in the hub cache, and the hub is switched off"),
                                        ("models/missing.safetensors", "does not exist"), ("missing", "does not exist")])
def test_a_name_that_leads_nowhere(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_checkpoint(CHECKPOINT, name, NOWHERE)
    assert text in str(caught.value) and "--pretrained_model_name_or_path" in str(caught.value)


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_modules_load_frozen_in_the_asked_dtype(parts, dtype):
    modules = {"transformer": load_transformer(parts.transformer, dtype), "ae": load_vae(parts.ae, dtype),
               "clip_l": load_clip(parts.clip_l, dtype), "t5xxl": load_t5(parts.t5xxl, dtype)}
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            overflows = name == "t5xxl" and dtype == torch.float16 and key.endswith("DenseReluDense.wo.weight")
            assert parameter.dtype == (F32 if overflows else dtype), key
            assert not parameter.requires_grad and parameter.device.type == "cpu"
        assert not any(child.training for child in module.modules())
    assert modules["t5xxl"].shared.weight is modules["t5xxl"].encoder.embed_tokens.weight
    expected = parts.transformer.source.read("img_in.weight", dtype)
    assert torch.equal(modules["transformer"].x_embedder.weight, expected)


def test_prefix_and_schnell_load_too(tmp_path):
    files = tiny.make_flux_files(tmp_path, "schnell", prefix="model.diffusion_model.", dtype=torch.bfloat16)
    model = load_transformer(open_parts(files.checkpoint, hub=NOWHERE).transformer, None)
    assert model.dtype == torch.bfloat16 and not model.config.guidance_embeds


def test_left_over_and_missing_keys_are_errors(tmp_path, files):
    shapes = tiny.transformer_shapes(64, 32, 1, 1, True)
    del shapes["double_blocks.0.txt_mlp.2.bias"]
    tiny.save(tmp_path / "flux.safetensors", shapes | {"double_blocks.0.txt_mlp.3.bias": (64,)}, F32)
    with pytest.raises(UserError) as caught:
        load_transformer(describe(open_source(tmp_path / "flux.safetensors")), F32)
    assert "double_blocks.0.txt_mlp.2.bias" in str(caught.value) and "double_blocks.0.txt_mlp.3.bias" in str(caught.value)


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory, files, parts):
    """The same models as diffusers and transformers save them, the larger two in shards."""
    folder = tmp_path_factory.mktemp("diffusers")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    load_transformer(parts.transformer, F32).save_pretrained(folder / "transformer", max_shard_size="600KB")
    load_vae(parts.ae, F32).save_pretrained(folder / "vae")
    load_clip(parts.clip_l, F32).save_pretrained(folder / "text_encoder")
    load_t5(parts.t5xxl, F32).save_pretrained(folder / "text_encoder_2", max_shard_size="150KB")
    shutil.copytree(files.clip_l_tokenizer, folder / "tokenizer")
    shutil.copytree(files.t5xxl_tokenizer, folder / "tokenizer_2")
    return folder


def test_diffusers_folder(pipeline_folder, parts):
    assert (pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    shard = next((pipeline_folder / "transformer").glob("*-00001-of-*.safetensors"))
    for name in (pipeline_folder, pipeline_folder / "transformer", shard):
        other = open_parts(name, hub=NOWHERE)
        assert (other.transformer.layout, other.transformer.variant, other.transformer.prefix) == ("diffusers", "dev", "")
        assert other.transformer.extras == () and other.transformer.head_dim == 32
        assert other.clip_l_tokenizer == pipeline_folder / "tokenizer"
    for load, mine, theirs in ((load_transformer, parts.transformer, other.transformer), (load_vae, parts.ae, other.ae),
                               (load_clip, parts.clip_l, other.clip_l), (load_t5, parts.t5xxl, other.t5xxl)):
        first, second = load(mine, F32).state_dict(), load(theirs, F32).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_config_json_decides_what_shapes_cannot(tmp_path, pipeline_folder):
    shutil.copytree(pipeline_folder / "transformer", tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"axes_dims_rope": [8, 12, 12]}))
    file = describe(open_checkpoint(CHECKPOINT, tmp_path, NOWHERE))
    assert transformer_config(file)["axes_dims_rope"] == (8, 12, 12)
    path.write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        transformer_config(file)


# --- text -------------------------------------------------------------------------------------------------------------


def test_encode_text(encoders):
    clip, t5, tokenizers = encoders
    captions = ["a photo of the cat", "", "the red rocket and the blue dog " * 12]
    encoded = encode_text({"clip": clip, "t5": t5}, tokenizers, captions, 48, apply_mask=False)
    assert encoded["t5"].shape == (3, 48, 64) and encoded["clip_pooled"].shape == (3, 64)
    assert encoded["t5_mask"].dtype == torch.bool and encoded["t5_mask"].sum(1).tolist() == [6, 1, 48]
    # one at a time or together, and what the modules themselves say
    alone = encode_text({"clip": clip, "t5": t5}, tokenizers, captions[:1], 48, apply_mask=False)
    assert torch.allclose(alone["t5"][0], encoded["t5"][0], atol=1e-5)
    assert torch.allclose(alone["clip_pooled"][0], encoded["clip_pooled"][0], atol=1e-5)
    ids = tokenizers.clip(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (3, 77) and torch.equal(clip(ids).pooler_output, encoded["clip_pooled"])


def test_the_pooled_vector_does_not_depend_on_padding(encoders):
    clip, t5, tokenizers = encoders
    pooled = encode_text({"clip": clip, "t5": t5}, tokenizers, ["the cat"], 16, False)["clip_pooled"]
    ids = tokenizers.clip(["the cat"], return_tensors="pt").input_ids  # begin, the, cat, end
    assert ids.shape == (1, 4)
    assert torch.allclose(clip(ids).last_hidden_state[:, -1], pooled, atol=1e-5)


def test_the_mask_hides_padding_from_t5_only_when_asked(encoders):
    clip, t5, tokenizers = encoders
    plain, masked = (encode_text({"clip": clip, "t5": t5}, tokenizers, ["a red cat"], 24, apply) for apply in (False, True))
    count = int(plain["t5_mask"].sum())
    ids = tokenizers.t5(["a red cat"], return_tensors="pt").input_ids
    assert ids.shape == (1, count)
    assert torch.allclose(masked["t5"][:, :count], t5(ids).last_hidden_state, atol=1e-5)
    assert not torch.allclose(plain["t5"][:, :count], masked["t5"][:, :count], atol=1e-3)
    assert torch.equal(plain["t5_mask"], masked["t5_mask"])


def test_t5_tokens_are_those_of_the_file(files, encoders):
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(files.t5xxl_tokenizer / "tokenizer.json"))
    for text in ("a photo of the cat", "  two   spaces ", "line\nbreak", "émigré", ""):
        assert encoders[2].t5(text)["input_ids"] == own.encode(text).ids
    assert len(encoders[2].t5) == own.get_vocab_size()


def test_t5_tokens_from_a_sentencepiece_model(tmp_path):
    """The hub's v1.1 repositories have nothing but spiece.model; the ids must be those of sentencepiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    model = io.BytesIO()
    lines = ["a photo of the cat", "the dog and the rocket", "blue green red coffee", "a girl with a picture in the house"] * 20
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=30, pad_id=0, eos_id=1,
                                             unk_id=2, bos_id=-1, minloglevel=2)
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer, reference = load_tokenizer(T5, tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("a photo of the cat", " two  spaces\nthere ", "ｆｕｌｌ ﬁ", ""):
        assert tokenizer(text)["input_ids"] == [*reference.encode(text), 1]
    assert len(tokenizer) == 30 and tokenizer.pad_token_id == 0


def test_tokenizers_that_do_not_belong_to_the_encoder(tmp_path, files, encoders):
    tiny.save(tmp_path / "t5.safetensors", tiny.t5_shapes(4), F32)
    with pytest.raises(UserError, match="the encoder knows only 4 tokens.*--t5xxl_tokenizer"):
        encode_text({"clip": encoders[0], "t5": load_t5(open_source(tmp_path / "t5.safetensors"), F32)}, encoders[2], ["a cat"], 8, False)


def test_given_tokenizers(tmp_path, files, parts):
    shutil.copytree(files.t5xxl_tokenizer, tmp_path / "mine")
    for given in (tmp_path / "mine", tmp_path / "mine" / "tokenizer.json"):
        other = open_parts(files.checkpoint, t5xxl_tokenizer=str(given), hub=NOWHERE)
        assert other.t5xxl_tokenizer == tmp_path / "mine"
    assert tokenizer_identity(tmp_path / "mine") == tokenizer_identity(files.t5xxl_tokenizer)
    assert tokenizer_identity(tmp_path / "mine") != tokenizer_identity(files.clip_l_tokenizer)
    (tmp_path / "empty").mkdir()
    for given, text in ((tmp_path / "empty", "holds no tokenizer.json or spiece.model"),
                        ("some-one/thing", "nor in the hub cache"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError) as caught:
            open_parts(files.checkpoint, t5xxl_tokenizer=str(given), hub=NOWHERE)
        assert str(caught.value).startswith("--t5xxl_tokenizer: ") and text in str(caught.value)


def test_tokenizers_from_the_hub_cache(tmp_path, files):
    lonely = tmp_path / "only"
    lonely.mkdir()
    for name in ("checkpoint", "ae", "clip_l", "t5xxl"):
        shutil.copy(getattr(files, name), lonely)
    clip = tmp_path / "hub/models--openai--clip-vit-large-patch14/snapshots/1"
    t5 = tmp_path / "hub/models--some-one--t5/snapshots/1/tokenizer_2"
    shutil.copytree(files.clip_l_tokenizer, clip)
    shutil.copytree(files.t5xxl_tokenizer, t5)
    hub = Hub(cache=tmp_path / "hub", offline=True)
    parts = open_parts(lonely / files.checkpoint.name, t5xxl_tokenizer="some-one/t5", hub=hub)
    assert (parts.clip_l_tokenizer, parts.t5xxl_tokenizer) == (clip, t5)


@pytest.mark.parametrize("kind, name", [("clip", "vocab.json"), ("t5", "tokenizer.json")])
def test_a_damaged_tokenizer_is_one_line(tmp_path, files, kind, name):
    folder = tmp_path / kind
    shutil.copytree(files.clip_l_tokenizer if kind == "clip" else files.t5xxl_tokenizer, folder)
    (folder / name).write_text("{ damaged", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(CLIP if kind == "clip" else T5, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_encode_and_decode_image(parts):
    vae = load_vae(parts.ae, F32)
    pixels = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_image(vae, pixels)
    assert latents.shape == (3, 16, 4, 6) and latents.dtype == F32 and not latents.requires_grad
    moments = vae.encoder(pixels)  # (3, 32, 4, 6): mean and log variance
    assert torch.allclose(latents, (moments[:, :16] - 0.1159) * 0.3611, atol=1e-6)
    assert torch.equal(encode_image(vae, pixels), latents)  # no draw
    assert torch.allclose(encode_image(vae, pixels[1:2]), latents[1:2], atol=1e-5)
    pictures = decode_image(vae, latents)
    assert pictures.shape == pixels.shape and pictures.dtype == F32 and pictures.abs().max() <= 1
    assert torch.allclose(pictures, vae.decoder(moments[:, :16]).clamp(-1, 1), atol=1e-4)


def test_a_half_precision_autoencoder_still_gives_float32(parts):
    vae = load_vae(parts.ae, torch.bfloat16)
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    latents = encode_image(vae, pixels)
    assert latents.dtype == F32 and decode_image(vae, latents).dtype == F32
    assert torch.allclose(latents, encode_image(load_vae(parts.ae, F32), pixels), atol=0.1)
