"""When the held-out pictures are measured, and that each of them counts once on any number of ranks."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library import validation
from library.data.dataset import TrainingData
from library.data.plan import StepPlan
from library.data.showing import Course
from library.encode import Inputs
from library.validation import Schedule, Validation
from tests.unit.data_helpers import SMALL, dataset_file, one_folder, picture, scan_file


@pytest.mark.parametrize("every_steps, every_epochs, due", [
    (None, None, [5, 10, 12]), (4, None, [4, 8, 12]), (None, 2, [10, 12]), (4, 2, [4, 8, 10, 12])])
def test_when_it_is_due(every_steps, every_epochs, due):
    """Epochs of 5 steps, 12 steps in all."""
    times = Schedule(every_steps, every_epochs, 12)
    assert [step for step in range(1, 13) if times.due(step, (step - 1) // 5 + 1, step % 5 == 0)] == due


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mean_is_over_pictures(tmp_path, monkeypatch, ranks):
    """Five pictures whose losses are 0 to 4, in batches of two; what keeps a rank busy does not count."""
    for index in range(5):
        picture(tmp_path / "pictures" / f"{index}.png", (64, 64), seed=index)
    items = one_folder(tmp_path / "pictures", subset="loss_weight = 3.0")
    seen = []

    def losses(arch, denoiser, objective, latents, text, geometry, weight, mask, draws):
        seen.append(float(draws.uniform[0]))
        return latents.mean((1, 2, 3)) * weight

    def encoded(batch):
        numbers = [float(sample.split("/")[1][0]) for sample in batch.sample_ids]
        return Inputs(torch.tensor(numbers).reshape(-1, 1, 1, 1).expand(-1, 4, 8, 8), {}, batch.geometry, None)

    monkeypatch.setattr(validation, "training_losses", losses)
    measured = Validation(TrainingData(items, Course(1, 1, augmented=False)), StepPlan(items, [2], 0, ranks), None)
    denoiser = torch.nn.Identity()
    all_sums = []
    for rank in range(ranks):
        runtime = SimpleNamespace(rank=rank, device=torch.device("cpu"), autocast=nullcontext, sum_over_ranks=lambda total: total)
        task = SimpleNamespace(runtime=runtime, denoiser=denoiser, modules=(denoiser,), seed=1, arch=None, objective=None,
                               text=lambda fixed, captions: fixed, encoded=SimpleNamespace(batch=encoded))
        runtime.sum_over_ranks = lambda sums: all_sums.append(sums) or torch.ones_like(sums)
        measured.measure(task)
    total, count = sum(all_sums).sum(0).tolist()
    assert total / count == pytest.approx((0 + 1 + 2 + 3 + 4) / 5) and denoiser.training
    assert set(seen) == set(validation.QUANTILES)


def test_each_dataset_has_a_mean_of_its_own(tmp_path, monkeypatch):
    """Pictures 0, 1, 2 are of the first dataset and 10, 11 of the second."""
    for folder, numbers in (("one", (0, 1, 2)), ("two", (10, 11))):
        for number in numbers:
            picture(tmp_path / folder / f"{number}.png", (64, 64), seed=number)
    text = "\n".join(f"[[datasets]]\nresolution = 64\n{SMALL}\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / folder).as_posix()}'\n"
                     for folder in ("one", "two"))
    scanned = scan_file(dataset_file(tmp_path, text))
    scanned.raise_errors()

    def encoded(batch):
        numbers = [float(Path(path).stem) for path in batch.paths]
        return Inputs(torch.tensor(numbers).reshape(-1, 1, 1, 1).expand(-1, 4, 8, 8), {}, batch.geometry, None)

    monkeypatch.setattr(validation, "training_losses", lambda arch, denoiser, objective, latents, *more: latents.mean((1, 2, 3)))
    items = scanned.items
    runtime = SimpleNamespace(rank=0, device=torch.device("cpu"), autocast=nullcontext, sum_over_ranks=lambda sums: sums)
    task = SimpleNamespace(runtime=runtime, modules=(), denoiser=None, seed=1, arch=None, objective=None,
                           text=lambda fixed, captions: fixed, encoded=SimpleNamespace(batch=encoded))
    measured = Validation(TrainingData(items, Course(1, 1, augmented=False)), StepPlan(items, [2, 2], 0, 1), None).measure(task)
    assert measured.values("held") == pytest.approx({"held": 24 / 5, "held/dataset 1": 1, "held/dataset 2": 10.5})
