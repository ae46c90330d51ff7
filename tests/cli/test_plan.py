"""--plan prints what a run would need and exits; --vram_budget chooses the memory flags of a run."""

from __future__ import annotations

import re
import sys

import pytest

from tests.cli.conftest import run_all
from tests.cli.runs import SCRIPT, checkpoints
from tests.contract.conftest import dataset_file, losses, make_pictures
from tests.full_size import write_flux
from tests.tiny_lumina import make_image_2_files, make_next_files
from tests.tiny_sdxl import make_sdxl_files

SHORT = ("--t5xxl_max_token_length", "16")


def amounts(text: str) -> dict[str, float]:
    """Line of the table -> megabytes."""
    unit = {"GB": 1000.0, "MB": 1.0}
    return {match[1].strip(): float(match[2]) * unit[match[3]]
            for match in re.finditer(r"^  (.*?\S)\s{2,}([\d.]+) (GB|MB)$", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def plans(files, tmp_path_factory):
    """Three plans, a budget that nothing fits, two flags that exclude each other, and two runs that train."""
    folder = tmp_path_factory.mktemp("plans")
    pictures = make_pictures(folder / "pictures", 2, (256, 256))
    data = dataset_file(folder / "data.toml", pictures, resolution=256)
    base = ["--pretrained_model_name_or_path", files.checkpoint, "--dataset_config", data, "--output_dir", folder / "out", *SHORT,
            "--max_train_steps", 2, "--learning_rate", "1e-3", "--cache_latents", "--cache_text_encoder_outputs"]
    plain, recomputed, bf16, little, both, chosen, given = run_all(
        [*base, "--plan"], [*base, "--plan", "--gradient_checkpointing"],
        [*base, "--plan", "--mixed_precision", "bf16", "--optimizer_type", "AdamW8bit", "--gradient_accumulation_steps", 2],
        [*base, "--vram_budget", "1MB"], [*base, "--plan", "--debug_dataset"],
        [*base, "--output_name", "chosen", "--vram_budget", "18MB"],
        [*base, "--output_name", "given", "--gradient_checkpointing"])
    return folder / "out", plain, recomputed, bf16, little, both, chosen, given


def test_a_plan_is_printed_and_nothing_is_trained(plans):
    out, plain, recomputed, bf16, *_ = plans
    for done in (plain, recomputed, bf16):
        assert done.status == 0 and "Traceback" not in done.text, done.text
        assert "493,760 parameters, 4 blocks" in done.stdout and "2 x 256x256 pixels" in done.stdout
        assert "No weights were read" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100
    assert not list(out.glob("*.csv")) or checkpoints(out) == ["chosen.safetensors", "given.safetensors"]


def test_what_the_plan_says(plans):
    _, plain, recomputed, bf16, *_ = plans
    one, other, half = (amounts(done.stdout.split("In main memory")[0]) for done in (plain, recomputed, bf16))
    activations = "what the forward pass keeps for the backward pass"
    weights, states = "weights that stay on the card", "optimizer states that stay on the card"
    assert one[weights] == other[weights] == pytest.approx(4 * 0.493760, abs=0.06)
    assert one[states] == pytest.approx(8 * 0.493760, abs=0.06)
    assert other[activations] < 0.7 * one[activations]
    assert half[weights] == pytest.approx(2 * 0.493760, abs=0.06) and half[states] < one[states] / 2
    assert "everything kept on the card" in plain.stdout and "\n  recompute all\n" in recomputed.stdout


def test_a_budget_chooses_what_a_flag_would_say(plans):
    out, *_, chosen, given = plans
    assert chosen.status == given.status == 0, chosen.text + given.text
    assert re.search(r"--vram_budget 18MB: recompute [^;]+; the fastest of what fits", chosen.text)
    assert re.search(r"peak memory: [\d.]+ GB resident, [\d.]+ GB planned", chosen.text)
    assert losses(out, "chosen") == losses(out, "given") and "peak memory:" not in given.text
    assert "gradient_checkpointing = true" in (out / "chosen_config.toml").read_text(encoding="utf-8")


def test_mistakes(plans):
    little, both = plans[4:6]
    assert little.status == both.status == 2
    assert re.fullmatch(r"error: --vram_budget: 1.0 MB are not enough: with the least that is possible this run needs "
                        r"[\d.]+ MB \(recompute [^)]*\); .*", little.errors[0]), little.text
    assert "--debug_dataset" in both.errors[0] and "leave one of the two out" in both.errors[0]


def test_another_model(pictures, tmp_path):
    files = make_sdxl_files(tmp_path / "model")
    base = ["--pretrained_model_name_or_path", files.checkpoint, "--dataset_config", dataset_file(tmp_path / "data.toml", pictures),
            "--output_dir", tmp_path / "out", "--plan"]
    plain, encoders = run_all([*base, "--gradient_checkpointing"], [*base, "--train_text_encoder"], script="sdxl_train.py")
    assert plain.status == encoders.status == 0, plain.text + encoders.text
    assert "blocks" in plain.stdout and "recompute all" in plain.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last_schedule.png"]
    assert "- not counted: clip_l, clip_g, which train too" in encoders.stdout


@pytest.mark.parametrize("make", [make_image_2_files, make_next_files])
def test_a_model_that_reads_lengths_off_masks(make, pictures, tmp_path):
    files = make(tmp_path / "model")
    base = ["--pretrained_model_name_or_path", files.checkpoint, "--dataset_config", dataset_file(tmp_path / "data.toml", pictures),
            "--output_dir", tmp_path / "out", "--max_train_steps", 1]
    plan, run, little = run_all([*base, "--plan"], [*base, "--vram_budget", "1GB"], [*base, "--vram_budget", "1MB"],
                                script="lumina_train.py")
    assert plan.status == run.status == 0, plan.text + run.text
    assert "everything kept on the card" in plan.stdout and "--vram_budget 1GB: everything kept" in run.text
    assert little.status == 2 and "1.0 MB are not enough" in little.errors[0]
    assert checkpoints(tmp_path / "out") == ["last.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="a file with holes takes its full size there")
def test_the_largest_model_is_planned_without_its_weights(tmp_path):
    """24 GB of weights that are not even on the disk."""
    checkpoint = write_flux(tmp_path / "model")
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 2, (1024, 1024)), resolution=1024, batch_size=1)
    done, = run_all(["--pretrained_model_name_or_path", checkpoint, "--dataset_config", data, "--output_dir", tmp_path / "out",
                     "--mixed_precision", "bf16", "--optimizer_type", "AdamW8bit", "--plan", "--cache_latents_to_disk",
                     "--cache_text_encoder_outputs_to_disk", "--gradient_checkpointing"], script=SCRIPT)
    assert done.status == 0, done.text
    found = amounts(done.stdout)
    assert "11,901,408,320 parameters, 57 blocks" in done.stdout
    assert found["weights that stay on the card"] == 23_800 and found["optimizer states that stay on the card"] == 24_180
    assert found["before training, while caches are filled, at least"] > 9_600 and found["1 file of the model"] == 23_800
    assert re.search(r"H200 +150.75 GB +fits +everything kept on the card", done.stdout)
