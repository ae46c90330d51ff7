"""Around the loaded modules: recompute, streaming, optimizer and objective, until a step can be made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from library.architectures.base import Architecture, TextEncoders
from library.config.memory_options import MemoryOptions
from library.config.parse import Config
from library.config.state_options import EmaOptions
from library.data.plan import StepPlan
from library.dist import Runtime
from library.ema import Ema
from library.encode import Encoded
from library.errors import UserError
from library.log import log
from library.loop import Task
from library.memory.boundaries import Boundaries
from library.memory.in_backward import StepInBackward, average_over_ranks
from library.memory.offload import Offload
from library.memory.recompute import Recompute, every
from library.memory.schedule import evenly
from library.memory.streaming import Streaming
from library.memory.transport import open_transport
from library.nan_policy import NanPolicy
from library.optim import rounding, table
from library.optim.groups import Group, assert_partition, named_parameters
from library.optim.schedule import Curve
from library.optim.updater import StepAfterBackward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def weights_dtype(config: Config) -> torch.dtype:
    """The dtype in which trained weights are kept."""
    return DTYPES[config.weights_dtype]


@dataclass(frozen=True)
class Engine:
    """How the denoiser's blocks come to the device."""

    boundaries: Boundaries | None
    streaming: Streaming | None

    def readable(self) -> AbstractContextManager[None]:
        """Within it every weight can be read and written, wherever it lies between steps."""
        return nullcontext() if self.streaming is None else self.streaming.host_weights()


def loading_device(options: MemoryOptions, device: torch.device) -> torch.device:
    """Where the denoiser is loaded to: what is streamed never has room on the device as a whole."""
    return torch.device("cpu") if options.blocks_to_swap else device


def require_blocks(config: Config, arch: Architecture) -> None:
    """UserError when more blocks are to be streamed than the model has. Reads headers only."""
    count = config.memory.blocks_to_swap
    if not count:
        return
    there = len(arch.blocks(arch.meta_denoiser(torch.float32)))
    if count > there:
        raise UserError(f"{count} blocks are to be streamed, but the model has {there}", place=config.place("blocks_to_swap"),
                        remedy=f"give at most {there}, which streams all of them")


def open_engine(options: MemoryOptions, arch: Architecture, denoiser: nn.Module, encoders: TextEncoders,
                device: torch.device) -> Engine:
    """Recompute and streaming, after it is known what trains and before the optimizer is built."""
    blocks = arch.blocks(denoiser)
    count = options.blocks_to_swap or 0
    places = evenly(len(blocks), count)
    recomputed: list[nn.Module] = []
    if options.recomputes:
        text = [block for name, encoder in encoders.modules.items() for block in arch.text_blocks(name, encoder)]
        chosen = {id(block) for block in (*every(blocks, options.recompute_every), *(blocks[place] for place in places), *text)}
        recomputed = [block for block in (*blocks, *text) if id(block) in chosen]
        offload = Offload(open_transport(device)) if options.cpu_offload_checkpointing else None
        Recompute(recomputed, selective=options.recompute_policy == "selective", offload=offload)
    boundaries = Boundaries(blocks) if options.unit else None
    if not count:
        return Engine(boundaries, None)
    streaming = Streaming(boundaries, places, recomputed, open_transport(device), options.swap_look_ahead)
    streaming.move_rest(denoiser)
    log.info("%d of %d blocks wait in CPU memory: %.2f GB; on the device %d of them at a time", count, len(blocks),
             sum(region.numel() for region in streaming.weights.host) / 1e9, streaming.schedule.slots)
    return Engine(boundaries, streaming)


def build_task(config: Config, runtime: Runtime, arch: Architecture, denoiser: nn.Module, encoders: TextEncoders,
               groups: list[Group], engine: Engine, encoded: Encoded, plan: StepPlan, rates: Curve,
               total_steps: int, ema: Ema | None) -> Task:
    """All that a step needs. ``encoders``: those that train."""
    trained = {"": denoiser, **encoders.modules}
    assert_partition(groups, ((f"{prefix}.{name}", parameter) for prefix, module in trained.items()
                              for name, parameter in module.named_parameters()))
    for group in groups:
        log.info("training %s: %.1f M parameters in %s, learning rate %g", group.name,
                 sum(p.numel() for _, p in group.params) / 1e6, str(group.params[0][1].dtype).removeprefix("torch."),
                 group.learning_rate)
    # Gradients that are given up before the backward pass ends are exchanged by the updater, not by a replicated module.
    replicated = runtime.replicate if config.memory.unit is None else (lambda module: module)
    return Task(
        runtime=runtime,
        arch=arch,
        denoiser=replicated(denoiser),
        encoders=replace(encoders, modules={name: replicated(module) for name, module in encoders.modules.items()}),
        objective=arch.objective(config.loss),
        updater=build_updater(config, groups, engine, rates, runtime.world_size),
        encoded=encoded,
        plan=plan,
        seed=config.general.seed,
        first_step=0,
        total_steps=total_steps,
        workers=config.dataset.workers(latents_cached=encoded.train.latents is not None),
        scaler=torch.amp.GradScaler(runtime.device.type) if config.precision.mixed_precision == "fp16" else None,
        nans=NanPolicy(runtime, config.training.nan_policy),
        ema=ema,
        readable=engine.readable,
    )


def open_average(options: EmaOptions, groups: Sequence[Group], engine: Engine) -> Ema | None:
    """The running average of what trains, where one is asked for."""
    if not options.ema_decay:
        return None
    with engine.readable():
        device = torch.device("cpu") if options.ema_device == "cpu" else None
        return Ema(named_parameters(groups), options.ema_decay, device, lagged=False if engine.streaming else None)


def build_updater(config: Config, groups: Sequence[Group], engine: Engine, rates: Curve,
                  ranks: int) -> StepAfterBackward | StepInBackward:
    options, memory = config.optimizer, config.memory
    rounded = rounding.StochasticRounding(groups, config.general.seed) if weights_dtype(config) is torch.bfloat16 else None
    stepped = rounded.groups if rounded else groups
    optimizer = table.build(options.chosen_type, options.optimizer_args, stepped, options.learning_rate)
    if memory.unit is None:
        return StepAfterBackward(optimizer, groups, rates, memory.max_grad_norm(options.max_grad_norm), rounded)
    # The loop looks at the losses before the backward pass, so that no unit has to wait for a look at its gradients.
    return StepInBackward(optimizer, groups, rates, memory.unit, engine.boundaries, engine.streaming, rounded,
                          average=average_over_ranks if ranks > 1 else None, guard=False,
                          stream_states=memory.stream_optimizer_states)
