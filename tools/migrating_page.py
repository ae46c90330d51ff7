"""Writes docs/migrating.md: where our defaults, names and behaviour differ from the dialect of flags that people know.

``PEER_DEFAULTS`` holds the dialect's default of every setting that we share with its FLUX fine-tuning script; a test
checks that each setting stands either there or in ``NEW``, and that exactly the differences have a reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flux_train import ENTRY  # noqa: E402
from library.atomic import write_atomic  # noqa: E402
from library.config.help import default  # noqa: E402
from library.config.values import show  # noqa: E402
from tools.options_page import table  # noqa: E402

PAGE = ROOT / "docs" / "migrating.md"

_NONE = """config_file console_log_file pretrained_model_name_or_path dataset_config resolution
text_encoder_batch_size max_train_epochs output_dir save_precision save_every_n_steps save_every_n_epochs save_n_epoch_ratio
save_last_n_epochs save_last_n_steps metadata_title metadata_author metadata_description metadata_license metadata_tags
metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase sample_prompts sample_every_n_steps
sample_every_n_epochs logging_dir log_with log_tracker_config wandb_run_name wandb_api_key ae clip_l t5xxl t5xxl_max_token_length
seed output_name save_model_as train_data_dir reg_data_dir in_json dataset_class conditioning_data_dir caption_extention
caption_prefix caption_suffix secondary_separator face_crop_aug_range resize_interpolation validation_seed validate_every_n_steps
validate_every_n_epochs max_validation_steps""".split()
_OFF = """output_config console_log_simple enable_bucket bucket_no_upscale cache_latents
cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk full_bf16 gradient_checkpointing
sample_at_first log_config apply_t5_attn_mask cache_info debug_dataset enable_wildcard shuffle_caption color_aug flip_aug
random_crop alpha_mask masked_loss skip_cache_check skip_latents_validity_check""".split()

PEER_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(_NONE), **dict.fromkeys(_OFF, False),
    "console_log_level": "INFO", "train_batch_size": 1, "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64,
    "caption_extension": ".caption", "caption_separator": ",", "keep_tokens": 0, "keep_tokens_separator": "",
    "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "token_warmup_min": 1,
    "token_warmup_step": 0.0, "prior_loss_weight": 1.0, "validation_split": 0.0, "dataset_repeats": 1,
    "max_data_loader_n_workers": 8, "vae_batch_size": 1,
    "mixed_precision": "no", "optimizer_type": "AdamW", "optimizer_args": (), "learning_rate": 2e-6, "max_grad_norm": 1.0,
    "use_8bit_adam": False, "use_lion_optimizer": False, "lr_scheduler": "constant", "lr_warmup_steps": 0, "lr_decay_steps": 0,
    "lr_scheduler_num_cycles": 1, "lr_scheduler_power": 1.0, "lr_scheduler_timescale": None, "lr_scheduler_min_lr_ratio": None,
    "lr_scheduler_type": "", "lr_scheduler_args": (), "max_train_steps": 1600, "gradient_accumulation_steps": 1,
    "timestep_sampling": "sigma", "weighting_scheme": "uniform", "discrete_flow_shift": 3.0, "sigmoid_scale": 1.0,
    "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "model_prediction_type": "sigma_scaled", "min_timestep": 0,
    "max_timestep": 1000, "log_prefix": "", "log_tracker_name": "finetuning", "guidance_scale": 3.5, "model_type": "flux",
}

NEW: dict[str, str] = {
    "weights_dtype": "keep weights in float32 under bf16 arithmetic (`fp32`), or in bf16 with stochastic rounding (`bf16`). "
                     "`auto`: bf16 under `--mixed_precision bf16` or `--full_bf16`, else float32",
    "cache_dir": "disk caches can stand on another disk than the pictures",
    "cache_check": "how closely changed pictures are looked for; `--skip_cache_check` is `--cache_check none`",
    "text_cache_variants": "shuffled captions, dropped tags and wildcards together with cached text encoder outputs",
    "recursive": "pictures in subfolders",
    "skip_image_resolution": "pictures that are too small to learn from need not be sorted out by hand",
    "clip_l_tokenizer": "train without a connection to the hub",
    "t5xxl_tokenizer": "train without a connection to the hub",
    "no_metadata": "known from the LoRA scripts of the dialect; here for checkpoints as well",
}

REASONS: dict[str, str] = {
    "timestep_sampling": "with `shift` the noise levels that decide the composition get most of the training; the usual recipe",
    "model_prediction_type": "`sigma_scaled` compares an estimate of the picture with a velocity; `raw` compares like with like",
    "discrete_flow_shift": "exp(1.15), the shift of FLUX's own schedule at 1024 x 1024",
    "guidance_scale": "a distilled model is best fine-tuned without guidance; 3.5 belongs to sampling",
    "max_bucket_reso": "1024 takes area away from every bucket that is not square at resolution 1024",
    "min_bucket_reso": "the same, except where 256 would be more than half the shorter side of a small resolution",
    "bucket_reso_steps": "the same, raised to a multiple of what the model needs",
    "caption_extension": "nearly all folders of captions hold `.txt`; `.caption` is still found",
    "resize_interpolation": "the same choice, under a name",
    "seed": "a run without `--seed` can be repeated too",
    "output_name": "one name for all files of a run; the dialect uses `epoch`, `at` and `last`",
    "save_model_as": "the same: the dialect's script for this model writes nothing else either",
    "min_timestep": "the same; not given means the whole range",
    "max_timestep": "the same; not given means the whole range",
}

INTRO = """# Coming from another trainer

