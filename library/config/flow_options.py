"""Flags of the rectified-flow objective, and their conflicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.config.check import Problem, conflict
from library.config.values import flag, show

if TYPE_CHECKING:
    from library.config.parse import Config

# Setting -> (what makes it count, in words for the remedy). Without that a changed value would silently do nothing.
_OBJECTIVE_NEEDS: dict[str, tuple[Callable, str]] = {
    "discrete_flow_shift": (lambda flow: flow.timestep_sampling in ("shift", "sigma"), "--timestep_sampling shift"),
    "sigmoid_scale": (lambda flow: flow.timestep_sampling in ("sigmoid", "shift", "flux_shift"), "--timestep_sampling shift"),
    "logit_mean": (lambda flow: (flow.timestep_sampling, flow.weighting_scheme) == ("sigma", "logit_normal"),
                   "--timestep_sampling sigma --weighting_scheme logit_normal"),
    "logit_std": (lambda flow: (flow.timestep_sampling, flow.weighting_scheme) == ("sigma", "logit_normal"),
                  "--timestep_sampling sigma --weighting_scheme logit_normal"),
    "mode_scale": (lambda flow: (flow.timestep_sampling, flow.weighting_scheme) == ("sigma", "mode"),
                   "--timestep_sampling sigma --weighting_scheme mode"),
}
_DENSITIES, _WEIGHTS = ("logit_normal", "mode"), ("sigma_sqrt", "cosmap")


@dataclass(frozen=True)
class FlowOptions:
    """The rectified-flow objective: how noise levels are drawn and what the model is asked for."""

    title: ClassVar[str] = "Objective"

    timestep_sampling: str = flag("shift", "how noise levels are drawn",
                                  choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift"))
    weighting_scheme: str = flag(
        "uniform", "with sigma sampling: density of levels; with sigma_scaled prediction: weight of the loss",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"), off="none")
    discrete_flow_shift: float = flag(3.0, "with shift and sigma sampling: above 1 trains noisier levels more", above=0, off="1")
    sigmoid_scale: float = flag(1.0, "with sigmoid, shift and flux_shift sampling: spread of the normal draw", above=0)
    logit_mean: float = flag(0.0, "with sigma sampling and logit_normal weighting: mean of the normal draw")
    logit_std: float = flag(1.0, "with sigma sampling and logit_normal weighting: its standard deviation", above=0)
    mode_scale: float = flag(1.29, "with sigma sampling and mode weighting: strength of the mode")
    model_prediction_type: str = flag("raw", "what is compared with the target: the output as it is, with the input added, "
                                      "or as an estimate of the picture", choices=("raw", "additive", "sigma_scaled"))
    min_timestep: int | None = flag(None, "least noisy level that is trained, of 1000", minimum=0, maximum=999, default_text="0")
    max_timestep: int | None = flag(None, "noisiest level that is trained, of 1000", minimum=1, maximum=1000, default_text="1000")
    ip_noise_gamma: float | None = flag(None, "perturb the noisy input by this much more noise, which the target does not "
                                        "contain; about 0.1", minimum=0, off="0")
    ip_noise_gamma_random_strength: bool = flag(False, "draw the size of that noise between 0 and --ip_noise_gamma for each "
                                                "sample")

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts between these flags."""
        changed = config.changed()
        yield from range_problems(config, self.min_timestep, self.max_timestep)
        for name, (counts, needs) in _OBJECTIVE_NEEDS.items():
            if name in changed and not counts(self):
                given = f"--timestep_sampling {self.timestep_sampling} and --weighting_scheme {self.weighting_scheme}"
                yield conflict(config, f"{name} timestep_sampling weighting_scheme",
                               f"{show(getattr(self, name))} would have no effect with {given}", f"leave it out, or use {needs}")
        scheme = self.weighting_scheme
        if scheme in _DENSITIES and self.timestep_sampling != "sigma":
            yield conflict(config, "weighting_scheme timestep_sampling",
                           f"{scheme} is a density of levels and has no effect with --timestep_sampling {self.timestep_sampling}",
                           "use --timestep_sampling sigma, or --weighting_scheme none")
        if scheme in _WEIGHTS and self.model_prediction_type != "sigma_scaled":
            yield conflict(config, "weighting_scheme model_prediction_type",
                           f"{scheme} is a weight of the loss and has no effect with --model_prediction_type "
                           f"{self.model_prediction_type}",
                           "use --model_prediction_type sigma_scaled, or --weighting_scheme none")
        if self.ip_noise_gamma_random_strength and not self.ip_noise_gamma:
            yield conflict(config, "ip_noise_gamma_random_strength ip_noise_gamma", "has no effect without --ip_noise_gamma",
                           "add --ip_noise_gamma or leave it out")


def range_problems(config: Config, min_timestep: int | None, max_timestep: int | None) -> Iterator[Problem]:
    """The range of levels must not be empty."""
    low, high = min_timestep or 0, 1000 if max_timestep is None else max_timestep
    if low >= high:
        yield conflict(config, "min_timestep max_timestep", f"{low} leaves nothing below max_timestep {high}",
                       "give a smaller min_timestep or a larger max_timestep")
