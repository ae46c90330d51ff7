"""The commands that the pages show are valid: every flag known, nothing refused, nothing named as without effect."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from library.config.check import check
from library.config.parse import parse

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```\w*\n(.*?)^```$", flags=re.M | re.S)


def commands():
    """(page, script, its arguments) of every launch in a fenced block."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in FENCED.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line) if line.lstrip().startswith("accelerate launch") else []
                script = next((index for index, word in enumerate(words) if word.endswith("_train.py")), None)
                if script is not None:
                    yield pytest.param(words[script], words[:script], words[script + 1:], id=f"{page.name}-{words[script]}")


@pytest.mark.parametrize(("script", "launcher", "arguments"), list(commands()))
def test_command_is_valid(script, launcher, arguments, tmp_path, monkeypatch):
    from_file = "--config_file" in arguments
    monkeypatch.chdir(ROOT if from_file else tmp_path)
    for word in () if from_file else arguments:
        if Path(word).suffix in (".toml", ".txt", ".safetensors"):
            (tmp_path / word).touch()
    precision = launcher[launcher.index("--mixed_precision") + 1] if "--mixed_precision" in launcher else "no"
    config = parse(importlib.import_module(script.removesuffix(".py")).ENTRY, arguments, {"ACCELERATE_MIXED_PRECISION": precision})
    if not from_file:  # the toy that such a file names is made by the command before it
        check(config)
    assert not config.notes


def test_every_script_has_a_command_in_the_readme_and_in_its_guide():
    shown = {parameter.id for parameter in commands()}
    for script in ROOT.glob("*_train.py"):
        assert {f"README.md-{script.name}", f"{script.stem.removesuffix('_train')}.md-{script.name}"} <= shown
