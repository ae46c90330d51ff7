"""What is measured without weights, against what a real step of the same model keeps and computes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flux_train
import sdxl_train
from library.config.loss_options import LossOptions
from library.config.parse import parse
from library.memory.measure import measure
from library.memory.recompute import Recompute
from library.planning import measure_step, micro_batch
from library.run import architecture_of
from tests.tiny import make_flux_files
from tests.tiny_sdxl import make_sdxl_files

SIZE, BATCH = (96, 64), 2
MODELS = {"flux": (flux_train.ENTRY, partial(make_flux_files, double_blocks=3, single_blocks=3)),
          "sdxl": (sdxl_train.ENTRY, make_sdxl_files)}


@pytest.fixture(scope="module", params=MODELS)
def arch(request, tmp_path_factory):
    entry, make = MODELS[request.param]
    return open_tiny(entry, make(tmp_path_factory.mktemp(request.param)).checkpoint)


def open_tiny(entry, checkpoint: Path, *flags: str):
    config = parse(entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", "none.toml",
                           "--output_dir", "none", *flags], env={})
    return architecture_of(entry).open_architecture(config.model, config.architecture, config.objective)


def measured(arch, weights=torch.float32, autocast=None, cuda=False, batch=BATCH):
    return measure_step(arch, LossOptions(), SIZE, batch, weights, autocast, lambda denoiser: denoiser.requires_grad_(True), cuda)


def real_step(arch, weights=torch.float32, autocast=None):
    """(denoiser, losses) of a real micro-batch, and the bytes of every storage that autograd keeps for it."""
    denoiser = arch.load_denoiser(torch.device("cpu"), weights).requires_grad_(True)
    return denoiser, lambda: micro_batch(arch, denoiser, arch.objective(LossOptions()), SIZE, BATCH, autocast or weights)


def kept(denoiser: nn.Module, run, autocast=None) -> dict[int, int]:
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
