"""Which setting fits a budget and costs the least time; what else fits; what to change when memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from library.errors import UserError
from library.memory.cards import Card
from library.memory.measured import Measured
from library.memory.needs import Needs
from library.memory.setting import Fixed, Setting

WORTH = 0.03  # of the device's memory: what a piece of advice has to save at least
PARTS = 8  # of all blocks, for numbers of streamed ones to choose from

Allowed = Callable[[Setting], bool]
"""Which settings may be chosen: what the user's other settings go with, and what is built."""


@dataclass(frozen=True)
class Choice:
    """``needs`` of the chosen setting; ``seconds`` of a step on ``card``, and those of the fastest setting if memory were no
    matter."""

    needs: Needs
    card: Card
    seconds: float
    unlimited: float

    def why(self) -> str:
        slower = self.seconds / self.unlimited - 1
        cost = "as fast as with any amount of memory" if slower < 0.005 else f"{slower:.0%} slower than with any amount of memory"
        return f"the fastest of what fits and your flags allow: {self.seconds:.2f} s a step predicted on {self.card.name}, {cost}"


class Planner:
    """Computes what settings of one run need. ``allowed`` bounds what ``choose`` and ``advise`` may propose."""

    def __init__(self, measured: Measured, fixed: Fixed, allowed: Allowed = lambda setting: True):
        self.measured, self.fixed, self._allowed = measured, fixed, allowed
        self._shared: dict = {}

    def needs(self, setting: Setting) -> Needs:
        return Needs(self.measured, self.fixed, setting, self._shared)

    def choose(self, budget: int, card: Card) -> Choice:
        """The setting within ``budget`` bytes of device memory with the shortest step on ``card``; of equals the one that changes
        least. UserError when none fits, with the least that is possible."""
        found = self._lattice
        seconds = {needs.setting: needs.time(card).total for needs in found}
        fitting = [needs for needs in found if needs.device_bytes <= budget]
        if not fitting:
            least = min(found, key=lambda needs: needs.device_bytes)
            raise UserError(f"{gigabytes(budget)} are not enough: with the least that is possible this run needs "
                            f"{gigabytes(least.device_bytes)} ({least.setting.words()})", place="--vram_budget",
                            remedy="lower the batch size or the resolution, or use an optimizer with smaller states")
        best = min(fitting, key=lambda needs: round(seconds[needs.setting], 4))  # the first of equals
        return Choice(best, card, seconds[best.setting], min(seconds.values()))

    @cached_property
    def _lattice(self) -> list[Needs]:
        """What each setting needs; its bytes do not depend on the card."""
        return [self.needs(setting) for setting in self.settings()]

    def settings(self) -> Iterator[Setting]:
        """The lattice, from the plainest setting on; of streamed blocks at most nine numbers."""
        blocks = len(self.measured.blocks)
        counts = sorted({round(blocks * part / PARTS) for part in range(PARTS + 1)}) if blocks > PARTS else range(blocks + 1)
        policies = [Setting(), *(Setting("all", every) for every in (4, 3, 2)), Setting("selective"), Setting("all"),
                    Setting("all", offload=True)]
        for policy in policies:
            for unit in ("model", "block", "parameter"):
                for streamed in counts:
                    for stream_states in (False, True):
                        setting = replace(policy, unit=unit, streamed=streamed, stream_states=stream_states)
                        if setting.problem(blocks) is None and self._allowed(setting):
                            yield setting

    def advise(self, setting: Setting, card: Card) -> str | None:
        """One line for a run that ran out of memory: the change of one flag that gives the most memory for the time it costs.
        None when no flag that may be set would help."""
        now = self.needs(setting)
        best: tuple[float, str] | None = None
        for flag, changed in changes(setting, len(self.measured.blocks)):
            if changed.problem(len(self.measured.blocks)) is not None or not self._allowed(changed):
                continue
            then = self.needs(changed)
            saved = now.device_bytes - then.device_bytes
            if saved < WORTH * now.device_bytes:
                continue
            slower = max(0.0, then.time(card).total / now.time(card).total - 1)
            line = f"add {flag}: {gigabytes(saved)} less, " + (f"about {slower:.0%} slower" if slower >= 0.01 else "no slower")
            if best is None or saved / (0.02 + slower) > best[0]:
                best = (saved / (0.02 + slower), line)
        return best[1] if best else None


def changes(setting: Setting, blocks: int) -> Sequence[tuple[str, Setting]]:
    """What one more flag, or two that only go together, would make of ``setting``."""
    unit = setting.unit if setting.unit != "model" else "block"
    in_backward = "" if setting.unit != "model" else " --blockwise_fused_optimizers"
    recompute = setting.recompute if setting.recompute != "none" else "all"
    found = [("--gradient_checkpointing", replace(setting, recompute="all", every=1)),
             ("--blockwise_fused_optimizers", replace(setting, unit="block")),
             ("--fused_backward_pass", replace(setting, unit="parameter")),
             ("--cpu_offload_checkpointing", replace(setting, offload=True)),
             ("--stream_optimizer_states", replace(setting, stream_states=True))]
    for share in (0.25, 0.5, 0.75, 1):
        streamed = round(share * blocks)
        if streamed > setting.streamed:
            found.append((f"--blocks_to_swap {streamed}{in_backward}",
                          replace(setting, streamed=streamed, unit=unit, recompute=recompute, every=1)))
    return found


def gigabytes(size: int) -> str:
    """In units of 10^9 bytes; small ones in 10^6."""
    return f"{size / 1e9:.2f} GB" if size >= 99_500_000 else f"{size / 1e6:.1f} MB"
