"""The process group, the device, precision and seeds: the only module that touches global state of torch."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import nn

from library.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """Where and how this process computes. ``compute_dtype`` is the dtype of matrix products under autocast; ``beside_main``:
    how many processes, rank 0 and those after it, certainly see the same disk as rank 0."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    world_size: int
    compute_dtype: torch.dtype
    beside_main: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for one forward pass; nothing at all in float32."""
        if self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def replicate(self, module: nn.Module) -> nn.Module:
        """DistributedDataParallel around ``module`` when there are several processes and it trains, else ``module`` itself."""
        trains = any(parameter.requires_grad for parameter in module.parameters())
        return self.accelerator.prepare_model(module) if self.world_size > 1 and trains else module

    def no_sync(self, module: nn.Module) -> AbstractContextManager:
        """Skip the exchange of gradients: for all but the last micro-batch of a step."""
        return module.no_sync() if hasattr(module, "no_sync") else nullcontext()

    def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, reduction="sum") if self.world_size > 1 else value

    def join_over_ranks(self, names: list[str]) -> list[str]:
        """The names of all ranks, without repeats, in the same order everywhere."""
        return list(dict.fromkeys(name for part in self.exchange(names) for name in part))

    def exchange(self, value: object) -> list:
        """What every rank has, as a list in the order of the ranks. Values are pickled: keep them below some hundred MB."""
        if self.world_size == 1:
            return [value]
        gathered: list = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def require_agreement(self, what: str, value: str) -> None:
        """Raise UserError where the processes do not see the same: they would wait for each other for ever."""
        if len(set(self.exchange(value))) > 1:
            raise UserError(f"the processes of this run do not see the same {what}",
                            remedy="make sure that nothing changes it while the run starts, and that all machines share it")

    def any_rank(self, flag: bool) -> bool:
        """True everywhere as soon as one rank says so (ranks must agree on when to stop)."""
        if self.world_size == 1:
            return flag
        return bool(self.sum_over_ranks(torch.tensor([float(flag)], device=self.device)).item())

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group together. NCCL complains about a run that just ends; gloo must be left to the end of the
        process: destroying it while the replicated module still refers to it made the first rank hang now and then."""
        if self.world_size > 1:
            self.wait()
            if torch.distributed.get_backend() == "nccl":
                torch.distributed.destroy_process_group()


# While the first rank encodes a dataset, draws previews or writes 24 GB to a slow disk, the others wait at the next exchange.
# torch's own limit of ten minutes would end the run there; a rank that died is noticed by the launcher without it.
LONGEST_WAIT = timedelta(days=7)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_runtime(mixed_precision: str, seed: int) -> Runtime:
    """Join the process group that the launcher prepared, pick the device, seed torch, numpy and random.

    accelerate is used for launch, devices and replication. Autocast, accumulation and the order of samples are ours:
    they must be the same for every launcher and exact after a resume.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    # Without a device, accelerate joins the processes only when told so: each would train alone and write the same files.
    accelerator = Accelerator(mixed_precision="no", cpu=launched > 1 and not torch.accelerator.is_available(),
                              kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT),
                                               # gradients lie in the buckets that are exchanged, not beside them as copies
                                               DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    if accelerator.num_processes != launched:
        raise UserError(f"{launched} processes were started, but accelerate joins only {accelerator.num_processes}",
                        remedy="start one process (plain python), or as many as there are devices")
    set_seed(seed)
    alone = Runtime(accelerator, accelerator.device, accelerator.process_index, accelerator.num_processes,
                    DTYPES[mixed_precision])
    # Launchers number the processes machine by machine, and tell each how many there are on its own.
    on_its_machine = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return replace(alone, beside_main=min(alone.exchange(on_its_machine)[0], alone.world_size))


_LAUNCHER = os.getppid() if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys() else None


def launcher_is_gone() -> bool:
    """True once the launcher that started this process has died: it does not pass signals on, and nobody would notice.

    A shell is no launcher: a run started with nohup goes on after the terminal is closed.
    """
    return _LAUNCHER is not None and os.name != "nt" and os.getppid() != _LAUNCHER
