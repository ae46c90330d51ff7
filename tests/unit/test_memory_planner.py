"""Choosing a setting, advice when memory ran out, and the text of a plan."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import flux_train
import sdxl_train
from library.config.loss_options import LossOptions
from library.errors import UserError
from library.memory.cards import CARDS, with_memory
from library.memory.plan_text import WIDTH, cards_table, describe, table
from library.memory.planner import Planner, gigabytes
from library.memory.report import beside_plan, peak_bytes
from library.memory.setting import Optimizer, Setting
from library.optim.states import state_bytes
from library.planning import measure_step
from tests.full_size import write_flux, write_sdxl
from tests.unit.memory_plan_helpers import BLOCKS, FIXED, model
from tests.unit.test_memory_measure import open_tiny

holes = pytest.mark.skipif(sys.platform == "win32", reason="a file with holes takes its full size there")

PLANNER = Planner(model(), FIXED)
CARD = CARDS[0]


def fastest(budget: int) -> float:
    """By trying all."""
    return min(needs.time(CARD).total for needs in map(PLANNER.needs, PLANNER.settings()) if needs.device_bytes <= budget)


def test_the_fastest_setting_that_fits_is_chosen():
    sizes = sorted({PLANNER.needs(setting).device_bytes for setting in PLANNER.settings()})
    for budget in sizes[::7] + [sizes[0], sizes[-1], sizes[-1] + 1]:
        choice = PLANNER.choose(budget, CARD)
        assert choice.needs.device_bytes <= budget
        assert choice.seconds == pytest.approx(fastest(budget), abs=2e-4)
    assert PLANNER.choose(sizes[-1], CARD).needs.setting == Setting()  # of equals the plainest
    assert "as fast as" in PLANNER.choose(sizes[-1], CARD).why() and "slower" in PLANNER.choose(sizes[0], CARD).why()


def test_more_memory_is_never_slower():
    sizes = sorted({PLANNER.needs(setting).device_bytes for setting in PLANNER.settings()})
    times = [PLANNER.choose(size, CARD).seconds for size in sizes[::5]]
    assert all(more <= less + 2e-4 for less, more in zip(times, times[1:]))


def test_when_nothing_fits_the_least_is_named():
    least = min((PLANNER.needs(setting) for setting in PLANNER.settings()), key=lambda needs: needs.device_bytes)
    with pytest.raises(UserError) as raised:
        PLANNER.choose(least.device_bytes - 1, CARD)
    assert f"needs {gigabytes(least.device_bytes)} ({least.setting.words()})" in str(raised.value)
    assert PLANNER.choose(least.device_bytes, CARD).needs.device_bytes == least.device_bytes


def test_only_what_is_allowed_is_chosen_and_advised():
    planner = Planner(model(), FIXED, lambda setting: setting.unit == "model" and setting.recompute != "selective")
    assert {setting.unit for setting in planner.settings()} == {"model"} and not any(s.streamed for s in planner.settings())
    assert planner.advise(Setting(), CARD).startswith("add --gradient_checkpointing: ")
    assert Planner(model(), FIXED, lambda setting: False).advise(Setting(), CARD) is None


def test_advice_saves_what_it_says():
    planner = Planner(model(), FIXED, lambda setting: setting in (Setting(), Setting("all")))
    saved = planner.needs(Setting()).device_bytes - planner.needs(Setting("all")).device_bytes
    assert planner.advise(Setting(), CARD) == f"add --gradient_checkpointing: {gigabytes(saved)} less, about " + \
        f"{planner.needs(Setting('all')).time(CARD).total / planner.needs(Setting()).time(CARD).total - 1:.0%} slower"
    everything = Setting("all", unit="block", streamed=BLOCKS, stream_states=True, offload=True)
    assert PLANNER.advise(everything, CARD) is None
    assert "--blocks_to_swap" in PLANNER.advise(Setting("all", offload=True), replace(CARD, bus=1e15)) + \
        PLANNER.advise(Setting("all", unit="block", offload=True), replace(CARD, bus=1e15))


def test_the_table_adds_up_and_is_narrow():
    needs = PLANNER.needs(Setting("all", unit="block", streamed=BLOCKS, stream_states=True))
    lines = describe(needs, CARD) + cards_table(PLANNER, needs, CARDS)
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    for size in (*(size for size in needs.device.values() if size), needs.device_bytes, sum(needs.pinned.values())):
        assert not size or gigabytes(size) in text or size == sum(needs.pinned.values())
    assert f"Predicted on {CARD.name}: " in text and all(card.name in text for card in CARDS)
    assert "hides all copies" in text


def test_a_table_wraps_its_long_column():
    lines = table(("a", "b", "c"), [("x", "word " * 40, "1"), ("longer", "short", "22")], wrapped=1)
    assert max(map(len, lines)) <= WIDTH and len(lines) > 4
    starts = {line.index("word") for line in lines if "word" in line}
    assert len(starts) == 1 and lines[-1].index("short") in starts


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MB"), (99_400_000, "99.4 MB"), (10**8, "0.10 GB"), (23_802_816_640, "23.80 GB")])
def test_amounts_in_words(size, text):
    assert gigabytes(size) == text


def test_a_budget_stands_for_the_smallest_card_that_has_it():
    assert with_memory(12 * 10**9).name == "RTX 3060" and with_memory(10**15).name == "H200"


def test_the_measured_peak_stands_beside_the_plan():
    needs = PLANNER.needs(Setting())
    planned = needs.device_bytes + sum(needs.pinned.values()) + sum(needs.ordinary.values())
    line = beside_plan(needs, torch.device("cpu"))
    assert f"{planned / 1e9:.2f} GB planned" in line and f"{peak_bytes(torch.device('cpu')) / 1e9:.2f} GB resident" in line


def measure_full_size(entry, checkpoint):
    """At 1024 x 1024, in bfloat16, as a CPU would keep it."""
    arch = open_tiny(entry, checkpoint)
    return measure_step(arch, LossOptions(), (1024, 1024), 1, torch.bfloat16, None,
                        lambda denoiser: denoiser.requires_grad_(True), cuda=False)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    path = write_flux(tmp_path_factory.mktemp("flux"))
    return measure_full_size(flux_train.ENTRY, path)


@holes
def test_flux_dev(flux):
    """Against what is known of the published model, and what was counted in another way (reference/performance.md)."""
    assert flux.parameters == 11_901_408_320 and len(flux.blocks) == 57
    plan = Planner(flux, replace(FIXED, rounding=True, cuda=True)).needs(Setting())
    assert plan.device["weights"] == pytest.approx(23.8e9, rel=1e-3)
    assert flux.saved_bytes == pytest.approx(39.23 * 2**30, rel=2e-3)
    assert (flux.forward.flops, flux.backward.flops) == pytest.approx((74.38e12, 156.19e12), rel=1e-3)


@holes
@pytest.mark.parametrize(("name", "limit", "stream_states", "copied_in"), [
    ("Adafactor", 6.0e9, False, 2 * 23.67e9), ("AdamW8bit", 12e9, True, 2 * 23.67e9 + 24.05e9)])
def test_flux_dev_on_a_small_card_with_everything_streamed(flux, name, limit, stream_states, copied_in):
    of_shape = state_bytes(name, ())
    fixed = replace(FIXED, optimizer=Optimizer(name, lambda weight: of_shape(weight.shape)), rounding=True, cuda=True)
    plan = Planner(flux, fixed).needs(Setting("all", unit="block", streamed=57, stream_states=stream_states))
    assert 3e9 < plan.allocated_bytes < limit
    assert 0.92 * copied_in < plan.bus.into < copied_in  # what is in the ring at the turns stays there
    assert plan.bus.out == pytest.approx(copied_in - 23.67e9, rel=1e-3)


@holes
def test_sdxl_base(tmp_path):
    sdxl = measure_full_size(sdxl_train.ENTRY, write_sdxl(tmp_path))
    assert sdxl.parameters == 2_567_463_684
    assert sdxl.saved_bytes == pytest.approx(6.415 * 2**30, rel=2e-3)
    assert (sdxl.forward.flops, sdxl.backward.flops) == pytest.approx((6.76e12, 13.86e12), rel=1e-3)
