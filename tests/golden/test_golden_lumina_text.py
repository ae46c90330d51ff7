"""The text encoder against the recorded text inputs of Lumina-Image 2.0.

The record holds no captions; their tokens were found by trying every token at every position, which is possible because attention
is causal: only one of 1,608 gives the recorded state. The recorded program runs Gemma 2 through an attention that leaves out the
squeezing of scores (``attn_logit_softcapping``), which belongs to the model: transformers itself, and so diffusers' pipeline, has
it. Without it the states agree to the last bits; with it they differ by what the last test says.
"""

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from library.architectures.gemma import encode
from library.architectures.lumina_text import encode_text
from tests.golden import records
from tests.golden.compare import close
from tests.golden.weights import fill

BOS, PAD = 2, 0
CAPTIONS = {  # row of the first step -> its tokens
    0: (2, 611, 410, 476, 271, 439, 604, 697, 936, 1578, 473, 926, 678, 1565, 1430, 345, 1462, 448, 314, 1162, 1491, 1540, 1466,
        1540, 929, 942),
    1: (2, 611, 410, 476, 271, 439, 604, 697, 936, 1578, 473, 926, 678, 1565, 1367, 314, 271, 991, 1540, 1469, 1540, 986, 942,
        1540, 448),
}


class KnownTokens:
    """A tokenizer whose captions are numbers already; pads on the right."""

    def __call__(self, texts, **_):
        rows = [[int(number) for number in text.split()] for text in texts]
        longest = max(map(len, rows))
        return {"input_ids": torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])}


def tiny_gemma(squeezed: bool) -> Gemma2Model:
    module = Gemma2Model(Gemma2Config(
        hidden_size=40, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
        num_hidden_layers=4, vocab_size=1608)).eval()
    for name, parameter in module.named_parameters():
        parameter.data.copy_(fill(name, tuple(parameter.shape)))
    for layer in module.layers:
        assert layer.self_attn.attn_logit_softcapping == 50.0
        if not squeezed:
            layer.self_attn.attn_logit_softcapping = None
    return module


def texts(rows) -> list[str]:
    return [" ".join(str(token) for token in CAPTIONS[row]) for row in rows]


@pytest.mark.parametrize("rows", [(0,), (1,), (0, 1)])
def test_states_and_masks(rows):
    step = records.read("lumina_default").step(0)
    text = encode_text(tiny_gemma(squeezed=False), KnownTokens(), texts(rows), 64, "")
    mask = step["in.cap_mask"][list(rows)].bool()
    assert torch.equal(text["gemma_mask"], mask)
    close(text["gemma"][mask], step["in.cap_feats"][list(rows)][mask], 2e-6)
    assert not text["gemma"][~mask].any()


def test_captions_begin_with_the_same_instruction():
    """The marker of the text, then "You are an assistant <Prompt Start> ", spelled in 13 tokens."""
    assert CAPTIONS[0][0] == BOS and CAPTIONS[0][:14] == CAPTIONS[1][:14] and CAPTIONS[0][14] != CAPTIONS[1][14]


def test_what_the_squeezing_changes():
    step = records.read("lumina_default").step(0)
    states, mask = encode(tiny_gemma(squeezed=True), KnownTokens(), texts((0, 1)), 64, "")
    difference = (states - step["in.cap_feats"])[mask].abs()
    assert torch.equal(states[:, 0], step["in.cap_feats"][:, 0])  # the first token sees itself only
    assert 0.1 < difference.max() < 0.5 and difference.mean() < 0.02 * step["in.cap_feats"][mask].abs().mean()
