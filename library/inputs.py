"""What a run is given: settings, pictures, prompts and the model's files, all read as far as their headers.

Needs no torch, so that a dataset mistake costs a second; heavy modules are imported where they are first used.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoint.metadata import thumbnail_url
from library.config.parse import Config, Entry
from library.config.save_formats import SUFFIXES
from library.data import findings, scan, select, spec
from library.data.items import Items
from library.data.keys import folder_of
from library.data.showing import Course
from library.data.tokens import Counted, count_longest
from library.errors import UserError, raise_all
from library.log import log, setup_logging
from library.optim import fitting
from library.prompts import Prompt, parse_prompts, with_seeds
from library.saving import endangered
from library.trackers import tracker_arguments

if TYPE_CHECKING:
    from library.architectures.base import Architecture, ArchitectureModule
    from library.data.tokens import TokenMeter

CAPTIONS_COUNTED = 2000  # the longest ones: about a second


@dataclass(frozen=True)
class DataPlan:
    """Everything known about the data before a weight is read."""

    specs: tuple[spec.DatasetSpec, ...]
    scan: scan.Scan
    selection: select.Selection
    prompts: tuple[Prompt, ...]

    @property
    def items(self) -> Items:
        return self.selection.train

    @property
    def batch_sizes(self) -> list[int]:
        return [dataset.batch_size for dataset in self.specs]

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of the dataset with the largest area: what the file's metadata states."""
        return max((dataset.resolution for dataset in self.specs), key=lambda size: size[0] * size[1])


def begin_log(config: Config) -> None:
    general = config.general
    setup_logging(general.console_log_level, general.console_log_file, general.console_log_simple,
                  is_main=os.environ.get("RANK", "0") == "0", secrets=config.secrets())
    for note in config.notes:
        log.info(note)


def open_inputs(entry: Entry, config: Config) -> tuple[DataPlan, Architecture]:
    """The data and the model's files, both only as far as their headers: all refusals happen here."""
    data = read_data(config, also=[lambda: fitting.require_fit(config), lambda: _check_thumbnail(config),
                                   lambda: tracker_arguments(config.logging.log_tracker_config)])
    fitting.try_out(config)  # which takes torch
    arch = architecture_of(entry).open_architecture(config.model, config.architecture, config.objective)
    for line in arch.describe().splitlines():
        log.info(line)
    if config.memory.blocks_to_swap:
        from library.build import require_blocks

        require_blocks(config, arch)
    suffix = SUFFIXES[config.saving.save_model_as or arch.save_format]
    for path in endangered(config.saving.output_dir, config.saving.output_name, arch.files(), suffix):
        raise UserError(f"this run would write over {path}, which it reads", place=config.place("output_name"),
                        remedy="choose another --output_name or --output_dir")
    return data, arch


def read_data(config: Config, also: Sequence[Callable[[], object]] = ()) -> DataPlan:
    """Dataset file, pictures' headers, captions, preview prompts. Mistakes in all of them, and in ``also``, are told together."""
    step = config.architecture.latent.pixel_step

    def read_pictures() -> tuple[tuple[spec.DatasetSpec, ...], scan.Scan, select.Selection]:
        specs, scanned = find_pictures(config)
        scanned.raise_errors()
        return specs, scanned, select.select(scanned.items)

    def read_prompts() -> tuple[Prompt, ...]:
        if config.sampling.sample_prompts is None or not config.sampling.scheduled:
            return ()
        parsed = parse_prompts(config.sampling.sample_prompts, step, config.architecture.preview,
                               getattr(config.architecture, "samplers", ()))
        for note in parsed.notes:
            log.info(note)
        return with_seeds(parsed.prompts)

    results, errors = [], []
    for read in (read_pictures, read_prompts, *also):
        try:
            results.append(read())
        except UserError as error:
            errors.append(error)
    raise_all(errors)
    (specs, scanned, selection), prompts = results[:2]
    return DataPlan(specs, scanned, selection, prompts)


def find_pictures(config: Config) -> tuple[tuple[spec.DatasetSpec, ...], scan.Scan]:
    """The dataset's settings, and every picture they name with all that is wrong with it."""
    caching = config.caching
    specs = spec.load(config.dataset, caching, config.architecture.latent.pixel_step, config.place)

    def index_dir(subset: spec.SubsetSpec) -> Path | None:
        root = subset.image_dir or (subset.metadata_file.parent if subset.metadata_file else None)
        kept = root is not None and (caching.on_disk or subset.cache_info)
        return folder_of(root, caching.cache_dir) if kept else None

    return specs, scan.scan(specs, index_dir=index_dir, check=caching.check)


def _check_thumbnail(config: Config) -> None:
    """Before the training, and not when its result is to be saved."""
    if config.metadata.metadata_thumbnail is not None and not config.metadata.no_metadata:
        thumbnail_url(config.metadata.metadata_thumbnail)


def architecture_of(entry: Entry) -> ArchitectureModule:
    return importlib.import_module(entry.architecture)  # type: ignore[return-value]  # a module has no methods to compare


def course_of(config: Config, data: DataPlan, total_steps: int) -> Course:
    return Course(config.general.seed, total_steps, config.caching.variants, data.specs[0].prior_loss_weight)


def open_meter(entry: Entry, config: Config) -> TokenMeter:
    """Counts tokens of texts before an encoder is loaded. UserError where the tokenizers cannot be opened."""
    return architecture_of(entry).open_token_meter(config.model, config.architecture)


def count_tokens(entry: Entry, config: Config, data: DataPlan) -> tuple[Counted, Counted]:
    """Tokens of the longest captions and of all preview prompts; of none where the tokenizers cannot be opened."""
    try:
        meter = open_meter(entry, config)
    except UserError as error:
        log.info("whether captions are too long is not known: %s", error)
        return Counted(), Counted()
    places = {words: place for prompt in reversed(data.prompts)
              for words, place in ((prompt.negative, f"{prompt.place}, negative prompt"), (prompt.text, prompt.place))}
    prompts = list(zip(places.values(), meter(list(places)), strict=True))
    return count_longest(data.items, config.general.seed, meter, CAPTIONS_COUNTED), Counted(prompts)


def tell(found: Sequence[findings.Finding]) -> None:
    """What the data looks like, and what is wrong with it, in the log."""
    for finding, line in zip(found, findings.brief(found), strict=True):
        log.log({"note": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[finding.severity], line)


def show_data(entry: Entry, config: Config) -> int:
    """Write the page of ``--debug_dataset``: what the model would see of the data, and what is wrong with it."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    from library.data import page

    _, scanned = find_pictures(config)
    training, path = config.training, config.saving.output_dir / f"{config.saving.output_name}_dataset.html"
    facts = page.Run(config.general.seed, training.max_train_steps, training.max_train_epochs, config.caching.variants,
                     training.gradient_accumulation_steps, int(os.environ.get("WORLD_SIZE") or 1))
    tell(page.write(path, scanned, facts, lambda: open_meter(entry, config)))
    log.info("the data is shown in %s; nothing was trained", path)
    return 0
