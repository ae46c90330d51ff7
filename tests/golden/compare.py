"""Comparing what we compute with a recorded run."""

import torch

from library.objectives.noise import Draws

TOLERANCE = 1e-5


def close(ours: torch.Tensor, recorded: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Largest difference within ``tolerance`` of the largest recorded value: relative, without dividing by values near 0."""
    assert ours.shape == recorded.shape
    difference = (ours.detach().double() - recorded.double()).abs().max().item()
    assert difference <= tolerance * recorded.abs().max().item()


def recorded_draws(step: dict[str, torch.Tensor]) -> Draws:
    unused = torch.full((len(step["latents"]),), torch.nan)  # the level is injected
    return Draws(step["noise"], unused, unused)


def check_final_weights(record, module, bound, tolerance, leave_out=()):
    """Norm, sum and first numbers of every weight; a sum is measured by the sum of magnitudes, as it may cancel to nothing."""
    weights = {key: parameter.detach() for key, parameter in module.named_parameters()}
    for row, key in enumerate(record.settings["after_names"].split(",")):
        if key in leave_out:
            continue
        ours = bound.to_original(key, weights.__getitem__).double()
        close(ours.norm(), record.tensors["after.norm"][row], tolerance)
        close(ours.flatten()[:4], record.tensors["after.first4"][row], tolerance)
        drift = abs(ours.sum() - record.tensors["after.sum"][row])
        assert drift <= tolerance * ours.abs().sum(), key
