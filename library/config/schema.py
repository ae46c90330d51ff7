"""Every setting of a run: one frozen dataclass per concern, where each field IS a flag (and a key of ``--config_file``).

A field made with ``flag()`` carries its help, limits and off value; its annotation is its type. ``parse.py`` fills these
classes, ``help.py`` and ``tools/options_page.py`` print them. Values that follow from others are properties: fields are
what the user said, and never change. No heavy imports here: ``--help`` has to answer at once. The settings of pictures,
captions and caches stand in ``data_options.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from library.config.nan_policies import NAN_POLICIES, ROLLBACK, STOP
from library.config.values import flag, read_warmup

if TYPE_CHECKING:
    from library.config.check import Problem
    from library.config.parse import Config

# Trackers that run through accelerate's own classes -> the packages of theirs, any of which will do
ACCELERATE_TRACKERS = {"aim": ("aim",), "clearml": ("clearml",), "comet_ml": ("comet_ml",), "dvclive": ("dvclive",),
                       "mlflow": ("mlflow", "mlflow_skinny"), "swanlab": ("swanlab",), "trackio": ("trackio",)}


def installed(tracker: str) -> bool:
    """Whether the package of a tracker other than TensorBoard is there."""
    return any(importlib.util.find_spec(package) is not None for package in ACCELERATE_TRACKERS.get(tracker, (tracker,)))


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial",
             "inverse_sqrt", "warmup_stable_decay", "piecewise_constant", "adafactor")
# Which of them read a setting: in all others it has no effect
READ_BY = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_power": ("polynomial",), "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "polynomial", "warmup_stable_decay"),
}


@dataclass(frozen=True)
class GeneralOptions:
    title: ClassVar[str] = "Configuration file, console, seed"

    config_file: Path | None = flag(None, "TOML file with these same settings; the command line wins over it",
                                    metavar="FILE", saved=False)
    output_config: bool = flag(False, "write the resulting configuration to --config_file and exit", saved=False)
    seed: int = flag(42, "start of all randomness; the same seed repeats a run", minimum=0, maximum=2**32 - 1)
    console_log_level: str = flag("INFO", "least important message to show",
                                  choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    console_log_file: Path | None = flag(None, "write messages to this file instead of the terminal", metavar="FILE")
    console_log_simple: bool = flag(False, "messages without time and level")


@dataclass(frozen=True)
class ModelOptions:
    title: ClassVar[str] = "Model"

    pretrained_model_name_or_path: str | None = flag(
        None, "model to start from: .safetensors file, sharded index, diffusers folder, or hub id", metavar="PATH", required=True)
    attn_mode: str | None = flag(None, "attention by torch's own kernels, or by flash-attn, which wastes nothing on the "
                                 "padding of texts", choices=("torch", "flash"), default_text="torch")
    use_flash_attn: bool = flag(False, "the same as --attn_mode flash")

    @property
    def attention(self) -> str:
        """``torch`` or ``flash``."""
        return self.attn_mode or ("flash" if self.use_flash_attn else "torch")

    def problems(self, config: Config) -> Iterator[Problem]:
        """A choice that contradicts itself."""
        from library.config.check import conflict  # which imports this package's other modules

        if self.use_flash_attn and self.attn_mode == "torch":
            yield conflict(config, "attn_mode use_flash_attn", "torch contradicts --use_flash_attn", "leave one of the two out")


@dataclass(frozen=True)
class PrecisionOptions:
    title: ClassVar[str] = "Precision"

    mixed_precision: str = flag("no", "dtype of matrix products", choices=("no", "fp16", "bf16"), off="no",
                                default_text="what accelerate launch says, else no")
    full_bf16: bool = flag(False, "keep weights and gradients in bf16 (stochastic rounding keeps small updates)")
    weights_dtype: str = flag("auto", "dtype in which trained weights are kept", choices=("auto", "fp32", "bf16"), off="fp32")

    def kept_weights(self, follow_mixed_precision: bool) -> str:
        """``fp32`` or ``bf16``; ``follow_mixed_precision``: bf16 training alone makes this architecture's weights bf16."""
        if self.weights_dtype != "auto":
            return self.weights_dtype
        return "bf16" if self.full_bf16 or (follow_mixed_precision and self.mixed_precision == "bf16") else "fp32"


