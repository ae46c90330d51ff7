"""What a run would need, before a weight is read: the memory planner put to work on a configuration."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from library.architectures.base import NO_ENCODERS, Architecture
from library.config.loss_options import LossOptions
from library.config.parse import DEFAULT
from library.data.plan import GroupFacts, StepPlan, group_facts
from library.errors import UserError
from library.memory.cards import CARDS, Card, named, with_memory
from library.memory.measure import measure
from library.memory.measured import Measured
from library.memory.needs import Needs
from library.memory.plan_text import WIDTH, cards_table, describe
from library.memory.planner import Planner, gigabytes
from library.memory.setting import Fixed, Optimizer, Setting
from library.objectives.noise import Draws
from library.optim import fitting, schedule, states, table
from library.optim.groups import Group
from library.out_of_memory import out_of_memory, told
from library.plots import write_rate_curve
from library.step import training_losses
from library.step_flops import StepFlops

if TYPE_CHECKING:
    from library.config.parse import Config
    from library.data.items import Items

_COMPUTE = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RunPlan:
    """The plan of one run. ``prepare`` switches on the gradients of what trains. Measures at once, which takes seconds.

    ``cuda``: for a graphics card, whether there is one here or not; else for the CPU as the device. With ``--vram_budget`` the
    memory flags that were not given are chosen here: ``config`` is the one to go on with. UserError when nothing fits.
    """

    def __init__(self, config: Config, items: Items, batch_sizes: Sequence[int], arch: Architecture,
                 prepare: Callable[..., Sequence[Group]], cuda: bool):
        self.config, self._arch, self._cuda = config, arch, cuda
        self.card = _this_card()
        self.largest = max(group_facts(items, batch_sizes), key=_work)
        self.notes: list[str] = []
        rates = arch.encoder_rates(config.optimizer.learning_rate)
        self._rates, self._lengths = {"denoiser": config.optimizer.learning_rate, **rates}, (items, batch_sizes)
        if rates:
            self.notes.append(f"not counted: {', '.join(rates)}, which train too")

        def trains(denoiser: nn.Module) -> None:
            if rates:
                denoiser.requires_grad_(True)
                return
            groups = prepare(arch, denoiser, NO_ENCODERS, config.optimizer.learning_rate)
            self._rates = {group.name: group.learning_rate for group in groups}
        self.measured = measure_step(arch, config.loss, self.largest.bucket, _samples(self.largest),
                                     _WEIGHTS[config.weights_dtype], _COMPUTE[config.precision.mixed_precision], trains, cuda)
        self.planner = Planner(self.measured, self._fixed(items, tuple(rates)), self._allowed)
        if config.memory.vram_budget_bytes:
            self._choose(config.memory.vram_budget_bytes)

    @property
    def needs(self) -> Needs:
        """Of the settings as they are."""
        return self.planner.needs(setting_of(self.config))

    def _allowed(self, setting: Setting) -> bool:
        """There are flags for it, and it contradicts none that was given."""
        config = self.config
        clipped = setting.unit != "model" and bool(config.optimizer.max_grad_norm)  # which was asked for by name
        scaled = setting.unit != "model" and config.precision.mixed_precision == "fp16"
        record = table.find(config.optimizer.chosen_type)
        summed = setting.unit != "model" and not fitting.steps_in_backward(record)
        stuck = setting.stream_states and not fitting.streams_states(record)
        return offered(setting) and not (clipped or scaled or summed or stuck) and all(
            config.origins[name] == DEFAULT or getattr(config.memory, name) == value for name, value in flags_of(setting).items())

    def _choose(self, budget: int) -> None:
        """Let the memory flags be those that fit ``budget`` best."""
        card = self.card or with_memory(budget)
        plain = Planner(self.measured, self.planner.fixed, lambda one: one.unit == "model" and self._allowed(one))
        try:  # what changes no number comes first: steps inside the backward pass know no norm of all gradients to clip by
            choice = plain.choose(budget, card)
        except UserError:
            choice = self.planner.choose(budget, card)
        setting = choice.needs.setting
        if setting.unit != "model" and self.config.memory.unit is None:
            self.notes.append("weights are updated during the backward pass now, so --max_grad_norm is 0")
        self.config = replace(self.config, memory=replace(self.config.memory, **flags_of(setting)))
        self.notes.append(f"--vram_budget {self.config.memory.vram_budget}: {setting.words()}; {choice.why()}")
        if choice.needs.encoding_bytes > budget:
            self.notes.append(f"before training, filling caches takes at least {gigabytes(choice.needs.encoding_bytes)}")

    def advice(self) -> str:
        """One line for a run that ran out of memory: what to change, and what that would save."""
        needs = self.needs
        planner = Planner(self.measured, self.planner.fixed, offered)  # a flag that was given may have been a mistake
        line = planner.advise(needs.setting, self.card or with_memory(needs.device_bytes))
        if line is None and _samples(self.largest) > 1:
            line = f"lower the batch size from {self.largest.batch_size}"
        return line or "lower the resolution, or use an optimizer with smaller states such as Adafactor"

    def text(self) -> str:
        """What ``--plan`` prints."""
        config, facts, needs = self.config, self.largest, self.needs
        products = config.precision.mixed_precision.replace("no", config.weights_dtype)
        precision = f"weights {config.weights_dtype}, products {products}"
        size = f"{self.measured.parameters:,} parameters, {len(self.measured.blocks)} blocks"
        head = [f"Memory plan of {config.entry.program}: {size}",
                f"  {_samples(facts)} x {facts.bucket[0]}x{facts.bucket[1]} pixels (the largest batch), {precision}, "
                f"{self.planner.fixed.optimizer.name}", f"  {needs.setting.words()}"]
        notes = [line for note in self.notes
                 for line in textwrap.wrap(note, WIDTH - 2, initial_indent="- ", subsequent_indent="  ")]
        lines = [*head, *describe(needs, self.card), *self._cards(needs)]
        return "\n".join([*lines, *(["", *notes] if notes else []), "", "No weights were read, and nothing was trained."])

    def draw_rates(self) -> Path:
        """Draw the course of the learning rates over the run; returns where."""
        config, (items, batch_sizes) = self.config, self._lengths
        plan = StepPlan(items, batch_sizes, config.general.seed, int(os.environ.get("WORLD_SIZE") or 1),
                        config.training.gradient_accumulation_steps)
        epochs = config.training.max_train_epochs
        total = epochs * plan.steps_per_epoch if epochs else config.training.max_train_steps
        options = config.optimizer
        steps, values = schedule.curve(schedule.from_options(options, total), total, list(self._rates.values()))
        own = table.find(options.chosen_type).own_rate
        title = (options.lr_scheduler_type or options.lr_scheduler) + own * ", times the step size that the optimizer finds"
        path = config.saving.output_dir / f"{config.saving.output_name}_schedule.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rate_curve(steps, dict(zip(self._rates, values, strict=True)), path, title)
        return path

    def _cards(self, needs: Needs) -> list[str]:
        """What would fit elsewhere, whatever flags were given here."""
        return cards_table(Planner(self.measured, self.planner.fixed, offered), needs, CARDS)

    def _fixed(self, items: Items, training: Sequence[str]) -> Fixed:
        config, arch = self.config, self._arch
        caching, ranks = config.caching, int(os.environ.get("WORLD_SIZE") or 1)
        counts, itemsize = arch.encoder_parameters(), 4 if config.precision.mixed_precision == "no" else 2
        vae, text = itemsize * counts["vae"], itemsize * sum(n for name, n in counts.items() if name not in ("vae", *training))
        staying = (0 if caching.latents_cached else vae) + (0 if caching.text_cached else text)
        latents, texts = self._cached_bytes(items)
        on_disk = (latents if caching.cache_latents_to_disk else 0, texts if caching.cache_text_encoder_outputs_to_disk else 0)
        in_memory = (latents if caching.latents_cached else 0) - on_disk[0] + (texts if caching.text_cached else 0) - on_disk[1]
        stored = {"fp32": 4, "bf16": 2, "fp16": 2}[config.saving.stored_dtype(config.weights_dtype)]
        return Fixed(_optimizer(config), config.training.gradient_accumulation_steps, ranks, config.weights_dtype == "bf16",
                     single=config.precision.mixed_precision == "no", encoders=staying,
                     encoding=max(vae if caching.latents_cached else 0, text if caching.text_cached else 0), cached=in_memory,
                     cached_on_disk=sum(on_disk), checkpoint=stored * self.measured.parameters, cuda=self._cuda)

    def _cached_bytes(self, items: Items) -> tuple[int, int]:
        """About what caches of all pictures and captions take."""
        latent = self._arch.latent
        cells = sum(facts.pictures * facts.bucket[0] * facts.bucket[1] for facts in group_facts(items, [1] * len(items.specs)))
        text = sum(tensor.numel() * tensor.itemsize for tensor in self._arch.meta_text(1, torch.bfloat16).values())
        return 2 * latent.channels * cells // latent.factor**2, text * len(items) * (self.config.caching.variants or 1)


def step_flops(config: Config, arch: Architecture, prepare: Callable[..., object], plan: StepPlan) -> StepFlops | None:
    """Operations of each step. None where text encoders train: their part is not known."""
    rate = config.optimizer.learning_rate
    if arch.encoder_rates(rate):
        return None

    def of_size(size: tuple[int, int]) -> float:
        measured = measure_step(arch, config.loss, size, 1, _WEIGHTS[config.weights_dtype],
                                _COMPUTE[config.precision.mixed_precision],
                                lambda denoiser: prepare(arch, denoiser, NO_ENCODERS, rate))
        return measured.forward.flops + measured.backward.flops
    return StepFlops(plan, of_size)


def advice_for(error: Exception, plan: Callable[[], RunPlan]) -> UserError | None:
    """What to say in place of an error of torch that means that there was too little memory; None for all other errors."""
    where = out_of_memory(error)
    if where is None:
        return None
    if where != "the device":
        return told(error)
    try:
        advice = plan().advice()
    except UserError:  # there is no plan of this model
        advice = "add --gradient_checkpointing or --blocks_to_swap N, or lower the batch size"
    return told(error, remedy=advice)


def _this_card() -> Card | None:
    """The graphics card of this machine, with its own memory; None without one, or for one that is not in the table."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    card = named(properties.name)
    return card and replace(card, memory=properties.total_memory)


