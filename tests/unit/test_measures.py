import math

import pytest
import torch

from library.log import CSV_FIELDS
from library.loop import StepReport
from library.measures import NAMES, PEAKS, HeldOut, Measures, for_trackers, known_peak, peak_flops
from library.optim.updater import UpdateInfo


def report(step=1, loss=1.0, seconds=2.0, waited=0.5):
    return StepReport(step, 0, False, loss, UpdateInfo(3.0, 1e-4), 8, seconds, waited, 1 << 30, False)


def test_numbers_of_a_step():
    values = Measures(lambda step: {"denoiser": 1e-4 / step, "text": 1e-5}).of(report())
    assert values == {"loss": 1.0, "mean_loss": 1.0, "learning_rate": 1e-4, "grad_norm": 3.0, "seconds": 2.0, "images_per_second": 4.0,
                      "data_wait": 0.25, "peak_bytes": 1 << 30, "lr/denoiser": 1e-4, "lr/text": 1e-5}
    assert set(values) - {"lr/denoiser", "lr/text"} < set(CSV_FIELDS)
    shown = for_trackers({**values, "validation_loss": 2.0})
    assert shown["loss/average"] == 1.0 and shown["speed/data_wait_share"] == 0.25 and shown["loss/validation"] == 2.0
    assert {name for name in shown if name.startswith("lr")} == {"lr/denoiser", "lr/text"}
    assert set(NAMES) <= set(CSV_FIELDS)


def test_the_mean_follows_the_losses():
    measures = Measures(lambda step: {})
    assert [measures.of(report(loss=loss))["mean_loss"] for loss in (1.0, 2.0, 2.0)] == pytest.approx([1.0, 1.05, 1.0975])


def test_mfu_needs_the_operations_and_the_peak():
    flops = {"step_flops": lambda given: 1e12 * given.samples}
    assert Measures(lambda step: {}, **flops, peak=16e12).of(report())["mfu"] == pytest.approx(8e12 / 2 / 16e12)
    assert "mfu" not in Measures(lambda step: {}, **flops).of(report()) and "mfu" not in Measures(lambda step: {}, peak=1e12).of(report())


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H200", 989),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", 147), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362), ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA GeForce RTX 4080 SUPER", 104.4),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A10G", None), ("NVIDIA L400", None), ("Tesla T4", None), ("AMD Instinct MI300X", None)])
def test_peaks_of_cards(name, peak):
    assert known_peak(name) == (None if peak is None else peak * 1e12)


def test_no_peak_is_hidden_by_an_earlier_one():
    for index, (name, _) in enumerate(PEAKS):
        assert not any(f" {earlier} " in f" {name} " for earlier, _ in PEAKS[:index]), name


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert math.isfinite(known_peak("NVIDIA H100 80GB HBM3"))


def test_a_word_when_the_loss_on_held_out_pictures_turns():
    """Once for each lowest value, and not again by a run that goes on from there."""
    course = HeldOut()
    told = {step: course.add(step, loss) for step, loss in enumerate([1.0, 0.8, 0.83, 0.84, 0.81, 0.83, 0.84, 0.85, 0.9, 0.7, 0.75, 0.75, 0.75], 1)}
    assert [step for step, words in told.items() if words] == [8, 13]
    assert "lowest after step 2 (0.80000) and is 0.85000 now" in told[8] and "lowest after step 10" in told[13]
    assert HeldOut(course.points).add(14, 0.76) is None and HeldOut(course.points[:7]).add(8, 0.85)


def test_names_of_held_out_losses_in_trackers():
    assert for_trackers({"validation_loss": 1, "validation_loss_ema": 2, "validation_loss/dataset 2": 3}) == {
        "loss/validation": 1, "loss/validation_ema": 2, "loss/validation/dataset 2": 3}