<!-- Written by tools/migrating_page.py. Do not edit: change the tool and run it. -->

Flags, keys and dataset files follow the dialect of kohya-ss/sd-scripts, so that commands and TOML files keep working.
This page lists every place where they do not do the same, and why. All options: [options.md](options.md).

## To get the dialect's own FLUX defaults back

```
--timestep_sampling sigma --model_prediction_type sigma_scaled --discrete_flow_shift 3 --guidance_scale 3.5
--caption_extension .caption --max_bucket_reso 1024
```

## Defaults that differ
"""

BEHAVIOUR = """## Behaviour that differs

- **Nothing is ignored in silence.** An unknown flag or key is an error with the nearest known name; so is a value of the wrong
  type in `--config_file`, a key that stands twice, and a setting that would have no effect (`--logit_mean` without
  `--weighting_scheme logit_normal`, `--discrete_flow_shift` with `uniform`). Abbreviated flags are not accepted.
- **Flags of the dialect without effect** are accepted and named once in the log; flags that are not built yet are refused, each
  with what to do meanwhile. Both lists stand in [options.md](options.md).
- **Switches can be turned off** on the command line: `--cache_latents=false` overrules `cache_latents = true` in the file.
- **`--output_config`** writes all settings, not only those that differ from the defaults.
- **`accelerate launch --mixed_precision bf16`** counts when neither the command line of the script nor the file says otherwise.
- **bf16 weights** are rounded stochastically, whatever the optimizer, so that small updates are not lost.
  `--weights_dtype fp32` keeps float32 weights at twice the memory.
- **`--min_timestep` and `--max_timestep`** are honoured for FLUX.
- **`--weighting_scheme`** counts where the dialect lets it count (densities with `sigma` sampling, weights with `sigma_scaled`
  prediction) and is refused elsewhere.
- **`--lr_warmup_steps`** means optimizer steps on any number of GPUs.
- **`--save_model_as`** other than `safetensors` is refused: for this model the dialect ignores it.
- **`--model_type chroma`** is refused: the dialect's fine-tuning script trains a FLUX model then.
- **`--sample_every_*` without `--sample_prompts`** and **`--save_last_n_*` without `--save_every_n_*`** are errors.
- **Latents** are the mean of the autoencoder's posterior, cached or not; the dialect caches one random sample of it.
- **Noise and noise levels** are float32 and a function of the seed, the step and the picture: the same on any number of workers
  and GPUs, and 1x4 accumulated equals 4x1. The level reaches the model exactly, not rounded to bf16.
- **The order of pictures** is a function of the seed and the epoch: nothing is shown twice or left out, whatever the workers do.
- **Warm-up** makes its first update at 1/N of the learning rate, not at 0.
- **Schedules** have the same course on any number of GPUs, `--lr_decay_steps` too. `polynomial` ends at
  `--lr_scheduler_min_lr_ratio` of the learning rate, not at 1e-7; `warmup_stable_decay` warms up from 0, not from that end.
  A setting that the chosen schedule does not read is named in the log.
- **`--lr_scheduler_type`** replays its class: a resumed run is at the right place of the curve. `ReduceLROnPlateau` is refused.
- **Adafactor** is used with `relative_step=False scale_parameter=False warmup_init=False`; `relative_step` and `warmup_init` are
  refused, because the rate comes from `--learning_rate` and `--lr_scheduler`. For its own rate write
  `--lr_scheduler adafactor --learning_rate 1 --optimizer_args scale_parameter=True`. Convolutions are factored as matrices.