@dataclass(frozen=True)
class OptimizerOptions:
    title: ClassVar[str] = "Optimizer"

    optimizer_type: str = flag("AdamW", "AdamW, AdamW8bit, Adafactor, Lion, Prodigy or another one of "
                               "docs/optimizers.md (upper or lower case), or package.module.Class", metavar="NAME")
    optimizer_args: tuple[str, ...] = flag((), 'its own arguments, for instance weight_decay=0.01 "betas=0.9,0.99"',
                                           nargs="+", metavar="K=V")
    use_8bit_adam: bool = flag(False, "old name of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = flag(False, "old name of --optimizer_type Lion")
    learning_rate: float = flag(2e-6, "learning rate after warm-up", minimum=0)
    max_grad_norm: float | None = flag(None, "scale gradients down to this global norm; 0: never", minimum=0,
                                       default_text="1, or 0 when weights are updated during the backward pass")
    lr_scheduler: str = flag("constant", "course of the learning rate", choices=SCHEDULES)
    lr_warmup_steps: int | float = flag(0, "rise from 0 over N steps, or over a share of the run (0.1 or 10%)",
                                        metavar="N|0.x|N%", off="0", read=read_warmup)
    lr_decay_steps: int | float = flag(0, "fall over the last N steps, or over a share of the run (warmup_stable_decay)",
                                       metavar="N|0.x|N%", off="0", read=read_warmup)
    lr_scheduler_num_cycles: int = flag(1, "restarts (cosine_with_restarts), or falls and rises (cosine_with_min_lr, "
                                        "warmup_stable_decay)", minimum=1)
    lr_scheduler_power: float = flag(1.0, "power of polynomial", above=0)
    lr_scheduler_timescale: int | None = flag(None, "steps after which inverse_sqrt is down to 0.71 of its start", minimum=0,
                                              off="0", default_text="the warm-up, or 10000")
    lr_scheduler_min_lr_ratio: float | None = flag(None, "end of the fall, as a share of --learning_rate (cosine_with_min_lr, "
                                                   "polynomial, warmup_stable_decay)", minimum=0, maximum=1, default_text="0")
    lr_scheduler_type: str = flag("", "instead of --lr_scheduler: a class of torch.optim.lr_scheduler, or "
                                         "package.module.Class", metavar="NAME", default_text="none")
    lr_scheduler_args: tuple[str, ...] = flag((), "its arguments, for instance gamma=0.99; for piecewise_constant "
                                              "step_rules=1:100,0.1:200,0.01", nargs="+", metavar="K=V")

    @property
    def chosen_type(self) -> str:
        """``--optimizer_type``, by whichever of its names it was given."""
        return "AdamW8bit" if self.use_8bit_adam else "Lion" if self.use_lion_optimizer else self.optimizer_type


@dataclass(frozen=True)
class TrainingOptions:
    title: ClassVar[str] = "Length of training"

    max_train_steps: int = flag(1600, "optimizer steps", minimum=1)
    max_train_epochs: int | None = flag(None, "passes over the dataset (overrides --max_train_steps)", minimum=0, off="0")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", minimum=1, off="1")
    nan_policy: str = flag(STOP, "after a step whose loss or gradient is NaN or infinite: stop, skip that step, or go back to "
                           "the newest state and train on from there without it", choices=NAN_POLICIES, off=STOP)

    def problems(self, config: Config) -> Iterator[Problem]:
        """Going back needs states to go back to."""
        from library.config.check import conflict  # which imports this package's other modules

        if self.nan_policy == ROLLBACK and not config.state.on_the_way(config.saving):
            yield conflict(config, "nan_policy save_state save_state_every_n_steps", "rollback needs states that are written "
                           "during training", "add --save_state_every_n_steps N, or use --nan_policy skip")


@dataclass(frozen=True)
class SavingOptions:
    title: ClassVar[str] = "Saving"

    output_dir: Path | None = flag(None, "folder for everything this run writes", metavar="DIR", required=True)
    output_name: str = flag("last", "file name of the result, without suffix", metavar="NAME")
    save_precision: str | None = flag(None, "dtype in the saved file (float is float32)", choices=("float", "fp16", "bf16"),
                                      default_text="as trained")
    save_model_as: str | None = flag(None, "file format", choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
                                     default_text="safetensors; of a diffusers folder another one, where the model can")
    save_every_n_steps: int | None = flag(None, "also save after every N steps", minimum=0, off="0")
    save_every_n_epochs: int | None = flag(None, "also save after every N epochs", minimum=0, off="0")
    save_n_epoch_ratio: int | None = flag(None, "also save about N times over all epochs", minimum=0, off="0")
    save_last_n_epochs: int | None = flag(None, "of the epoch saves keep the last N", minimum=0, off="0")
    save_last_n_steps: int | None = flag(None, "of the step saves keep those not older than N steps", minimum=0, off="0")
    async_save: bool = flag(False, "write files and states during training from copies in host memory, while steps go on")

    @property
    def on_the_way(self) -> bool:
        """Whether checkpoints are written before training ends."""
        return bool(self.save_every_n_steps or self.save_every_n_epochs or self.save_n_epoch_ratio)

    def stored_dtype(self, weights_dtype: str) -> str:
        """``fp32``, ``fp16`` or ``bf16`` in the file, for weights trained in ``weights_dtype``."""
        return {None: weights_dtype, "float": "fp32"}.get(self.save_precision, self.save_precision)


@dataclass(frozen=True)
class MetadataOptions:
    title: ClassVar[str] = "Metadata of the saved file"

    metadata_title: str | None = flag(None, "title", metavar="TEXT", default_text="--output_name")
    metadata_author: str | None = flag(None, "author", metavar="TEXT")
    metadata_description: str | None = flag(None, "description", metavar="TEXT")
    metadata_license: str | None = flag(None, "license", metavar="TEXT")
    metadata_tags: str | None = flag(None, "tags, separated by commas", metavar="TEXT")
    metadata_usage_hint: str | None = flag(None, "advice for use", metavar="TEXT")
    metadata_thumbnail: Path | None = flag(None, "small picture to embed", metavar="FILE", exists=True)
    metadata_merged_from: str | None = flag(None, "models it was merged from", metavar="TEXT")
    metadata_trigger_phrase: str | None = flag(None, "words that call up what was trained", metavar="TEXT")
    no_metadata: bool = flag(False, "write no metadata: neither modelspec.* nor ss_* fields")


@dataclass(frozen=True)
class HubOptions:
    title: ClassVar[str] = "Upload to the Hugging Face hub"

    huggingface_repo_id: str | None = flag(None, "repository to which every saved file is uploaded; made where it is missing",
                                           metavar="OWNER/NAME")
    huggingface_repo_type: str = flag("model", "kind of that repository", choices=("model", "dataset", "space"))
    huggingface_path_in_repo: str | None = flag(None, "folder in it", metavar="PATH", default_text="its top")
    huggingface_repo_visibility: str = flag("private", "who can see a repository that is made", choices=("private", "public"))
    huggingface_token: str | None = flag(None, "access token with the right to write; better set HF_TOKEN or run `hf auth login`",
                                         metavar="TOKEN", secret=True)
    async_upload: bool = flag(False, "upload while training goes on; the end of the run waits for it")


@dataclass(frozen=True)
class SamplingOptions:
    title: ClassVar[str] = "Preview pictures"

    sample_prompts: Path | None = flag(None, "prompts to draw during training (.txt, .toml or .json)",
                                       metavar="FILE", exists=True)
    sample_every_n_steps: int | None = flag(None, "draw them after every N steps", minimum=0, off="0")
    sample_every_n_epochs: int | None = flag(None, "draw them after every N epochs", minimum=0, off="0")
    sample_at_first: bool = flag(False, "draw them before training as well")
    sample_batch_size: int = flag(1, "draw up to N of them together, if they agree in size, steps and guidance", metavar="N",
                                  minimum=1)

    @property
    def scheduled(self) -> bool:
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)


