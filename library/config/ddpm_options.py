"""Flags of the diffusion objective (noise or velocity prediction on a table of 1000 noise levels), and their conflicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.config.check import Problem, conflict
from library.config.schema import flag

if TYPE_CHECKING:
    from library.config.parse import Config


@dataclass(frozen=True)
class DdpmOptions:
    """The diffusion objective: which levels are drawn, what noise is added, what is asked for, how levels are weighted."""

    title: ClassVar[str] = "Objective"

    v_parameterization: bool = flag(False, "the model predicts velocity, not noise",
                                    default_text="what the checkpoint says, else off")
    zero_terminal_snr: bool = flag(False, "stretch the noise schedule until the last level is pure noise")
    min_timestep: int | None = flag(None, "least noisy level that is trained, of 1000", minimum=0, maximum=999, default_text="0")
    max_timestep: int | None = flag(None, "noise levels below this one are trained, of 1000", minimum=1, maximum=1000,
                                    default_text="1000")
    noise_offset: float | None = flag(None, "shift the noise of each channel of a picture by a normal draw of this size, so that "
                                      "brightness is learned; about 0.05", minimum=0, off="0")
    noise_offset_random_strength: bool = flag(False, "draw the size of the offset between 0 and --noise_offset for each sample")
    adaptive_noise_scale: float | None = flag(None, "add this times the mean of each latent channel to --noise_offset", off="0")
    multires_noise_iterations: int | None = flag(None, "add noise of so many coarser resolutions; about 6", minimum=0, off="0")
    multires_noise_discount: float = flag(0.3, "weight of each coarser resolution of noise relative to the one before",
                                          minimum=0, maximum=1)
    ip_noise_gamma: float | None = flag(None, "perturb the noisy input by this much more noise, which the target does not "
                                        "contain; about 0.1", minimum=0, off="0")
    ip_noise_gamma_random_strength: bool = flag(False, "draw the size of that noise between 0 and --ip_noise_gamma for each "
                                                "sample")
    min_snr_gamma: float | None = flag(None, "weigh levels by their signal-to-noise ratio, cut off at this value; about 5",
                                       minimum=0, off="0")
    debiased_estimation_loss: bool = flag(False, "weigh levels by one over the root of their signal-to-noise ratio")
    scale_v_pred_loss_like_noise_pred: bool = flag(False, "with velocity prediction: weigh levels as noise prediction does")
    v_pred_like_loss: float | None = flag(None, "with noise prediction: add this times the loss as velocity prediction weighs it",
                                          minimum=0, off="0")

    def problems(self, config: Config) -> Iterator[Problem]:
        """Conflicts between these flags. Whether a checkpoint predicts velocity may be known only once it is opened."""
        low, high = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if low > high or low == high == 1000:
            yield conflict(config, "min_timestep max_timestep", f"{low} leaves nothing below max_timestep {high}",
                           "give a smaller min_timestep or a larger max_timestep")
        needs = {"noise_offset_random_strength": "noise_offset", "adaptive_noise_scale": "noise_offset",
                 "ip_noise_gamma_random_strength": "ip_noise_gamma"}
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                yield conflict(config, f"{name} {needed}", f"has no effect without --{needed}",
                               f"add --{needed} or leave it out")
        if self.multires_noise_discount != 0.3 and not self.multires_noise_iterations:
            yield conflict(config, "multires_noise_discount multires_noise_iterations",
                           "has no effect without --multires_noise_iterations", "add that, or leave it out")
        if self.v_pred_like_loss and self.v_parameterization:
            yield conflict(config, "v_pred_like_loss v_parameterization",
                           "a velocity loss is what --v_parameterization has already", "leave one of the two out")
