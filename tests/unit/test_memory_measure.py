"""What is measured without weights, against what a real step of the same model keeps and computes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import flux_train
import lumina_train
import sdxl_train
from library.architectures.base import NO_ENCODERS
from library.config.loss_options import LossOptions
from library.config.parse import parse
from library.inputs import architecture_of
from library.memory.measure import measure
from library.memory.needs import Needs
from library.memory.recompute import Recompute
from library.memory.setting import Setting
from library.memory.trace import Trace
from library.methods import full
from library.planning import measure_step, micro_batch
from tests.tiny import make_flux_files
from tests.tiny_lumina import make_image_2_files, make_next_files
from tests.tiny_sdxl import make_sdxl_files
from tests.unit.memory_plan_helpers import FIXED

SIZE, BATCH = (96, 64), 2
MODELS = {"flux": (flux_train.ENTRY, partial(make_flux_files, double_blocks=3, single_blocks=3)),
          "sdxl": (sdxl_train.ENTRY, make_sdxl_files), "lumina": (lumina_train.ENTRY, make_image_2_files),
          "lumina-next": (lumina_train.ENTRY, make_next_files)}


@pytest.fixture(scope="module", params=MODELS)
def arch(request, tmp_path_factory):
    entry, make = MODELS[request.param]
    return open_tiny(entry, make(tmp_path_factory.mktemp(request.param)).checkpoint)


def open_tiny(entry, checkpoint: Path, *flags: str):
    config = parse(entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", "none.toml",
                           "--output_dir", "none", *flags], env={})
    return architecture_of(entry).open_architecture(config.model, config.architecture, config.objective)


def measured(arch, weights=torch.float32, autocast=None, cuda=False, batch=BATCH):
    return measure_step(arch, LossOptions(), SIZE, batch, weights, autocast, partial(train, arch), cuda)


def train(arch, denoiser):
    full.prepare(arch, denoiser, NO_ENCODERS, 1e-3)


def real_step(arch, weights=torch.float32, autocast=None):
    """(denoiser, losses) of a real micro-batch, and the bytes of every storage that autograd keeps for it."""
    denoiser = arch.load_denoiser(torch.device("cpu"), weights)
    train(arch, denoiser)
    return denoiser, lambda: micro_batch(arch, denoiser, arch.objective(LossOptions()), SIZE, BATCH, autocast or weights)


def kept(denoiser: nn.Module, run, autocast=None) -> dict[int, int]:
    """Address -> bytes."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or its address might be given to another one
        return tensor

    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None), \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return found


@pytest.mark.parametrize(("weights", "autocast"), [(torch.float32, None), (torch.float32, torch.bfloat16),
                                                   (torch.bfloat16, torch.bfloat16)])
def test_what_autograd_keeps_is_what_a_real_step_keeps(arch, weights, autocast):
    real = kept(*real_step(arch, weights, autocast), autocast)
    assert measured(arch, weights, autocast).saved_bytes == sum(real.values()) > 100_000


def given_to(blocks, own: set[int], found: dict[int, int]):
    """Hooks that add the storages which ``blocks`` are called with: recompute holds on to them, by name or through autograd."""
    def look(block, args, kwargs):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
                ALIVE.append(storage)
    return [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]


ALIVE: list[object] = []  # storages whose addresses are being compared


