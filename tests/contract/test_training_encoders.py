"""Text encoders that train along: what moves, and the features that must not change a number."""

import pytest
import torch
from safetensors import safe_open

from tests.contract.conftest import dataset_file, losses, make_pictures


def CHOOSE(case):
    return bool(case.encoders)


STEPS = ("--max_train_steps", "4", "--cache_latents")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four pictures of one shape as batches of 4, and the same as batches of 1."""
    folder = tmp_path_factory.mktemp("four")
    pictures = make_pictures(folder / "pictures", 4)
    return dataset_file(folder / "4x1.toml", pictures, batch_size=4), dataset_file(folder / "1x4.toml", pictures, batch_size=1)


def moved(before, after):
    with safe_open(before, "pt") as old, safe_open(after, "pt") as new:
        return {name for name in old.keys() if not torch.equal(old.get_tensor(name), new.get_tensor(name))}, set(old.keys())


def test_the_denoiser_and_all_encoders_move_and_nothing_else(case, train, checkpoint, four, tmp_path):
    train(tmp_path, four[0], *STEPS, *case.encoders)
    changed, names = moved(checkpoint, tmp_path / "last.safetensors")
    assert changed == {name for name in names if case.trains(name) or case.encoder_names(name)}


def test_some_of_the_encoders_train_and_the_others_can_be_cached(case, train, checkpoint, four, tmp_path):
    online = train(tmp_path / "online", four[0], *STEPS, *case.one_encoder)
    cached = train(tmp_path / "cached", four[0], *STEPS, *case.one_encoder, "--cache_text_encoder_outputs")
    assert losses(cached) == pytest.approx(losses(online), rel=1e-6)
    changed, _ = moved(checkpoint, cached / "last.safetensors")
    whole = {name for name in changed if case.encoder_names(name)}
    assert whole and changed == whole | {name for name in changed if case.trains(name)}
    assert not all(name in changed for name in moved(checkpoint, checkpoint)[1] if case.encoder_names(name))


def test_accumulation_and_recompute_leave_the_losses_alone(case, train, four, tmp_path):
    whole = losses(train(tmp_path / "whole", four[0], *STEPS, *case.encoders))
    parts = losses(train(tmp_path / "parts", four[1], *STEPS, *case.encoders, "--gradient_accumulation_steps", "4"))
    recomputed = losses(train(tmp_path / "recomputed", four[0], *STEPS, *case.encoders, "--gradient_checkpointing"))
    assert parts == pytest.approx(whole, rel=1e-5) and recomputed == pytest.approx(whole, rel=1e-6)


def test_previews_show_the_encoders_as_they_are_and_change_nothing(case, train, four, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red box --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    plain = losses(train(tmp_path / "plain", four[0], *STEPS, *case.encoders))
    drawn = losses(train(tmp_path / "drawn", four[0], *STEPS, *case.encoders, "--sample_prompts", str(prompts),
                         "--sample_every_n_steps", "2", "--sample_at_first"))
    assert drawn == plain and len(list((tmp_path / "drawn" / "sample").glob("*.png"))) == 4


def test_held_out_pictures_are_measured_with_the_encoders_as_they_are(case, train, tmp_path):
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 5), validation_split=0.4)
    train(tmp_path / "out", data, *STEPS, *case.encoders, "--validate_every_n_steps", "2")
    measured = losses(tmp_path / "out", column="validation_loss")
    assert len(measured) == 2 and measured[0] != measured[1]


def test_nothing_to_cache_is_refused(case, train, four, tmp_path):
    with pytest.raises(AssertionError, match="exit status 2"):
        train(tmp_path, four[0], *STEPS, *case.encoders, "--cache_text_encoder_outputs")
