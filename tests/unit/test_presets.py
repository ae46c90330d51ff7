"""The configuration files people start from hold known settings with valid values, and no setting that does nothing.

``configs/<model>/*.toml`` and ``configs/quickstart/<model>.toml`` belong to ``<model>_train.py``.
"""

import importlib
from pathlib import Path

import pytest

from library.config.parse import parse
from library.data import spec
from library.errors import UserError
from library.prompts import parse_prompts

ROOT = Path(__file__).parents[2]
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.toml") if path.name != "dataset.toml")
NAMES = [path.relative_to(ROOT / "configs").as_posix() for path in RUNS]


def script(path: Path) -> str:
    return f"{path.stem if path.parent.name == 'quickstart' else path.parent.name}_train"


@pytest.fixture
def read(monkeypatch):
    """``read(file, *flags)`` -> its configuration, from the folder that the paths in presets are relative to."""
    monkeypatch.chdir(ROOT)

    def read(path, *flags):
        entry = importlib.import_module(script(path)).ENTRY
        return parse(entry, ["--config_file", str(path), *flags], env={"ACCELERATE_MIXED_PRECISION": "bf16"})

    return read


def test_every_script_has_presets():
    assert {script(path) for path in RUNS} >= {path.stem for path in ROOT.glob("*_train.py")} >= {"flux_train", "sdxl_train"}
    assert {"quickstart/flux.toml", "quickstart/sdxl.toml"} <= set(NAMES)


@pytest.mark.parametrize("path", RUNS, ids=NAMES)
def test_preset_is_valid(path, read):
    config = read(path)
    assert not config.notes
    options = config.architecture
    prompts = parse_prompts(config.sampling.sample_prompts, options.latent.pixel_step, options.preview,
                            getattr(options, "samplers", ()))
    assert prompts.prompts and not prompts.notes
    try:
        spec.load(config.dataset, config.caching, options.latent.pixel_step, config.place)
    except UserError as error:  # the preset's pictures are the user's; all else must be right
        assert "no such folder" in str(error) and "pictures" in str(error), error


@pytest.mark.parametrize("path", RUNS, ids=NAMES)
def test_the_command_in_a_preset_is_its_own(path):
    text = path.read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("#   accelerate launch "))
    assert command.endswith(f"{script(path)}.py --config_file {path.relative_to(ROOT).as_posix()}")


def test_what_a_preset_leaves_switched_off_is_valid_too(read):
    """The line that is switched on by removing the mark in front of it."""
    path = ROOT / "configs/sdxl/finetune_16gb.toml"
    line = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# block_lr = "))
    rates = read(path, "--block_lr", line.split('"')[1]).architecture.block_rates
    assert [index for index, rate in enumerate(rates) if rate == 0] == [8, 9, 11]  # as docs/sdxl.md counts its memory
