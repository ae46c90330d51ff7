"""The adapter of both families: text, calls, groups, files it writes, previews."""

import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline, Lumina2Transformer2DModel, LuminaNextDiT2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma2Model, GemmaModel

import lumina_train
from library.architectures import lumina_call, lumina_preview, lumina_text
from library.architectures.attention import FlashKernel, TorchFlashKernel, TorchKernel
from library.architectures.base import DENOISER, NO_ENCODERS
from library.architectures.lumina import open_architecture, open_token_meter
from library.architectures.lumina_options import LuminaOptions
from library.config.check import check
from library.config.flow_options import FlowOptions
from library.config.parse import parse
from library.config.schema import ModelOptions
from library.errors import UserError
from library.memory.recompute import Recompute
from library.prompts import Prompt
from tests.tiny_lumina import make_all_in_one, make_image_2_files, make_next_files

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module", params=["2.0", "next"])
def files(request, tmp_path_factory):
    make = {"2.0": make_image_2_files, "next": make_next_files}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def image_2(tmp_path_factory):
    return make_image_2_files(tmp_path_factory.mktemp("image_2"))


@pytest.fixture(scope="module")
def next_files(tmp_path_factory):
    return make_next_files(tmp_path_factory.mktemp("next_files"))


def opened(path, model=None, **options):
    return open_architecture(ModelOptions(str(path), **(model or {})), LuminaOptions(**options), FlowOptions())


def encoded(arch, captions):
    return arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), captions)


def test_latents_are_those_of_the_family(image_2, next_files):
    for files, channels in ((image_2, 16), (next_files, 4)):
        arch = opened(files.checkpoint)
        assert arch.latent.channels == channels and arch.latent.pixel_step == LuminaOptions.latent.pixel_step == 16
        latents = arch.encode_image(arch.load_vae(CPU, F32), torch.zeros(1, 3, 64, 96))
        assert latents.shape == (1, channels, 8, 12)


def test_half_precision_is_kept_from_the_4_channel_autoencoder(next_files):
    assert opened(next_files.checkpoint).load_vae(CPU, torch.float16).dtype == F32


def test_text_is_the_penultimate_states_of_the_real_tokens(files):
    arch = opened(files.checkpoint, gemma2_max_token_length=12)
    encoders = arch.load_text_encoders(arch.text_encoders, CPU, F32)
    text = arch.encode_text(encoders, ["a photo of a cat", ""])
    assert text["gemma"].shape == (2, 12, 32) and text["gemma_mask"].sum(dim=1).tolist() == [6, 1]
    assert arch.text_trim == {"gemma": "gemma_mask"} and not text["gemma"][~text["gemma_mask"]].any()
    ids = encoders.tokenizers("a photo of a cat", return_tensors="pt")["input_ids"]
    encoder = encoders.modules["gemma"]
    kept = []
    encoder.layers[-2].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    encoder(input_ids=ids)
    state = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    torch.testing.assert_close(text["gemma"][0, :6], state[0].detach())


def test_captions_do_not_depend_on_their_neighbours(files):
    arch = opened(files.checkpoint, gemma2_max_token_length=20)
    together, alone = encoded(arch, ["a", "a photo of a picture of the dog"]), encoded(arch, ["a"])
    torch.testing.assert_close(together["gemma"][:1], alone["gemma"], rtol=1e-5, atol=1e-5)
    assert torch.equal(together["gemma_mask"][:1], alone["gemma_mask"])


def test_long_captions_are_cut_and_counted(files):
    arch = opened(files.checkpoint, gemma2_max_token_length=4)
    text = encoded(arch, ["a photo of a cat"])
    assert text["gemma_mask"].all() and text["gemma"].shape[1] == 4
    whole = encoded(opened(files.checkpoint), ["a photo of a cat"])
    torch.testing.assert_close(text["gemma"][0], whole["gemma"][0, :4], rtol=1e-5, atol=1e-5)
    options = LuminaOptions(gemma2_max_token_length=4)
    (count,), (short,) = open_token_meter(ModelOptions(str(files.checkpoint)), options)(["a photo of a cat", "a photo"])
    assert (count.encoder, count.tokens, count.limit, count.lost) == ("Gemma", 6, 4, "a cat")
    assert (short.tokens, short.lost) == (3, "")


