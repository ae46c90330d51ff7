"""The quickstart's own files and commands, with two steps instead of hundreds."""

import re
import shutil
import subprocess
import tomllib

import pytest
from PIL import Image

from tests.cli.conftest import ROOT, environment, run_script
from tests.cli.runs import launch, launcher
from tests.contract.conftest import losses


@pytest.mark.parametrize(("model", "checkpoint"), [("flux", "flux1-dev.safetensors"), ("sdxl", "sd_xl_base_1.0.safetensors"),
                                                   ("sd3", "sd3_medium.safetensors"), ("lumina", "lumina_2_model_bf16.safetensors")])
def test_toy_checkpoint_and_main_job(model, checkpoint, tmp_path):
    """One of them under the launcher that the quickstart uses."""
    made = run_script("--output", tmp_path / "toy", "--size", "tiny", script=f"tools/make_toy_{model}.py")
    assert made.status == 0, made.text
    flags = ["--config_file", f"configs/quickstart/{model}.toml", "--max_train_steps", 2, "--lr_warmup_steps", 0, "--sample_every_n_steps", 2,
             "--output_dir", tmp_path, "--logging_dir", tmp_path / "logs", "--pretrained_model_name_or_path", tmp_path / "toy" / checkpoint]
    done = launch(launcher("no"), *flags) if model == "flux" else run_script(*flags, "--mixed_precision", "no", script=f"{model}_train.py")
    assert done.status == 0 and "12 pictures" in done.text and "Traceback" not in done.text, done.text
    assert len(losses(tmp_path, "quickstart")) == 2
    for name in ("quickstart.safetensors", "quickstart_config.toml", "quickstart_loss.png"):  # what quickstart.sh says is there
        assert (tmp_path / name).stat().st_size > 0
        assert name in (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    prompts = [line for line in (ROOT / "configs/quickstart/prompts.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert len(list((tmp_path / "sample").glob("quickstart_0*.png"))) == 2 * len(prompts)
    with Image.open(tmp_path / "sample" / "quickstart_contact_sheet.png") as sheet:
        assert sheet.width > 500


@pytest.mark.parametrize("model", ["flux", "sdxl", "sd3"])
def test_the_script_builds_what_the_configuration_reads(model):
    """quickstart.sh and the configuration name the same folder; the file in it is the one that the maker writes."""
    script = (ROOT / "quickstart.sh").read_text(encoding="utf-8")
    folder = re.search(rf"^ *{model}\) OUT=(\S+) ", script, flags=re.M)[1]
    config = tomllib.loads((ROOT / f"configs/quickstart/{model}.toml").read_text(encoding="utf-8"))
    checkpoint = config["model"]["pretrained_model_name_or_path"]
    assert checkpoint.startswith(f"{folder}/toy/") and config["output"]["output_dir"] == folder
    assert checkpoint.rsplit("/", 1)[1] in (ROOT / f"tools/make_toy_{model}.py").read_text(encoding="utf-8")


def test_an_unknown_model_is_told_before_anything_is_made():
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    done = subprocess.run(["bash", "quickstart.sh", "sd9"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: no quickstart for 'sd9'; use: bash quickstart.sh [flux|sdxl|sd3|lumina] [flags of the script]\n"


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", ".ci/run", "tools/environment.sh"])
def test_shell_scripts_parse(script):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0
