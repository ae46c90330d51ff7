"""Finding SD3's parts: variants by the header, parts inside and beside, what is wrong and what is another model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.sd3 import open_token_meter
from library.architectures.sd3_models import (load_encoder, load_transformer, load_vae, text_blocks, transformer_config)
from library.architectures.sd3_options import Sd3Options
from library.architectures.sd3_parts import describe, open_parts, open_tokenizers
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub
from library.checkpoint.source import Source, open_source
from library.config.schema import ModelOptions
from library.errors import UserError
from tests.contract.test_keymap import LAYOUTS, header_only
from tests.tiny import make_flux_files
from tests.tiny_sd3 import DEPTH, DUAL, ENCODERS, G_WIDTH, L_WIDTH, POOLED, POSITIONS, T5_WIDTH, VARIANTS, make_sd3_files
from tests.tiny_sdxl import make_sdxl_files

F32 = torch.float32


@pytest.fixture
def offline(tmp_path):
    return Hub(cache=tmp_path / "no hub", offline=True)


def published(name):
    shapes = json.loads((LAYOUTS / f"{name}.json").read_text(encoding="utf-8"))
    return header_only({key: tuple(shape) for key, shape in shapes.items()})


@pytest.mark.parametrize("name, variant, depth, positions, heads", [
    ("sd3_medium", "sd3-medium", 24, 192, 24), ("sd3_medium_incl_clips_t5xxl", "sd3-medium", 24, 192, 24),
    ("sd3.5_medium", "sd3.5-medium", 24, 384, 24), ("sd3.5_large", "sd3.5-large", 38, 192, 38)])
def test_published_headers(name, variant, depth, positions, heads):
    file = describe(published(name))
    assert (file.variant, file.layout, file.prefix, file.depth, file.positions) == (
        variant, "mmdit", "model.diffusion_model.", depth, positions)
    config = transformer_config(file)
    assert config["num_attention_heads"] == heads and config["attention_head_dim"] == 64
    assert config["dual_attention_layers"] == (tuple(range(13)) if variant == "sd3.5-medium" else ())
    assert config["qk_norm"] == (None if variant == "sd3-medium" else "rms_norm")
    assert (config["joint_attention_dim"], config["pooled_projection_dim"]) == (4096, 2048)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("embedded", [(), ("clip_l", "clip_g"), ENCODERS])
def test_parts_inside_and_beside(tmp_path, offline, variant, embedded):
    files = make_sd3_files(tmp_path, variant, embedded)
    parts = open_parts(files.checkpoint, {}, hub=offline)
    file = parts.transformer
    assert (file.variant, file.depth, file.dual, file.positions) == (variant, DEPTH, DUAL if "5-medium" in variant else (), POSITIONS)
    assert (file.text_width, file.pooled_width) == (T5_WIDTH, POOLED)
    for name in ENCODERS:
        assert parts.origins[name].startswith("inside ") == (name in embedded)
    widths = [load_encoder(name, source, F32).get_input_embeddings().weight.shape[1] for name, source in parts.encoders.items()]
    assert widths == [L_WIDTH, G_WIDTH, T5_WIDTH]
    assert [len(text_blocks(name, load_encoder(name, source, F32))) for name, source in parts.encoders.items()] == [2, 3, 2]
    vae = load_vae(parts.vae, F32)
    assert (vae.config.scaling_factor, vae.config.shift_factor, vae.config.latent_channels) == (1.5305, 0.0609, 16)
    assert parts.summary().splitlines()[0].startswith({"sd3-medium": "SD3-medium", "sd3.5-medium": "SD3.5-medium",
                                                       "sd3.5-large": "SD3.5-large (or large-turbo"}[variant])


def test_files_that_are_named(tmp_path, offline):
    files = make_sd3_files(tmp_path / "a", embedded=ENCODERS)
    others = make_sd3_files(tmp_path / "b", seed=5)
    given = {name: others.encoders[name] for name in ENCODERS} | {"vae": others.checkpoint}
    parts = open_parts(files.checkpoint, given, hub=offline)
    assert all(parts.encoders[name].path == others.encoders[name] for name in ENCODERS) and parts.vae.path == others.checkpoint
    assert parts.origins["clip_g"] == "--clip_g"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixes(tmp_path, offline, prefix):
    files = make_sd3_files(tmp_path, prefix=prefix, with_vae=False)
    vae = make_sd3_files(tmp_path / "other").checkpoint
    parts = open_parts(files.checkpoint, {"vae": vae}, hub=offline)
    assert parts.transformer.prefix == prefix and load_transformer(parts.transformer, F32)


def test_encoders_that_are_left_out(tmp_path, offline):
    files = make_sd3_files(tmp_path)
    files.encoders["t5xxl"].unlink()
    (files.tokenizers["t5xxl"]).rename(tmp_path / "gone")
    with pytest.raises(UserError) as caught:
        open_parts(files.checkpoint, {}, hub=offline)
    assert len(caught.value.problems) == 2 and "T5-XXL text encoder (width 256) was not found" in str(caught.value)
    parts = open_parts(files.checkpoint, {"t5xxl": "none"}, hub=offline)
    assert tuple(parts.encoders) == ("clip_l", "clip_g") and "t5xxl: none, zeros in its place" in parts.summary()


def test_the_other_clips_tokenizer_will_do(tmp_path, offline):
    files = make_sd3_files(tmp_path)
    files.tokenizers["clip_g"].rename(tmp_path / "gone")
    assert open_parts(files.checkpoint, {}, hub=offline).tokenizers["clip_g"] == files.tokenizers["clip_l"]
    with pytest.raises(UserError, match="--clip_g_tokenizer"):
        open_parts(files.checkpoint, {}, {"clip_g": str(tmp_path / "nowhere")}, hub=offline)


def test_encoders_of_other_widths(tmp_path, offline):
    files = make_sd3_files(tmp_path)
    tensors = load_file(str(files.encoders["clip_g"]))
    tensors["text_projection.weight"] = tensors["text_projection.weight"][:G_WIDTH - 8].clone()
    save_file(tensors, str(files.encoders["clip_g"]))
    with pytest.raises(UserError, match=f"CLIP-L gives {L_WIDTH} numbers and CLIP-G {G_WIDTH - 8}, but .* takes {POOLED}"):
        open_parts(files.checkpoint, {}, hub=offline)
    flux = make_flux_files(tmp_path / "flux")
    with pytest.raises(UserError, match="--t5xxl: .* is not the T5-XXL text encoder .width 256.: it looks like a T5 encoder .width 64."):
        open_parts(files.checkpoint, {"t5xxl": flux.t5xxl}, hub=offline)


def test_other_models_are_told_apart(tmp_path, offline):
    for make, words in ((lambda: make_flux_files(tmp_path / "f").checkpoint, ("FLUX.1 transformer", "flux_train.py")),
                        (lambda: make_sdxl_files(tmp_path / "x").checkpoint, ("SDXL checkpoint", "sdxl_train.py"))):
        with pytest.raises(UserError) as caught:
            open_parts(make(), {}, hub=offline)
        assert all(word in str(caught.value) for word in words)


def test_a_file_with_something_missing(tmp_path, offline):
    files = make_sd3_files(tmp_path)
    whole = load_file(str(files.checkpoint))
    save_file({name: tensor for name, tensor in whole.items() if not name.endswith("pos_embed")}, str(files.checkpoint))
    with pytest.raises(UserError, match="looks like SD3 but lacks pos_embed"):
        open_parts(files.checkpoint, {}, hub=offline)
    lost = "model.diffusion_model.joint_blocks.1.x_block.attn.proj.bias"
    save_file({name: tensor for name, tensor in whole.items() if name != lost}, str(files.checkpoint))
    with pytest.raises(UserError, match="1 tensor is missing, first 'joint_blocks.1.x_block.attn.proj.bias'"):
        load_transformer(open_parts(files.checkpoint, {}, hub=offline).transformer, F32)


def test_a_variant_with_more_inputs(tmp_path):
    shapes = {name: info.shape for name, info in published("sd3_medium").tensors.items()}
    shapes["model.diffusion_model.x_embedder.proj.weight"] = (1536, 33, 2, 2)
    with pytest.raises(UserError, match="takes 33 latent channels"):
        describe(header_only(shapes))


def test_quantised_files_are_refused(tmp_path):
    source = published("sd3_medium")
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    info = source.tensors[name]
    tensors = source.tensors | {name: TensorInfo("U8", info.shape, info.file, info.start, info.stop)}
    with pytest.raises(UserError, match="quantised"):
        describe(Source(source.path, tensors, {}, {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_table_of_positions_keeps_its_numbers(tmp_path, dtype):
    """It never trains, and rounding it to the weights' dtype would change what is saved."""
    files = make_sd3_files(tmp_path, dtype=torch.float16)
    module = load_transformer(describe(open_source(files.checkpoint)), dtype)
    assert module.pos_embed.pos_embed.dtype == torch.float16 and module.pos_embed.proj.weight.dtype == dtype
    stored = load_file(str(files.checkpoint))["model.diffusion_model.pos_embed"]
    assert torch.equal(module.pos_embed.pos_embed, stored)


def test_tokenizers_without_weights(tmp_path, offline):
    files = make_sd3_files(tmp_path)
    for path in files.encoders.values():
        path.unlink()
    assert open_tokenizers(files.checkpoint, {}, hub=offline) == files.tokenizers
    count = open_token_meter(ModelOptions(str(files.checkpoint)), Sd3Options(t5xxl_max_token_length=8))
    (t5, clip), = count(["a photo of the cat and the blue dog in red"])
    assert (t5.encoder, t5.limit, t5.lost, clip.encoder, clip.limit, clip.lost) == ("T5", 8, "blue dog in red", "CLIP", 77, "")
    alone = open_token_meter(ModelOptions(str(files.checkpoint)), Sd3Options(t5xxl="none"))(["a cat"])
    assert [[one.encoder for one in row] for row in alone] == [["CLIP"]]
