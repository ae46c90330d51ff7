"""Block streaming against its limits, at true size: step time and peak memory for every share of streamed blocks and batch.

    python benchmarks/gpu_streaming.py [--models FLUX SDXL] [--shares 0 .25 .5 1] [--batches 1 2 4] [--seconds 450]
    python benchmarks/gpu_streaming.py --toy          tiny models, also without a GPU: does it run?

Full fine-tuning in bfloat16 with stochastic rounding, recompute, one optimizer step per block in the backward pass. Weights
and inputs are random and made on the device. In the same process, for each cell:

    step      as users get it
    compute   a step with everything resident, at the same batch: no copies
    copy      the same copies without the compute
    serial    the same with a wait for every copy: no overlap

Aims: step <= 1.05 compute where the copies fit under it, step <= 1.10 max(compute, copy) everywhere. Before each model a
tiny one of its kind is trained streamed and resident and must come out the same bit for bit. Cells that do not fit into ``--seconds`` or
into memory are named, not waited for.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import machine, table  # noqa: E402

COLUMNS = ("streamed", "batch", "step ms", "compute", "copy", "serial", "/ compute", "/ max", "peak GB", "GB in", "GB out")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for check_equal: products that repeat themselves
    import torch

    from benchmarks.streaming_models import MODELS

    cuda = torch.cuda.is_available()
    if not cuda and not options.toy:
        raise SystemExit("no CUDA device: only --toy can run here")
    device = torch.device("cuda" if cuda else "cpu")
    deadline = time.perf_counter() + options.seconds
    print(machine())
    wanted = [m for m in MODELS if not options.models or any(m.name.lower().startswith(name.lower()) for name in options.models)]
    for model in wanted:
        check_equal(model, device)
        rows = measure_model(model, device, options, deadline)
        table(f"{model.name}, {options.optimizer}{', states streamed' if options.states else ''}", COLUMNS, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--models", nargs="*", help="the first letters of their names; default all")
    parser.add_argument("--shares", nargs="*", type=float, default=[0, 0.25, 0.5, 1])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--optimizer", default="Adafactor")
    parser.add_argument("--states", action="store_true", help="stream the optimizer's states as well")
    parser.add_argument("--look-ahead", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of which the median is taken, after two more")
    parser.add_argument("--seconds", type=float, default=450)
    return parser


@dataclass
class Setup:
    """A model with the engine around it."""

    module: object
    updater: object
    boundaries: object
    recompute: object
    streaming: object | None
    switch: object
    step: int = field(default=0)

    def close(self) -> None:
        self.updater.detach()
        if self.streaming is not None:
            self.streaming.detach()
        self.boundaries.detach()
        self.recompute.detach()


class Switch:
    """A transport whose copies can be waited for one by one."""

    def __init__(self, transport):
        self._transport, self.serial = transport, False

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def copy(self, target, source, lane, after, done) -> None:
        self._transport.copy(target, source, lane, after, done)
        if self.serial:
            self._transport.drain()


def set_up(model, module, device, share: float, options) -> Setup:
    from library.memory.boundaries import Boundaries
    from library.memory.in_backward import StepInBackward
    from library.memory.recompute import Recompute
    from library.memory.schedule import evenly
    from library.memory.streaming import Streaming
    from library.memory.transport import open_transport
    from library.optim import table as optimizers
    from library.optim.groups import Group
    from library.optim.rounding import StochasticRounding
    from library.optim.schedule import Schedule

    blocks, switch = model.blocks(module), Switch(open_transport(device))
    recompute, boundaries = Recompute(blocks), Boundaries(blocks)
    streaming = None
    if share:
        places = evenly(len(blocks), max(1, round(share * len(blocks))))
        streaming = Streaming(boundaries, places, recompute.blocks, switch, options.look_ahead)
        streaming.move_rest(module)
    else:
        module.to(device)
    groups = [Group("all", tuple(module.named_parameters()), 1e-5)]
    rounding = StochasticRounding(groups, seed=0)
    optimizer = optimizers.build(options.optimizer, [], rounding.groups, 1e-5)
    updater = StepInBackward(optimizer, groups, Schedule("constant"), "block", boundaries, streaming, rounding,
                             stream_states=options.states and streaming is not None)
    return Setup(module, updater, boundaries, recompute, streaming, switch)


def one_step(setup: Setup, inputs: dict) -> float:
    """Seconds, the device's work included."""
    setup.switch.drain()
    started = time.perf_counter()
    setup.updater.begin_microbatch(setup.step, 10**6, True)
    setup.module(**inputs, return_dict=False)[0].float().square().mean().backward()
    setup.updater.after_backward(setup.step, 10**6, True)
    setup.switch.drain()
    setup.step += 1
    return time.perf_counter() - started