def test_system_prompt_stands_before_every_caption_but_the_empty_one(image_2):
    said = "the picture"
    assert lumina_text.instructed(["a cat", ""], said) == ["the picture <Prompt Start> a cat", ""]
    assert lumina_text.instructed(["a cat", ""], "") == ["a cat", ""]
    plain, told = opened(image_2.checkpoint), opened(image_2.checkpoint, system_prompt=said)
    assert plain.text_identity(("gemma",), F32) != told.text_identity(("gemma",), F32)
    ours, by_hand = encoded(told, ["a cat", ""]), encoded(plain, ["the picture <Prompt Start> a cat", ""])
    assert torch.equal(ours["gemma"], by_hand["gemma"]) and torch.equal(ours["gemma_mask"], by_hand["gemma_mask"])
    meter = open_token_meter(ModelOptions(str(image_2.checkpoint)), LuminaOptions(system_prompt=said, gemma2_max_token_length=22))
    (count,), (empty,) = meter(["a cat and dog", ""])
    assert count.tokens == 24 and count.lost and "a cat and dog".endswith(count.lost) and empty.tokens == 1


def test_a_system_prompt_that_leaves_no_room_for_captions_is_refused(image_2):
    path, options = ModelOptions(str(image_2.checkpoint)), LuminaOptions(system_prompt="the picture", gemma2_max_token_length=8)
    with pytest.raises(UserError, match=r"--system_prompt: the instruction takes (\d+) tokens of the 8 that Gemma reads: .* more than \1$"):
        open_token_meter(path, options)(["a cat"])


