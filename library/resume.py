"""Whether a run may go on from a state: the same model, the same pictures, the same settings; and what differs otherwise."""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from library.checkpoint.train_state import StateFacts
from library.config.parse import Config, to_toml
from library.errors import UserError, UserErrors
from library.resume_rules import CHANGES, FIXED, KEEPS, Rule, follows_length, rule_of

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "numpy")
_PATH_MARKS = ("PATH", "FILE", "DIR")  # what --help calls a value that is a place
_UNKNOWN = Rule(CHANGES, "nothing is known about its effect")
_ABSENT = "not set"


@dataclass(frozen=True)
class Change:
    """One setting that differs, in the words of a user. ``fixed``: it cannot be changed, confirmed or not."""

    name: str
    before: str
    now: str
    reason: str
    fixed: bool = False

    def __str__(self) -> str:
        return f"{self.name} was {self.before} and is {self.now} ({self.reason})"


def compare(saved: str, config: Config) -> list[Change]:
    """The settings of ``config`` that differ from the ``saved`` ones (TOML of ``parse.to_toml``) and would change the run.

    Settings that only say where things lie, what is shown or saved, or how memory is used are passed over; see
    ``resume_rules``. A setting that the older program did not have counts as left at its default.
    """
    before, now = (_flat(text) for text in (saved, to_toml(config)))
    changes = []
    for name, setting in config.entry.settings().items():
        default = _plain(setting.default)
        old, new = before.get(name, default), now.get(name, default)
        if not setting.meta["saved"] or old == new:
            continue
        is_path = setting.kind is Path or setting.meta["metavar"] in _PATH_MARKS
        rule = rule_of(setting.section, name, is_path) or _UNKNOWN
        if rule.verdict == KEEPS:
            continue
        if name.startswith("cache_text_encoder_outputs") and _text_cached(before) == _text_cached(now):
            continue  # two names of one thing; where it is kept does not matter
        changes.append(Change(f"--{name}", _shown(old), _shown(new), rule.reason, rule.verdict == FIXED))
    norms = [_clipping(values) for values in (before, now)]
    if norms[0] != norms[1] and before.get("max_grad_norm") == now.get("max_grad_norm"):
        changes.append(Change("the gradient norm in force", f"{norms[0]:g}", f"{norms[1]:g}",
                              "--max_grad_norm is 0 by itself where weights are updated during the backward pass"))
    return changes


def _clipping(values: Mapping[str, Any]) -> float:
    """``--max_grad_norm`` in force, of settings as they were saved."""
    inside = any(values.get(name) for name in ("blocks_to_swap", "fused_backward_pass", "blockwise_fused_optimizers"))
    return values.get("max_grad_norm", 0.0 if inside else 1.0)


def require_same(saved: StateFacts, now: StateFacts, config: Config, place: str, anyway: bool) -> list[Change]:
    """Refuse a state that does not belong to this run. Returns the changes that were confirmed by ``anyway``.

    UserErrors, each change a line: another model, whatever was said; other pictures or settings, unless ``anyway``.
    The number of processes may differ: ``StepPlan(stride=saved.stride)`` then gives every step the samples it would have had.
    """
    if saved.model != now.model:
        raise UserError("this state is of another model, another kind of training, or other frozen parts", place=place,
                        remedy="resume with the model it was saved with; to train on from its weights, start from a checkpoint")
    changes = compare(saved.config, config) + _run_changes(saved, now)
    fixed = [change for change in changes if change.fixed]
    if fixed:
        raise UserErrors([UserError(str(change), place=place, remedy="set it back; no state can go on with another value")
                          for change in fixed])
    if changes and not anyway:
        raise UserErrors([UserError(str(change), place=place, remedy="set it back, or add --resume_anyway to go on with what it "
                                    "is now") for change in changes])
    if now.step > now.total_steps:
        raise UserError(f"this state is of step {now.step}, and the run has {now.total_steps}", place=place,
                        remedy="raise --max_train_steps or --max_train_epochs")
    return changes


