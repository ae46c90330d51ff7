"""Several processes: the same steps as one process that accumulates, one log, one file."""

import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import ROOT, environment, run_script, with_flag
from tests.cli.runs import column
from tests.contract.conftest import dataset_file, make_pictures


def two(*arguments):
    """The script in two processes, run to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
                              "flux_train.py", *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert several.returncode == 0, several.stderr[-3000:]
    return several


@pytest.mark.parametrize("disk", [(), ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")], ids=["memory", "disk"])
def test_two_processes_are_one_that_accumulates_two(base, tmp_path, disk):
    """3 micro-batches an epoch do not divide by 2: the filler of the last step must count nothing. Both fill the caches, measure
    the held-out pictures, and go on from a state bit for bit."""
    pictures, more = make_pictures(tmp_path / "three", 3 if disk else 5), []
    three = dataset_file(tmp_path / "three.toml", pictures, batch_size=1, **({} if disk else {"validation_split": 0.4}))
    if not disk:
        more = ["--validate_every_n_steps", "2", "--ema_decay", "0.9", "--save_state_every_n_steps", "3"]
    flags = [*with_flag(with_flag(with_flag(base, "learning_rate", "1e-3"), "max_train_steps", 5), "dataset_config", three), *more]
    several = two(*with_flag(flags, "output_dir", tmp_path / "two"), *disk)
    assert several.stderr.count("steps in all") == 1 and several.stderr.count("saved ") == (1 if disk else 2)
    assert len(list((tmp_path / "three" / ".kiln_cache").glob("latents-*"))) == (2 if disk else 0)
    one = run_script(*with_flag(flags, "output_dir", tmp_path / "one"), "--gradient_accumulation_steps", "2")
    assert one.status == 0, one.text
    for name in ("loss", "validation_loss", "validation_loss_ema"):
        assert column(tmp_path / "two", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-5)
    assert len(column(tmp_path / "two", "validation_loss")) == (0 if disk else 3)
    whole, single = load_file(tmp_path / "two" / "last.safetensors"), load_file(tmp_path / "one" / "last.safetensors")
    assert all((whole[name] - single[name]).abs().max() < 1e-4 for name in single)
    if not disk:
        two(*with_flag(flags, "output_dir", tmp_path / "rest"), "--resume", tmp_path / "two" / "last-step00000003-state")
        rest = load_file(tmp_path / "rest" / "last.safetensors")
        assert all(torch.equal(rest[name], whole[name]) for name in whole)
        for name in ("loss", "validation_loss", "validation_loss_ema"):
            assert column(tmp_path / "rest", name) == column(tmp_path / "two", name)[-2:]
