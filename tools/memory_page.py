"""Writes docs/memory.md: what each memory setting costs and saves, computed by the planner on the published models' headers.

    python tools/memory_page.py        about half a minute; weights are neither there nor needed
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from library.atomic import write_atomic  # noqa: E402
from library.config.loss_options import LossOptions  # noqa: E402
from library.config.parse import parse  # noqa: E402
from library.memory.cards import named  # noqa: E402
from library.memory.planner import Planner, gigabytes  # noqa: E402
from library.memory.setting import Fixed, Optimizer, Setting  # noqa: E402
from library.optim.states import state_bytes  # noqa: E402
from library.planning import measure_step  # noqa: E402
from tests.full_size import write_flux, write_lumina, write_sd3, write_sdxl  # noqa: E402
from tools.options_page import table  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
MODELS = (("FLUX.1-dev", "flux_train", write_flux), ("SD3.5-large", "sd3_train", write_sd3), ("SDXL base 1.0", "sdxl_train", write_sdxl),
          ("Lumina-Image 2.0", "lumina_train", write_lumina))
CARD = named("RTX 4090")

INTRO = """# Memory

<!-- Written by tools/memory_page.py. Do not edit: change the tool and run it. -->

**Every number on this page was computed by the planner, not measured on a card.** Bytes of weights, gradients, optimizer states and
kept activations are exact (tests hold them to real steps); what CUDA itself takes, gaps between allocations, and all times
are estimates.

## See what a run would need: `--plan`

Add `--plan` to any command. It reads the data and the headers of the model's files, runs the model once on tensors without
memory (a few seconds), prints a table and exits. No weights are read, and no graphics card is needed.

How to read it:

