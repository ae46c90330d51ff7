"""Conflicts between settings, found before anything is read or written; each names the setting to change, and to what."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.data_options import VALIDATION_SCHEDULE
from library.config.save_formats import SUFFIXES, is_pipeline
from library.config.schema import READ_BY, installed
from library.config.values import show
from library.errors import UserError, nearest, raise_all

if TYPE_CHECKING:
    from library.config.parse import Config

# The flags that a conflict is about (the one to change first), and the conflict
Problem = tuple[frozenset[str], UserError]


def check(config: Config) -> None:
    """Raise UserError(s) with every conflict in the configuration."""
    raise_all([error for _, error in problems(config)])


def problems(config: Config) -> list[Problem]:
    """Every conflict, with the flags it follows from.

    The options class of any section may add its own with a method ``problems(config)`` that yields the same pairs.
    """
    found: list[Problem] = []
    for rule in (_required, _files, _model, _source, _output, _precision, _length, _optimizer, _buckets, _validation,
                 _caching, _saving, _hub, _sampling, _logging):
        found += rule(config)
    for section in config.entry.sections():
        own = getattr(getattr(config, section), "problems", None)
        found += own(config) if own else ()
    return found


def conflict(config: Config, flags: str, message: str, remedy: str) -> Problem:
    """``flags``: names separated by blanks; the first is where the user has to look."""
    names = flags.split()
    return frozenset(names), UserError(message, place=config.place(names[0]), remedy=remedy)


def missing_file(config: Config, flag: str, path: Path) -> Problem | None:
    """The conflict of a path that is not there, with the nearest name in its folder."""
    if path.exists():
        return None
    beside = Path(config.place(flag).rsplit(":", 2)[0]).parent / path  # of the file that names it, when it is not a flag
    if not config.place(flag).startswith("--") and beside.exists():
        return conflict(config, flag, f"no such file or folder: {path}",
                        f"paths in this file are looked up from {Path.cwd()}: write {beside}, or start there")
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if path.suffix in ("", entry.suffix) or entry.stem == path.stem]
        remedy = nearest(path.name, siblings) or "check the spelling of the path"
    except OSError:
        remedy = f"there is no folder {path.parent} either; paths are looked up from {Path.cwd()}"
    return conflict(config, flag, f"no such file or folder: {path}", remedy)


def _required(config: Config) -> Iterator[Problem]:
    for name, setting in config.entry.settings().items():
        if setting.meta["required"] and getattr(getattr(config, setting.section), name) is None:
            yield conflict(config, name, "is required", f"add --{name} {setting.meta['metavar']}")


def _files(config: Config) -> Iterator[Problem]:
    for name, setting in config.entry.settings().items():
        path = getattr(getattr(config, setting.section), name)
        if setting.meta["exists"] and path is not None:
            problem = missing_file(config, name, path)
            if problem:
                yield problem
            elif path.is_dir() and setting.meta["metavar"] == "FILE":
                yield conflict(config, name, f"{path} is a folder, not a file", "name a file in it")


def _model(config: Config) -> Iterator[Problem]:
    given = config.model.pretrained_model_name_or_path
    if given is None or _may_be_on_the_hub(given):
        return
    problem = missing_file(config, "pretrained_model_name_or_path", Path(given).expanduser())
    if problem:
        yield problem


def _may_be_on_the_hub(name: str) -> bool:
    """``owner/repository`` or a file in one, and no path of this machine; whether it is there is found out later."""
    path = Path(name)
    return name.count("/") in (1, 2) and not path.is_absolute() and not path.exists() and not Path(path.parts[0]).exists() \
        and not name.startswith(("./", "../", "~")) \
        and (len(path.parts) == 3 or path.suffix.lower() not in (".safetensors", ".sft", ".json", ".ckpt", ".gguf", ".pt"))


def _output(config: Config) -> Iterator[Problem]:
    name, folder = config.saving.output_name, config.saving.output_dir
    if name in (".", "..") or any(letter in name for letter in '/\\:*?"<>|'):
        yield conflict(config, "output_name", f"{name!r} is not a file name", "use letters, digits, - _ and . only")
    if folder is None:
        return
    yield from _writable(config, "output_dir", folder)
    for flag, path in (("dataset_config", config.dataset.dataset_config), ("in_json", config.dataset.in_json),
                       ("sample_prompts", config.sampling.sample_prompts)):
        for written in (f"{name}_config.toml", f"{name}_log.csv"):
            target = folder / written
            if path is not None and path.exists() and target.exists() and os.path.samefile(target, path):
                yield conflict(config, f"output_name output_dir {flag}",
                               f"this run would write over {path}, which --{flag} reads", "choose another name or folder")
    model = config.model.pretrained_model_name_or_path
    result = folder / f"{name}.safetensors"
    if model is not None and result.exists() and Path(model).exists() and os.path.samefile(result, model):
        yield conflict(config, "output_name output_dir pretrained_model_name_or_path",
                       f"the result would replace the model it starts from: {result}", "choose another name or folder")


def _writable(config: Config, flag: str, folder: Path) -> Iterator[Problem]:
    """``folder`` can be made, or written to."""
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("."))
    if not existing.is_dir():
        yield conflict(config, flag, f"{existing} is a file, not a folder", "name another folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield conflict(config, flag, f"{existing} is not writable", "name another folder, or change its permissions")


def _precision(config: Config) -> Iterator[Problem]:
    precision = config.precision
    if precision.full_bf16 and precision.mixed_precision != "bf16":
        yield conflict(config, "full_bf16 mixed_precision",
                       f"needs bf16 arithmetic, not --mixed_precision {precision.mixed_precision}", "add --mixed_precision bf16")
    elif config.weights_dtype == "bf16" and precision.mixed_precision != "bf16":
        yield conflict(config, "weights_dtype mixed_precision", "bf16 weights need bf16 arithmetic", "add --mixed_precision bf16")
    if precision.full_bf16 and precision.weights_dtype == "fp32":
        yield conflict(config, "weights_dtype full_bf16", "fp32 contradicts --full_bf16", "leave one of the two out")


def _length(config: Config) -> Iterator[Problem]:
    optimizer, steps = config.optimizer, config.training.max_train_steps
    warmup, name = optimizer.lr_warmup_steps, optimizer.lr_scheduler
    if optimizer.lr_scheduler_type:
        if warmup:
            yield conflict(config, "lr_warmup_steps lr_scheduler_type", "a scheduler class is not warmed up from outside",
                           "leave it out, or chain one: torch.optim.lr_scheduler.LinearLR warms up")
        if "lr_scheduler" in config.changed():
            yield conflict(config, "lr_scheduler_type lr_scheduler", f"contradicts --lr_scheduler {name}",
                           "leave one of the two out")
    elif name in ("constant", "piecewise_constant") and warmup:
        yield conflict(config, "lr_warmup_steps lr_scheduler", f"the {name.replace('_', ' ')} schedule has no warm-up",
                       "use --lr_scheduler constant_with_warmup")
    elif config.training.max_train_epochs is None and warmup >= steps:
        yield conflict(config, "lr_warmup_steps max_train_steps", f"warm-up of {warmup} steps fills the whole run of {steps}",
                       f"give fewer than {steps}, or a share such as 5%")
    elif name == "warmup_stable_decay" and not optimizer.lr_decay_steps:
        yield conflict(config, "lr_decay_steps lr_scheduler", "warmup_stable_decay needs the length of its fall",
                       "add --lr_decay_steps 20%")
    if name == "piecewise_constant" and not optimizer.lr_scheduler_args:
        yield conflict(config, "lr_scheduler_args lr_scheduler", "piecewise_constant needs its steps",
                       "add --lr_scheduler_args step_rules=1:100,0.1:200,0.01")
    if optimizer.lr_scheduler_args and name != "piecewise_constant" and not optimizer.lr_scheduler_type:
        yield conflict(config, "lr_scheduler_args lr_scheduler_type", f"--lr_scheduler {name} takes no such arguments",
                       "name the class that they are for with --lr_scheduler_type, or leave them out")


def _optimizer(config: Config) -> Iterator[Problem]:
    yield from _pairs(config, "optimizer_args", "weight_decay=0.01")
    yield from _pairs(config, "lr_scheduler_args", "gamma=0.99")
    optimizer = config.optimizer
    if optimizer.use_8bit_adam and optimizer.use_lion_optimizer:
        yield conflict(config, "use_lion_optimizer use_8bit_adam", "contradicts --use_8bit_adam", "leave one of the two out")
    for old in ("use_8bit_adam", "use_lion_optimizer"):
        if getattr(optimizer, old) and optimizer.optimizer_type.lower() not in ("", "adamw", optimizer.chosen_type.lower()):
            yield conflict(config, f"{old} optimizer_type", f"contradicts --optimizer_type {optimizer.optimizer_type}",
                           "leave one of the two out")


def _pairs(config: Config, flag: str, example: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for text in getattr(config.optimizer, flag):
        name, equals, value = text.partition("=")
        if not (name.strip().isidentifier() and equals and value.strip()):
            yield conflict(config, flag, f"{text!r} is not name=value", f"write for instance {example}")
        elif name.strip() in seen:
            yield conflict(config, flag, f"{name.strip()} stands twice", "keep one of them")
        seen.add(name.strip())


def _source(config: Config) -> Iterator[Problem]:
    """There is one description of the data, and it is there. What beside --dataset_config has no effect is only named."""
    data = config.dataset
    if data.dataset_config is None and data.train_data_dir is None and data.in_json is None and data.dataset_class is None:
        yield conflict(config, "dataset_config train_data_dir in_json dataset_class", "is required",
                       "add --dataset_config FILE, or --train_data_dir DIR")
        if data.reg_data_dir is not None:
            yield conflict(config, "reg_data_dir train_data_dir", "there are no pictures to learn", "add --train_data_dir DIR")
        return
    if data.dataset_class is not None:
        others = [name for name in ("dataset_config", "train_data_dir", "in_json", "reg_data_dir", "conditioning_data_dir")
                  if getattr(data, name) is not None]
        if others:
            yield conflict(config, f"dataset_class {' '.join(others)}", f"describes all pictures, and so does --{others[0]}",
                           "leave one of the two out")
    flags = ["dataset_config"]
    if data.dataset_config is None:
        flags = ["in_json", "train_data_dir", "reg_data_dir"]
        if data.in_json is not None and data.reg_data_dir is not None:
            yield conflict(config, "reg_data_dir in_json", "has no effect beside --in_json",
                           "list both in a file for --dataset_config, the folder with is_reg = true")
    for flag in (*flags, "conditioning_data_dir"):
        path = getattr(data, flag)
        if path is None:
            continue
        wants_file = flag in ("dataset_config", "in_json")
        if (problem := missing_file(config, flag, path)) is not None:
            yield problem
        elif path.is_dir() == wants_file:
            yield conflict(config, flag, f"{path} is a {'folder, not a file' if wants_file else 'file, not a folder'}",
                           "name a file in it" if wants_file else "name the folder it lies in")
    if data.alpha_mask and data.conditioning_data_dir is not None:
        yield conflict(config, "alpha_mask conditioning_data_dir", "masks come from transparency or from pictures, not from both",
                       "leave one of the two out")
    if data.conditioning_data_dir is not None and not data.masked_loss:
        yield conflict(config, "conditioning_data_dir masked_loss", "mask pictures are not used without --masked_loss",
                       "add --masked_loss, or leave it out")
    if data.caption_extension and data.caption_extention and data.caption_extension != data.caption_extention:
        yield conflict(config, "caption_extention caption_extension", "contradicts --caption_extension", "leave it out")


def _validation(config: Config) -> Iterator[Problem]:
    """Without a dataset file it is known from the start whether anything is held out."""
    if config.dataset.dataset_config is None and not config.dataset.validation_split:
        for flag in VALIDATION_SCHEDULE:
            if getattr(config.dataset, flag) is not None:
                yield conflict(config, f"{flag} validation_split dataset_config", "there is nothing to validate on",
                               "add --validation_split 0.1, or leave it out")


def _buckets(config: Config) -> Iterator[Problem]:
    low, high = config.dataset.min_bucket_reso, config.dataset.max_bucket_reso
    if low is not None and high is not None and low > high:
        yield conflict(config, "min_bucket_reso max_bucket_reso", f"{low} is larger than max_bucket_reso {high}",
                       f"give at most {high}, or a larger max_bucket_reso")


def _caching(config: Config) -> Iterator[Problem]:
    caching = config.caching
    if caching.cache_dir is not None:  # whether it is used the dataset file says, which may set cache_info (spec_check.py)
        yield from _writable(config, "cache_dir", caching.cache_dir)
    skipping = next((flag for flag in ("skip_cache_check", "skip_latents_validity_check") if getattr(caching, flag)), None)
    if skipping and caching.cache_check == "full":
        yield conflict(config, f"{skipping} cache_check", "contradicts --cache_check full", "leave one of the two out")


def _saving(config: Config) -> Iterator[Problem]:
    saving = config.saving
    formats = getattr(config.architecture, "save_formats", ("safetensors",))
    if saving.save_model_as is not None and saving.save_model_as not in formats:
        choice = " or ".join(f"--save_model_as {kind}" for kind in formats)
        yield conflict(config, "save_model_as", f"this model is not saved as {saving.save_model_as}",
                       f"use {choice}; diffusers reads it with from_single_file")
    elif saving.save_model_as is not None and not SUFFIXES[saving.save_model_as] and saving.output_dir is not None:
        folder = saving.output_dir / saving.output_name
        if folder.exists() and not is_pipeline(folder):
            yield conflict(config, "output_name save_model_as", f"the model would be saved as the folder {folder}, which is "
                           "there already and is no diffusers model", "choose another --output_name, or move it away")
    for keep, every in (("save_last_n_steps", "save_every_n_steps"), ("save_last_n_epochs", "save_every_n_epochs")):
        saves = getattr(saving, every) or (every == "save_every_n_epochs" and saving.save_n_epoch_ratio)
        if getattr(saving, keep) and not saves:
            yield conflict(config, f"{keep} {every} save_n_epoch_ratio", f"there is nothing to keep without --{every}",
                           f"add --{every} N")
    if saving.async_save and not (saving.on_the_way or config.state.on_the_way(saving)):
        yield conflict(config, "async_save save_every_n_steps save_every_n_epochs save_n_epoch_ratio save_state_every_n_steps",
                       "no file is written during training", "add --save_every_n_steps N, or leave it out")
    if saving.save_n_epoch_ratio and saving.save_every_n_epochs:
        yield conflict(config, "save_n_epoch_ratio save_every_n_epochs", "contradicts --save_every_n_epochs",
                       "leave one of the two out")


def _hub(config: Config) -> Iterator[Problem]:
    hub = config.hub
    if hub.huggingface_repo_id is None:
        for name in config.changed():
            if name.startswith("huggingface_") or name == "async_upload":
                yield conflict(config, f"{name} huggingface_repo_id", "nothing is uploaded without --huggingface_repo_id",
                               "add --huggingface_repo_id OWNER/NAME, or leave it out")
    elif not re.fullmatch(r"([\w.-]+/)?[\w.-]+", hub.huggingface_repo_id, re.ASCII):
        yield conflict(config, "huggingface_repo_id", f"{hub.huggingface_repo_id!r} is not the name of a repository",
                       "write OWNER/NAME; a folder in it is --huggingface_path_in_repo")
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield conflict(config, "huggingface_repo_id", "nothing can be uploaded with HF_HUB_OFFLINE set",
                       "unset it, or leave the upload out")


def _sampling(config: Config) -> Iterator[Problem]:
    if config.sampling.scheduled and config.sampling.sample_prompts is None:
        schedule = next(name for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
                        if getattr(config.sampling, name))
        yield conflict(config, f"{schedule} sample_prompts", "there is nothing to draw", "add --sample_prompts FILE")


def _logging(config: Config) -> Iterator[Problem]:
    logging = config.logging
    if "tensorboard" in logging.trackers and logging.logging_dir is None:
        yield conflict(config, "log_with logging_dir", "TensorBoard needs a folder to write to", "add --logging_dir DIR")
    elif "tensorboard" in logging.trackers:
        yield from _writable(config, "logging_dir", logging.logging_dir)
    for name in logging.trackers:
        if name != "tensorboard" and not installed(name):
            yield conflict(config, "log_with", f"the package {name} is not installed",
                           f"run `pip install {name}`, or use --log_with tensorboard")
    if "aim" in logging.trackers and logging.logging_dir is None:
        yield conflict(config, "log_with logging_dir", "aim needs a folder to write to", "add --logging_dir DIR")
    for name in ("log_tracker_config", "log_config", "log_prefix"):
        if getattr(logging, name) and not logging.trackers:
            yield conflict(config, f"{name} log_with logging_dir", "would have no effect without a tracker",
                           "add --logging_dir DIR for TensorBoard or --log_with NAME, or leave it out")
    for name in ("wandb_run_name", "wandb_api_key"):
        if getattr(logging, name) and "wandb" not in logging.trackers:
            yield conflict(config, f"{name} log_with", "would have no effect without wandb",
                           "add --log_with wandb, or leave it out")


def remarks(config: Config) -> tuple[str, ...]:
    """What is allowed but might surprise: sentences for the log."""
    found = list(config.memory.remarks(config))
    if config.training.max_train_epochs and "max_train_steps" in config.changed():
        found.append(f"{config.place('max_train_epochs')} {config.training.max_train_epochs} overrules max_train_steps")
    if config.sampling.sample_prompts is not None and not config.sampling.scheduled:
        found.append(f"{config.place('sample_prompts')} has no effect: none of --sample_every_n_steps, --sample_every_n_epochs "
                     "and --sample_at_first is given")
    if config.sampling.sample_prompts is None and config.sampling.sample_batch_size > 1:
        found.append(f"{config.place('sample_batch_size')} has no effect: there is no --sample_prompts")
    if config.sampling.sample_every_n_steps and config.sampling.sample_every_n_epochs:
        found.append(f"{config.place('sample_every_n_epochs')} overrules sample_every_n_steps, as in the dialect")
    for flag, readers in READ_BY.items():  # graphical front ends write them into every file
        schedule = config.optimizer.lr_scheduler_type or config.optimizer.lr_scheduler
        if flag in config.changed() and schedule not in readers:
            found.append(f"{config.place(flag)} has no effect with the schedule {schedule}: read by {', '.join(readers)}")
    for old in ("use_8bit_adam", "use_lion_optimizer"):
        if getattr(config.optimizer, old):
            found.append(f"{config.place(old)} is taken for --optimizer_type {config.optimizer.chosen_type}")
    if config.dataset.caption_extention:
        found.append(f"{config.place('caption_extention')} is taken for --caption_extension")
    if config.caching.cache_check != "none" and config.caching.check == "none":
        found.append("cached files are trusted without a look at the pictures, as --cache_check none does")
    for name, variable in (("wandb_api_key", "WANDB_API_KEY"), ("huggingface_token", "HF_TOKEN")):
        if config.origins.get(name) == "command line":
            found.append(f"--{name} can be read by other users of this machine; set {variable} instead")
    return tuple(found)
