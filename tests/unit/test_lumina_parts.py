"""Which file is what: both families found in every layout, and refused where the parts are of the other one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.lumina_models import load_transformer, load_vae, rope_axes
from library.architectures.lumina_parts import IMAGE_2, NEXT, TOKENIZER, LuminaParts, describe, open_parts, open_tokenizer
from library.architectures.gemma import build_gemma, load_gemma
from library.architectures.tokenizers import load_tokenizer
from library.checkpoint.hub import Hub
from library.checkpoint.reader import build_on_meta
from library.checkpoint.source import open_source
from library.errors import UserError
from tests.tiny import make_flux_files
from tests.tiny_lumina import (gemma_shapes, image_2_shapes, make_all_in_one, make_image_2_files, make_next_files, next_shapes,
                               save)
from tests.tiny_sdxl import make_sdxl_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image_2(tmp_path_factory):
    return make_image_2_files(tmp_path_factory.mktemp("image_2"))


@pytest.fixture(scope="module")
def next_files(tmp_path_factory):
    return make_next_files(tmp_path_factory.mktemp("next"))


@pytest.fixture
def offline(tmp_path):
    return Hub(cache=tmp_path / "no hub", offline=True)


def opened(path, offline, **given) -> LuminaParts:
    return open_parts(path, hub=offline, **given)


def refusal(path, offline, **given) -> str:
    with pytest.raises(UserError) as caught:
        open_parts(path, hub=offline, **given)
    return str(caught.value)


def test_families_are_told_apart_and_their_parts_found(image_2, next_files, offline):
    for files, family, channels in ((image_2, IMAGE_2, 16), (next_files, NEXT, 4)):
        parts = opened(files.checkpoint, offline)
        assert (parts.transformer.family, parts.transformer.layout, parts.transformer.prefix) == (family, "original", "")
        assert parts.gemma.path == files.gemma and parts.ae.path == files.ae and parts.tokenizer == files.tokenizer
        assert family in parts.summary() and "beside the checkpoint" in parts.summary()
        vae = load_vae(parts.transformer, parts.ae, torch.float32, CPU)
        assert vae.config.latent_channels == channels
        assert (vae.config.scaling_factor, vae.config.shift_factor) == ((0.3611, 0.1159) if channels == 16 else (0.13025, None))


def test_all_in_one_file(tmp_path, offline):
    path = make_all_in_one(tmp_path / "neta_lumina.safetensors")
    parts = opened(path, offline)
    assert parts.transformer.prefix == "model.diffusion_model." and parts.gemma.path == parts.ae.path == path
    assert "inside neta_lumina" in parts.summary()
    load_transformer(parts.transformer, None)
    assert type(load_gemma(parts.gemma, None)).__name__ == "Gemma2Model"


def test_prefix_alone(tmp_path, offline):
    files = make_image_2_files(tmp_path, prefix="model.diffusion_model.")
    assert opened(files.checkpoint, offline).transformer.prefix == "model.diffusion_model."


def test_shards_of_the_transformer(image_2, tmp_path, offline):
    tensors = load_file(image_2.checkpoint)
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in some}, str(tmp_path / f"model-{number:05d}-of-00002.safetensors"))
    given = {"gemma2": image_2.gemma, "ae": image_2.ae, "gemma2_tokenizer": str(image_2.tokenizer)}
    for path in (tmp_path, tmp_path / "model-00001-of-00002.safetensors"):
        parts = opened(path, offline, **given)
        assert parts.origins == {"gemma": "--gemma2", "ae": "--ae", "tokenizer": "--gemma2_tokenizer"}
        module = load_transformer(parts.transformer, None)
        whole = load_transformer(describe(open_source(image_2.checkpoint)), None)
        states = zip(module.state_dict().values(), whole.state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in states)


def test_parts_of_the_other_family_are_refused(image_2, next_files, offline):
    text = refusal(next_files.checkpoint, offline, gemma2=image_2.gemma, ae=image_2.ae, ae_flag="--vae")
    looks = "it looks like a language model of width 32"
    assert f"--gemma2: {image_2.gemma} is not the Gemma-2B text encoder (width 32): {looks}, Gemma 2" in text
    assert f"--vae: {image_2.ae} is not the SDXL autoencoder (4 channels): it looks like an autoencoder with 16 latent" in text
    text = refusal(image_2.checkpoint, offline, gemma2=next_files.gemma, ae=next_files.ae)
    assert "--gemma2" in text and f"is not the Gemma-2-2B text encoder (width 32): {looks}" in text
    assert f"--ae: {next_files.ae} is not the FLUX.1 autoencoder (16 channels)" in text


def test_a_next_checkpoint_among_the_parts_of_2_is_refused_with_what_lies_there(image_2, next_files, tmp_path, offline):
    """Found by their names beside it, and told apart by their headers."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path, name in ((next_files.checkpoint, "model.safetensors"), (image_2.gemma, "gemma_2b.safetensors"),
                       (image_2.ae, "sdxl_vae.safetensors")):
        (folder / name).write_bytes(path.read_bytes())
    text = refusal(folder / "model.safetensors", offline, gemma2_tokenizer=str(next_files.tokenizer))
    assert "Gemma-2B text encoder (width 32)" in text and "looks like a language model of width 32, Gemma 2" in text
    assert "SDXL autoencoder" in text and "looks like an autoencoder with 16 latent channels" in text


