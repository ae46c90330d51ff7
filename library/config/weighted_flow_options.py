"""Flags of the rectified-flow objective in which one scheme sets the density of levels and the weight of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.config.check import Problem, conflict
from library.config.flow_options import range_problems
from library.config.values import flag, show

if TYPE_CHECKING:
    from library.config.parse import Config

_NEEDS = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}  # setting -> its scheme


@dataclass(frozen=True)
class WeightedFlowOptions:
    """The rectified-flow objective: how noise levels are drawn and weighed. Estimates of the picture are compared."""

    title: ClassVar[str] = "Objective"

    weighting_scheme: str = flag(
        "uniform", "logit_normal and mode: density of levels; sigma_sqrt and cosmap: weight of the loss (sigma_sqrt makes it "
        "that of velocities); uniform and none: neither",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"), off="none")
    training_shift: float = flag(1.0, "above 1 trains noisier levels more; 3 is the shift that pictures are drawn with", above=0,
                                 off="1")
    logit_mean: float = flag(0.0, "with logit_normal: mean of the normal draw; above 0 trains noisier levels more")
    logit_std: float = flag(1.0, "with logit_normal: its standard deviation", above=0)
    mode_scale: float = flag(1.29, "with mode: strength of the mode")
    min_timestep: int | None = flag(None, "least noisy level that is trained, of 1000", minimum=0, maximum=999, default_text="0")
    max_timestep: int | None = flag(None, "noise levels below this one are trained, of 1000", minimum=1, maximum=1000,
                                    default_text="1000")

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts between these flags."""
        yield from range_problems(config, self.min_timestep, self.max_timestep)
        changed = config.changed()
        for name, scheme in _NEEDS.items():
            if name in changed and self.weighting_scheme != scheme:
                yield conflict(config, f"{name} weighting_scheme",
                               f"{show(getattr(self, name))} would have no effect with --weighting_scheme "
                               f"{self.weighting_scheme}", f"leave it out, or use --weighting_scheme {scheme}")
