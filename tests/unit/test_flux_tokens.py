"""Token counts without weights: they agree with what the encoders are given."""

import pytest

from library.architectures.flux import open_token_meter
from library.architectures.flux_options import FluxOptions
from library.architectures.flux_parts import TOKENIZERS
from library.architectures.tokenizers import load_tokenizer, padded
from library.config.schema import ModelOptions
from library.errors import UserError
from tests.tiny import make_flux_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_flux_files(tmp_path_factory.mktemp("flux"))


def meter(files, **options):
    return open_token_meter(ModelOptions(pretrained_model_name_or_path=str(files.checkpoint)), FluxOptions(**options))


def test_counts_and_what_is_lost(files):
    count = meter(files, t5xxl_max_token_length=8)
    (t5, clip), (short, _) = count(["a photo of the cat and the blue dog in red", "a cat"])
    assert (t5.encoder, t5.limit, clip.encoder, clip.limit) == ("T5", 8, "CLIP", 77)
    assert t5.tokens == 12 and t5.lost == "blue dog in red" and clip.tokens == 13 and clip.lost == ""
    assert short.tokens == 3 and short.lost == ""
    assert count([]) == []


def test_nothing_is_lost_up_to_the_last_place(files):
    count = meter(files, t5xxl_max_token_length=8)
    [(t5, _)] = count(["a cat and the blue dog red"])
    assert (t5.tokens, t5.lost) == (8, "")
    [(t5, _)] = count(["a cat and the blue dog red a"])
    assert (t5.tokens, t5.lost) == (9, "a")


def test_the_kept_part_is_what_the_encoder_reads(files):
    clip = load_tokenizer(TOKENIZERS["clip_l_tokenizer"], files.clip_l_tokenizer)
    t5 = load_tokenizer(TOKENIZERS["t5xxl_tokenizer"], files.t5xxl_tokenizer)
    text = "the cat and the dog, " * 40
    counts = meter(files, t5xxl_max_token_length=20)([text])[0]
    for tokenizer, length, count in zip((t5, clip), (20, 77), counts, strict=True):
        kept = text.rstrip()[:len(text.rstrip()) - len(count.lost)]
        ids, _ = padded(tokenizer, [text], length)
        assert tokenizer(kept)["input_ids"] == ids[0].tolist()


def test_the_variant_decides_the_length(tmp_path):
    files = make_flux_files(tmp_path, variant="schnell")
    assert meter(files)(["a"])[0][0].limit == 256


def test_weights_are_not_needed(files, tmp_path):
    """Encoders and autoencoder may be missing: only tokenizers are asked for."""
    for part in (files.ae, files.clip_l, files.t5xxl):
        part.rename(part.with_suffix(".gone"))
    try:
        assert meter(files)(["a cat"])[0][0].tokens == 3
    finally:
        for part in (files.ae, files.clip_l, files.t5xxl):
            part.with_suffix(".gone").rename(part)


def test_missing_tokenizers_are_told(tmp_path, monkeypatch):
    files = make_flux_files(tmp_path)
    files.t5xxl_tokenizer.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--t5xxl_tokenizer"):
        meter(files)
    assert meter(files, t5xxl_tokenizer=str(tmp_path / "elsewhere"))(["a cat"])[0][0].tokens == 3
