"""How long a step waits for a state: written between two steps, and with --async_save.

    python benchmarks/state_io.py [--millions 100]

A float32 model of so many parameters with AdamW's two moments, 12 bytes a parameter in all, as a run keeps them on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import machine, table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=100)
    millions = parser.parse_args().millions
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), millions)
    print(machine())
    table(f"States of {12e-3 * millions:.2f} GB", ("what", "seconds a step waits", "seconds until it stands"), rows)


def measure(folder: Path, millions: int) -> list[tuple[str, float, float]]:
    import torch

    from library.checkpoint.train_state import StateFacts
    from library.state_writing import Contents, StateWriter

    def tensors() -> dict[str, torch.Tensor]:
        return {f"block{number}.weight": torch.randn(1000, 1000) for number in range(millions)}

    weights, first, second = tensors(), tensors(), tensors()
    optimizer = {name: {"step": 1.0, "exp_avg": first[name], "exp_avg_sq": second[name]} for name in weights}

    def state(step: int, epoch: int) -> Contents:
        return Contents(StateFacts(step, epoch, 9, 1, 9, 1, "model", "data", ""), "run", weights, {"optimizer": optimizer})

    def fail(error: Exception) -> None:
        raise error

    rows, step = [], 0
    for what, beside, rounds in (("between two steps", False, ("",)), ("--async_save", True, (", first state", ", later ones"))):
        writer = StateWriter(state, nullcontext, beside=beside, on_failure=fail)
        for words in rounds:
            step += 1
            started = time.perf_counter()
            writer.write(folder / f"run-step{step:08d}-state", step, 1, lambda: None)
            waited = time.perf_counter() - started
            writer.wait()
            rows.append((what + words, waited, time.perf_counter() - started))
    return rows


if __name__ == "__main__":
    main()