- **On the card, at the fullest moment.** Gradients come while activations go, so the parts never all have their largest size
  at once. The planner adds up every moment of a step (the end of the forward pass, the backward pass of each block, the
  optimizer's step) and shows the fullest one; the heading names it. A card needs "in all" free.
- **Before training, while caches are filled** is what the largest encoder takes by itself. It has to fit too, unless the caches
  are on disk already.
- **In main memory.** "Pinned" memory cannot be swapped out; leave the system some gigabytes beside it.
- **A step** names the arithmetic and what is copied over the bus. On a card that the planner knows it also says how long a step
  should take, and whether computing hides the copies. If it does not, a larger batch hides them for free.
- **On common cards** shows for each whether this run fits, and the fastest setting that does.

`--vram_budget 12GB` lets the planner choose: of the memory settings that you did not give yourself, those that fit and cost the
least time. The log says what was chosen and why, and at the end the measured peak beside the planned one. `12GB` is 12 * 10^9
bytes, `12GiB` is 12 * 2^30. Leave room for what else uses the card: a desktop takes 0.5 to 1.5 GB. If nothing fits, the error
names the least that is possible.

When a run is out of memory all the same, the error names the one flag that gives the most memory for the time it costs.

## What each setting costs and saves

| setting | saves | costs |
|---|---|---|
| `--mixed_precision bf16` with bf16 weights | half of weights and gradients, and half of most activations | nothing: products are faster, and stochastic rounding keeps small updates |
| `--optimizer_type AdamW8bit` | three quarters of the optimizer's states | nothing in time; slightly coarser states |
| `--optimizer_type Adafactor` | nearly all states | other dynamics than Adam: choose the learning rate anew |
| `--cache_latents`, `--cache_text_encoder_outputs` | the encoders during training | disk or main memory; limits on changing captions |
| `--gradient_checkpointing` | most activations: each block keeps its inputs alone | one more forward pass: a quarter to a third of the step |
| step per block or parameter, in the backward pass | all gradients but those of one block | the norm over all gradients cannot be clipped |
| streamed blocks | their weights, but for a ring of three blocks | main memory, copies over the bus: free where computing hides them |
| states streamed with their blocks | their states, but for the ring | main memory, copies in the backward pass |
| inputs of recomputed blocks on the host | one activation per block | main memory and copies; matters for large batches |
| smaller batch, `--gradient_accumulation_steps` | activations in proportion | gradients of the whole model wait between micro-batches |
"""

REFUSED = (
    ("--fused_backward_pass --blockwise_fused_optimizers", "one unit or the other"),
    ("--max_grad_norm 1 --blocks_to_swap 2", "the norm over all gradients is not known when the first weight is updated"),
    ("--max_grad_norm 1 --fused_backward_pass", "as above"),
    ("--max_grad_norm 1 --blockwise_fused_optimizers", "as above"),
    ("--mixed_precision fp16 --blocks_to_swap 2", "scaled gradients are looked at as a whole before any weight is updated"),
    ("--mixed_precision fp16 --fused_backward_pass", "as above"),
    ("--mixed_precision fp16 --blockwise_fused_optimizers", "as above"),
    ("--optimizer_type Prodigy --blockwise_fused_optimizers", "it sums over all gradients first, as D-Adaptation does"),
    ("--optimizer_type package.module.Class --fused_backward_pass", "a class that is not in the table: what it needs is not known"),
    ("--optimizer_type PagedAdamW8bit --blocks_to_swap 2 --stream_optimizer_states", "it moves its states by itself"),
    ("--optimizer_type AdamWScheduleFree --blocks_to_swap 2 --stream_optimizer_states",
     "the weights to save and draw with need all states at once"),
    ("--stream_optimizer_states", "no blocks are streamed that states could follow"),
    ("--swap_look_ahead 3", "as above"),
    ("--recompute_policy selective", "nothing is recomputed without `--gradient_checkpointing`"),
    ("--recompute_every 2", "as above"),
    ("--recompute_every 2 --blocks_to_swap 2", "every streamed block is recomputed"),
    ("--recompute_policy selective --cpu_offload_checkpointing", "one keeps on the card what the other moves away"),
    ("--ema_decay 0.99 --ema_device gpu --blocks_to_swap 2", "the average of a block waits where the block does"),
    ("--plan --debug_dataset", "each shows something else and exits"),
)
"""Flags that do not go together, and why: told before anything is read (``tests/unit/test_memory_page.py`` tries each)."""

NOT_COUNTED = """## What is not counted

- Preview pictures and validation need no gradients, so less than a step; drawing them also needs the autoencoder, and
  `--sample_batch_size` several pictures' room.
- Text encoders that train (`--train_text_encoder`). The plan says so.
- The moment when weights are read: main memory then holds one 16 MiB buffer more than the model.
- Convolutions for which cuDNN takes large buffers of its own, and the allocator's gaps beyond an estimate of 3 %.
"""


def refused() -> Iterator[str]:
    yield "## What does not go together\n"
    yield "These are refused before anything is read, with the line that names the flag and what to change:\n"
    yield from table(("flags", "why"), [(f"`{flags}`", why) for flags, why in REFUSED])
    yield "More blocks than the model has are refused before a weight is read.\n"


def ladder(blocks: int) -> Iterator[Setting]:
    """From the fastest to the smallest."""
    yield Setting()
    yield Setting("selective")
    yield Setting("all")
    yield Setting("all", unit="block")
    for share in (4, 2, 1):
        yield Setting("all", unit="block", streamed=blocks // share)
    yield Setting("all", unit="block", streamed=blocks, stream_states=True)
    yield Setting("all", unit="block", streamed=blocks, stream_states=True, offload=True)


def section(title: str, script: str, checkpoint: Path) -> Iterator[str]:
    """The settings on one model."""
    entry = importlib.import_module(script).ENTRY
    config = parse(entry, ["--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", "none", "--output_dir", "none"], {})
    arch = importlib.import_module(entry.architecture).open_architecture(config.model, config.architecture, config.objective)
    measured = measure_step(arch, LossOptions(), (1024, 1024), 1, torch.bfloat16, torch.bfloat16,
                            lambda denoiser: denoiser.requires_grad_(True))
    yield f"### {title}: 1024 x 1024, batch 1, bf16 weights\n"
    yield (f"{measured.parameters / 1e9:.2f} billion parameters in {len(measured.blocks)} blocks; a step without recompute is "
           f"{(measured.forward.flops + measured.backward.flops) / 1e12:.0f} TFLOP. Predicted times are for a {CARD.name}.\n")
    for name in ("AdamW8bit", "Adafactor"):
        law = state_bytes(name, ())
        planner = Planner(measured, Fixed(Optimizer(name, lambda weight: law(weight.shape), 8 if name == "Adafactor" else 0),
                                          rounding=True))
        rows = []
        for setting in ladder(len(measured.blocks)):
            if name == "Adafactor" and setting.stream_states:
                continue
            needs = planner.needs(setting)
            time = needs.time(CARD)
            copies = "none" if not needs.bus.into else "hidden" if time.hidden else "waited for"
            rows.append((setting.words(), gigabytes(needs.device_bytes), gigabytes(sum(needs.pinned.values())),
                         f"{needs.bus.into / 1e9:.1f} / {needs.bus.out / 1e9:.1f} GB", f"{time.total:.2f} s", copies))
        yield f"With {name}:\n"
        yield from table(("setting", "card", "pinned", "bus in / out", "step", "copies"), rows)


def page() -> str:
    """The whole page as Markdown."""
    lines = [INTRO]
    with tempfile.TemporaryDirectory() as folder:
        for title, script, write in MODELS:
            lines += section(title, script, write(Path(folder) / script))
    return "\n".join([*lines, *refused(), NOT_COUNTED])


if __name__ == "__main__":
    write_atomic(PAGE, page())
    print(f"written: {PAGE}")
