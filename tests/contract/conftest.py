"""Tiny checkpoints and a picture folder per adapter, and runs of the real scripts inside this process."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from library import outputs
from library.app import main
from tests.contract.cases import CASES


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        if "setting" in metafunc.fixturenames:
            pairs = [(case, setting) for case in CASES for setting in case.settings]
            names = [f"{case.name}{'-'.join(('', *setting)).replace('--', '')}" for case, setting in pairs]
            metafunc.parametrize(("case", "setting"), pairs, ids=names, scope="session")
        else:
            cases = [case for case in CASES if metafunc.module.__dict__.get("CHOOSE", lambda case: True)(case)]
            metafunc.parametrize("case", cases, ids=[case.name for case in cases], scope="session")


@pytest.fixture(scope="session")
def checkpoint(case, tmp_path_factory) -> Path:
    return case.make(tmp_path_factory.mktemp(case.name))


def make_pictures(folder: Path, count: int, size: tuple[int, int] = (96, 96)) -> Path:
    """Pictures that differ: a gradient and a disc in colours of their own, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = size
    for index in range(count):
        picture = Image.new("RGB", size, (40 * index % 256, 90 + 23 * index % 160, 200 - 31 * index % 200))
        picture.paste((255 - 60 * index % 256, 30 * index % 256, 128), (width // 4, height // 4, width // 2 + 5 * index, height // 2))
        picture.save(folder / f"picture{index}.png")
        (folder / f"picture{index}.txt").write_text(f"picture number {index} of a {'red' if index % 2 else 'blue'} box", encoding="utf-8")
    return folder


def dataset_file(path: Path, pictures: Path, **keys) -> Path:
    settings = {"resolution": 64, "batch_size": 2, **keys}
    lines = ["[[datasets]]", *(f"{name} = {str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()),
             "[[datasets.subsets]]", f"image_dir = '{pictures.as_posix()}'"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def losses(folder: Path, name: str = "last") -> list[float]:
    """The loss of every step of a run, from its CSV."""
    with (folder / f"{name}_log.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def no_pictures_of_the_loss(monkeypatch):
    """A seventh of a tiny run is spent on that picture, which other tests look at."""
    monkeypatch.setattr(outputs, "write_loss_curve", lambda *_: False)


@pytest.fixture
def train(case, checkpoint):
    """``train(output_dir, dataset_file, *more_flags)`` runs the case's script in this process."""

    def run(output: Path, dataset: Path, *flags: str) -> Path:
        arguments = ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset), "--output_dir", str(output),
                     "--learning_rate", "1e-3", "--console_log_level", "WARNING", *flags]
        status = main(case.entry, arguments)
        assert status == 0, f"exit status {status} for {arguments}"
        return output

    return run


CACHED = ("--cache_latents", "--cache_text_encoder_outputs")
