"""What our loop costs above a bare forward/backward/step loop with the same model and data.

    python benchmarks/loop_overhead.py [--steps 40] [--size small|medium]

Both loops run in one process in alternating rounds, so that both see the same machine. The bare loop draws noise and levels
with torch's global generator, calls the adapter's predict, takes the mean squared error, clips, steps fused AdamW and reads the
loss. Ours does all that a run does: batches from the cache, noise per sample, weights, norm, log, CSV. Reported: the median
of each round's mean step, their ratio and difference. Aim: under 1 ms plus 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import machine, table  # noqa: E402

SIZES = {"small": dict(head_dim=32, heads=2, double_blocks=2, single_blocks=2),
         "medium": dict(head_dim=64, heads=12, double_blocks=4, single_blocks=8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=tuple(SIZES), default="medium")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare, ours = measure(Path(folder), arguments)
    print(machine())
    bare_ms, our_ms = 1000 * statistics.median(bare), 1000 * statistics.median(ours)
    table(f"Loop overhead, {arguments.size} model, {arguments.rounds} rounds of {arguments.steps} steps",
          ("loop", "ms/step", "/ bare"), [("bare", bare_ms, 1.0), ("ours", our_ms, our_ms / bare_ms)])
    print(f"\noverhead {our_ms - bare_ms:.2f} ms a step; aim {1 + bare_ms / 100:.2f} ms (1 ms + 1 %)")


def measure(folder: Path, arguments) -> tuple[list[float], list[float]]:
    """Seconds per step of each round: (bare, ours)."""
    import torch

    from flux_train import ENTRY
    from library.architectures.flux import open_architecture
    from library.config.parse import parse
    from library.data.plan import StepPlan
    from library.interrupt import stop_requested
    from library.log import setup_logging
    from library.loop import train
    from library.methods import full
    from library.optim.schedule import Schedule
    from library.outputs import Outputs
    from library.run import build_task, encode, join, read_data
    from tests.tiny import make_flux_files

    files = make_flux_files(folder / "model", **SIZES[arguments.size])
    pictures = Path(__file__).parents[1] / "configs" / "quickstart" / "photos"
    dataset = folder / "data.toml"
    dataset.write_text("[[datasets]]\nresolution = 128\nbatch_size = 4\n"
                       f"[[datasets.subsets]]\nimage_dir = {str(pictures)!r}\n", encoding="utf-8")
    config = parse(ENTRY, ["--pretrained_model_name_or_path", str(files.checkpoint), "--dataset_config", str(dataset),
                           "--output_dir", str(folder / "out"), "--cache_latents", "--cache_text_encoder_outputs",
                           "--t5xxl_max_token_length", "32"])  # short captions: a quick step shows the loop's own cost
    setup_logging("WARNING", None, True, True)
    data = read_data(config)
    arch = open_architecture(config.model, config.architecture)
    runtime = join(config, data)
    plan = StepPlan(data.items, batch_sizes=data.batch_sizes, seed=0)
    encoded = encode(config, data, arch, runtime, arguments.steps)
    (folder / "out").mkdir(exist_ok=True)

    def fresh():
        denoiser = arch.load_denoiser(runtime.device, torch.float32)
        return denoiser, full.prepare(denoiser, 1e-5)

    bare_denoiser, _ = fresh()
    optimizer = torch.optim.AdamW(bare_denoiser.parameters(), lr=1e-5, fused=True)
    ready = [encoded.batch(batch) for batch in _batches(encoded, plan)]

    def bare_round() -> float:
        started = time.perf_counter()
        for step in range(arguments.steps):
            latents, text, _ = ready[step % len(ready)]
            noise, level = torch.randn_like(latents), torch.sigmoid(torch.randn(len(latents), device=latents.device))
            x_t = torch.lerp(latents, noise, level.view(-1, 1, 1, 1))
            loss = torch.nn.functional.mse_loss(arch.predict(bare_denoiser, x_t, level, text), noise - latents)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bare_denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        return (time.perf_counter() - started) / arguments.steps

    denoiser, groups = fresh()
    task = build_task(config, runtime, arch, denoiser, groups, encoded, plan, Schedule("constant", 0), arguments.steps)

    def our_round() -> float:
        with stop_requested() as stop, Outputs(config, runtime, arch, full, denoiser, encoded, (), data.resolution,
                                               total_steps=arguments.steps, steps_per_epoch=plan.steps_per_epoch,
                                               validate=lambda report: None) as outputs:
            started = time.perf_counter()
            train(task, stop, outputs.after_step)
            return (time.perf_counter() - started) / arguments.steps

    bare_round(), our_round()  # warm-up
    rounds = [(bare_round(), our_round()) for _ in range(arguments.rounds)]
    return [one for one, _ in rounds], [other for _, other in rounds]


def _batches(encoded, plan):
    """The batches of one epoch, as the bare loop reads them."""
    from library.data.dataset import batches

    return [batch for group in batches(encoded.train, plan, 0, 0, plan.steps_per_epoch, 0) for batch in group.micro]


if __name__ == "__main__":
    main()