def _work(facts: GroupFacts) -> int:
    return _samples(facts) * facts.bucket[0] * facts.bucket[1]


def _samples(facts: GroupFacts) -> int:
    return min(facts.batch_size, facts.showings)


def _optimizer(config: Config) -> Optimizer:
    options = config.optimizer
    record, of_shape = table.find(options.chosen_type), states.state_bytes(options.chosen_type, options.optimizer_args)
    eager = not (record.fused or record.package == "bitsandbytes")
    return Optimizer(record.name, lambda weight: of_shape(weight.shape), 8 if eager else 0,  # two float32 copies on the way
                     record.per_parameter)


def setting_of(config: Config) -> Setting:
    """The memory flags, as the planner sees them. A new flag has its line here and in ``flags_of`` and ``offered``."""
    memory = config.memory
    policy = memory.recompute_policy if memory.recomputes else "none"
    return Setting(policy, memory.recompute_every if policy != "none" else 1, memory.cpu_offload_checkpointing,
                   memory.blocks_to_swap or 0, memory.swap_look_ahead, memory.unit or "model", memory.stream_optimizer_states)


def flags_of(setting: Setting) -> dict[str, Any]:
    """The values of the memory flags that make ``setting``."""
    return {"gradient_checkpointing": setting.recompute != "none",
            "recompute_policy": setting.recompute if setting.recompute != "none" else "all", "recompute_every": setting.every,
            "cpu_offload_checkpointing": setting.offload, "blocks_to_swap": setting.streamed or None,
            "swap_look_ahead": setting.look_ahead, "stream_optimizer_states": setting.stream_states,
            "fused_backward_pass": setting.unit == "parameter", "blockwise_fused_optimizers": setting.unit == "block"}


