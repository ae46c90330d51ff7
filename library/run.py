"""A training run from configuration to files, in order: data plan, caches, weights, optimizer, loop, export.

The first part needs no torch, so that a dataset mistake costs a second; heavy modules are imported where they are first used.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from library.architectures.base import NO_ENCODERS
from library.config.parse import Config, Entry, to_toml
from library.data import findings
from library.data import plan as plans
from library.inputs import DataPlan, begin_log, count_tokens, course_of, open_inputs, show_data, tell
from library.log import log
from library.optim import fitting, schedule
from library.out_of_memory import ENCODING, LOADING, telling
from library.upload import Uploader

if TYPE_CHECKING:
    from library.architectures.base import Architecture
    from library.dist import Runtime
    from library.encode import Encoded
    from library.optim.groups import Group
    from library.planning import RunPlan
    from library.report.report import Report
    from library.run_metadata import Facts


def run(entry: Entry, config: Config) -> int:
    """Train as ``config`` says; returns the exit status. Raises UserError for everything the user can mend."""
    started = time.monotonic()
    begin_log(config)
    if config.dataset.debug_dataset:
        return show_data(entry, config)
    data, arch = open_inputs(entry, config)
    uploader = open_uploader(config)
    method = importlib.import_module(entry.method)
    general, optimizer = config.general, config.optimizer
    plan_memory = lru_cache(lambda: open_plan(config, data, arch, method))
    if config.memory.plan:
        return show_plan(plan_memory)
    config = fit_budget(config, plan_memory)

    from library import states
    from library.build import build_task, loading_device, open_average, open_engine, weights_dtype
    from library.ending import to_the_end
    from library.optim.groups import named_parameters
    from library.memory.report import beside_plan
    from library.outputs import Outputs
    from library.planning import advice_for, step_flops
    from library.validation import Validating

    runtime = join(config, data)
    saved = states.find(config, runtime)
    plan = plans.StepPlan(data.items, batch_sizes=data.batch_sizes, seed=general.seed, world_size=runtime.world_size,
                          accumulation=config.training.gradient_accumulation_steps,
                          stride=states.kept_stride(saved, runtime.world_size))
    total_steps = count_steps(config, plan.steps_per_epoch)
    training = tuple(arch.encoder_rates(optimizer.learning_rate))
    frozen = tuple(name for name in arch.text_encoders if name not in training)
    facts = states.facts_of_run(entry, config, arch, data.specs, data.items, plan, total_steps, frozen, saved)
    if saved is not None:
        states.check(saved, facts, config)
    for line in plans.report(data.items):
        log.info(line)
    if runtime.is_main:  # it may read pictures of equal length to see whether they are the same
        captions, prompts = count_tokens(entry, config, data)
        tell(findings.gather(data.scan, data.selection, plan, captions) + findings.too_long(prompts, "preview prompt"))
    rates = schedule.from_options(optimizer, total_steps)
    encoded = encode(config, data, arch, runtime, total_steps, training)
    with telling(*LOADING):
        denoiser = arch.load_denoiser(loading_device(config.memory, runtime.device), weights_dtype(config))
        encoders = arch.load_text_encoders(training, runtime.device, weights_dtype(config)) if training else NO_ENCODERS
        groups = method.prepare(arch, denoiser, encoders, optimizer.learning_rate)
        engine = open_engine(config.memory, arch, denoiser, encoders, runtime.device)
        ema = open_average(config.ema, groups, engine)
    task = build_task(config, runtime, arch, denoiser, encoders, groups, engine, encoded, plan, rates, total_steps, ema)
    weights = named_parameters(groups)
    if saved is not None:
        task = states.restore(saved, task, weights, ema, engine.readable)

    keeping = states.Keeping(
        lambda step, epoch, logged: states.contents(step, epoch, replace(facts, **vars(logged)), config.saving.output_name, task,
                                                    weights, ema),
        lambda path: states.go_back(path, runtime, task, weights, ema, engine.readable), task.first_step,
        saved and saved.path, facts.logged, ema,
        open_report(entry, config, data, plan, total_steps,
                    fitting.planned_rates(config, rates, groups, total_steps)) if runtime.is_main else None)
    with Outputs(config, runtime, arch, method, denoiser, encoders, encoded, data.prompts, data.resolution,
                 total_steps=total_steps, steps_per_epoch=plan.steps_per_epoch, reading=engine.readable,
                 validate=Validating(task, config.dataset, data.batch_sizes), uploader=uploader,
                 rates=partial(task.updater.rates_at, total_steps),
                 delivered=partial(states.delivered, task.updater, engine.readable),
                 step_flops=step_flops(config, arch, method.prepare, plan), keeping=keeping,
                 facts=facts_of(config, data, arch, plan, groups, rates, total_steps)) as outputs:
        log.info("ready after %.1f s; steps in all: %d", time.monotonic() - started, total_steps)
        outputs.before_training()
        status = to_the_end(task, outputs, lambda error: advice_for(error, plan_memory))
        if config.memory.vram_budget:
            log.info(beside_plan(plan_memory().needs, runtime.device))
    runtime.close()
    return status


def open_plan(config: Config, data: DataPlan, arch: Architecture, method: Any) -> RunPlan:
    """What the run needs; ``--plan`` is about graphics cards, whether there is one here or not."""
    import torch

    from library.planning import RunPlan

    cuda = config.memory.plan or torch.cuda.is_available()
    return RunPlan(config, data.items, data.batch_sizes, arch, method.prepare, cuda)


def show_plan(plan_memory: Callable[[], RunPlan]) -> int:
    """Print the table of ``--plan`` and draw the learning rate."""
    if os.environ.get("RANK", "0") == "0":
        print(plan_memory().text(), flush=True)
        log.info("the course of the learning rate is drawn in %s", plan_memory().draw_rates())
    return 0


def fit_budget(config: Config, plan_memory: Callable[[], RunPlan]) -> Config:
    """``config`` with the memory flags that ``--vram_budget`` chooses. UserError when nothing fits."""
    if not config.memory.vram_budget:
        return config
    plan = plan_memory()
    for note in plan.notes:
        log.info(note)
    return plan.config


def fill_caches(entry: Entry, config: Config) -> None:
    """Encode what a run with these settings would keep on disk, and nothing else."""
    begin_log(config)
    data, arch = open_inputs(entry, config)
    runtime = join(config, data)
    if runtime.is_main:
        tell(findings.too_long(count_tokens(entry, config, replace(data, prompts=()))[0]))
    kept = replace(config.caching, cache_latents=False, cache_text_encoder_outputs=False)  # these two alone keep it in memory
    encode(replace(config, caching=kept), replace(data, prompts=()), arch, runtime, config.training.max_train_steps,
           tuple(arch.encoder_rates(config.optimizer.learning_rate)))
    runtime.close()


def open_uploader(config: Config) -> Uploader:
    """What uploads to the hub; on the first rank its access token is tried out now. UserError for one that will not do."""
    uploader = Uploader(config.hub)
    if os.environ.get("RANK", "0") == "0":
        uploader.check()
    return uploader


def facts_of(config: Config, data: DataPlan, arch: Architecture, plan: plans.StepPlan, groups: Sequence[Group],
             rates: schedule.Curve, total_steps: int) -> Facts:
    """What saved files say of this run."""
    from library.run_metadata import Facts

    encoders = arch.encoder_rates(config.optimizer.learning_rate)
    return Facts(
        config, data.items, held_out=len(data.selection.validation),
        rates={group.name: group.learning_rate for group in groups if group.name not in encoders}, encoder_rates=encoders,
        batches_per_epoch=plan.batches_per_epoch, total_steps=total_steps, steps_per_epoch=plan.steps_per_epoch,
        warmup_steps=getattr(rates, "warmup_steps", 0), world_size=plan.world_size,
        objective=getattr(arch, "objective_options", config.objective), base_version=getattr(arch, "base_version", None))


def open_report(entry: Entry, config: Config, data: DataPlan, plan: plans.StepPlan, total_steps: int,
                rates: Callable[[int], Mapping[str, float]] | None) -> Report:
    """The page about this run, kept up to date beside its results."""
    from library.report.report import Report, data_sheet

    course = course_of(config, data, total_steps)
    return Report(config.saving.output_dir, config.saving.output_name, total_steps=total_steps, program=entry.program,
                  settings=to_toml(config), changed=config.changed(), rates=rates,
                  data=lambda: data_sheet(data.items, course, plan.steps_per_epoch, config.caching.variants))


def join(config: Config, data: DataPlan) -> Runtime:
    """The process group, once it is sure that all processes will train on the same."""
    from library.dist import open_runtime

    runtime = open_runtime(config.precision.mixed_precision, config.general.seed)
    runtime.require_agreement("pictures and captions", data.items.digest())
    return runtime


def encode(config: Config, data: DataPlan, arch: Architecture, runtime: Runtime, total_steps: int,
           training: Sequence[str]) -> Encoded:
    """Fill the caches that were asked for; what is not cached is encoded for each batch. ``training``: encoders that train."""
    from library.encode import encode_all

    course = course_of(config, data, total_steps)
    with telling(*ENCODING):
        return encode_all(arch, runtime, config.caching, data.selection, course, max(data.batch_sizes), data.prompts, training,
                          remember=data.scan.remember)


def count_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: ``--max_train_epochs`` wins over ``--max_train_steps``."""
    epochs = config.training.max_train_epochs
    return epochs * steps_per_epoch if epochs else config.training.max_train_steps