def test_words_beyond_the_encoder_are_refused(files, tmp_path):
    content = json.loads((files.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["zebra"] = 900
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 900, "content": "zebra", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="Gemma tokenizer gives token 900.*--gemma2_tokenizer"):
        encoded(opened(files.checkpoint, gemma2_tokenizer=str(tmp_path)), ["a zebra"])


def test_padding_is_never_read(files):
    """Numbers in the padding change nothing, nor does more of it: what a cache does not keep."""
    arch = opened(files.checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    text = encoded(arch, ["a photo of a cat", "a"])
    x_t, level = torch.randn(2, arch.latent.channels, 8, 12), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = arch.predict(denoiser, x_t, level, text, None)
        noisy = text["gemma"] + torch.randn_like(text["gemma"]) * ~text["gemma_mask"][..., None]
        assert torch.allclose(arch.predict(denoiser, x_t, level, {**text, "gemma": noisy}, None), expected, atol=1e-6)
        longer = {name: torch.cat([value, torch.zeros_like(value)], dim=1) for name, value in text.items()}
        assert torch.allclose(arch.predict(denoiser, x_t, level, longer, None), expected, atol=1e-6)
        alone = arch.predict(denoiser, x_t[1:], level[1:], {name: value[1:] for name, value in text.items()}, None)
    torch.testing.assert_close(alone, expected[1:], rtol=1e-5, atol=1e-5)


def test_words_steer_the_prediction(files):
    arch = opened(files.checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    x_t = torch.randn(1, arch.latent.channels, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        one, two = arch.predict(denoiser, x_t, torch.tensor([0.5, 0.5]), encoded(arch, ["a cat", "a dog"]), None)
    assert (one - two).abs().max() > 1e-3


def test_call_is_that_of_the_diffusers_pipelines(files, tmp_path):
    """Time, sign, positions: against the module called as the pipelines do, at the size where those adapt nothing."""
    arch = opened(files.checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    text = encoded(arch, ["a photo of a cat"])
    x_t = torch.randn(1, arch.latent.channels, 8, 12)
    plain = {"hidden_states": x_t, "timestep": torch.tensor([1 - 0.25]), "encoder_hidden_states": text["gemma"]}
    with torch.no_grad():
        ours = arch.predict(denoiser, x_t, torch.tensor([0.25]), text, None)
        if arch.latent.channels == 16:
            theirs = denoiser(**plain, encoder_attention_mask=text["gemma_mask"].int()).sample
        else:
            from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

            table = get_2d_rotary_pos_embed_lumina(denoiser.head_dim, 384, 384, linear_factor=1.0, ntk_factor=1.0)
            theirs = denoiser(**plain, encoder_mask=text["gemma_mask"].int(), image_rotary_emb=table,
                              cross_attention_kwargs={}).sample.chunk(2, dim=1)[0]
    torch.testing.assert_close(ours, -theirs, rtol=1e-5, atol=1e-5)
    assert ours.dtype == F32 and ours.shape == x_t.shape


def test_refiners_are_recomputed_too(files):
    """All layers run again in the backward pass; diffusers by itself leaves out the first four, or refuses."""
    arch = opened(files.checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    blocks, ran = arch.blocks(denoiser), []
    text = encoded(arch, ["a cat", "a photo of the dog"])
    x_t, level = torch.randn(2, arch.latent.channels, 8, 8), torch.tensor([0.4, 0.6])

    def gradients():
        denoiser.zero_grad()
        arch.predict(denoiser, x_t, level, text, None).square().mean().backward()
        return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}

    arch.groups(denoiser, NO_ENCODERS, 1e-3)
    plain = gradients()
    for index, block in enumerate(blocks):
        block.ffn_norm1.register_forward_pre_hook(lambda _module, _inputs, number=index: ran.append(number))
    Recompute(blocks)
    recomputed = gradients()
    count = len(blocks)
    assert count == (6 if arch.latent.channels == 16 else 2)
    assert ran == [*range(count), *reversed(range(count))]
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_all_that_is_used_trains(files):
    arch = opened(files.checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    (group,) = arch.groups(denoiser, NO_ENCODERS, 1e-3)
    left_out = {name for name, _ in denoiser.named_parameters()} - {name for name, _ in group.params}
    assert left_out == ({"pad_token"} if arch.latent.channels == 4 else set())
    assert all(parameter.requires_grad == (name not in left_out) for name, parameter in denoiser.named_parameters())
    text = encoded(arch, ["a cat"])
    arch.predict(denoiser, torch.randn(1, arch.latent.channels, 8, 8), torch.tensor([0.5]), text, None).sum().backward()
    assert all(parameter.grad is not None for _, parameter in group.params)


def test_queries_are_one_matrix_with_both_gradients(next_files):
    """Trained as two, as diffusers has it, they would drift apart and could not be written back."""
    arch = opened(next_files.checkpoint)
    tied = arch.load_denoiser(CPU, F32)
    untied = LuminaNextDiT2DModel(**{key: value for key, value in tied.config.items() if not key.startswith("_")})
    untied.load_state_dict(tied.state_dict())
    arch.groups(tied, NO_ENCODERS, 1e-3)
    text, x_t = encoded(arch, ["a photo of a cat"]), torch.randn(1, 4, 8, 8)
    for module in (tied, untied):
        lumina_call.predict(module, x_t, torch.tensor([0.5]), text).square().mean().backward()
    for ours, theirs in zip(tied.layers, untied.layers, strict=True):
        for part in ("to_q", "norm_q"):
            both = getattr(theirs.attn1, part).weight.grad + getattr(theirs.attn2, part).weight.grad
            torch.testing.assert_close(getattr(ours.attn1, part).weight.grad, both, rtol=1e-4, atol=1e-7)
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 3 * len(tied.layers)


@pytest.mark.parametrize("flags, expected", [({}, TorchKernel), ({"attn_mode": "torch"}, TorchKernel),
                                             ({"use_flash_attn": True}, (FlashKernel, TorchFlashKernel)),
                                             ({"attn_mode": "flash"}, (FlashKernel, TorchFlashKernel))])
def test_attention_is_routed_as_asked(files, flags, expected):
    denoiser = opened(files.checkpoint, model=flags).load_denoiser(CPU, F32)
    routed = [part.forward.router.kernel for part in denoiser.modules() if hasattr(part, "processor")]
    assert len(routed) >= 4 and all(isinstance(kernel, expected) for kernel in routed)


def test_flash_gives_the_same_prediction(files):
    arch, flash = opened(files.checkpoint), opened(files.checkpoint, model={"use_flash_attn": True})
    text = encoded(arch, ["a photo of a cat", "a"])
    x_t, level = torch.randn(2, arch.latent.channels, 8, 12), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        one, two = (each.predict(each.load_denoiser(CPU, F32), x_t, level, text, None) for each in (arch, flash))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def saved(arch, path, dtype=F32, kind="safetensors", denoiser=None):
    denoiser = denoiser or arch.load_denoiser(CPU, F32)
    arch.export({DENOISER: denoiser}, path, dtype, {"modelspec.title": "x"}, kind)
    return path


def test_all_in_one_file_stays_one(tmp_path):
    source = make_all_in_one(tmp_path / "all.safetensors")
    path = saved(opened(source), tmp_path / "out.safetensors", torch.bfloat16)
    before, after = load_file(source), load_file(path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.title"] == "x"
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.bfloat16() if name.startswith("model.diffusion_model.") else tensor
        assert torch.equal(after[name], expected), name


def test_folder_is_one_that_diffusers_reads_and_so_do_we(files, tmp_path):
    arch = opened(files.checkpoint)
    denoiser = arch.load_denoiser(CPU, F32)
    folder = saved(arch, tmp_path / "model", kind="diffusers_safetensors", denoiser=denoiser)
    total = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert total == pytest.approx(arch.saved_bytes({DENOISER: denoiser}, F32, "diffusers_safetensors"), rel=0.01)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    second = arch.latent.channels == 16
    assert isinstance(pipeline.transformer, Lumina2Transformer2DModel if second else LuminaNextDiT2DModel)
    assert isinstance(pipeline.text_encoder, Gemma2Model if second else GemmaModel)
    assert pipeline.scheduler.config.shift == (6.0 if second else 1.0)
    pairs = zip(denoiser.state_dict().items(), pipeline.transformer.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)
    assert torch.equal(pipeline.text_encoder.state_dict()["embed_tokens.weight"],
                       load_file(files.gemma)["model.embed_tokens.weight"])
    again = opened(folder)
    assert again.file.layout == "diffusers" and again.save_format == "diffusers_safetensors"
    assert again.vae_identity(F32) != "" and encoded(again, ["a cat"])["gemma"].equal(encoded(arch, ["a cat"])["gemma"])
    loaded = again.load_denoiser(CPU, F32)
    pairs = zip(denoiser.named_parameters(), loaded.named_parameters(), strict=True)
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)
    # a folder saved as a file has the original names, and ones for the norm that folders lack
    back = load_file(saved(again, tmp_path / "back.safetensors", denoiser=loaded))
    original = load_file(files.checkpoint)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items() if name != "norm_final.weight")
    assert not second or back["norm_final.weight"].unique().tolist() == [1.0]


def test_folder_does_not_replace_what_is_no_model(image_2, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="no diffusers model that could be replaced"):
        saved(opened(image_2.checkpoint), tmp_path / "mine", kind="diffusers_safetensors")


def test_folders_with_two_query_matrices_are_refused(next_files, tmp_path):
    folder = saved(opened(next_files.checkpoint), tmp_path / "model", kind="diffusers_safetensors")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    assert torch.equal(tensors["layers.1.attn1.to_q.weight"], tensors["layers.1.attn2.to_q.weight"])
    tensors["layers.1.attn2.to_q.weight"] = tensors["layers.1.attn2.to_q.weight"] + 1
    save_file(tensors, str(file))
    with pytest.raises(UserError, match="layers.1.attn1.to_q.weight and layers.1.attn2.to_q.weight differ"):
        opened(folder).load_denoiser(CPU, F32)


def test_metadata_names_the_family(image_2, next_files):
    names = [opened(files.checkpoint).modelspec()["architecture"] for files in (image_2, next_files)]
    assert names == ["lumina-2", "lumina-next"]


def drawn(arch, denoiser, vae, text, **prompt):
    settings = {"width": 96, "height": 64, "seed": 1, "steps": 4, "cfg": 1.0, **prompt}
    return arch.sample(denoiser, vae, [Prompt("a", **settings)], text["a"], text["b"], F32)[0]


def test_previews_have_size_seed_and_guidance(files):
    arch = opened(files.checkpoint)
    denoiser, vae = arch.load_denoiser(CPU, F32), arch.load_vae(CPU, F32)
    text = {name: encoded(arch, [caption]) for name, caption in (("a", "a photo of a cat"), ("b", ""))}
    first = drawn(arch, denoiser, vae, text)
    assert first.size == (96, 64) and first.tobytes() == drawn(arch, denoiser, vae, text).tobytes()
    assert first.tobytes() != drawn(arch, denoiser, vae, text, seed=2).tobytes()
    assert first.tobytes() != drawn(arch, denoiser, vae, text, cfg=4.0).tobytes()
    half = arch.sample(denoiser, vae, [Prompt("a", width=96, height=64, seed=1, steps=4)], text["a"], text["b"], torch.bfloat16)
    assert half[0].size == (96, 64)


def test_a_model_that_knows_the_way_draws_the_picture(image_2, monkeypatch):
    """With the true velocity towards fixed latents the steps end there, whatever the number of steps."""
    arch = opened(image_2.checkpoint)
    target = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    seen, ends = [], []

    def straight(_denoiser, x_t, level, _text):
        seen.append(level[0].item())
        return (x_t - target) / level.view(-1, 1, 1, 1)

    monkeypatch.setattr(lumina_preview, "predict", straight)
    monkeypatch.setattr(lumina_preview, "to_pictures", lambda _vae, latents: ends.append(latents) or [None])
    text = {"a": encoded(arch, ["a"]), "b": encoded(arch, [""])}
    for cfg in (1.0, 3.0):
        drawn(arch, torch.nn.Linear(1, 1), None, text, width=64, cfg=cfg)
    assert all(torch.allclose(end, target, atol=1e-5) for end in ends) and len(ends) == 2
    shifted = [6 * sigma / (1 + 5 * sigma) for sigma in (1.0, 0.75, 0.5, 0.25)]
    assert seen[:4] == pytest.approx(shifted) and seen[0] == 1.0


def test_guidance_of_lumina_next_leaves_the_last_channel():
    """As the release's sampler has it."""
    positive, negative = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    assert lumina_preview.guide(positive, negative, 3.0, 4).unique().tolist() == [3.0]
    guided = lumina_preview.guide(positive, negative, 3.0, 3)
    assert guided[:, :3].unique().tolist() == [3.0] and guided[:, 3:].unique().tolist() == [1.0]


def test_files_that_are_read_are_known(files):
    arch = opened(files.checkpoint)
    assert arch.files() == {files.checkpoint, files.gemma, files.ae}


def test_adapter_has_everything_the_protocol_asks_for(files):
    from library.architectures.base import Architecture

    arch = opened(files.checkpoint)
    asked = [name for name in (*vars(Architecture), *Architecture.__annotations__) if not name.startswith("_")]
    assert all(hasattr(arch, name) for name in asked)
    for name, method in inspect.getmembers(Architecture, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(arch, name)).parameters) == list(inspect.signature(method).parameters)[1:], name


def flags(path, *more):
    return parse(lumina_train.ENTRY, ["--pretrained_model_name_or_path", str(path), "--dataset_config", str(path),
                                      "--output_dir", "out", *more], {})


def refused(path, *more) -> str:
    with pytest.raises(UserError) as caught:
        check(flags(path, *more))
    return str(caught.value)


def test_flags(image_2):
    config = flags(image_2.checkpoint)
    assert (config.objective.timestep_sampling, config.objective.discrete_flow_shift) == ("shift", 6.0)
    assert config.objective.model_prediction_type == "raw" and config.model.attention == "torch" and not config.notes
    assert flags(image_2.checkpoint, "--use_flash_attn").model.attention == "flash"
    assert flags(image_2.checkpoint, "--vae", str(image_2.ae)).architecture.autoencoder == image_2.ae
    given = flags(image_2.checkpoint, "--timestep_sampling", "nextdit_shift", "--gemma2", str(image_2.gemma), "--ae",
                  str(image_2.ae), "--gemma2_max_token_length", "128", "--system_prompt", "You draw.")
    assert given.architecture.system_prompt == "You draw." and given.objective.timestep_sampling == "nextdit_shift"
    assert flags(image_2.checkpoint, "--sample_batch_size", "2").sampling.sample_batch_size == 2


def test_refused_flags(image_2):
    assert "SageAttention has no backward pass" in refused(image_2.checkpoint, "--use_sage_attn")
    assert "contradicts --use_flash_attn" in refused(image_2.checkpoint, "--use_flash_attn", "--attn_mode", "torch")
    other = str(image_2.gemma)
    assert "give one of the two" in refused(image_2.checkpoint, "--ae", str(image_2.ae), "--vae", other)
    assert "would have no effect" in refused(image_2.checkpoint, "--timestep_sampling", "nextdit_shift", "--sigmoid_scale", "2")
    assert "--gemma2_max_token_length" in refused(image_2.checkpoint, "--gemma2_max_token_length", "1")
