"""Writes docs/migrating.md: where our defaults, names and behaviour differ from the dialect of flags that people know.

``PEER_DEFAULTS`` and ``OWN_DEFAULTS`` hold the dialect's default of every setting that we share with its fine-tuning scripts; a
test checks that each setting stands either there or in ``NEW``, and that exactly the differences have a reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.atomic import write_atomic  # noqa: E402
from library.config.help import default  # noqa: E402
from library.config.values import show  # noqa: E402
from library.config.parse import Entry  # noqa: E402
from tools.options_page import entries, table  # noqa: E402

PAGE = ROOT / "docs" / "migrating.md"

_NONE = """config_file console_log_file pretrained_model_name_or_path dataset_config resolution
text_encoder_batch_size max_train_epochs output_dir save_precision save_every_n_steps save_every_n_epochs save_n_epoch_ratio
save_last_n_epochs save_last_n_steps metadata_title metadata_author metadata_description metadata_license metadata_tags
metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase sample_prompts sample_every_n_steps
sample_batch_size sample_every_n_epochs logging_dir log_with log_tracker_config wandb_run_name wandb_api_key
blocks_to_swap
seed output_name save_model_as train_data_dir reg_data_dir in_json dataset_class conditioning_data_dir caption_extention
caption_prefix caption_suffix secondary_separator face_crop_aug_range resize_interpolation validation_seed validate_every_n_steps
validate_every_n_epochs max_validation_steps huggingface_repo_id huggingface_repo_type huggingface_path_in_repo
huggingface_repo_visibility huggingface_token resume save_last_n_epochs_state save_last_n_steps_state""".split()
_OFF = """output_config console_log_simple enable_bucket bucket_no_upscale cache_latents
cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk full_bf16 gradient_checkpointing
sample_at_first log_config cpu_offload_checkpointing fused_backward_pass blockwise_fused_optimizers cache_info
debug_dataset enable_wildcard shuffle_caption color_aug flip_aug random_crop alpha_mask masked_loss
skip_cache_check skip_latents_validity_check use_flash_attn async_upload save_state save_state_on_train_end
save_state_to_huggingface resume_from_huggingface""".split()

PEER_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(_NONE), **dict.fromkeys(_OFF, False),
    "console_log_level": "INFO", "train_batch_size": 1, "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64,
    "caption_extension": ".caption", "caption_separator": ",", "keep_tokens": 0, "keep_tokens_separator": "",
    "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0, "caption_tag_dropout_rate": 0.0, "token_warmup_min": 1,
    "token_warmup_step": 0.0, "prior_loss_weight": 1.0, "validation_split": 0.0, "dataset_repeats": 1,
    "max_data_loader_n_workers": 8, "vae_batch_size": 1,
    "mixed_precision": "no", "optimizer_type": "AdamW", "optimizer_args": (), "learning_rate": 2e-6, "max_grad_norm": 1.0,
    "use_8bit_adam": False, "use_lion_optimizer": False, "lr_decay_steps": 0,
    "lr_scheduler_num_cycles": 1, "lr_scheduler_power": 1.0, "lr_scheduler_timescale": None, "lr_scheduler_min_lr_ratio": None,
    "lr_scheduler_type": "", "lr_scheduler_args": (),
    "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 1600, "gradient_accumulation_steps": 1,
    "min_timestep": 0, "max_timestep": 1000, "log_prefix": "", "log_tracker_name": "finetuning", "loss_type": "l2",
    "huber_schedule": "snr", "huber_c": 0.1, "huber_scale": 1.0,
}

OWN_DEFAULTS: dict[str, dict[str, object]] = {
    "flux_train.py": {
        **dict.fromkeys("ae clip_l t5xxl t5xxl_max_token_length".split()), "apply_t5_attn_mask": False,
        "timestep_sampling": "sigma", "weighting_scheme": "uniform", "discrete_flow_shift": 3.0, "sigmoid_scale": 1.0,
        "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "model_prediction_type": "sigma_scaled",
        "guidance_scale": 3.5, "model_type": "flux", "ip_noise_gamma": None, "ip_noise_gamma_random_strength": False,
    },
    "sdxl_train.py": {
        **dict.fromkeys("vae tokenizer_cache_dir learning_rate_te1 learning_rate_te2 block_lr noise_offset adaptive_noise_scale "
                        "multires_noise_iterations ip_noise_gamma min_snr_gamma v_pred_like_loss".split()),
        **dict.fromkeys("no_half_vae weighted_captions train_text_encoder v_parameterization zero_terminal_snr "
                        "noise_offset_random_strength ip_noise_gamma_random_strength debiased_estimation_loss "
                        "scale_v_pred_loss_like_noise_pred".split(), False),
        "max_token_length": 75, "multires_noise_discount": 0.3, "sample_sampler": "ddim",
    },
    "sd3_train.py": {
        **dict.fromkeys("clip_l clip_g t5xxl vae t5xxl_device t5xxl_dtype learning_rate_te1 learning_rate_te2 learning_rate_te3 "
                        "num_last_block_to_freeze".split()),
        **dict.fromkeys("apply_lg_attn_mask apply_t5_attn_mask enable_scaled_pos_embed train_text_encoder train_t5xxl "
                        "use_t5xxl_cache_only save_clip save_t5xxl".split(), False),
        **dict.fromkeys("clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate pos_emb_random_crop_rate".split(), 0.0),
        "t5xxl_max_token_length": 256, "weighting_scheme": "uniform", "training_shift": 1.0, "logit_mean": 0.0, "logit_std": 1.0,
        "mode_scale": 1.29,
    },
    "lumina_train.py": {
        **dict.fromkeys("gemma2 ae vae".split()), "gemma2_max_token_length": 256, "system_prompt": "",
        "timestep_sampling": "shift", "weighting_scheme": "uniform", "discrete_flow_shift": 6.0, "sigmoid_scale": 1.0,
        "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "model_prediction_type": "raw", "ip_noise_gamma": None,
        "ip_noise_gamma_random_strength": False,
    },
}

NEW: dict[str, str] = {
    "weights_dtype": "keep weights in float32 under bf16 arithmetic (`fp32`), or in bf16 with stochastic rounding (`bf16`). "
                     "`auto`: bf16 under `--mixed_precision bf16` or `--full_bf16`, else float32",
    "cache_dir": "disk caches can stand on another disk than the pictures",
    "cache_check": "how closely changed pictures are looked for; `--skip_cache_check` is `--cache_check none`",
    "text_cache_variants": "shuffled captions, dropped tags and wildcards together with cached text encoder outputs",
    "recursive": "pictures in subfolders",
    "skip_image_resolution": "pictures that are too small to learn from need not be sorted out by hand",
    "plan": "see what a run would need of memory, disk and time, and what would fit, before anything is read: "
            "[memory.md](memory.md)",
    "vram_budget": "let the memory flags be chosen that fit a card and cost the least time",
    "clip_l_tokenizer": "train without a connection to the hub",
    "clip_g_tokenizer": "train without a connection to the hub",
    "t5xxl_tokenizer": "train without a connection to the hub",
    "gemma2_tokenizer": "train without a connection to the hub",
    "attn_mode": "one choice of attention for all models; `--use_flash_attn`, in the dialect a flag of Lumina, is short for `flash`",
    "async_save": "files during training cost the time of a copy to host memory, not that of the disk",
    "no_metadata": "known from the LoRA scripts of the dialect; here for checkpoints as well",
}

NEW |= {
    "save_state_every_n_steps": "states at moments of their own, apart from checkpoints",
    "resume_anyway": "go on from a state although settings changed that change the run; without it they are listed and refused",
    "nan_policy": "a step with a NaN can be left out, or the run goes back to its newest state, where others train on with broken weights",
    "ema_decay": "a running average of the weights, saved beside them",
    "ema_device": "where that average is kept",
    "recompute_policy": "keep the outputs of matrix products and attention: nearly the speed without recompute",
    "recompute_every": "recompute some of the blocks, where there is room for the rest",
    "swap_look_ahead": "more blocks on their way at a time, where copies come late",
    "stream_optimizer_states": "optimizer states wait in CPU memory with their block",
}

REASONS: dict[str, str] = {
    "timestep_sampling": "with `shift` the noise levels that decide the composition get most of the training; the usual recipe",
    "model_prediction_type": "`sigma_scaled` compares an estimate of the picture with a velocity; `raw` compares like with like",
    "discrete_flow_shift": "exp(1.15), the shift of FLUX's own schedule at 1024 x 1024",
    "sample_batch_size": "one at a time takes the least memory; a flag of every script here, in the dialect of Lumina's alone",
    "guidance_scale": "a distilled model is best fine-tuned without guidance; 3.5 belongs to sampling",
    "max_bucket_reso": "1024 takes area away from every bucket that is not square at resolution 1024",
    "min_bucket_reso": "the same, except where 256 would be more than half the shorter side of a small resolution",
    "bucket_reso_steps": "the same, raised to a multiple of what the model needs",
    "caption_extension": "nearly all folders of captions hold `.txt`; `.caption` is still found",
    "resize_interpolation": "the same choice, under a name",
    "huber_schedule": "`snr` works here with every model; in the dialect it fails with a flow",
    "max_grad_norm": "the same, except where weights are updated during the backward pass and no such norm is known",
    "seed": "a run without `--seed` can be repeated too",
    "output_name": "one name for all files of a run; the dialect uses `epoch`, `at` and `last`",
    "huggingface_repo_type": "the same, under its name",
    "huggingface_repo_visibility": "the same, under its name; other words than `public` and `private` are refused",
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
- **`--min_timestep` and `--max_timestep`** are honoured for FLUX and Lumina.
- **Lumina-Next**, which the dialect does not train, is trained by `lumina_train.py` like Lumina-Image 2.0; a diffusers folder of
  either is saved as a folder.
- **`--model_prediction_type sigma_scaled` and `additive`** have the signs of Lumina's time and velocity; the dialect took them
  from FLUX, where both are the other way round.
- **`--use_flash_attn`** works for every model, and without the package through torch's own kernel. **`--use_sage_attn`** is
  refused: it has no backward pass.
- **`--system_prompt`** stands before every caption but the empty one, and counts in `--gemma2_max_token_length`.
- **`--weighting_scheme`** counts where the dialect lets it count (densities with `sigma` sampling, weights with `sigma_scaled`
  prediction) and is refused elsewhere.
- **SD3**: `--num_last_block_to_freeze` counts blocks; weights of `--weighting_scheme` are each sample's own; noise levels reach the
  model unrounded; `--apply_lg_attn_mask` and `--apply_t5_attn_mask` act with and without caches, as zeros in place of padding;
  `--enable_scaled_pos_embed` goes by each picture's own area and not by the resolutions of the dataset; random crops of the position
  table are drawn per sample; `--use_t5xxl_cache_only` asks for `--cache_text_encoder_outputs`; `--save_clip`, `--save_t5xxl`,
  `--t5xxl_device` and `--t5xxl_dtype` work; `--train_t5xxl` does not need `--train_text_encoder`; encoders are saved in `--save_precision`.
- **`--lr_warmup_steps`** means optimizer steps on any number of GPUs.
- **`--save_model_as`** other than `safetensors` is refused for FLUX, where the dialect ignores it. For SDXL every choice works,
  for Lumina `safetensors` and `diffusers_safetensors`; without one a diffusers folder is saved as a diffusers folder.
- **SDXL's pooled embedding** is right for single files: their `text_projection` is transposed when it is read. The dialect takes it
  as it lies, so that models trained there learned with another vector than the one they are used with.
- **`--learning_rate_te1 0`** and zeros in `--block_lr` leave these weights without gradients. Encoders that do not train can be
  cached while the others train. **`--weighted_captions`** goes with cached text.
- **`v_pred` and `ztsnr` keys** of a checkpoint are obeyed, with a word in the log, and written.
- **Saved files** are written aside, take their name when they are whole, and are read back; older ones go after that. One that cannot be written is
  tried again, and says so, instead of ending the run. [outputs.md](outputs.md) has the rules.
- **Metadata** of checkpoints holds the `ss_*` fields that the dialect writes for LoRA only, without hashing the whole base model;
  `modelspec.hash_sha256` is filled in. Optimizer names are those of the flag.
- **`--log_tracker_config`** is added to what other flags say (`--wandb_run_name` stays); `--log_with` also takes the names of
  accelerate's other trackers, and TensorBoard gets pictures. A tracker that fails does not end the run.
- **`--huggingface_path_in_repo`** may be left out (the top of the repository), a token that may not write is told before training,
  and the end of a run waits for uploads.
- **States on the hub**: each is one commit in a folder of its own name. `--resume_from_huggingface` also takes `latest` or the
  name of a state alone, in `--huggingface_repo_id`; a revision may be left empty (`OWNER/REPO/STATE::dataset`). In the dialect the
  path had to be spelled out, nothing was checked after the download, and counters began at 0.
- **Weights of the loss, masks and `loss_weight`** act together in every objective, for each picture by itself.
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
- **`--max_grad_norm`** clips the norm over all weights, always. With `--blocks_to_swap`, `--fused_backward_pass` and
  `--blockwise_fused_optimizers` no such norm is known in time: the default is 0 there, and another value is refused.
- **`--blocks_to_swap`** streams any number of blocks, all of them included, with any optimizer, and trains to the same weights, bit
  for bit. It brings `--gradient_checkpointing` with it. `--double_blocks_to_swap` and `--single_blocks_to_swap` are one number.
- **`--fused_backward_pass`** and **`--blockwise_fused_optimizers`** work with every optimizer that steps weight by weight, with
  `--gradient_accumulation_steps` and on several GPUs, and cannot be given together.
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
  a fixed seed. With `--sample_batch_size` only prompts that agree in size, steps, sampler and guidance are drawn together, each
  from its own seed, and the pictures are the same.
- **A NaN or infinite loss** stops the run before the weights take it, with the step and the pictures.
- **Caches** are found by content (picture, mask, caption, encoder, settings), so there is nothing to delete after an edit.
  They lie in large files with checksums, in half the dialect's precision and a fraction of its size. Latents in `*.npz` files
  of the dialect can be imported with `python tools/cache.py import`; cached text outputs are made anew.
"""


