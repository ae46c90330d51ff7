"""How much arithmetic a training step is, for the share of the card's peak that it reaches (MFU; Chowdhery et al. 2022, PaLM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy

from library.data.plan import StepPlan, group_facts
from library.log import log

if TYPE_CHECKING:
    from library.loop import StepReport


class StepFlops:
    """Floating-point operations of a step over all devices: forward and backward, nothing that is computed twice, no fillers.

    ``of_size((width, height))``: those of one picture. That takes seconds, so it is asked for three sizes at most: in the area of
    a picture the work of attention is of second degree and all else of first, and the others follow. None where it fails.
    """

    def __init__(self, plan: StepPlan, of_size: Callable[[tuple[int, int]], float]):
        self._plan, self._of_size = plan, of_size
        self.of_area = lru_cache(maxsize=None)(self._of_area)

    def __call__(self, report: StepReport) -> float | None:
        if self._course is None:
            return None
        shown = [each.item for rank in self._plan.step(report.step - 1).micro for batch in rank if not batch.filler
                 for each in batch.occurrences]
        return sum(self.of_area(int(self._areas[item])) for item in shown)

    @cached_property
    def _areas(self) -> numpy.ndarray:
        """(N,) pixels of each picture as it is trained on."""
        return self._plan.items.buckets.astype(numpy.int64).prod(axis=1)

    def _of_area(self, area: int) -> float:
        return float(numpy.polyval(self._course, area / 2**20))

    @cached_property
    def _course(self) -> numpy.ndarray | None:
        """Coefficients over the area in 2**20 pixels, through what was measured."""
        facts = group_facts(self._plan.items, [1] * len(self._plan.items.specs))
        sizes = chosen_sizes([one.bucket for one in facts])
        try:
            work = [self._of_size(size) for size in sizes]
        except Exception as error:  # a model that cannot be measured without its weights: a curve is not worth the training
            log.info("the share of the card's arithmetic that is used is not known: %s", error)
            return None
        return numpy.polyfit([width * height / 2**20 for width, height in sizes], work, len(sizes) - 1)


def chosen_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The smallest, the largest, and one between them, of different areas that lie apart by a twentieth at least."""
    by_area = {width * height: (width, height) for width, height in sizes}
    low, high = min(by_area), max(by_area)
    middle = min(by_area, key=lambda area: abs(area - (low + high) / 2))
    chosen = [high]
    for area in (low, middle):
        if all(abs(area - other) > 0.05 * other for other in chosen):
            chosen.append(area)
    return [by_area[area] for area in sorted(chosen)]
