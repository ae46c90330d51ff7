"""Token counts without weights: they agree with what the encoders are given."""

import pytest

from library.architectures.clip_chunks import chunk
from library.architectures.sdxl import open_token_meter
from library.architectures.sdxl_options import SdxlOptions
from library.architectures.sdxl_parts import TOKENIZER
from library.architectures.tokenizers import load_tokenizer
from library.config.schema import ModelOptions
from library.errors import UserError
from tests.tiny_sdxl import make_sdxl_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl"))


def meter(files, **options):
    return open_token_meter(ModelOptions(str(files.checkpoint)), SdxlOptions(**options))


@pytest.mark.parametrize("length", [75, 150, 225])
def test_counts_and_what_is_lost(files, length):
    count = meter(files, max_token_length=length)
    [[fits], [exact], [longer], [empty]] = count(["a cat", "cat " * length, "cat " * length + "the dog", ""])
    assert (fits.encoder, fits.tokens, fits.limit, fits.lost) == ("CLIP", 4, length + 2, "")
    assert (exact.tokens, exact.lost) == (length + 2, "") and (longer.tokens, longer.lost) == (length + 4, "the dog")
    assert empty.tokens == 2 and count([]) == []


def test_brackets_are_tokens_only_where_they_are_text(files):
    text = "(cat:1.5) " + "dog " * 74 + "[girl] (the rocket:0.5)"
    [[plain]], [[weighted]] = meter(files)([text]), meter(files, weighted_captions=True)([text])
    assert plain.tokens > weighted.tokens == 2 + 1 + 74 + 1 + 2 and weighted.lost == "girl the rocket"
    tokenizer = load_tokenizer(TOKENIZER, files.tokenizer)
    kept = chunk(tokenizer, [text], 1, tokenizer.eos_token_id, weighted=True)
    assert kept.ids[0, 0, 75] == tokenizer("dog", add_special_tokens=False)["input_ids"][0]


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_token_meter(ModelOptions(str(tmp_path / "none.safetensors")), SdxlOptions())
