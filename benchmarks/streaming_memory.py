"""Peak memory and time of a few steps of a toy of 2 GB on a CPU: resident, with steps in the backward pass, streamed.

    python benchmarks/streaming_memory.py [--blocks 16] [--width 2048]

On a CPU host copies and slots share the memory that is measured, so the figures show gradients and rings, not savings of VRAM.
Every mode must end with the same weights. "expected" is the sum of what stands in memory on purpose.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import in_process, machine, peak_resident_bytes, resident_bytes, table  # noqa: E402

MODES = ("resident", "parameter", "block", "block, all streamed")
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.blocks, options.width)))
        return
    sizes = ("--blocks", str(options.blocks), "--width", str(options.width))
    results = {mode: in_process(Path(__file__), mode, *sizes) for mode in MODES}
    print(machine())
    table(f"{results['resident']['weights'] / 1e9:.2f} GB of weights in {options.blocks} blocks, SGD",
          ("steps", "s/step", "peak GB", "expected GB", "GB copied a step"),
          [(mode, r["seconds"], r["peak"] / 1e9, r["expected"] / 1e9, r["copied"] / 1e9) for mode, r in results.items()])
    assert len({r["digest"] for r in results.values()}) == 1, "the modes ended with different weights"


def measure(mode: str, blocks: int, width: int) -> dict[str, float]:
    import torch
    from torch import nn

    from library.memory.boundaries import Boundaries
    from library.memory.in_backward import StepInBackward
    from library.memory.recompute import Recompute
    from library.memory.streaming import LOOK_AHEAD, Streaming
    from library.memory.transport import CpuTransport
    from library.optim.groups import Group
    from library.optim.schedule import Schedule
    from library.optim.updater import StepAfterBackward

    torch.manual_seed(0)
    parts = nn.ModuleList(nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width)) for _ in range(blocks))
    weights = sum(p.nbytes for p in parts.parameters())
    before = resident_bytes() - weights
    recompute, boundaries, streaming = Recompute(parts), Boundaries(list(parts)), None
    if "streamed" in mode:
        streaming = Streaming(boundaries, range(blocks), recompute.blocks, CpuTransport())
    groups = [Group("all", tuple(parts.named_parameters()), 1e-2)]
    optimizer = torch.optim.SGD([p for _, p in groups[0].params], lr=1e-2, foreach=False)
    unit = mode.split(",")[0]
    updater = StepAfterBackward(optimizer, groups, Schedule("constant"), 0.0) if unit == "resident" else \
        StepInBackward(optimizer, groups, Schedule("constant"), unit, boundaries, streaming)
    started = time.perf_counter()
    for step in range(STEPS):
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(step))
        updater.begin_microbatch(step, STEPS, True)
        for part in parts:
            x = x + part(x)
        x.square().mean().backward()
        updater.after_backward(step, STEPS, True)
    seconds = (time.perf_counter() - started) / STEPS
    peak = peak_resident_bytes() - before
    ring = streaming.weights if streaming else None
    copied = (ring.bytes_in + ring.bytes_out) / STEPS if ring else 0
    if streaming:
        streaming.detach()
    digest = hashlib.sha256()
    for parameter in parts.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    gradients = {"resident": weights, "parameter": max(p.nbytes for p in parts.parameters())}.get(unit, weights // blocks)
    return dict(seconds=seconds, peak=peak, weights=weights, copied=copied, digest=digest.hexdigest(),
                expected=weights + gradients + (LOOK_AHEAD + 1) * weights // blocks * bool(streaming))


if __name__ == "__main__":
    main()
