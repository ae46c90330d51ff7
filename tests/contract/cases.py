"""The adapters under contract: every test of this folder runs over all of them. A new architecture adds its rows here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flux_train
import lumina_train
import sd3_train
import sdxl_train
from library.checkpoint.sd3_keys import MMDIT_PREFIX
from library.checkpoint.sdxl_keys import UNET_PREFIX
from library.config.parse import Entry
from tests.contract import converters
from tests.tiny import make_flux_files
from tests.tiny_lumina import make_image_2_files, make_next_files
from tests.tiny_sd3 import ENCODERS, make_sd3_files
from tests.tiny_sdxl import make_sdxl_files

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One adapter, or one variant of it."""

    name: str
    entry: Entry
    make: Callable[[Path], Path]
    """Writes a tiny complete checkpoint set into a folder and returns the path of the main file."""
    settings: tuple[tuple[str, ...], ...]
    """Flags that choose levels and targets in different ways: the oracle must be right under all of them."""
    oracle: Callable[[Tensor], Tensor]
    """What the denoiser returns, in its own convention, when the answer (B, C, h, w) of the objective is this."""
    landed: Callable[[Any, Any, Tensor], Tensor]
    """(objective, noisy, output) -> the latents that one step from there to no noise reaches."""
    time_input: Callable[[nn.Module], nn.Module]
    """The submodule whose first input is the noise level as the denoiser counts it."""
    level: Tensor
    """One level (1,) as the objective gives it, and..."""
    time: float
    """...the number that has to arrive in ``time_input`` for it."""
    trains: Callable[[str], bool]
    """Whether a tensor of the checkpoint trains without further flags."""
    diffusers: Callable[[Path], tuple[Tensors, Tensors]]
    """The denoiser of a saved file by module name: as the converter of diffusers makes it, and as our reader does."""
    variant: bool = False
    """One more variant of an architecture that is here already: slow tests are content with the first one."""
    encoders: tuple[str, ...] = ()
    """Flags that train all text encoders, for adapters that can."""
    one_encoder: tuple[str, ...] = ()
    """Flags that train some of them."""
    encoder_names: Callable[[str], bool] = lambda name: False
    """Whether a tensor of the checkpoint trains with the flags ``encoders``, beside the denoiser."""


def _packed(velocity: Tensor) -> Tensor:
    from library.architectures.flux_call import pack

    return pack(velocity)


def _flow_landing(_objective: Any, noisy: Any, output: Tensor) -> Tensor:
    return noisy.x_t - noisy.level.view(-1, 1, 1, 1) * output


def _ddpm_landing(objective: Any, noisy: Any, output: Tensor) -> Tensor:
    """x_0 by the definitions of noise and velocity (Salimans and Ho 2022), divided by nothing that may be zero."""
    from library.objectives.ddpm import signal_shares, without_terminal_signal

    shares = signal_shares()
    shares = without_terminal_signal(shares) if objective.options.zero_terminal_snr else shares
    signal = shares[noisy.level].float().view(-1, 1, 1, 1)
    if objective.options.v_parameterization:
        return signal.sqrt() * noisy.x_t - (1 - signal).sqrt() * output
    return (noisy.x_t - (1 - signal).sqrt() * output) / signal.sqrt()


def _flux(variant: str) -> Case:
    samplings = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
    return Case(
        f"flux-{variant}", flux_train.ENTRY, lambda folder: make_flux_files(folder, variant=variant).checkpoint,
        settings=tuple(("--timestep_sampling", name) for name in samplings), oracle=_packed, landed=_flow_landing,
        time_input=lambda denoiser: denoiser.time_text_embed.time_proj, level=torch.tensor([0.7071]), time=707.1,
        trains=lambda name: True, diffusers=converters.flux, variant=variant != "dev",
    )


def _lumina(name: str, make: Callable[[Path], Any], oracle: Callable[[Tensor], Tensor], diffusers: Callable[[Path], Any],
            unused: str) -> Case:
    samplings = ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift")
    return Case(
        name, lumina_train.ENTRY, lambda folder: make(folder).checkpoint, oracle=oracle, landed=_flow_landing,
        settings=tuple(("--timestep_sampling", sampling) for sampling in samplings),
        time_input=lambda denoiser: denoiser.time_caption_embed.time_proj, level=torch.tensor([0.7071]), time=0.2929,
        trains=lambda name: name != unused, diffusers=diffusers, variant=name == "lumina-next",
    )


def _trained_by_encoders(name: str) -> bool:
    """All but the last layer and the final norm of the first encoder, and what is no weight."""
    first, second = name.startswith("conditioner.embedders.0."), name.startswith("conditioner.embedders.1.")
    idle = (".layers.1.", "final_layer_norm", "position_ids", "logit_scale")
    return (first and not any(part in name for part in idle)) or (second and "logit_scale" not in name)


def _sd3(variant: str, embedded: tuple[str, ...] = (), encoders: tuple[str, ...] = (), one_encoder: tuple[str, ...] = ()) -> Case:
    schemes = ("uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap")
    return Case(
        variant, sd3_train.ENTRY, lambda folder: make_sd3_files(folder, variant, embedded).checkpoint,
        settings=(*(("--weighting_scheme", name) for name in schemes), ("--training_shift", "3")),
        oracle=lambda answer: answer, landed=_flow_landing, time_input=lambda denoiser: denoiser.time_text_embed.time_proj,
        level=torch.tensor([0.7071]), time=707.1,
        trains=lambda name: name.startswith(MMDIT_PREFIX) and not name.endswith("pos_embed"), diffusers=converters.sd3,
        encoders=encoders, one_encoder=one_encoder, encoder_names=lambda name: name.startswith("text_encoders."),
        variant=variant != "sd3-medium",
    )


CASES = (
    _flux("dev"),
    _flux("schnell"),
    _lumina("lumina-image-2", make_image_2_files, lambda answer: -answer, converters.lumina_image_2, unused="norm_final.weight"),
    # it says something about the variance, too
    _lumina("lumina-next", make_next_files, lambda answer: torch.cat([-answer, torch.ones_like(answer)], dim=1),
            converters.lumina_next, unused="pad_token"),
    Case(
        "sdxl", sdxl_train.ENTRY, lambda folder: make_sdxl_files(folder).checkpoint,
        settings=((), ("--v_parameterization",), ("--v_parameterization", "--zero_terminal_snr"), ("--min_timestep", "900")),
        oracle=lambda answer: answer, landed=_ddpm_landing, time_input=lambda denoiser: denoiser.time_proj,
        level=torch.tensor([707]), time=707, trains=lambda name: name.startswith(UNET_PREFIX), diffusers=converters.sdxl,
        encoders=("--train_text_encoder",), one_encoder=("--train_text_encoder", "--learning_rate_te1", "0"),
        encoder_names=_trained_by_encoders,
    ),
    _sd3("sd3-medium", ENCODERS, ("--train_text_encoder", "--train_t5xxl"), ("--train_text_encoder", "--learning_rate_te2", "0")),
    _sd3("sd3.5-medium"),
    _sd3("sd3.5-large"),
)