def only_copies(setup: Setup) -> float:
    """The copies of one step, driven past the same boundaries."""
    streaming, count = setup.streaming, len(setup.boundaries.blocks)
    setup.switch.drain()
    started = time.perf_counter()
    for place in range(count):
        streaming.enter_forward(place)
    for place in reversed(range(count)):
        streaming.enter_backward(place)
        if place in streaming.number:
            for ring in (streaming.weights, *streaming.step_rings):
                ring.changed(streaming.number[place])
        streaming.leave_backward(place)
    setup.switch.drain()
    return time.perf_counter() - started


def measure_model(model, device, options, deadline: float) -> list[tuple]:
    import torch

    from benchmarks.streaming_models import materialize

    rows, resident = [], {}  # ms of a resident step by batch
    if time.perf_counter() > deadline:
        return [("no time left",) + ("",) * (len(COLUMNS) - 1)]
    with torch.device("meta"):
        module = model.build(options.toy)
    module = materialize(module, device, torch.bfloat16)
    for share in sorted(options.shares):
        try:
            setup = set_up(model, module, device, share, options)
        except torch.cuda.OutOfMemoryError:
            rows.append((f"{share:.0%}", "all", "out of memory") + ("",) * (len(COLUMNS) - 3))
            continue
        for batch in options.batches:
            inputs = model.inputs(module, batch, device, options.toy)
            cells = ("no time left",) + ("",) * (len(COLUMNS) - 3)
            if time.perf_counter() < deadline:
                try:
                    cells = measure_cell(setup, inputs, device, options.steps, resident.get(batch, float("nan")))
                    if not share:
                        resident[batch] = cells[0]
                except torch.cuda.OutOfMemoryError:
                    cells = ("out of memory",) + ("",) * (len(COLUMNS) - 3)
                    module.zero_grad(set_to_none=True)
            rows.append((f"{share:.0%}", batch, *cells))
            print(model.name, *rows[-1], flush=True)
        setup.close()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # between settings, never in a step
    return rows


def measure_cell(setup: Setup, inputs: dict, device, steps: int, compute: float) -> tuple:
    """``compute``: ms of the resident step, NaN if it is not known."""
    import torch

    from library.memory.report import peak_bytes

    def median(what) -> float:
        return 1000 * statistics.median(what() for _ in range(steps))

    streaming = setup.streaming
    one_step(setup, inputs)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rings = [streaming.weights, *streaming.step_rings] if streaming else []
    before = [(ring.bytes_in, ring.bytes_out) for ring in rings]
    one_step(setup, inputs)
    into = sum(ring.bytes_in - i for ring, (i, _) in zip(rings, before, strict=True)) / 1e9
    out = sum(ring.bytes_out - o for ring, (_, o) in zip(rings, before, strict=True)) / 1e9
    step, peak = median(lambda: one_step(setup, inputs)), peak_bytes(device) / 1e9
    if streaming is None:
        return step, step, 0.0, step, 1.0, 1.0, peak, 0.0, 0.0
    setup.switch.serial = True
    serial = median(lambda: one_step(setup, inputs))
    setup.switch.serial = False
    copy = median(lambda: only_copies(setup))
    return step, compute, copy, serial, step / compute, step / max(compute, copy), peak, into, out


def check_equal(model, device) -> None:
    """Streamed and resident, with kernels that repeat themselves: the same weights after three steps, or there is no benchmark."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.streaming_models import materialize

    results = []
    options = parser().parse_args(["--toy", "--optimizer", "AdamW", "--states"])
    for share in (0, 1):
        with torch.device("meta"):
            module = model.build(True)
        setup = set_up(model, materialize(module, device, torch.bfloat16), device, share, options)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                for _ in range(3):
                    one_step(setup, model.inputs(module, 2, device, True))
        finally:
            torch.use_deterministic_algorithms(False)
        setup.close()
        results.append([parameter.detach().cpu() for parameter in setup.module.parameters()])
    differing = sum(not torch.equal(one, other) for one, other in zip(*results, strict=True))
    if differing:
        raise SystemExit(f"{model.name}: streamed and resident runs differ in {differing} of {len(results[0])} tensors")
    print(f"{model.name}, tiny: streamed and resident runs are equal bit for bit", flush=True)


if __name__ == "__main__":
    main()
