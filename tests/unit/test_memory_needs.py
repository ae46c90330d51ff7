"""The planner's formulas on a model of which every number can be worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from library.memory.amounts import Copies
from library.memory.cards import CARDS, named
from library.memory.needs import PARTS, Needs, evenly, region
from library.memory.planner import Planner
from library.memory.setting import Optimizer, Setting
from tests.unit.memory_plan_helpers import BLOCKS, FIXED, MIB, OUTSIDE, WEIGHT, model

STREAMED = Setting("all", unit="block", streamed=BLOCKS)
W, T, O = WEIGHT.size, WEIGHT.size, 8 * WEIGHT.count
CARD = CARDS[0]


def needs(setting: Setting = Setting(), **fixed) -> Needs:
    return Needs(model(), replace(FIXED, **fixed), setting)


def test_parameters_gradients_and_states_are_exact():
    plan = needs()
    update = plan.moments["update"]
    assert update["weights"] == update["gradients"] == BLOCKS * W + OUTSIDE.size
    assert update["states"] == BLOCKS * O + 8 * OUTSIDE.count
    assert update["activations"] == update["ring"] == update["casts"] == 0


def test_every_total_is_the_sum_of_its_parts():
    for setting in Planner(model(), FIXED).settings():
        plan = needs(setting)
        assert all(tuple(parts) == PARTS and min(parts.values()) >= 0 for parts in plan.moments.values())
        assert plan.device_bytes == sum(plan.device.values()) == max(sum(parts.values()) for parts in plan.moments.values())


@pytest.mark.parametrize(("setting", "kept", "again"), [
    (Setting(), 28, 0),
    (Setting("selective"), 24, 4),
    (Setting("all"), 8, 20),
])
def test_activations_while_a_block_runs_backward(setting, kept, again):
    """Of the blocks in front of it what they keep; of its own everything; of those behind it nothing."""
    plan = needs(setting)
    for block in range(BLOCKS):
        parts = plan.moments[f"backward block {block + 1} of {BLOCKS} (Block)"]
        assert parts["activations"] == ((block + 1) * kept + again) * MIB
        assert parts["gradients"] == (BLOCKS - block) * T
        # what is made while it runs forward again, or what comes on top while it runs backward; and a gradient on its way
        assert parts["workspace"] == (max(3, 30 - 20) + 1 if again else 3 + 1) * MIB


def test_every_second_block_and_inputs_on_the_host():
    second = needs(Setting("all", every=2)).moments[f"backward block {BLOCKS} of {BLOCKS} (Block)"]
    assert second["activations"] == (BLOCKS // 2 * (28 + 8) + 20) * MIB
    away = needs(Setting("all", offload=True))
    assert away.moments[f"backward block {BLOCKS} of {BLOCKS} (Block)"]["activations"] == (3 * 8 + 20) * MIB
    assert away.pinned["activations"] == BLOCKS * 8 * MIB
    assert (away.bus.into, away.bus.out) == (BLOCKS * 8 * MIB,) * 2


@pytest.mark.parametrize(("unit", "ranks", "micro", "waiting"), [
    ("model", 2, 1, BLOCKS * T + OUTSIDE.size), ("model", 1, 2, BLOCKS * T + OUTSIDE.size), ("block", 1, 1, T + OUTSIDE.size),
    ("block", 2, 1, T + OUTSIDE.size), ("parameter", 1, 1, 0), ("parameter", 1, 3, BLOCKS * T + OUTSIDE.size)])
def test_gradients_that_wait(unit, ranks, micro, waiting):
    plan = needs(Setting(unit=unit), ranks=ranks, micro_batches=micro)
    for block in range(BLOCKS):
        assert plan.moments[f"backward block {block + 1} of {BLOCKS} (Block)"]["gradients"] == waiting
    assert ("update" in plan.moments) == (unit == "model")


def test_a_ring_takes_the_place_of_streamed_weights():
    plan = needs(STREAMED)
    assert plan.device["weights"] == OUTSIDE.size and plan.device["ring"] == 3 * W
    assert plan.pinned == {"weights": BLOCKS * W, "states": 0, "gradients": 0, "activations": 0}
    with_states = needs(replace(STREAMED, stream_states=True), micro_batches=2)
    assert with_states.device["ring"] == 3 * (W + O + T) and with_states.device["states"] == 8 * OUTSIDE.count
    assert with_states.pinned == {"weights": BLOCKS * W, "states": BLOCKS * O, "gradients": BLOCKS * T, "activations": 0}


@pytest.mark.parametrize(("streamed", "look_ahead", "micro"), list(itertools.product((1, 2, 3, 5, BLOCKS), (0, 1, 2, 20), (1, 2, 3))))
def test_copies_are_those_of_a_ring_that_is_walked_through(streamed, look_ahead, micro):
    """The formulas against a ring that is played through, step after step, until it repeats itself."""
    setting = replace(STREAMED, streamed=streamed, look_ahead=look_ahead, stream_states=True)
    plan = needs(setting, micro_batches=micro)
    slots = min(look_ahead + 1, streamed)
    rings = {name: dict.fromkeys(range(slots)) for name in ("weights", "states", "gradients")}
    for _ in range(3):
        copies = Copies()

        def bring(name: str, block: int, size: int, filled: bool = True) -> None:
            nonlocal copies
            if rings[name][block % slots] != block and filled:
                copies += Copies(size, 0)
            rings[name][block % slots] = block

        for batch in range(micro):
            for block in range(streamed):
                bring("weights", block, W)
            for block in reversed(range(streamed)):
                bring("weights", block, W)
                bring("gradients", block, T, filled=batch > 0) if micro > 1 else None
                if batch < micro - 1:
                    copies += Copies(0, T)
                else:
                    bring("states", block, O)
                    copies += Copies(0, T + O)
    assert plan.bus == copies


def test_regions_and_places_are_those_of_the_engine():
    assert region([1, 256, 257]) == 256 + 256 + 512 and region([]) == 0
    assert evenly(8, 2) == (2, 6) and evenly(5, 5) == (0, 1, 2, 3, 4) and evenly(57, 1) == (28,)


def test_more_is_never_less():
    """More micro-batches, processes, averages, look-ahead or kept activations never need less of anything; more streaming never
    more of the card (with enough blocks that the ring is smaller than what it replaces) nor less of the host and the bus."""
    def all_needs(plan: Needs) -> tuple[int, ...]:
        return plan.device_bytes, sum(plan.pinned.values()), sum(plan.ordinary.values()), plan.bus.into, plan.bus.out
    for setting in Planner(model(), FIXED).settings():
        base = all_needs(needs(setting))
        for more in ({"micro_batches": 2}, {"ranks": 2}, {"average": "device"}, {"average": "host"}, {"rounding": True},
                     {"encoders": 10}, {"cached": 10}, {"optimizer": Optimizer("three", lambda weight: 12 * weight.count, 4)}):
            assert all(now >= before for now, before in zip(all_needs(needs(setting, **more)), base, strict=True)), (setting, more)
        if setting.streamed:
            deeper = needs(replace(setting, look_ahead=4))
            assert deeper.device_bytes >= base[0] and deeper.bus.into <= base[3]
    streams = [needs(replace(STREAMED, streamed=count, stream_states=True)) for count in range(3, BLOCKS + 1)]
    for fewer, more in itertools.pairwise(streams):
        assert more.device_bytes < fewer.device_bytes and sum(more.pinned.values()) > sum(fewer.pinned.values())
        assert more.bus.into > fewer.bus.into and more.bus.out > fewer.bus.out
    kept = [needs(setting).device_bytes for setting in (Setting("all", offload=True, unit="block"), Setting("all", unit="block"),
                                                        Setting("all", 2, unit="block"), Setting("all", 4, unit="block"),
                                                        Setting(unit="block"))]
    assert kept == sorted(kept)


def test_bf16_weights_are_stepped_a_chunk_at_a_time():
    parts = needs(rounding=True).moments["update"]
    assert parts["workspace"] == 2 * 4 * (BLOCKS * WEIGHT.count + OUTSIDE.count) + 8 * WEIGHT.count  # all of it is one chunk
    one = needs(Setting(unit="parameter"), rounding=True).moments[f"backward block 1 of {BLOCKS} (Block)"]
    assert one["workspace"] == 4 * MIB + 2 * 4 * WEIGHT.count + 8 * WEIGHT.count


def test_time_is_the_longer_one_of_computing_and_copying():
    card = replace(CARD, peak=4e12, bandwidth=1e12, bus=1e15)
    computing = needs(STREAMED).time(card)
    assert computing.hidden and computing.forward == pytest.approx(BLOCKS * (1 / 3 + 1e-4))
    assert computing.backward == pytest.approx(BLOCKS * (1 + 3e-4))
    plan = needs(STREAMED)
    waiting = plan.time(replace(card, bus=1e3))
    assert not waiting.hidden and waiting.forward == pytest.approx(plan.forward_copies.into / 1e3)
    assert waiting.backward == pytest.approx(max(plan.backward_copies.into, plan.backward_copies.out) / 1e3)
    assert needs(Setting("selective")).time(card).backward == pytest.approx(BLOCKS * (2 / 3 + 3e-4))
    assert needs(single=True).time(replace(card, single=1e12)).forward == pytest.approx(BLOCKS * (4 / 3 + 1e-4))


@pytest.mark.parametrize(("setting", "why"), [
    (Setting(streamed=2), "recomputed"), (Setting("all", every=2, streamed=2, unit="block"), "recomputed"),
    (Setting("all", streamed=2), "during the backward"), (Setting("all", stream_states=True), "follow"),
    (Setting(offload=True), "inputs"), (Setting("all", unit="block", streamed=9), "9 of 8")])
def test_what_cannot_be_done_is_no_setting(setting, why):
    assert why in setting.problem(BLOCKS)
    with pytest.raises(AssertionError):
        needs(setting)


@pytest.mark.parametrize(("driver", "card"), [
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti 16GB"), ("NVIDIA GeForce RTX 4060", "RTX 4060"),
    ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("NVIDIA H200", "H200"), ("GeForce GT 710", None)])
def test_cards_by_the_name_that_a_driver_gives(driver, card):
    assert (found := named(driver)) is None and card is None or found.name == card
