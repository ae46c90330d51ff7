"""Flags of the dialect that are no settings here: what each one did, and what to do instead.

Three answers are possible. ``INERT``: accepted and named once in the log, because nothing would change (it is always so
here, or the dialect's own script ignores it too). ``LATER``: refused, because it would change the training and is not
built yet. ``ELSEWHERE``: refused, because another script's flag says that another script was meant. An architecture adds
its own records (``dialect`` on its options class); a record is passed over where a script has a setting of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INERT, LATER, ELSEWHERE = "inert", "later", "elsewhere"


@dataclass(frozen=True)
class Record:
    """One flag. ``takes``: ``switch``, ``value`` or ``list``. ``neutral``: values that ask for nothing and pass in silence."""

    name: str
    status: str
    reason: str
    takes: str = "switch"
    remedy: str = ""
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: Any) -> bool:
        """Whether ``value`` (text, or a TOML value; True for a bare switch) asks for nothing."""
        if value is False or value == "" or value == []:
            return True
        if isinstance(value, bool):
            return False
        if isinstance(value, str) and self.takes == "switch" and value.lower() in ("true", "false"):
            return value.lower() == "false"
        return any(value == known or _number(value) == known for known in self.neutral)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def records(status: str, names: str, reason: str, remedy: str = "", neutral: tuple[Any, ...] = ()) -> Iterator[Record]:
    """Records that share a reason. In ``names`` a trailing ``=`` marks a flag with a value, ``*`` one with several."""
    for word in names.split():
        takes = {"=": "value", "*": "list"}.get(word[-1], "switch")
        yield Record(word.rstrip("=*"), status, reason, takes, remedy, neutral)


def _inert() -> Iterator[Record]:
    yield from records(INERT, "mem_eff_attn xformers sdpa diffusers_xformers",
                       "attention always runs through torch's scaled_dot_product_attention, which has these kernels")
    yield from records(INERT, "mem_eff_save", "files are always written tensor by tensor")
    yield from records(INERT, "use_safetensors", "files are always written as safetensors")
    yield from records(INERT, "disable_mmap_load_safetensors", "files are read without memory maps")
    yield from records(INERT, "lowram highvram", "weights and caches are streamed, so there is no copy to place or to keep")
    yield from records(INERT, "persistent_data_loader_workers", "the processes that read pictures live as long as the run")
    yield from records(INERT, "ddp_timeout= ddp_gradient_as_bucket_view ddp_static_graph",
                       "the process group is set up by the program itself")
    yield from records(INERT, "dynamo_backend=", "only read with --torch_compile", neutral=("no", "inductor"))
    yield from records(INERT, "noise_offset= noise_offset_random_strength adaptive_noise_scale= multires_noise_iterations= "
                       "multires_noise_discount= zero_terminal_snr min_snr_gamma= scale_v_pred_loss_like_noise_pred "
                       "v_pred_like_loss= debiased_estimation_loss v2 v_parameterization",
                       "belongs to noise prediction; a rectified flow has no such term", neutral=(0, 0.3))
    yield from records(INERT, "timestep_sampling= weighting_scheme= discrete_flow_shift= sigmoid_scale= logit_mean= logit_std= "
                       "mode_scale= model_prediction_type=", "belongs to rectified flows; noise prediction has no such term",
                       neutral=("none", "uniform", "sigma"))
    yield from records(INERT, "clip_skip=", "text encoders are read at the layers that the model was trained with",
                       neutral=(0, 1))
    yield from records(INERT, "weighted_captions", "captions are read as plain text, brackets and numbers included")
    yield from records(INERT, "sample_sampler=", "previews follow the model's own flow by Euler steps")
    yield from records(INERT, "metadata_preprocessor= metadata_is_negative_embedding=",
                       "describes an adapter or an embedding, not a checkpoint")


def _later() -> Iterator[Record]:
    yield from records(LATER, "fused_optimizer_groups=", "groups of parameters are updated by block here",
                       "use --blockwise_fused_optimizers", (0,))
    yield from records(LATER, "full_fp16", "weights kept in fp16 lose most updates and overflow", "use --full_bf16")
    yield from records(LATER, "torch_compile", "not built yet: compiling the model",
                       "leave it out: it would change the speed only")
    yield from records(LATER, "deepspeed zero_stage= offload_optimizer_device= offload_optimizer_nvme_path= "
                       "offload_param_device= offload_param_nvme_path= zero3_init_flag zero3_save_16bit_model "
                       "fp16_master_weights_and_gradients",
                       "not built yet: DeepSpeed", "leave it out: several GPUs train together under plain accelerate launch")
    yield from records(LATER, "use_sage_attn", "SageAttention has no backward pass: it can draw pictures but not train",
                       "use --use_flash_attn")


def _elsewhere() -> Iterator[Record]:
    lora = "belongs to the *_train_network.py scripts (LoRA)", "leave it out here, or run that script of the same model"
    yield from records(ELSEWHERE, "network_module= network_dim= network_alpha= network_dropout= network_args* network_weights= "
                       "dim_from_weights network_train_unet_only network_train_text_encoder_only scale_weight_norms= "
                       "base_weights* base_weights_multiplier* training_comment= unet_lr= text_encoder_lr* fp8_base "
                       "fp8_base_unet split_mode initial_epoch= initial_step= skip_until_initial_step", *lora)
    other = "belongs to the script of another kind of model", "leave it out here, or run that model's script"
    yield from records(ELSEWHERE, "clip_g= gemma2= gemma2_max_token_length= system_prompt= apply_lg_attn_mask "
                       "clip_l_dropout_rate= clip_g_dropout_rate= t5_dropout_rate= pos_emb_random_crop_rate= "
                       "enable_scaled_pos_embed save_clip save_t5xxl t5xxl_device= t5xxl_dtype= use_t5xxl_cache_only "
                       "no_half_vae controlnet_model_name_or_path=", *other,
                       neutral=(0,))
    yield from records(ELSEWHERE, "ae= clip_l= t5xxl= t5xxl_max_token_length= apply_t5_attn_mask guidance_scale= model_type= "
                       "double_blocks_to_swap= single_blocks_to_swap=", *other, neutral=(0,))
    yield from records(ELSEWHERE, "train_text_encoder train_t5xxl learning_rate_te1= learning_rate_te2= learning_rate_te3= "
                       "block_lr= num_last_block_to_freeze=", *other, neutral=(0,))
    yield from records(ELSEWHERE, "training_shift=", other[0], "write --discrete_flow_shift", (1,))


DIALECT: dict[str, Record] = {record.name: record for make in (_inert, _later, _elsewhere) for record in make()}

# Switches of the launcher that would change the run behind our back: environment variable -> (harmless values, what it is)
LAUNCHER: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_USE_DEEPSPEED": (("false", "0", ""), "DeepSpeed"),
    "ACCELERATE_USE_FSDP": (("false", "0", ""), "FSDP"),
    "ACCELERATE_USE_MEGATRON_LM": (("false", "0", ""), "Megatron-LM"),
    "ACCELERATE_DYNAMO_BACKEND": (("no", ""), "torch.compile"),
}