- **Prodigy and D-Adaptation** with a learning rate below 0.01 are refused, and so are different rates for different parts of the
  model; the dialect warns, and trains with the first one.
- **Schedule-free optimizers** are looked at (previews, validation, saving) with their averaged weights, and go on training at
  exactly the weights they had. `--lr_scheduler` is not ignored with them.
- **`--optimizer_args`** are checked against the optimizer before anything is read. [optimizers.md](optimizers.md) lists what
  each one needs.
- **`--max_grad_norm`** clips the norm over all weights, always.
- **Dataset files** are read strictly: an unknown key, a wrong type or two settings that exclude each other are errors with
  file and line. Whole numbers pass where fractions are wanted (`validation_split = 0`). Subsets of one dataset may be of
  different kinds: folders, metadata files and folders with masks may stand side by side. `num_repeats` below 1 and a folder
  that stands twice in a dataset are errors. A relative path that does not exist where the command runs is looked for beside
  the dataset file.
- **Keys that are new**: `recursive`, `skip_image_resolution`, `loss_weight`, several endings in `caption_extension`, `.json`
  among them. [dataset.md](dataset.md) describes all keys.
- **Captions**: a picture without a caption, or with an empty one, is an error. Prefix and suffix belong to the line that is
  chosen; the text of `keep_tokens_separator` never stays in a caption; wildcards may be nested. What is drawn is a function
  of the seed, the epoch and the picture: the same for any number of workers.
- **Cached text encoder outputs** keep all rules for captions: dropped captions are the cached empty caption, and captions
  that vary need `--text_cache_variants`, or are refused. The dialect caches the raw file and lets the rules lapse without a
  word.
- **Masks** are scaled, cropped and mirrored exactly as their picture. `conditioning_data_dir` without `--masked_loss`, and
  `--masked_loss` without masks, are errors. A spare mask is only named.
- **Buckets** are chosen by the logarithm of the aspect ratio, so that portrait and landscape are treated alike.
- **Transparency** is laid on white where `alpha_mask` is off.
- **Validation** works in full fine-tuning, with folders and metadata files, and never touches regularisation pictures; the
  held-out part does not depend on the order of the files. A `validation_split` outside 0 to 1 is an error.
- **Regularisation pictures** weigh `prior_loss_weight` in full fine-tuning too, and it may stand in `[general]`.
- **`0_name`** folders below `--train_data_dir` are left out and named, as in the dialect; a folder without any
  `<repeats>_<caption>` folder is an error.
- **`--conditioning_data_dir`**, which the dialect declares and never reads, is the mask folder of every subset that names
  none (below `--train_data_dir`: its folder of the same name, where there is one).
- **`--cache_info`** keeps an index that notices changes, in place of `metadata_cache.json`, which does not.
- **Previews**: an unknown option in a prompt file is an error; text is never taken for an option; a prompt without `--d` gets
  a fixed seed.
- **A NaN or infinite loss** stops the run before the weights take it, with the step and the pictures.
- **Caches** are found by content (picture, mask, caption, encoder, settings), so there is nothing to delete after an edit.
  They lie in large files with checksums, in half the dialect's precision and a fraction of its size. Latents in `*.npz` files
  of the dialect can be imported with `python tools/cache.py import`; cached text outputs are made anew.
"""


def deviations() -> dict[str, tuple[object, str]]:
    """Flag -> (the dialect's default, ours in words), where the two values are not the same."""
    return {name: (PEER_DEFAULTS[name], default(setting)) for name, setting in ENTRY.settings().items()
            if name in PEER_DEFAULTS and PEER_DEFAULTS[name] != setting.default}


def page() -> str:
    """The whole page as Markdown."""
    rows = [(f"`--{name}`", show(theirs), ours, REASONS[name]) for name, (theirs, ours) in deviations().items()]
    lines = [INTRO, *table(("flag", "dialect", "here", "reason"), rows)]
    lines += ["## Flags that are new\n", *table(("flag", "what for"), [(f"`--{name}`", reason) for name, reason in NEW.items()])]
    return "\n".join([*lines, BEHAVIOUR])


if __name__ == "__main__":
    write_atomic(PAGE, page())
    print(f"written: {PAGE}")
