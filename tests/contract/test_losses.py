"""One list of losses per adapter, and the features that must not change it."""

import json
from pathlib import Path

import pytest

from tests.contract.conftest import CACHED, dataset_file, losses, make_pictures

STORED = Path(__file__).with_name("losses.json")  # remade by: KILN_REMAKE_LOSSES=1 pytest tests/contract/test_losses.py
STEPS = ("--max_train_steps", "6")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return dataset_file(folder / "data.toml", make_pictures(folder / "pictures", 5))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[Path, Path]:
    """Four pictures of one shape as batches of 4, and the same as batches of 1."""
    folder = tmp_path_factory.mktemp("four")
    pictures = make_pictures(folder / "pictures", 4)
    return dataset_file(folder / "4x1.toml", pictures, batch_size=4), dataset_file(folder / "1x4.toml", pictures, batch_size=1)


@pytest.fixture
def first(case):
    """For tests whose subject is not in the adapter: one case of each architecture is enough."""
    if case.variant:
        pytest.skip("the architecture's first case shows it")


def test_losses_are_the_stored_ones(case, train, data, tmp_path, request):
    import os

    measured = losses(train(tmp_path, data, *STEPS, *CACHED))
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    if os.environ.get("KILN_REMAKE_LOSSES"):
        STORED.write_text(json.dumps({**stored, case.name: measured}, indent=1) + "\n", encoding="utf-8")
        return
    assert measured == pytest.approx(stored[case.name], rel=2e-5)


@pytest.mark.parametrize("flags", [
    pytest.param(("--gradient_checkpointing",), id="recompute"),
    pytest.param(("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"), id="disk"),
    pytest.param(("--vae_batch_size", "3", "--text_encoder_batch_size", "4"), id="batched-encoding"),
])
def test_features_leave_the_losses_alone(case, train, data, tmp_path, flags):
    extra = ("--cache_dir", str(tmp_path / "cache")) if "--cache_latents_to_disk" in flags else ()
    plain = losses(train(tmp_path / "plain", data, *STEPS, *CACHED))
    featured = losses(train(tmp_path / "featured", data, *STEPS, *CACHED, *flags, *extra))
    assert featured == pytest.approx(plain, rel=5e-6)  # sums in batches of another size
    if extra:  # the second run reads what the first one wrote
        assert losses(train(tmp_path / "again", data, *STEPS, *CACHED, *flags, *extra)) == featured


def test_kinds_of_loss_and_a_perturbed_input_reach_the_step(case, first, train, data, tmp_path):
    """Each of them gives other numbers than the default, in every step."""
    kinds = {kind: ("--loss_type", *kind.split()) for kind in ("l2", "l1", "huber --huber_schedule snr", "smooth_l1 --huber_schedule constant")}
    if "ip_noise_gamma" in case.entry.settings():
        kinds["perturbed"] = ("--ip_noise_gamma", "0.3", "--ip_noise_gamma_random_strength")
    found = [losses(train(tmp_path / kind, data, "--max_train_steps", "1", *CACHED, *flags)) for kind, flags in kinds.items()]
    assert len({tuple(each) for each in found}) == len(kinds) == 4 + (case.name != "sd3-medium") and all(each[0] > 0 for each in found)


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_encoding_for_each_batch_gives_the_cached_losses(case, first, train, data, tmp_path, workers):
    cached = losses(train(tmp_path / "cached", data, *STEPS, *CACHED))
    online = losses(train(tmp_path / "online", data, *STEPS, "--max_data_loader_n_workers", workers))
    assert online == pytest.approx(cached, rel=1e-5)


def test_accumulation_of_four_ones_is_one_four(case, first, train, four, tmp_path):
    whole = losses(train(tmp_path / "whole", four[0], *STEPS, *CACHED))
    parts = losses(train(tmp_path / "parts", four[1], *STEPS, *CACHED, "--gradient_accumulation_steps", "4"))
    # Sums of other lengths round otherwise, and AdamW's first update, g / (|g| + 1e-8), makes that large where g is all rounding.
    assert parts == pytest.approx(whole, rel=5e-5)


def test_the_same_seed_repeats_a_run_and_another_does_not(case, first, train, data, tmp_path):
    first, second = (losses(train(tmp_path / name, data, *STEPS, *CACHED)) for name in ("first", "second"))
    other = losses(train(tmp_path / "other", data, *STEPS, *CACHED, "--seed", "7"))
    assert first == second
    assert other != first


def test_previews_leave_the_losses_alone(case, train, data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red box --w 64 --h 64 --s 2 --d 1\na box --w 64 --h 64 --s 2 --d 2\n", encoding="utf-8")
    plain = losses(train(tmp_path / "plain", data, *STEPS, *CACHED))
    drawn = losses(train(tmp_path / "drawn", data, *STEPS, *CACHED, "--sample_prompts", str(prompts),
                         "--sample_every_n_steps", "2", "--sample_at_first", "--sample_batch_size", "2"))
    assert drawn == plain
    pictures = sorted(path.name for path in (tmp_path / "drawn" / "sample").glob("*.png"))
    assert len(pictures) == 2 * 4 + 1, pictures  # of steps 0, 2, 4, 6, and the contact sheet


def test_previews_that_cannot_be_written_do_not_end_the_training(case, first, train, data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red box --w 64 --h 64 --s 1\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample").write_bytes(b"a file where the folder of the previews should be")
    flags = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2")
    assert len(losses(train(tmp_path / "out", data, *STEPS, *CACHED, *flags))) == 6
    assert (tmp_path / "out" / "last.safetensors").exists()
