"""Our objective and transformer call against four recorded training steps of an independent implementation.

The recorded program's own second attention is wrong for SD3.5-medium; its record was made with that corrected (README). The sum over
a batch of weights that each belong to another sample does not show here: the recorded schemes weigh all levels alike.
"""

import pytest
import torch

from library.architectures.sd3_call import install_positions, predict
from library.objectives.loss import mean
from library.objectives.noise import Draws
from library.objectives.weighted_flow import WeightedFlow
from library.optim import table
from library.optim.groups import Group, assert_partition
from library.optim.schedule import Schedule
from library.optim.updater import StepAfterBackward
from tests.golden import records, records_sd3
from tests.golden.compare import TOLERANCE, check_final_weights, close, recorded_draws
from tests.golden.records import STEPS
from tests.golden.records_sd3 import CLIP_TOKENS, T5_TOKENS

NAMES = records.names("sd3") + records.names("sd35")
L_WIDTH, G_WIDTH = 24, 32  # of the two CLIPs


def text(step) -> dict[str, torch.Tensor]:
    """The recorded context taken apart again."""
    context, pooled = step["in.context"], step["in.y"]
    beside = context[:, :CLIP_TOKENS]
    assert not beside[..., L_WIDTH + G_WIDTH:].any() and context.shape[1] == CLIP_TOKENS + T5_TOKENS
    return {"clip_l": beside[..., :L_WIDTH], "clip_g": beside[..., L_WIDTH:L_WIDTH + G_WIDTH], "t5xxl": context[:, CLIP_TOKENS:],
            "clip_l_pooled": pooled[:, :L_WIDTH], "clip_g_pooled": pooled[:, L_WIDTH:]}


def test_all_recorded_modes_are_here():
    assert len(NAMES) == 4


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_of_the_recorded_generator(name):
    """The recorder drew noise, then one number per picture, and nothing else: its whole run can be drawn again."""
    record = records.read(name)
    generator = torch.Generator()
    generator.set_state(record.tensors["step0.torch_rng_state"])
    objective = WeightedFlow(records_sd3.options(record))
    for index in range(STEPS):
        step = record.step(index)
        noise = torch.randn(step["latents"].shape, generator=generator)
        assert torch.equal(noise, step["noise"])
        uniform = torch.rand(len(noise), generator=generator)
        level = objective.level(Draws(noise, uniform, torch.full_like(uniform, torch.nan)), tokens=1)
        close(level, step["sigmas"], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_from_recorded_outputs(name):
    """Each formula on its own: recorded outputs in, recorded losses out, without a model in between."""
    record = records.read(name)
    objective = WeightedFlow(records_sd3.options(record))
    for index in range(STEPS):
        step = record.step(index)
        noisy = objective.noise(step["latents"], recorded_draws(step), step["sigmas"])
        close(noisy.x_t, step["noisy_input"], 1e-6)
        close(step["target"], step["latents"], 1e-6)  # the recorder compares pictures, not velocities
        losses = objective.losses(step["model_out"], noisy)
        close(losses, step["loss_unweighted_per_sample"], 1e-5)
        weight = objective.weight(noisy.level)
        close(weight, step["weighting"], 1e-6)
        close(mean(losses * weight, len(losses)), step["loss"].float(), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_four_training_steps(name):
    record = records.read(name)
    module, bound = records_sd3.tiny_mmdit(record)
    install_positions(module, scaled=False)
    groups = [Group("denoiser", tuple(module.named_parameters()), 1e-3)]
    assert_partition(groups, module.named_parameters())
    updater = StepAfterBackward(table.build("AdamW", [], groups, 1e-3), groups, Schedule("constant"), max_grad_norm=1.0)
    objective = WeightedFlow(records_sd3.options(record))
    names = record.settings["param_names"].split(",")
    for index in range(STEPS):
        step = record.step(index)
        noisy = objective.noise(step["latents"], recorded_draws(step), step["sigmas"])
        output = predict(module, noisy.x_t, noisy.level, text(step), T5_TOKENS)
        close(output, step["model_out"])
        losses = objective.losses(output, noisy)
        close(losses, step["loss_unweighted_per_sample"])
        loss = mean(losses * objective.weight(noisy.level), len(losses))
        close(loss, step["loss"])
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
        norms = torch.stack([bound.to_original(key, gradients.__getitem__).double().norm() for key in names])
        torch.testing.assert_close(norms, step["grad_norms"].nan_to_num(0.0), rtol=1e-4, atol=1e-6 * norms.max().item())
        info = updater.after_backward(index, STEPS, last_microbatch=True)
        assert info.grad_norm == pytest.approx(step["grad_norm_total"].item(), rel=TOLERANCE)
    check_final_weights(record, module, bound, TOLERANCE, leave_out={"pos_embed"})
    assert torch.equal(module.pos_embed.pos_embed, records_sd3.tiny_mmdit(record)[0].pos_embed.pos_embed)  # a table, not a weight