def peer_defaults(entry: Entry) -> dict[str, object]:
    """The dialect's defaults of what its script for the same model has too."""
    return PEER_DEFAULTS | OWN_DEFAULTS[entry.program]


def deviations(entry: Entry) -> dict[str, tuple[object, str]]:
    """Flag -> (the dialect's default, ours in words), where the two values are not the same."""
    theirs = peer_defaults(entry)
    return {name: (theirs[name], default(setting)) for name, setting in entry.settings().items()
            if name in theirs and theirs[name] != setting.default}


def page() -> str:
    """The whole page as Markdown."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for entry in entries():
        for name, (theirs, ours) in deviations(entry).items():
            rows.setdefault((f"`--{name}`", show(theirs), ours, REASONS[name]), []).append(f"`{entry.program}`")
    everywhere = len(entries())
    cells = [(*row[:3], "" if len(scripts) == everywhere else ", ".join(scripts), row[3]) for row, scripts in rows.items()]
    lines = [INTRO, *table(("flag", "dialect", "here", "only in", "reason"), cells)]
    lines += ["## Flags that are new\n", *table(("flag", "what for"), [(f"`--{name}`", reason) for name, reason in NEW.items()])]
    return "\n".join([*lines, BEHAVIOUR])


if __name__ == "__main__":
    write_atomic(PAGE, page())
    print(f"written: {PAGE}")
