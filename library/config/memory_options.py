"""Flags of the memory engine, and their conflicts with each other and with the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from library.config.check import Problem, conflict
from library.config.values import flag, read_bytes, to_bytes

if TYPE_CHECKING:
    from library.config.parse import Config

_IN_BACKWARD = "blocks_to_swap fused_backward_pass blockwise_fused_optimizers"


@dataclass(frozen=True)
class MemoryOptions:
    title: ClassVar[str] = "Memory"

    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: much less memory, "
                                        "about a third slower")
    recompute_policy: str = flag("all", "what is recomputed: everything in a block, or (selective) all but the outputs of matrix "
                                 "products and attention: nearly the speed without, for about half its memory",
                                 choices=("all", "selective"))
    recompute_every: int = flag(1, "recompute each Nth block only: where there is room for the rest", minimum=1)
    cpu_offload_checkpointing: bool = flag(False, "also keep the inputs of blocks in CPU memory until they are recomputed")
    blocks_to_swap: int | None = flag(None, "blocks of the denoiser whose weights wait in CPU memory and pass through the device "
                                      "while their neighbours compute; up to all of them", minimum=0, off="0")
    swap_look_ahead: int = flag(2, "with blocks_to_swap: blocks that are on their way while one computes", minimum=0)
    stream_optimizer_states: bool = flag(False, "with blocks_to_swap: optimizer states wait in CPU memory with their block")
    fused_backward_pass: bool = flag(False, "update each weight, and give up its gradient, as soon as that is known")
    blockwise_fused_optimizers: bool = flag(False, "the same for each block as a whole: fewer, larger updates")
    plan: bool = flag(False, "print what the run would need of memory, disk and time, and exit: no weights are read", saved=False)
    vram_budget: str | None = flag(None, "memory of the graphics card that may be used; of the settings above, those are chosen "
                                   "that fit and cost the least time", metavar="12GB", read=read_bytes)

    @property
    def vram_budget_bytes(self) -> int | None:
        return to_bytes(self.vram_budget) if self.vram_budget else None

    @property
    def unit(self) -> Literal["parameter", "block"] | None:
        """What is updated at once inside the backward pass; None: everything after it. Weights that are streamed have to be
        updated while they are on the device."""
        if self.fused_backward_pass:
            return "parameter"
        return "block" if self.blockwise_fused_optimizers or self.blocks_to_swap else None

    @property
    def recomputes(self) -> bool:
        """What is streamed must be recomputed: autograd would keep looking at weights that are gone."""
        return self.gradient_checkpointing or self.cpu_offload_checkpointing or bool(self.blocks_to_swap)

    def max_grad_norm(self, given: float | None) -> float:
        """``--max_grad_norm`` in force: a norm over all gradients is known after the backward pass only."""
        return given if given is not None else 0.0 if self.unit else 1.0

    def problems(self, config: Config) -> Iterator[Problem]:
        """Combinations that cannot work, or of which one would do nothing."""
        changed = config.changed()
        if self.plan and config.dataset.debug_dataset:
            yield conflict(config, "plan debug_dataset", "shows something else than --debug_dataset", "leave one of the two out")
        if self.fused_backward_pass and self.blockwise_fused_optimizers:
            yield conflict(config, "fused_backward_pass blockwise_fused_optimizers", "contradicts --blockwise_fused_optimizers",
                           "leave one of the two out; --blockwise_fused_optimizers is faster, --fused_backward_pass smaller")
        cause = next((name for name in _IN_BACKWARD.split() if getattr(self, name)), "")
        if self.unit and config.optimizer.max_grad_norm:
            yield conflict(config, f"max_grad_norm {cause}", f"a norm over all gradients is not known when weights are updated "
                           f"during the backward pass, as --{cause} has it", f"set --max_grad_norm 0, or leave --{cause} out")
        if self.unit and config.precision.mixed_precision == "fp16":
            yield conflict(config, f"mixed_precision {cause}", "gradients in fp16 must be looked at as a whole before any weight "
                           f"is updated, which --{cause} does not allow", f"use bf16, or leave --{cause} out")
        for name in ("stream_optimizer_states", "swap_look_ahead"):
            if name in changed and getattr(self, name) and not self.blocks_to_swap:
                yield conflict(config, f"{name} blocks_to_swap", "has no effect without --blocks_to_swap",
                               "add --blocks_to_swap N, or leave it out")
        for name in ("recompute_policy", "recompute_every"):
            if name in changed and not self.recomputes:
                yield conflict(config, f"{name} gradient_checkpointing", "has no effect without --gradient_checkpointing",
                               "add --gradient_checkpointing, or leave it out")
        if self.blocks_to_swap and self.recompute_every > 1:
            yield conflict(config, "recompute_every blocks_to_swap", "blocks that are streamed must be recomputed, each of them",
                           "leave --recompute_every out")
        if self.recompute_policy == "selective" and self.cpu_offload_checkpointing:
            yield conflict(config, "recompute_policy cpu_offload_checkpointing", "keeps on the device what "
                           "--cpu_offload_checkpointing is there to move away", "leave one of the two out")

    def remarks(self, config: Config) -> Iterator[str]:
        """What these flags bring with them."""
        if self.blocks_to_swap and not self.gradient_checkpointing:
            yield f"{config.place('blocks_to_swap')} brings --gradient_checkpointing with it"
        if self.unit and config.optimizer.max_grad_norm is None:
            yield ("weights are updated during the backward pass, when a norm over all gradients is not known: "
                   "--max_grad_norm is 0")
