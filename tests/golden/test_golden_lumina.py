"""Our objective and the call of Lumina-Image 2.0 against four recorded training steps of an independent implementation.

The recorded program's target and output are latents - noise, the other way round than here: signs are turned before comparing.
"""

import pytest
import torch

from library.architectures.attention import route
from library.architectures.lumina_call import predict
from library.objectives import density
from library.objectives.flow import Flow
from library.objectives.loss import mean, per_sample
from library.objectives.noise import Draws
from library.optim import table
from library.optim.groups import Group, assert_partition
from library.optim.schedule import Schedule
from library.optim.updater import StepAfterBackward
from tests.golden import records
from tests.golden.compare import TOLERANCE, check_final_weights, close, recorded_draws
from tests.golden.records import STEPS
from tests.golden.records_lumina import original_names, tiny_transformer

NAMES = records.names("lumina")


def text(step) -> dict[str, torch.Tensor]:
    return {"gemma": step["in.cap_feats"], "gemma_mask": step["in.cap_mask"].bool()}


def test_all_recorded_modes_are_here():
    assert NAMES == ["lumina_default", "lumina_nextdit_shift"]


@pytest.mark.parametrize("name", NAMES)
def test_levels_and_noise_are_those_of_the_recorded_generator(name):
    """The recorder drew noise, then the numbers of the levels: its whole run can be drawn again."""
    record = records.read(name)
    objective = Flow(record.options)
    generator = torch.Generator()
    generator.set_state(record.tensors["step0.torch_rng_state"])
    for index in range(STEPS):
        step = record.step(index)
        batch, _, height, width = step["latents"].shape
        noise = torch.randn(step["latents"].shape, generator=generator)
        unused = torch.full((batch,), torch.nan)
        if name == "lumina_default":
            draws = Draws(noise, unused, torch.randn(batch, generator=generator))
        else:
            draws = Draws(noise, torch.rand(batch, generator=generator), unused)
        level = objective.level(draws, (height // 2) * (width // 2))
        close(level, step["sigmas"].flatten(), 1e-6)
        noisy = objective.noise(step["latents"], draws, level)
        close(noisy.x_t, step["noisy_input"], 1e-6)
        close(noisy.target, -step["target"], 1e-6)
        close(1 - level, step["in.t"], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_from_recorded_outputs(name):
    record = records.read(name)
    objective = Flow(record.options)
    for index in range(STEPS):
        step = record.step(index)
        close(per_sample(step["pred"], step["target"]), step["loss_unweighted_per_sample"], 1e-6)
        losses = step["loss_unweighted_per_sample"] * objective.weight(step["sigmas"].flatten())
        close(mean(losses, len(losses)), step["loss"].float(), 1e-6)


@pytest.mark.parametrize("mode", [None, "torch", "flash"])
@pytest.mark.parametrize("name", NAMES)
def test_four_training_steps(name, mode):
    """Under every choice of attention: as diffusers computes it, routed, and with hidden keys dropped."""
    record = records.read(name)
    module, bound = tiny_transformer(record)
    if mode:
        route(module, mode)
    module.rope_embedder.freqs_cis = [angles.to(torch.complex64) for angles in module.rope_embedder.freqs_cis]
    groups = [Group("denoiser", tuple(module.named_parameters()), 1e-3)]
    assert_partition(groups, module.named_parameters())
    updater = StepAfterBackward(table.build("AdamW", [], groups, 1e-3), groups, Schedule("constant"), max_grad_norm=1.0)
    objective = Flow(record.options)
    recorded_names = record.settings["param_names"].split(",")
    for index in range(STEPS):
        step = record.step(index)
        noisy = objective.noise(step["latents"], recorded_draws(step), step["sigmas"].flatten())
        output = predict(module, noisy.x_t, noisy.level, text(step))
        close(output, -step["model_out"], TOLERANCE if index == 0 else 2 * TOLERANCE)
        losses = objective.losses(output, noisy)
        close(losses, step["loss_unweighted_per_sample"])
        loss = mean(losses * objective.weight(noisy.level), len(losses))
        close(loss, step["loss"])
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
        recorded = dict(zip(recorded_names, step["grad_norms"], strict=True))
        names = original_names(record)
        norms = torch.stack([bound.to_original(key, gradients.__getitem__).double().norm() for key in names])
        wanted = torch.stack([recorded[key] for key in names])
        torch.testing.assert_close(norms, wanted, rtol=1e-4, atol=1e-6 * norms.max().item())
        info = updater.after_backward(index, STEPS, last_microbatch=True)
        assert info.grad_norm == pytest.approx(step["grad_norm_total"].item(), rel=TOLERANCE)
    check_final_weights(record, module, bound, TOLERANCE, leave_out={"norm_final.weight"})


def test_nextdit_shift_is_a_uniform_draw_shifted_with_the_size():
    unused = torch.zeros(1, 1, 1, 1)
    uniform = torch.tensor([0.5])
    record = records.read("lumina_nextdit_shift")
    for tokens, factor in ((256, 2.718281828**0.5), (4096, 2.718281828**1.15)):
        level = Flow(record.options).level(Draws(unused, uniform, uniform), tokens)
        torch.testing.assert_close(level, density.shift(uniform, factor))
