"""The quickstart's own files and commands, with two steps instead of hundreds."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.cli.conftest import ROOT, environment
from tests.contract.conftest import losses


def run(*command, **extra):
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_toy_checkpoint_and_main_job(tmp_path):
    run(sys.executable, "tools/make_toy_flux.py", "--output", tmp_path / "toy")
    text = run(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
               "--dynamo_backend", "no", "flux_train.py", "--config_file", "configs/quickstart/flux.toml", "--max_train_steps", 2,
               "--lr_warmup_steps", 0, "--sample_every_n_steps", 2, "--output_dir", tmp_path, "--logging_dir", tmp_path / "logs",
               "--pretrained_model_name_or_path", tmp_path / "toy" / "flux1-dev.safetensors")
    assert "12 pictures" in text and "Traceback" not in text
    assert len(losses(tmp_path, "quickstart")) == 2
    for name in ("quickstart.safetensors", "quickstart_config.toml", "quickstart_loss.png"):  # what quickstart.sh says is there
        assert (tmp_path / name).stat().st_size > 0
        assert name in (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    prompts = [line for line in (ROOT / "configs/quickstart/prompts.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert len(list((tmp_path / "sample").glob("quickstart_0*.png"))) == 2 * len(prompts)
    with Image.open(tmp_path / "sample" / "quickstart_contact_sheet.png") as sheet:
        assert sheet.width > 500


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", ".ci/run", "tools/environment.sh"])
def test_shell_scripts_parse(script):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    run("bash", "-n", script)