def offered(setting: Setting) -> bool:
    """Whether there are flags for it."""
    return not (setting.streamed and setting.unit == "model")


def measure_step(arch: Architecture, loss: LossOptions, size: tuple[int, int], batch: int, weights: torch.dtype,
                 autocast: torch.dtype | None, trains: Callable[[nn.Module], object], cuda: bool = True) -> Measured:
    """A micro-batch of ``batch`` pictures of ``size`` (width, height), under ``--mixed_precision`` as ``autocast`` says.
    ``trains`` switches gradients on for what trains."""
    denoiser = arch.meta_denoiser(weights)
    trains(denoiser)
    objective = arch.objective(loss)

    def losses() -> torch.Tensor:
        return micro_batch(arch, denoiser, objective, size, batch, autocast or weights)
    return measure(denoiser, arch.blocks(denoiser), losses, autocast, cuda)


def micro_batch(arch: Architecture, denoiser: nn.Module, objective: object, size: tuple[int, int], batch: int,
                text_dtype: torch.dtype) -> torch.Tensor:
    """(B,) losses of a made-up micro-batch, as ``loop.py`` computes them of a real one. Masks are of full texts,
    and have a memory in any case."""
    latent = (arch.latent.channels, size[1] // arch.latent.factor, size[0] // arch.latent.factor)
    rows = tuple(str(row) for row in range(batch))
    draws = Draws(torch.zeros(batch, *latent), torch.zeros(batch), torch.zeros(batch), rows)
    text = arch.meta_text(batch, text_dtype)
    with unset_fake_temporarily():
        masks = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in text.items() if tensor.dtype is torch.bool}
    text = arch.vary_text({**text, **masks}, draws)
    return training_losses(arch, denoiser, objective, torch.zeros(batch, *latent), text, torch.zeros(batch, 6, dtype=torch.int64),
                           torch.ones(batch), None, draws)
