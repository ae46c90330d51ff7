"""The planner in a run: advice when memory runs out, the mapping from flags to settings and back."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import flux_train
from library.app import main
from library.config.memory_options import MemoryOptions
from library.memory.planner import Planner
from library.memory.setting import Setting
from library.planning import advice_for, flags_of, offered, setting_of
from tests.contract.conftest import dataset_file, make_pictures
from tests.tiny import make_flux_files
from tests.unit.memory_plan_helpers import FIXED, model


def test_every_setting_on_offer_has_flags_that_make_it():
    found = [setting for setting in Planner(model(), FIXED).settings() if offered(setting)]
    assert Setting() in found and Setting("all") in found
    for setting in found:
        assert setting_of(SimpleNamespace(memory=MemoryOptions(**flags_of(setting)))) == setting


def test_other_errors_are_left_alone():
    assert advice_for(RuntimeError("out of luck"), lambda: pytest.fail("no plan is needed")) is None


@pytest.mark.parametrize(("more", "advice"), [
    ((), r"add --[a-z_ 0-9-]+: [\d.]+ MB less, about \d+% slower"),
    (("--gradient_checkpointing", "--fused_backward_pass", "--blocks_to_swap", "4", "--stream_optimizer_states",
      "--cpu_offload_checkpointing"), "lower the batch size from 2")])
def test_a_run_without_memory_ends_with_advice(more, advice, tmp_path, monkeypatch, capsys):
    def train(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line")

    monkeypatch.setattr("library.ending.train", train)
    files = make_flux_files(tmp_path / "model")
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 2, (256, 256)), resolution=256)
    status = main(flux_train.ENTRY, ["--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(data),
                                     "--output_dir", str(tmp_path / "out"), "--t5xxl_max_token_length", "16", *more])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Tried to allocate 2.00 GiB" in lines[0] and "second" not in lines[0]
    assert re.search(advice, lines[0]), lines
