"""Flags of the diffusion objective and of the loss: defaults of the dialect, values that switch off, conflicts."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from library.architectures.base import LatentSpec
from library.config.ddpm_options import DdpmOptions
from library.config.parse import Entry, parse
from library.prompts import Prompt


@dataclass(frozen=True)
class Nothing:
    title: ClassVar[str] = "Test"
    latent: ClassVar[LatentSpec] = LatentSpec(4, 8, 4)
    preview: ClassVar[Prompt] = Prompt("")


ENTRY = Entry("test.py", "none", "none", DdpmOptions, Nothing, {})
REQUIRED = ["--pretrained_model_name_or_path", "org/model", "--dataset_config", "data.toml", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.toml").write_text("")


def options(entry, *argv) -> Any:
    return parse(entry, [*REQUIRED, *argv], {})


def conflicts(entry, *argv) -> list[str]:
    config = options(entry, *argv)
    return [str(error) for _, error in (*config.objective.problems(config), *config.loss.problems(config))]


def test_defaults_are_those_of_the_dialect():
    objective = options(ENTRY).objective
    assert objective == DdpmOptions() and not conflicts(ENTRY)
    assert (objective.multires_noise_discount, objective.min_snr_gamma, objective.noise_offset) == (0.3, None, None)
    loss = options(ENTRY).loss
    assert (loss.loss_type, loss.huber_schedule, loss.huber_c, loss.huber_scale) == ("l2", "snr", 0.1, 1.0)


@pytest.mark.parametrize("name", ["noise_offset", "multires_noise_iterations", "ip_noise_gamma", "min_snr_gamma",
                                  "v_pred_like_loss", "adaptive_noise_scale"])
def test_zero_is_the_same_as_not_given(name):
    assert getattr(options(ENTRY, f"--{name}", "0").objective, name) is None


@pytest.mark.parametrize("argv, expected", [
    ("--min_timestep 600 --max_timestep 500", "--min_timestep: 600 leaves nothing below max_timestep 500"),
    ("--noise_offset_random_strength", "--noise_offset_random_strength: has no effect without --noise_offset"),
    ("--adaptive_noise_scale 0.1", "--adaptive_noise_scale: has no effect without --noise_offset"),
    ("--ip_noise_gamma_random_strength", "--ip_noise_gamma_random_strength: has no effect without --ip_noise_gamma"),
    ("--multires_noise_discount 0.5", "--multires_noise_discount: has no effect without --multires_noise_iterations"),
    ("--v_pred_like_loss 1 --v_parameterization", "--v_pred_like_loss: a velocity loss is what --v_parameterization"),
])
def test_conflicts(argv, expected):
    found = conflicts(ENTRY, *argv.split())
    assert len(found) == 1 and found[0].startswith(expected)


@pytest.mark.parametrize("argv", [
    "--min_timestep 500 --max_timestep 500", "--noise_offset 0.05 --noise_offset_random_strength --adaptive_noise_scale -0.1",
    "--multires_noise_iterations 6 --multires_noise_discount 0.5", "--v_parameterization --zero_terminal_snr --min_snr_gamma 5",
    "--ip_noise_gamma 0.1 --ip_noise_gamma_random_strength --debiased_estimation_loss", "--max_timestep 10",
    "--v_parameterization --scale_v_pred_loss_like_noise_pred"])
def test_settings_that_go_together(argv):
    assert not conflicts(ENTRY, *argv.split())


@pytest.mark.parametrize("argv, expected", [
    ("--huber_c 0.2", "--huber_c: has no effect with --loss_type l2"),
    ("--huber_c 1.5 --loss_type l1", "--huber_c: has no effect with --loss_type l1"),
    ("--loss_type huber --huber_scale 2", "--huber_scale: has no effect with --huber_schedule snr")])
def test_conflicts_of_the_loss(argv, expected):
    found = conflicts(ENTRY, *argv.split())
    assert len(found) == 1 and found[0].startswith(expected)


def test_a_rounded_loss_takes_its_settings():
    assert not conflicts(ENTRY, *"--loss_type smooth_l1 --huber_schedule exponential --huber_c 0.2 --huber_scale 2".split())
    assert options(ENTRY, "--loss_type", "huber").loss.rounded and not options(ENTRY).loss.rounded