@dataclass(frozen=True)
class LoggingOptions:
    title: ClassVar[str] = "Trackers"

    logging_dir: Path | None = flag(None, "folder for TensorBoard; each run gets a folder of its own in it", metavar="DIR")
    log_prefix: str = flag("", "beginning of that folder's name", metavar="TEXT")
    log_with: str | None = flag(None, "where curves go (all: TensorBoard, wandb and every other one that is installed)",
                                choices=("tensorboard", "wandb", *ACCELERATE_TRACKERS, "all"),
                                default_text="tensorboard with --logging_dir, else nowhere")
    log_tracker_name: str = flag("finetuning", "project name in the tracker", metavar="NAME")
    log_tracker_config: Path | None = flag(None, "TOML file with arguments for the tracker", metavar="FILE", exists=True)
    wandb_run_name: str | None = flag(None, "name of the run on wandb", metavar="NAME")
    wandb_api_key: str | None = flag(None, "key for wandb; better set WANDB_API_KEY or run `wandb login`",
                                     metavar="KEY", secret=True)
    log_config: bool = flag(False, "send these settings to the tracker, without keys and paths")

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers in use."""
        if self.log_with == "all":
            return ("tensorboard", "wandb", *(name for name in ACCELERATE_TRACKERS if installed(name)))
        return (self.log_with,) if self.log_with else ("tensorboard",) if self.logging_dir else ()
