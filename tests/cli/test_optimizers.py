"""Every optimizer and every schedule through the script's command line: ten steps that lower the loss.

Noise is a function of seed, step and picture: a run that stands still shows the loss that each step has without training.
"""

from __future__ import annotations

import csv

import pytest
import torch
from safetensors.torch import load_file

import flux_train
from library.app import main
from library.config.schema import SCHEDULES
from library.optim.records import RECORDS
from tests.cli.conftest import run_all
from tests.contract.conftest import dataset_file, losses
from tests.unit.optim_helpers import ARGS, param, rate

# 8-bit states and bf16 weights are how these are used; the others alternate, so that both ways see every kind.
BF16 = {record.name for index, record in enumerate(RECORDS) if "8bit" in record.name or index % 2}
MORE = {"piecewise_constant": ["--lr_scheduler_args", "step_rules=1:4,0.5"], "warmup_stable_decay": ["--lr_decay_steps", "4"],
        "adafactor": ["--learning_rate", "0.1"]}


@pytest.fixture(scope="module")
def base(files, pictures, tmp_path_factory):
    """Arguments of a run of ten steps; its caches are filled once for all of them."""
    data = dataset_file(tmp_path_factory.mktemp("optimizers") / "data.toml", pictures)
    return ["--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(data), "--max_train_steps", "10",
            "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--t5xxl_max_token_length", "16",
            "--console_log_level", "WARNING"]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """``run(*flags)`` -> output folder of a run in this process."""

    def call(*flags: object):
        out = tmp_path_factory.mktemp("out")
        assert main(flux_train.ENTRY, [*base, "--output_dir", str(out), *map(str, flags)]) == 0
        return out
    return call


@pytest.fixture(scope="module")
def still(run):
    """precision -> the losses of a run that stands still."""
    return {precision: losses(run("--learning_rate", 0, *precision)) for precision in ((), ("--mixed_precision", "bf16"))}


def rates(folder, column="learning_rate") -> list[float]:
    with (folder / "last_log.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("record", [param(record) for record in RECORDS])
def test_every_optimizer_lowers_the_loss(run, still, record):
    if record.name == "PagedAdEMAMix8bit" and not torch.cuda.is_available():
        pytest.skip("pages of this one exist in bitsandbytes for CUDA only")
    precision = ("--mixed_precision", "bf16") if record.name in BF16 else ()
    given = [arg.replace("d0=1e-2", "d0=3e-4") for arg in ARGS.get(record.name, [])]
    out = run("--optimizer_type", record.name, *(["--optimizer_args", *given] if given else []), *precision,
              "--learning_rate", rate(record) / (1 if record.own_rate else 30), "--max_grad_norm", 0)
    assert sum(losses(out)[5:]) < sum(still[precision][5:])
    if record.own_rate:
        assert rates(out, "lr/denoiser")[-1] < 0.1 < rates(out)[-1]  # what it found itself


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_lowers_the_loss(run, still, name):
    warm = ["--lr_warmup_steps", 2] if name not in ("constant", "piecewise_constant") else []
    out = run("--lr_scheduler", name, "--learning_rate", "1e-3", *warm, *MORE.get(name, []))
    assert sum(losses(out)[5:]) < sum(still[()][5:])
    if warm:
        assert rates(out)[0] == pytest.approx(rates(out)[1] / 2)
    assert (len(set(rates(out))) == 1) == (name == "constant")


def test_a_scheduler_class_lowers_the_loss(run, still):
    out = run("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=4", "gamma=0.5", "--learning_rate", "1e-3")
    assert sum(losses(out)[5:]) < sum(still[()][5:])
    assert rates(out) == pytest.approx([1e-3] * 4 + [5e-4] * 4 + [2.5e-4] * 2)


@pytest.mark.parametrize("more", [(), ("--blocks_to_swap", 2), ("--async_save",)], ids=["plain", "streamed", "async"])
def test_schedule_free_weights_are_saved_and_training_goes_on_from_the_others(run, more):
    """A run that saves at each step, and measures, is the run that saves once; what it saves is the average."""
    flags = ("--optimizer_type", "AdamWScheduleFree", "--learning_rate", "1e-3", "--max_grad_norm", 0, "--mixed_precision", "bf16",
             "--max_train_steps", 4, "--validation_split", 0.25, *more)
    often = run(*flags, "--save_every_n_steps", 1, "--validate_every_n_steps", 1, "--save_state")
    once = run(*flags, *(("--save_every_n_steps", 3) if more == ("--async_save",) else ()))
    assert losses(often) == losses(once)
    one, other = load_file(often / "last.safetensors"), load_file(once / "last.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)
    trained, kept = (load_file(often / "last-state" / f"{part}.safetensors") for part in ("weights", "optimizer"))
    average = trained["context_embedder.weight"].float().lerp(kept["context_embedder.weight/z"], 1 - 1 / 0.9)  # beta1 is 0.9
    assert torch.equal(one["txt_in.weight"], average.bfloat16())
    assert not torch.equal(one["txt_in.weight"], trained["context_embedder.weight"])


@pytest.mark.parametrize("flags, said", [
    (["--optimizer_type", "Prodigy"], "--learning_rate: 2e-06 would stop Prodigy"),
    (["--optimizer_type", "Lyon"], "unknown optimizer 'Lyon'; did you mean 'lion'"),
    (["--lr_scheduler_type", "StepLR"], "--lr_scheduler_args: StepLR refuses its arguments"),
    (["--optimizer_type", "Lion", "--optimizer_args", "beta=1"], "Lion has no argument 'beta'; did you mean 'betas'"),
    (["--optimizer_type", "Prodigy", "--learning_rate", "1", "--fused_backward_pass"],
     "Prodigy sums over all gradients before it updates any weight; --fused_backward_pass updates weights during the backward"),
    (["--optimizer_type", "torch.optim.Adam8", "--blocks_to_swap", "2"],
     "torch.optim.Adam8 is not in the table, so whether it may update some weights before others is not known; --blocks_to_swap"),
    (["--optimizer_type", "PagedAdamW", "--blocks_to_swap", "2", "--stream_optimizer_states"],
     "--stream_optimizer_states: PagedAdamW moves its states to CPU memory and back by itself"),
    (["--optimizer_type", "SGDScheduleFree", "--blocks_to_swap", "2", "--stream_optimizer_states"],
     "SGDScheduleFree needs all its states at once for the weights to save and to draw with"),
    (["--optimizer_type", "SGDScheduleFree", "--ema_decay", "0.9"],
     "--ema_decay: SGDScheduleFree averages the weights itself, and saves that average; leave --ema_decay out"),
])
def test_mistakes_are_told_before_anything_is_read(base, tmp_path, capfd, flags, said):
    assert main(flux_train.ENTRY, [*base, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    text = capfd.readouterr().err
    assert said in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_as_users_run_it(base, tmp_path):
    """In a process of its own: an old name, and a plan with its picture."""
    out = ["--output_dir", tmp_path / "out", "--console_log_level", "INFO"]
    old, plan = run_all([*base, *out, "--use_8bit_adam", "--max_train_steps", 1],
                        [*base, *out, "--plan", "--lr_scheduler", "cosine", "--output_name", "drawn"])
    assert old.status == plan.status == 0, old.text + plan.text
    assert "--use_8bit_adam is taken for --optimizer_type AdamW8bit" in old.text
    assert "the course of the learning rate is drawn in" in plan.text
    assert (tmp_path / "out" / "drawn_schedule.png").stat().st_size > 10_000
