"""Text of SD3: against diffusers' pipeline, missing encoders, hidden padding, dropout of one encoder, places on the table."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from library.architectures.sd3_models import load_encoder, load_transformer
from library.architectures.sd3_parts import TOKENIZERS, open_parts
from library.architectures.sd3_text import CORNERS, NAMES, Masks, Tokenizers, context, encode_text, vary
from library.architectures.tokenizers import load_tokenizer
from library.checkpoint.hub import Hub
from library.encode import as_cached, without_padding
from library.errors import UserError
from library.objectives.noise import draw
from tests.tiny_sd3 import G_WIDTH, L_WIDTH, POOLED, T5_WIDTH, make_sd3_files

CPU, F32 = torch.device("cpu"), torch.float32
CAPTIONS = ["a red cat and a blue dog", "", "the photo of the cat " * 40]
LENGTH = 24


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    return open_parts(make_sd3_files(folder).checkpoint, {}, hub=Hub(cache=folder / "hub", offline=True))


@pytest.fixture(scope="module")
def encoders(parts):
    modules = {name: load_encoder(name, source, F32) for name, source in parts.encoders.items()}
    return modules, Tokenizers(**{name: load_tokenizer(TOKENIZERS[name], folder) for name, folder in parts.tokenizers.items()})


@torch.no_grad()
def encode(encoders, masks=Masks(), names=NAMES, captions=CAPTIONS):
    modules, tokenizers = encoders
    return encode_text({name: modules[name] for name in names}, tokenizers, captions, LENGTH, masks)


def assembled(text, batch=len(CAPTIONS)):
    return context(text, batch, T5_WIDTH, POOLED, LENGTH, CPU)


def test_equals_the_pipeline_of_diffusers(parts, encoders):
    """Their pipeline over the same modules; CLIP-L is given the projection that changes nothing, as the pipeline's class has one."""
    from transformers import CLIPTextModelWithProjection

    modules, tokenizers = encoders
    projected = CLIPTextModelWithProjection(modules["clip_l"].config).eval()
    own = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in modules["clip_l"].state_dict().items()}
    projected.load_state_dict(own | {"text_projection.weight": torch.eye(L_WIDTH)})
    first, second = (load_tokenizer(TOKENIZERS[name], parts.tokenizers[name]) for name in ("clip_l", "clip_g"))
    second.pad_token = second.convert_ids_to_tokens(0)
    first.model_max_length = second.model_max_length = 77
    pipeline = StableDiffusion3Pipeline(
        transformer=load_transformer(parts.transformer, F32), scheduler=None, vae=None, text_encoder=projected,
        text_encoder_2=modules["clip_g"], text_encoder_3=modules["t5xxl"], tokenizer=first, tokenizer_2=second,
        tokenizer_3=tokenizers.t5xxl)
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(CAPTIONS[:2], None, None, do_classifier_free_guidance=False,
                                                      max_sequence_length=LENGTH)
    ours, our_pooled = assembled(encode(encoders, captions=CAPTIONS[:2]), 2)
    torch.testing.assert_close(ours, states.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(our_pooled, pooled.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("missing", [("clip_l",), ("clip_g",), ("t5xxl",), ("clip_l", "clip_g"), ("clip_l", "clip_g", "t5xxl")])
def test_a_missing_encoder_leaves_zeros_where_it_would_be(encoders, missing):
    whole, whole_pooled = assembled(encode(encoders))
    states, pooled = assembled(encode(encoders, names=[name for name in NAMES if name not in missing]))
    assert states.shape == whole.shape and pooled.shape == whole_pooled.shape
    places = {"clip_l": (slice(0, 77), slice(0, L_WIDTH)), "clip_g": (slice(0, 77), slice(L_WIDTH, L_WIDTH + G_WIDTH)),
              "t5xxl": (slice(77, None), slice(None))}
    pooled_places = {"clip_l": slice(0, L_WIDTH), "clip_g": slice(L_WIDTH, None)}
    for name in NAMES:
        tokens, widths = places[name]
        expected = torch.zeros_like(whole[:, tokens, widths]) if name in missing else whole[:, tokens, widths]
        assert torch.equal(states[:, tokens, widths], expected)
        if name in pooled_places:
            there = whole_pooled[:, pooled_places[name]]
            assert torch.equal(pooled[:, pooled_places[name]], torch.zeros_like(there) if name in missing else there)


def test_hidden_padding(encoders):
    """Nothing of the padding is left, real tokens of CLIP are as before, and T5's no longer depend on how much padding follows."""
    plain, hidden = encode(encoders), encode(encoders, Masks(clip=True, t5=True))
    for name in ("clip_l", "clip_g"):
        mask = hidden[f"{name}_mask"]
        assert mask.sum(1).tolist()[1] == 2 and mask[2].all()  # begin and end; and a caption that fills all places
        assert not hidden[name][~mask].any() and torch.equal(hidden[name][mask], plain[name][mask])
        assert torch.equal(hidden[f"{name}_pooled"], plain[f"{name}_pooled"])
    mask = hidden["t5xxl_mask"]
    assert not hidden["t5xxl"][~mask].any() and not torch.allclose(hidden["t5xxl"][0, :3], plain["t5xxl"][0, :3], atol=1e-4)
    modules, tokenizers = encoders
    with torch.no_grad():
        longer = encode_text({"t5xxl": modules["t5xxl"]}, tokenizers, CAPTIONS[:1], 2 * LENGTH, Masks(t5=True))["t5xxl"]
    torch.testing.assert_close(longer[:, :LENGTH], hidden["t5xxl"][:1], atol=2e-6, rtol=1e-5)
    assert "t5xxl_mask" not in plain and Masks(t5=True).trim == {"t5xxl": "t5xxl_mask"} and not Masks().trim


def test_hidden_padding_is_the_same_from_a_cache(encoders):
    """A cache leaves the padding out and gives zeros back; online the same rounding is applied: no number differs."""
    masks = Masks(clip=True, t5=True)
    text = encode(encoders, masks)
    online = {name: as_cached(value) for name, value in without_padding(text, masks.trim).items()}
    assert all(torch.equal(online[name], as_cached(value)) for name, value in text.items())


def test_gradients_reach_every_weight_of_encoders_that_train(encoders):
    modules, tokenizers = encoders
    for module in modules.values():
        module.requires_grad_(True)
    try:
        states, pooled = assembled(encode_text(modules, tokenizers, CAPTIONS, LENGTH))
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        ((states * weights).sum() + pooled.square().sum()).backward()
        idle = [f"{name}.{key}" for name, module in modules.items() for key, parameter in module.named_parameters()
                if parameter.grad is None or not parameter.grad.any()]
        assert not idle
    finally:
        for module in modules.values():
            module.requires_grad_(False)
            module.zero_grad()


def draws(count=400):
    return draw(0, 0, [str(index) for index in range(count)], (16, 2, 2))


def test_each_encoder_is_lost_by_its_own_chance_and_per_sample():
    text = {name: torch.ones(400, 2, 3) for name in NAMES} | {f"{name}_pooled": torch.ones(400, 3) for name in NAMES[:2]}
    varied = vary(text, draws(), {"clip_l": 0.3, "clip_g": 0.0, "t5xxl": 1.0}, 0.0)
    lost = ~varied["clip_l"].any(dim=(1, 2))
    assert 0.2 < lost.float().mean() < 0.4 and torch.equal(lost, ~varied["clip_l_pooled"].any(dim=1))
    assert set(varied["clip_l"][~lost].flatten().tolist()) == {1.0}
    assert torch.equal(varied["clip_g"], text["clip_g"]) and not varied["t5xxl"].any() and CORNERS not in varied
    again = vary(text, draws(), {"clip_l": 0.3, "clip_g": 0.5}, 0.0)  # one rate changes no draw of another
    assert torch.equal(again["clip_l"], varied["clip_l"])
    assert not torch.equal(~again["clip_g"].any(dim=(1, 2)), lost) and text["clip_l"].all()


def test_places_on_the_table():
    corners = vary({}, draws(), {}, 0.5)[CORNERS]
    elsewhere = corners[:, 0] >= 0
    assert corners.shape == (400, 2) and 0.4 < elsewhere.float().mean() < 0.6
    assert (corners[~elsewhere] == -1).all() and corners[elsewhere].max() < 1 and corners[elsewhere].min() >= 0
    assert corners[elsewhere].std(0).min() > 0.2 and not torch.equal(corners[elsewhere, 0], corners[elsewhere, 1])


def test_a_tokenizer_of_another_encoder_is_refused(encoders):
    class Other:
        bos_token_id, eos_token_id = 0, 7

        def __call__(self, *_, **__):
            return {"input_ids": [1]}

    with pytest.raises(UserError, match="--clip_g_tokenizer"):
        encode_text({"clip_g": encoders[0]["clip_g"]}, Tokenizers(clip_g=Other()), ["a"], LENGTH)