@pytest.mark.parametrize("every", [1, 2])
def test_what_recompute_keeps_is_what_a_real_step_keeps(arch, every):
    denoiser, run = real_step(arch)
    blocks = arch.blocks(denoiser)[every - 1::every]
    own = {tensor.untyped_storage().data_ptr() for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    given: dict[int, int] = {}
    Recompute(blocks)
    given_to(blocks, own, given)
    real = kept(denoiser, run) | given
    ALIVE.clear()
    plan = Needs(measured(arch), FIXED, Setting("all", every))
    assert plan.moments["forward"]["activations"] == sum(real.values())
    assert plan.moments["forward"]["casts"] == 0


def test_parameters_and_gradients_are_those_of_the_model(arch):
    denoiser, run = real_step(arch)
    run().sum().backward()
    found = measured(arch)
    assert found.parameters == sum(p.numel() for p in denoiser.parameters())
    assert sum(segment.bytes_of() for segment in found.segments) == sum(
        tensor.numel() * tensor.itemsize for tensor in (*denoiser.parameters(), *denoiser.buffers()))
    gradients = sum(p.grad.numel() * p.grad.itemsize for p in denoiser.parameters() if p.requires_grad)
    plan = Needs(found, FIXED, Setting())
    assert plan.moments["update"]["gradients"] == gradients
    for segment, block in zip(found.blocks, arch.blocks(denoiser), strict=True):
        assert segment.bytes_of(True) == sum(p.numel() * p.itemsize for p in block.parameters())


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_the_fullest_moment_is_that_of_a_real_step(arch, recompute):
    """A real step on real tensors, its allocations watched one by one; gradients are given up at once."""
    denoiser, run = real_step(arch)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if recompute == "all":
        Recompute(arch.blocks(denoiser))
    trace = Trace((*denoiser.parameters(), *denoiser.buffers()), cuda=False)
    with trace:
        run().sum().backward()
    plan = Needs(measured(arch), FIXED, Setting(recompute, unit="parameter"))
    parts = plan.device
    planned = parts["activations"] + parts["gradients"] + parts["workspace"]
    assert trace.peak <= planned * 1.02 and planned <= trace.peak * 1.15, (trace.peak, parts, plan.worst)


def test_flops_are_those_of_a_real_step(arch):
    """Attention backward is counted as flash attention does it: five products, where the plain one has four."""
    denoiser, run = real_step(arch)
    found = measured(arch)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        losses = run()
    with FlopCounterMode(display=False) as backward:
        losses.sum().backward()
    assert found.forward.flops == forward.get_total_flops()
    attention = forward.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    assert found.backward.flops == backward.get_total_flops() + attention // 2


def test_twice_the_pictures_are_twice_the_work(arch):
    one, two = measured(arch, batch=1), measured(arch, batch=2)
    assert 1.5 * one.saved_bytes < two.saved_bytes < 2.1 * one.saved_bytes
    assert 1.9 * one.forward.flops < two.forward.flops <= 2 * one.forward.flops
    assert one.parameters == two.parameters


class Around(nn.Module):
    """One block in a frame that asks for its gradient."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.first, self.block = nn.Linear(64, 64), block

    def forward(self) -> Tensor:
        return self.block(self.first(torch.zeros(4, 64)).to(torch.bfloat16)).float().sum(dim=1)


def saved_by(block: nn.Module, autocast: torch.dtype | None, cuda: bool) -> list[int]:
    model = Around(block)
    found = measure(model, [block], model, autocast, cuda)
    return sorted(found.sizes[number] for number in found.blocks[0].saved)


def test_a_gpu_under_autocast_norms_in_float32():
    """The input and the statistics of the norm; its result, for the activation behind it: in float32 only on a GPU."""
    block = nn.Sequential(nn.LayerNorm(64), nn.SiLU()).to(torch.bfloat16)
    half, whole, row = 4 * 64 * 2, 4 * 64 * 4, 4 * 4
    assert saved_by(block, torch.bfloat16, False)[-2:] == [half, half]
    norm_in_float32 = saved_by(block, torch.bfloat16, True)
    assert norm_in_float32[:2] == [row, row] and norm_in_float32[-2:] == [whole, whole]


def test_a_gpu_has_a_fused_rms_norm_where_dtypes_agree():
    half, row = 4 * 64 * 2, 4 * 4
    assert saved_by(nn.RMSNorm(64).to(torch.bfloat16), None, True) == [row, half]
    assert len(saved_by(nn.RMSNorm(64).to(torch.bfloat16), None, False)) > 2
    assert len(saved_by(nn.RMSNorm(64), None, True)) > 2


def test_what_does_not_train_costs_no_gradients(arch):
    frozen = measure_step(arch, LossOptions(), SIZE, BATCH, torch.float32, None,
                          lambda denoiser: [p.requires_grad_(p.ndim == 1) for p in denoiser.parameters()], cuda=False)
    full = measured(arch)
    assert frozen.parameters == full.parameters and frozen.backward.flops < full.backward.flops
    assert sum(segment.bytes_of(True) for segment in frozen.segments) < sum(segment.bytes_of(False) for segment in frozen.segments)


def test_measuring_leaves_nothing_behind(arch):
    """Neither hooks nor modes: the next real step computes numbers again."""
    measured(arch, torch.float32, torch.bfloat16, True)
    _, run = real_step(arch)
    losses = run()
    assert type(losses) is Tensor and losses.isfinite().all()
    assert not torch.is_autocast_enabled("cpu")


def test_two_blocks_that_are_alike_are_measured_once():
    """...and one that is not, by a hyperparameter that no shape tells, is measured by itself."""
    runs = []

    class Block(nn.Module):
        def __init__(self, power: int):
            super().__init__()
            self.linear, self.power = nn.Linear(8, 8), power

        def extra_repr(self) -> str:
            return f"power={self.power}"

        def forward(self, x: Tensor) -> Tensor:
            runs.append(self.power)
            return self.linear(x) ** self.power

    model = nn.Sequential(Block(2), Block(3), Block(2), Block(3), Block(2))
    found = measure(model, list(model), lambda: model(torch.zeros(4, 8)).sum(dim=1), cuda=False)
    assert runs == [2, 3, 2]  # the input of the first one needs no gradient
    assert [len(block.saved) for block in found.blocks] == [2] * 5  # the input and the result of the product
    assert all(block.inputs < block.saved for block in found.blocks)
    assert not found.blocks[2].saved & found.blocks[4].saved
    assert found.saved_bytes == 10 * 4 * 8 * 4
    assert all(block.backward.flops == 2 * block.forward.flops for block in found.blocks[1:])
    assert found.blocks[0].backward.flops == found.blocks[0].forward.flops  # nobody asks for the gradient of its input


def test_a_block_that_does_not_run_is_noticed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(AssertionError, match="did not run"):
        measure(model, list(model), lambda: model[0](torch.zeros(2, 4)).sum(dim=1))
