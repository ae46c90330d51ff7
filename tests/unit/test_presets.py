"""The configuration files people start from hold known settings with valid values, and no setting that does nothing."""

from pathlib import Path

import pytest

import flux_train
from library.architectures.flux_options import FluxOptions
from library.config.parse import parse
from library.data import spec
from library.prompts import parse_prompts

ROOT = Path(__file__).parents[2]
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.toml") if path.name != "dataset.toml")
STEP = FluxOptions.latent.pixel_step


def test_there_are_presets():
    assert {path.relative_to(ROOT / "configs").as_posix() for path in RUNS} >= {"quickstart/flux.toml", "flux/finetune.toml"}


@pytest.mark.parametrize("path", RUNS, ids=[path.parent.name for path in RUNS])
def test_preset_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in presets are relative to the repository
    config = parse(flux_train.ENTRY, ["--config_file", str(path)], env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert not config.notes
    assert parse_prompts(config.sampling.sample_prompts, STEP, FluxOptions.preview).prompts
    try:
        spec.load(config.dataset, config.caching, STEP, config.place)
    except Exception as error:  # the preset's pictures are the user's; all else must be right
        assert "no such folder" in str(error) and "pictures" in str(error), error
