"""Which settings change what a run computes. The table behind the refusal to resume with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]  # flag -> value, as TOML has it; those that are None are absent

CHANGES, KEEPS, FIXED = "changes", "keeps", "fixed"
SECTION = "*"  # a rule for all flags of a section that have none of their own


@dataclass(frozen=True)
class Rule:
    """``verdict``: the setting CHANGES the run and needs a confirmation, KEEPS it as it is, or is FIXED: no state can go on with
    another value."""

    verdict: str
    reason: str


_LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "piecewise_constant", "adafactor")


def follows_length(values: Values) -> bool:
    """The learning rate depends on the length of the run. Schedules that are not known here are taken to."""
    warmup = values.get("lr_warmup_steps", 0)
    share = isinstance(warmup, str) or 0 < warmup < 1
    return share or bool(values.get("lr_scheduler_type")) or values.get("lr_scheduler") not in _LENGTHLESS


_PATHS = Rule(KEEPS, "where something lies; what it holds is compared itself")
_SPEED = Rule(KEEPS, "speed and memory; the numbers stay the same")
_WORDS = Rule(KEEPS, "what is written, not what is trained")
_LENGTH = Rule(KEEPS, "the length that comes out is compared itself, where something follows it")
_DATA = Rule(KEEPS, "the pictures and their settings are compared as they came out, however they were given")

_OTHER_OPTIMIZER = Rule(FIXED, "the saved state of one optimizer says nothing to another")

# (section, flag) -> rule
RULES: dict[tuple[str, str], Rule] = {
    ("general", SECTION): _WORDS,
    ("general", "seed"): Rule(CHANGES, "noise, order and captions follow from it"),
    ("model", SECTION): _PATHS,
    ("architecture", SECTION): Rule(CHANGES, "the model is called otherwise"),
    ("dataset", SECTION): _DATA,
    ("caching", SECTION): _SPEED,
    ("caching", "cache_text_encoder_outputs"): Rule(CHANGES, "cached captions vary less than fresh ones"),
    ("caching", "cache_text_encoder_outputs_to_disk"): Rule(CHANGES, "cached captions vary less than fresh ones"),
    ("caching", "text_cache_variants"): Rule(CHANGES, "captions are drawn from so many variants"),
    ("training", SECTION): Rule(CHANGES, "what a step is made of"),
    ("training", "max_train_steps"): _LENGTH,
    ("training", "max_train_epochs"): _LENGTH,
    ("training", "gradient_accumulation_steps"): Rule(
        KEEPS, "the batches of a step are compared, over all processes; accumulation only splits them"),
    ("training", "nan_policy"): Rule(KEEPS, "steps that were left out stay so; it says what happens to others"),
    ("optimizer", SECTION): Rule(CHANGES, "the updates of the weights"),
    ("optimizer", "optimizer_type"): _OTHER_OPTIMIZER,
    ("optimizer", "use_8bit_adam"): _OTHER_OPTIMIZER,
    ("optimizer", "use_lion_optimizer"): _OTHER_OPTIMIZER,
    ("objective", SECTION): Rule(CHANGES, "what the model is asked for"),
    ("loss", SECTION): Rule(CHANGES, "what is minimised"),
    ("precision", SECTION): Rule(CHANGES, "the arithmetic"),
    ("precision", "weights_dtype"): Rule(FIXED, "the weights are saved in the format they are trained in"),
    ("precision", "full_bf16"): Rule(FIXED, "the weights are saved in the format they are trained in"),
    ("memory", SECTION): _SPEED,
    # Steps inside the backward pass see one parameter's gradient at a time, and cannot be scaled by the norm of all.
    ("memory", "fused_backward_pass"): Rule(CHANGES, "gradients are not clipped by their common norm"),
    ("memory", "blockwise_fused_optimizers"): Rule(CHANGES, "gradients are not clipped by their common norm"),
    ("saving", SECTION): _WORDS,
    ("hub", SECTION): _WORDS,
    ("state", SECTION): _WORDS,
    ("metadata", SECTION): _WORDS,
    ("sampling", SECTION): _WORDS,
    ("logging", SECTION): _WORDS,
    ("ema", SECTION): Rule(CHANGES, "the averaged weights"),
    ("ema", "ema_device"): _SPEED,
}


def rule_of(section: str, flag: str, is_path: bool) -> Rule | None:
    """The rule of a flag; None where the table is silent, which counts as a change that matters."""
    own = RULES.get((section, flag))
    if own is not None:
        return own
    return _PATHS if is_path else RULES.get((section, SECTION))
