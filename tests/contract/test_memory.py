"""The memory engine on the real modules, tiny: streamed with NaN in place of what is elsewhere, equal to the resident run."""

import pytest
import torch

from library.architectures import flux_call, flux_models, flux_parts, sdxl_call, sdxl_models, sdxl_parts
from library.checkpoint.source import open_source
from library.memory.boundaries import Boundaries
from library.memory.in_backward import StepInBackward
from library.memory.offload import Offload
from library.memory.recompute import Recompute
from library.memory.schedule import evenly
from library.memory.streaming import Streaming
from library.memory.transport import CpuTransport
from library.optim import table
from library.optim.groups import Group
from library.optim.schedule import Schedule
from library.optim.updater import StepAfterBackward
from tests.tiny import make_flux_files
from tests.tiny_sdxl import make_sdxl_files
from tests.unit.memory_helpers import LateTransport, assert_same

STEPS = 2


def flux(folder):
    module = flux_models.load_transformer(flux_parts.describe(open_source(make_flux_files(folder).checkpoint)), torch.float32)

    def loss(generator):
        x_t = torch.randn(2, 16, 8, 12, generator=generator)
        text = {"t5": torch.randn(2, 7, 64, generator=generator), "clip_pooled": torch.randn(2, 64, generator=generator)}
        return (flux_call.predict(module, x_t, torch.tensor([0.2, 0.9]), text, 1.0) - x_t).square().mean()
    return module, [*module.transformer_blocks, *module.single_transformer_blocks], loss


def sdxl(folder):
    module = sdxl_models.load_unet(sdxl_parts.describe(open_source(make_sdxl_files(folder).checkpoint)), torch.float32)
    geometry = torch.tensor([[600, 800, 3, 5, 64, 96], [64, 96, 0, 0, 64, 96]])

    def loss(generator):
        x_t = torch.randn(2, 4, 8, 12, generator=generator)
        text = {name: torch.randn(2, 77, 64, generator=generator) for name in ("clip_l", "clip_g")}
        text["pooled"] = torch.randn(2, 64, generator=generator)
        return (sdxl_call.predict(module, x_t, torch.tensor([7, 980]), text, geometry) - x_t).square().mean()
    return module, sdxl_call.blocks(module), loss


def train(make, folder, micro=1, unit=None, share=0.0, transport=CpuTransport, poison=False, states=False, selective=False,
          offload=False):
    torch.manual_seed(0)
    module, blocks, loss_of = make(folder)
    module.requires_grad_(True).train()
    transport = transport()
    kept = Offload(transport, smallest_bytes=1024) if offload else None
    recompute, boundaries = Recompute(blocks, selective, kept), Boundaries(blocks)
    streaming = None
    if share:
        places = evenly(len(blocks), round(share * len(blocks)))
        streaming = Streaming(boundaries, places, recompute.blocks, transport, look_ahead=1, poison=poison)
    groups = [Group("all", tuple(module.named_parameters()), 1e-3)]
    optimizer = table.build("AdamW", [], groups, 1e-3)
    updater = StepAfterBackward(optimizer, groups, Schedule("constant"), 0.0) if unit is None else \
        StepInBackward(optimizer, groups, Schedule("constant"), unit, boundaries, streaming, stream_states=states)
    losses = []
    for step in range(STEPS):
        for index in range(micro):
            updater.begin_microbatch(step, STEPS, index == micro - 1)
            loss = loss_of(torch.Generator().manual_seed(10 * step + index)) / micro
            loss.backward()
            updater.after_backward(step, STEPS, index == micro - 1)
            losses.append(loss.item())
    if kept is not None:
        assert kept.bytes_out > 0
    if streaming is not None:
        streaming.settle()
        streaming.detach()
    return losses, dict(module.state_dict()), updater.state_dict()


@pytest.fixture(scope="module", params=[flux, sdxl], ids=lambda make: make.__name__)
def resident(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    return request.param, folder, {micro: train(request.param, folder, micro) for micro in (1, 2)}


@pytest.mark.parametrize("options", [
    dict(unit="parameter"), dict(unit="block", micro=2), dict(unit="parameter", share=1.0, poison=True),
    dict(unit="block", share=0.5, poison=True, states=True, micro=2), dict(unit="block", share=1.0, transport=LateTransport),
    dict(unit="parameter", share=1.0, transport=LateTransport, states=True, micro=2, offload=True),
    dict(unit="block", share=0.5, selective=True, poison=True), dict(selective=True), dict(offload=True),
    dict(unit="block", share=1.0, selective=True, offload=True, transport=LateTransport),
], ids=lambda options: "-".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()))
def test_equal_to_the_resident_run(resident, options):
    make, folder, expected = resident
    losses, weights, state = train(make, folder, **options)
    plain = expected[options.get("micro", 1)]
    assert losses == plain[0]
    assert_same(weights, plain[1])
    assert_same(state, plain[2])
