"""Start-up: --help, a mistake in the dataset file, and the whole way to the end of one training step.

    python benchmarks/startup.py [--repeats 5]

Reference in the same run: a process that only imports torch, and one that imports torch, diffusers' FLUX class and the
encoder classes. Wall time, best of the repeats.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import ROOT, environment, machine, table, wall_seconds  # noqa: E402
from tests.tiny import make_flux_files  # noqa: E402

IMPORTS = ("import torch; from diffusers import FluxTransformer2DModel, AutoencoderKL; "
           "from transformers import CLIPTextModel, T5EncoderModel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_flux_files(folder / "model")
        pictures = ROOT / "configs" / "quickstart" / "photos"
        good, bad = folder / "good.toml", folder / "bad.toml"
        good.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {str(pictures)!r}\n", encoding="utf-8")
        bad.write_text(good.read_text(encoding="utf-8") + "num_repeat = 1\n", encoding="utf-8")

        def train(dataset: Path) -> list[str]:
            return [sys.executable, "flux_train.py", "--pretrained_model_name_or_path", str(files.checkpoint),
                    "--dataset_config", str(dataset), "--output_dir", str(folder / "out"), "--max_train_steps", "1",
                    "--cache_latents", "--cache_text_encoder_outputs"]

        def refused() -> float:
            started = time.perf_counter()
            done = subprocess.run(train(bad), capture_output=True, env=environment(), cwd=ROOT)
            assert done.returncode == 2, done.stderr
            return time.perf_counter() - started

        def best(measure) -> float:
            return min(measure() for _ in range(repeats))

        torch_alone = best(lambda: wall_seconds([sys.executable, "-c", "import torch"]))
        rows = [("import torch", torch_alone),
                ("import torch, diffusers, transformers classes", best(lambda: wall_seconds([sys.executable, "-c", IMPORTS]))),
                ("flux_train.py --help", best(lambda: wall_seconds([sys.executable, "flux_train.py", "--help"]))),
                ("mistake in the dataset file reported", best(refused)),
                ("12 pictures cached, 1 step, checkpoint saved", best(lambda: wall_seconds(train(good))))]
    print(machine())
    table(f"Start-up, best of {repeats}", ("what", "seconds", "/ import torch"), [(*row, row[1] / torch_alone) for row in rows])


if __name__ == "__main__":
    main()
