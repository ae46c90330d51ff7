"""Several processes: the same steps as one process that accumulates, one log, one file."""

import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import ROOT, environment, run_script, with_flag
from tests.contract.conftest import dataset_file, losses, make_pictures


@pytest.mark.parametrize("disk", [(), ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")], ids=["memory", "disk"])
def test_two_processes_are_one_that_accumulates_two(base, tmp_path, disk):
    """3 micro-batches an epoch do not divide by 2: the filler of the last step must count nothing. Both fill the caches, and each
    draws its part of the previews."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{words} --w 64 --h 64 --s 2\n" for words in ("a red box", "a blue box", "snow")), encoding="utf-8")
    disk = (*disk, "--sample_prompts", prompts, "--sample_at_first")
    three = dataset_file(tmp_path / "three.toml", make_pictures(tmp_path / "three", 3), batch_size=1)
    flags = with_flag(with_flag(with_flag(base, "learning_rate", "1e-3"), "max_train_steps", 5), "dataset_config", three)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
                              "flux_train.py", *with_flag(flags, "output_dir", tmp_path / "two"), *map(str, disk)],
                             cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert several.returncode == 0, several.stderr[-3000:]
    assert several.stderr.count("steps in all") == 1 and several.stderr.count("saved ") == 1
    assert len(list((tmp_path / "three" / ".kiln_cache").glob("latents-*"))) == (2 if "--cache_latents_to_disk" in disk else 0)
    one = run_script(*with_flag(flags, "output_dir", tmp_path / "one"), "--gradient_accumulation_steps", "2", *disk)
    assert one.status == 0, one.text
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    drawn = [sorted((tmp_path / which / "sample").iterdir()) for which in ("one", "two")]
    assert len(drawn[0]) == 4  # and the contact sheet
    assert [path.read_bytes() for path in drawn[0]] == [path.read_bytes() for path in drawn[1]]
    two, single = load_file(tmp_path / "two" / "last.safetensors"), load_file(tmp_path / "one" / "last.safetensors")
    assert all((two[name] - single[name]).abs().max() < 1e-4 for name in single)