def test_an_encoder_of_another_width_is_refused(image_2, tmp_path, offline):
    path = tmp_path / "gemma_2_9b.safetensors"
    save(path, gemma_shapes(40, second=True, width=40), torch.float32, 0)
    assert "it looks like a language model of width 40, Gemma 2" in refusal(image_2.checkpoint, offline, gemma2=path)


def test_everything_missing_is_told_at_once(image_2, tmp_path, offline):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(image_2.checkpoint.read_bytes())
    text = refusal(copy, offline)
    assert all(flag in text for flag in ("--gemma2", "--ae", "--gemma2_tokenizer"))


def test_other_models_are_refused_by_name(tmp_path, offline):
    flux = make_flux_files(tmp_path / "flux").checkpoint
    text = refusal(flux, offline)
    assert "is not a Lumina checkpoint: it looks like a FLUX.1 transformer" in text and "train it with flux_train.py" in text
    assert "train it with sdxl_train.py" in refusal(make_sdxl_files(tmp_path / "sdxl").checkpoint, offline)
    relative = image_2_shapes() | {"x_pad_token": (1, 48), "cap_pad_token": (1, 48)}
    save(tmp_path / "z.safetensors", relative, torch.float32, 0)
    assert "looks like a Z-Image transformer" in refusal(tmp_path / "z.safetensors", offline)


@pytest.mark.parametrize("shapes, words", [
    (image_2_shapes(channels=32), "takes 32 latent channels where Lumina-Image 2.0 takes 16"),
    (next_shapes(channels=16), "takes 16 latent channels where Lumina-Next takes 4"),
    ({name: shape for name, shape in image_2_shapes().items() if not name.startswith("cap_embedder")},
     "looks like Lumina-Image 2.0 but lacks cap_embedder.0.weight"),
    ({**next_shapes(), "layers.0.attention.gate": (5,)}, "do not divide into heads of 9"),
    ({**image_2_shapes(), "layers.0.attention.out.weight.absmax": (3,)}, "is quantised"),
])
def test_variants_and_damaged_files_are_refused(tmp_path, offline, shapes, words):
    save(tmp_path / "m.safetensors", shapes, torch.float32, 0)
    assert words in refusal(tmp_path / "m.safetensors", offline)


def test_a_missing_tensor_is_an_error_with_its_name(tmp_path, offline):
    files = make_image_2_files(tmp_path)
    tensors = load_file(files.checkpoint)
    tensors.pop("layers.1.ffn_norm2.weight")
    save_file(tensors | {"layers.1.ffn_norm3.weight": torch.ones(48)}, str(files.checkpoint))
    with pytest.raises(UserError, match="1 tensor is missing, first 'layers.1.ffn_norm2.weight'.*1 name is unknown"):
        load_transformer(opened(files.checkpoint, offline).transformer, None)


def test_rotary_axes_are_thirds():
    assert rope_axes(96) == (32, 32, 32)
    with pytest.raises(UserError, match="heads of width 16"):
        rope_axes(16)


def test_longer_captions_get_longer_tables(image_2, offline):
    """Positions of 2.0 end at 300: a picture behind a caption of 400 tokens would stand outside the table."""
    file = opened(image_2.checkpoint, offline).transformer
    tables = [load_transformer(file, None, text_tokens=tokens).rope_embedder.freqs_cis for tokens in (256, 400)]
    assert [len(table[0]) for table in tables] == [300, 401] and tables[0][0].dtype == torch.complex64
    assert torch.equal(tables[0][0], tables[1][0][:300])


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_gemma_of_either_generation_with_or_without_prefix(tmp_path, second, prefix):
    path = tmp_path / "g.safetensors"
    save(path, gemma_shapes(40, second, prefix=prefix) | {"lm_head.weight": (40, 32)}, torch.bfloat16, 0)
    module = load_gemma(open_source(path), None)
    config = module.config
    assert type(module).__name__ == ("Gemma2Model" if second else "GemmaModel") and module.dtype == torch.bfloat16
    assert (config.num_attention_heads, config.head_dim, config.num_key_value_heads) == (8, 8, 4)
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    if second:  # what its scores are divided by is the width of a head, and they are squeezed
        assert config.query_pre_attn_scalar == 8 and config.attn_logit_softcapping == 50
        assert config._attn_implementation == "eager"


def test_heads_that_shapes_do_not_tell_come_from_the_folder(tmp_path):
    save(tmp_path / "model.safetensors", gemma_shapes(40, second=True, head_dim=10, prefix=""), torch.float32, 0)
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma2Model"], "num_attention_heads": 4, "head_dim": 20}')
    config = build_on_meta(lambda: build_gemma(open_source(tmp_path))).config
    assert (config.num_attention_heads, config.head_dim, config.num_key_value_heads) == (4, 20, 2)


def test_tokenizer_pads_on_the_right_and_begins_with_its_marker(image_2, offline):
    tokenizer = load_tokenizer(TOKENIZER, open_tokenizer(image_2.checkpoint, hub=offline))
    encoded = tokenizer(["a photo of a cat", "a"], padding=True)
    assert tokenizer.padding_side == "right"
    assert encoded["attention_mask"] == [[1] * 6, [1, 1, 0, 0, 0, 0]] and encoded["input_ids"][1][:1] == [tokenizer.bos_token_id]


def test_tokenizer_of_sentencepiece_alone_is_not_taken(image_2, tmp_path, offline):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    assert "holds no tokenizer.json" in refusal(image_2.checkpoint, offline, gemma2_tokenizer=str(tmp_path))