def stride_of(saved: StateFacts, now: StateFacts) -> int:
    """The batches of a step for the run that goes on. With another number of processes they stay what they were, so that every
    step sees the samples that it would have seen; with the same number they are what the settings say."""
    return saved.stride if saved.world_size != now.world_size else now.stride


def _run_changes(saved: StateFacts, now: StateFacts) -> list[Change]:
    """What differs besides flags. The length of the run counts where something follows it."""
    changes = []
    settings = [_flat(facts.config) for facts in (saved, now)]
    if saved.total_steps != now.total_steps and (any(map(follows_length, settings)) or _words_follow_length(now)):
        changes.append(Change("the length of the run in steps", str(saved.total_steps), str(now.total_steps),
                              "the learning rate, or the words of captions, follow it"))
    for name in sorted(saved.data_settings.keys() | now.data_settings.keys()):
        old, new = saved.data_settings.get(name, _ABSENT), now.data_settings.get(name, _ABSENT)
        if old != new:
            changes.append(Change(name, old, new, "a setting of the dataset"))
    if saved.data != now.data:
        changes.append(Change("the set of pictures and captions", saved.data[:12], now.data[:12],
                              "pictures, captions or repeats were changed; steps would see others than they would have"))
    if saved.stride != stride_of(saved, now):
        changes.append(Change("the number of batches in a step", str(saved.stride), str(now.stride),
                              "processes times --gradient_accumulation_steps"))
    return changes


def identity(*texts: str) -> str:
    """One text for ``StateFacts.model``, from what must not differ: architecture, method, hashes of the frozen weights."""
    return xxhash.xxh3_128_hexdigest("\0".join(texts).encode())


def _words_follow_length(facts: StateFacts) -> bool:
    return any(name.endswith(": captions.warmup_step") and 0 < float(value) < 1 for name, value in facts.data_settings.items())


def data_settings(specs: Sequence[Any]) -> dict[str, str]:
    """The resolved settings of a dataset file by name, without places (``DatasetSpec`` -> ``StateFacts.data_settings``)."""
    flat: dict[str, str] = {}
    for number, spec in enumerate(specs, 1):
        for name, value in _fields(spec):
            if name != "subsets":
                flat[f"dataset {number}: {name}"] = value
        for index, subset in enumerate(spec.subsets, 1):
            flat |= {f"dataset {number}, subset {index}: {name}": value for name, value in _fields(subset)}
    return flat


# Places; what they hold is in the digest. Of the held-out part only its choice matters, which is in the digest as well.
_PLACES = ("place", "image_dir", "metadata_file", "mask_dir", "cache_info", "validation_split", "validation_seed", "recursive",
           "suffixes", "caption_suffixes")


def _fields(record: Any, prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for each in dataclasses.fields(record):
        value = getattr(record, each.name)
        if each.name in _PLACES:
            continue
        if dataclasses.is_dataclass(value):
            found += _fields(value, f"{prefix}{each.name}.")
        elif each.name == "subsets":
            continue
        else:
            found.append((prefix + each.name, json.dumps(value, default=str)))
    return found


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def version_notes(saved: Mapping[str, str]) -> list[str]:
    """A line per package that is not of the version that wrote the state: numbers may then differ in their last digits."""
    now = versions()
    return [f"the state was written with {name} {old}; here it is {now.get(name, 'missing')}, so numbers may differ a little"
            for name, old in saved.items() if now.get(name) != old]


def _flat(text: str) -> dict[str, Any]:
    sections = tomllib.loads(text)
    return {name: value for section in sections.values() for name, value in section.items()}


def _plain(value: Any) -> Any:
    """A default as it comes back from TOML."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _text_cached(values: Mapping[str, Any]) -> bool:
    return bool(values.get("cache_text_encoder_outputs") or values.get("cache_text_encoder_outputs_to_disk"))


def _shown(value: Any) -> str:
    return _ABSENT if value is None else json.dumps(value, ensure_ascii=False)
