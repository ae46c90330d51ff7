"""Captions for SDXL: weights in brackets, chunks of 77 tokens, hidden states and the pooled vector, training the encoders."""

import pytest
import torch

from library.architectures import attention_weights, clip_chunks
from library.architectures.sdxl_models import load_clip_g, load_clip_l
from library.architectures.clip_states import blocks
from library.architectures.sdxl_parts import TOKENIZER, TOKENIZER_2, open_parts
from library.architectures.sdxl_text import NAMES, Tokenizers, encode_text, side_by_side, trained_parameters
from library.architectures.tokenizers import load_tokenizer
from library.checkpoint.hub import Hub
from library.errors import UserError
from library.memory.recompute import Recompute
from tests.tiny_sdxl import make_sdxl_files

F32 = torch.float32


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    return open_parts(make_sdxl_files(folder).checkpoint, hub=Hub(cache=folder / "none", offline=True))


@pytest.fixture
def encoders(parts):
    return load_clip_l(parts.clip_l, F32), load_clip_g(parts.clip_g, F32)


@pytest.fixture(scope="module")
def tokenizers(parts):
    return Tokenizers(load_tokenizer(TOKENIZER, parts.tokenizer), load_tokenizer(TOKENIZER_2, parts.tokenizer_2))


# --- weights in brackets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption, expected", [
    ("a red cat", [("a red cat", 1)]), ("", []),
    ("a (red:1.5) cat", [("a ", 1), ("red", 1.5), (" cat", 1)]),
    ("(a (b) c)", [("a ", 1.1), ("b", 1.21), (" c", 1.1)]),
    ("[a] ([b])", [("a", 1 / 1.1), (" b", 1)]),
    ("(a [b]:2)", [("a ", 2), ("b", 2 / 1.1)]),
    (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
    ("a) b] :1.5) c", [("a) b] :1.5) c", 1)]), ("(a [b", [("a ", 1.1), ("b", 1)]),
    ("at 10:30 (noon: 1.2 )", [("at 10:30 ", 1), ("noon", 1.2)]),
    ("(a:b)", [("a:b", 1.1)]), ("(a:.5)(b:0)", [("a", 0.5), ("b", 0)]), ("(a:-1)", [("a", -1)]), ("(a:.)", [("a:.", 1.1)]),
    ("two\nlines (of\ntext)", [("two\nlines ", 1), ("of\ntext", 1.1)]),
])
def test_attention_weights(caption, expected):
    found = attention_weights.parse(caption)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_one_chunk_is_what_the_tokenizer_itself_makes(tokenizers):
    captions = ["a photo of the cat", "", "girl " * 75, "girl " * 200]
    made = clip_chunks.chunk(tokenizers.clip_l, captions, 1, tokenizers.clip_l.eos_token_id, weighted=False)
    own = tokenizers.clip_l(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(made.ids[:, 0], own)
    assert torch.equal(made.weights, torch.ones(4, 1, 77))


def test_long_captions_are_cut_into_chunks_with_ends_of_their_own(tokenizers):
    begin, end = tokenizers.clip_g.bos_token_id, tokenizers.clip_g.eos_token_id
    tokens = tokenizers.clip_g("cat dog " * 50, add_special_tokens=False)["input_ids"]
    assert len(tokens) == 100
    ids = clip_chunks.chunk(tokenizers.clip_g, ["cat dog " * 50], 3, 0, weighted=False).ids[0]
    assert ids[0].tolist() == [begin, *tokens[:75], end]
    assert ids[1].tolist() == [begin, *tokens[75:], end, *[0] * 50]
    assert ids[2].tolist() == [begin, end, *[0] * 75]


def test_weights_stand_at_their_tokens(tokenizers):
    made = clip_chunks.chunk(tokenizers.clip_l, ["cat " * 74 + "(dog girl:1.5) (cat:0.5)"], 2, 0, weighted=True)
    plain = clip_chunks.chunk(tokenizers.clip_l, ["cat " * 74 + "dog girl cat"], 2, 0, weighted=False)
    assert torch.equal(made.ids, plain.ids)
    assert made.weights[0, 0].tolist() == [1.0] * 75 + [1.5, 1.0]
    assert made.weights[0, 1].tolist() == [1.0, 1.5, 0.5] + [1.0] * 74


def test_join_keeps_the_first_begin_and_the_last_end():
    states = torch.arange(2 * 3 * 77.0).view(2, 3, 77, 1)
    joined = clip_chunks.join(states)
    assert joined.shape == (2, 227, 1)
    assert joined[0, :, 0].tolist() == [0, *range(1, 76), *range(78, 153), *range(155, 230), 230]
    assert torch.equal(clip_chunks.join(states[:, :1]), states[:, 0])


def named(encoders):
    return dict(zip(NAMES, encoders, strict=True))


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks, length", [(1, 77), (2, 152), (3, 227)])
def test_shapes(encoders, tokenizers, chunks, length):
    encoded = encode_text(named(encoders), tokenizers, ["a cat", "girl " * 160], chunks, weighted=False)
    assert side_by_side(encoded).shape == (2, length, 128) and encoded["pooled"].shape == (2, 64)
    assert not side_by_side(encoded).requires_grad
    for name, encoder in named(encoders).items():  # one of them alone gives the same
        alone = encode_text({name: encoder}, tokenizers, ["a cat", "girl " * 160], chunks, weighted=False)
        assert all(torch.equal(value, encoded[key]) for key, value in alone.items()) and name in alone


def test_states_and_pooled_are_those_of_the_modules(encoders, tokenizers):
    """By hand: hidden state before the last layer of each; the last state at the first end token, normed, times P."""
    clip_l, clip_g = encoders
    ids = tokenizers.clip_l(["the red cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    padded = ids.clone()
    padded[0, 5:] = 0  # begin, three words, end, then "!"
    encoded = encode_text(named((clip_l, clip_g)), tokenizers, ["the red cat"], 1, weighted=False)
    assert torch.equal(encoded["clip_l"], clip_l(ids, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(encoded["clip_g"], clip_g(padded, output_hidden_states=True).hidden_states[-2])
    state = clip_g.text_model(padded).last_hidden_state[:, 4]
    torch.testing.assert_close(encoded["pooled"], state @ clip_g.text_projection.weight.t())


def test_pooled_and_beginning_of_a_long_caption_are_those_of_its_first_chunk(encoders, tokenizers):
    long = "girl cat " * 60
    short = encode_text(named(encoders), tokenizers, ["girl cat " * 37 + "girl"], 1, weighted=False)  # 75 tokens
    encoded = encode_text(named(encoders), tokenizers, ["a dog", long], 3, weighted=False)
    torch.testing.assert_close(encoded["pooled"][1:], short["pooled"])
    torch.testing.assert_close(side_by_side(encoded)[1:, :76], side_by_side(short)[:, :76])


def test_weighted_captions_multiply_states_and_leave_the_pooled_vector(encoders, tokenizers):
    plain = encode_text(named(encoders), tokenizers, ["the red cat"], 1, weighted=True)
    weighted = encode_text(named(encoders), tokenizers, ["the (red:1.5) cat"], 1, weighted=True)
    factor = torch.ones(77)
    factor[2] = 1.5
    torch.testing.assert_close(side_by_side(weighted), side_by_side(plain) * factor[:, None])
    assert torch.equal(weighted["pooled"], plain["pooled"])
    unread = encode_text(named(encoders), tokenizers, ["the red cat"], 1, weighted=False)
    assert torch.equal(side_by_side(plain), side_by_side(unread))


def test_a_tokenizer_of_another_encoder(encoders, tokenizers):
    clip_l, clip_g = encoders
    clip_g.config.eos_token_id = 2
    with pytest.raises(UserError, match="the CLIP-G tokenizer ends captions with token .* made for 2"):
        encode_text(named((clip_l, clip_g)), tokenizers, ["a cat"], 1, weighted=False)
    clip_l.set_input_embeddings(torch.nn.Embedding(4, 64))
    with pytest.raises(UserError, match="the CLIP-L tokenizer gives token .* knows only 4 tokens"):
        encode_text(named((clip_l, clip_g)), tokenizers, ["a cat"], 1, weighted=False)


# --- training the encoders --------------------------------------------------------------------------------------------


def gradients(encoders, tokenizers, chunks=1):
    for encoder in encoders:
        encoder.requires_grad_(True)
    encoded = encode_text(named(encoders), tokenizers, ["the red cat", "girl " * 90], chunks, weighted=False)
    (side_by_side(encoded).square().mean() + encoded["pooled"].square().mean()).backward()
    return [{name: parameter.grad for name, parameter in encoder.named_parameters()} for encoder in encoders]


def test_exactly_the_trained_parameters_get_gradients(encoders, tokenizers):
    for name, encoder, found in zip(("clip_l", "clip_g"), encoders, gradients(encoders, tokenizers), strict=True):
        wanted = {key for key, _ in trained_parameters(name, encoder)}
        assert {key for key, gradient in found.items() if gradient is not None} == wanted
    idle = set(found := dict(encoders[0].named_parameters())) - {key for key, _ in trained_parameters("clip_l", encoders[0])}
    assert {key.removeprefix("text_model.").rsplit(".", 1)[0].split(".")[0] for key in idle} == {"encoder", "final_layer_norm"}
    assert all(".layers.1." in key or "final_layer_norm" in key for key in idle) and len(idle) < len(found)


def test_recomputing_the_encoders_changes_no_gradient(encoders, tokenizers):
    plain = gradients(encoders, tokenizers, chunks=2)
    for encoder in encoders:
        encoder.zero_grad()
        Recompute(blocks(encoder))
    again = gradients(encoders, tokenizers, chunks=2)
    for first, second in zip(plain, again, strict=True):
        for name in first:
            assert (first[name] is None) == (second[name] is None)
            assert first[name] is None or torch.equal(first[name], second[name]), name
