"""Writes docs/optimizers.md from library/optim/records.py: ``python tools/optimizers_page.py`` (a test keeps the page current)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.atomic import write_atomic  # noqa: E402
from library.optim.records import COUNTER, RECORDS, STATISTIC, Record  # noqa: E402
from library.optim.schedule import NAMES  # noqa: E402
from tools.options_page import table  # noqa: E402

PAGE = ROOT / "docs" / "optimizers.md"

INTRO = """# Optimizers and schedules

<!-- Written by tools/optimizers_page.py from library/optim/records.py. Do not edit: change the records and run the tool. -->

`--optimizer_type` takes a name of this table (upper or lower case) or the dotted path of any class, such as
`pytorch_optimizer.SOAP`. `--optimizer_args weight_decay=0.01 "betas=0.9,0.99"` gives it arguments of its own; they are checked
against what it has before anything is read.

Whatever the optimizer, weights are stepped as float32. Weights kept in bf16 are lifted to float32 for the moment of the step, a
few at a time, and rounded back stochastically: bf16 weights change neither the arithmetic nor the size of the state.

## The table

- **state**: bytes per parameter that the optimizer keeps. Weights of 2.6 billion parameters (SDXL) under AdamW: 21 GB; of 12
  billion (FLUX.1) under AdamW8bit: 24 GB. *rows + columns* is next to nothing: 4 bytes for each row and column of a matrix.
- **rate 1**: finds the step size itself; use `--learning_rate 1`. Anything below 0.01 is refused.
- **step**: *apart* can be stepped parameter by parameter, *counted* as well, *at once* only all together, because it sums
  something over all of them. Under bf16 weights *at once* takes 8 bytes per parameter more during the step, and it is refused
  with `--fused_backward_pass`, `--blockwise_fused_optimizers` and `--blocks_to_swap`, which update weights during the backward
  pass. `--stream_optimizer_states` takes all others but the paged ones and those that average.
- **averages**: trains at one point and delivers the average of many. Previews, validation and saved files show the average; the
  training continues from exactly where it was (a copy of its weights waits in CPU memory meanwhile, as large as they are).
- **package**: where it is not installed, the error says `pip install PACKAGE`. *included* stands in `requirements.txt`.
"""

CLASSES = """## Classes that are not listed

Of a dotted path nothing is known, so it is stepped over all weights at once (and is refused with flags that
update weights during the backward pass). All that it keeps for single parameters, for
groups and in plain numbers of its own is saved and resumed. A class that needs a closure (LBFGS, SAM) is refused.

## What to know of some

- **Adafactor, CAME**: a 3x3 convolution (outputs, inputs, 3, 3) is given to them as the matrix (outputs, inputs x 9), because they
  factor the last two dimensions only: as it is, its statistics would be two thirds of the weight's size, those of a 1x1
  convolution twice its size. Vectors are not factored.
- **Prodigy, D-Adaptation**: one step size for the whole model, found from all gradients together. Different learning rates for
  different parts are refused. Every process finds the same one, because gradients are averaged before the step. A warm-up
  disturbs Prodigy's estimate unless `--optimizer_args safeguard_warmup=True` is given.
- **Muon**: the learning rate fits both kinds of weights (`adjust_lr_fn=original` turns that off); start from AdamW's.
- **Paged** optimizers of bitsandbytes move state to CPU memory when the GPU is full, on CUDA only.
"""

SCHEDULES = {
    "constant": ("", "the same throughout"),
    "constant_with_warmup": ("", "the same after the warm-up"),
    "linear": ("", "straight down to 0"),
    "cosine": ("", "half a wave down to 0"),
    "cosine_with_restarts": ("`num_cycles`", "half waves down to 0, each starting again at the top"),
    "cosine_with_min_lr": ("`num_cycles`, `min_lr_ratio`", "half waves between the top and the lowest rate"),
    "polynomial": ("`power`, `min_lr_ratio`", "the rest of the run to the power, down to the lowest rate"),
    "inverse_sqrt": ("`timescale`", "1 / sqrt(steps / timescale), counted so that it starts at 1"),
    "warmup_stable_decay": ("`--lr_decay_steps`, `num_cycles`, `min_lr_ratio`", "a plateau, and a half wave down at the end"),
    "piecewise_constant": ("`--lr_scheduler_args step_rules=1:100,0.1:200,0.01`",
                           "factor 1 before step 100, 0.1 before step 200, 0.01 from there on"),
    "adafactor": ("", "1 / sqrt(step), at most 0.01: Adafactor's own rate. Use `--learning_rate 1` and "
                      "`--optimizer_args scale_parameter=True`"),
}

SCHEDULE_INTRO = """## Schedules

`--lr_scheduler` is a factor on the learning rate of every part of the model. It is a function of the step and the length of the
run alone, so it is the same on any number of GPUs and after a resume. `--lr_warmup_steps` (steps, `0.05` or `5%`) rises from 0 to
the curve; `constant` and `piecewise_constant` have none. `num_cycles`, `power`, `timescale` and `min_lr_ratio` are
`--lr_scheduler_num_cycles` and so on. `--plan` draws the course to `NAME_schedule.png`; the report of a run shows it as well.
"""

SCHEDULE_CLASSES = """`--lr_scheduler_type` takes any scheduler of `torch.optim.lr_scheduler` by name, or the dotted path of another one,
with `--lr_scheduler_args gamma=0.99`. Arguments for the length of the run (`total_steps`, `num_training_steps`, `T_max`) are filled
in. The class is driven from the first step, so a resumed run is at the right place. It has no `--lr_warmup_steps`, only the
learning rate is scheduled (`cycle_momentum` is off), and schedulers that follow the loss are refused.
"""


def page() -> str:
    """The whole page as Markdown."""
    included = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()}
    assert set(SCHEDULES) == set(NAMES)
    head = ("name", "state", "rate 1", "step", "averages", "package", "notes")
    rows = [(f"`{name}`", *SCHEDULES[name]) for name in NAMES]
    lines = [INTRO, *table(head, (_row(record, record.package in included) for record in RECORDS)), CLASSES, SCHEDULE_INTRO,
             *table(("name", "reads", "course after the warm-up"), rows), SCHEDULE_CLASSES]
    return "\n".join(lines).rstrip() + "\n"


def _row(record: Record, included: bool) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (record.name, *record.aliases))
    step = {STATISTIC: "at once", COUNTER: "counted"}.get(record.keeps, "apart")
    package = f"{record.package} (included)" if included else record.package
    return (names, "; ".join(_state(record)), "yes" if record.own_rate else "", step, "yes" if record.modes else "", package,
            re.sub(r"; bf16 weights are stepped.*", "", record.note))


def _state(record: Record) -> Iterator[str]:
    each = record.bytes_per_parameter + sum(more for key, more in record.bytes_if.items() if record.defaults.get(key))
    if each or not record.factored:
        yield f"{each:.3g}"
    if record.factored:
        yield "rows + columns" if record.factored == 1 else f"{record.factored} x (rows + columns)"
    for key, more in record.bytes_if.items():
        if not record.defaults.get(key):
            yield f"+{more:g} with `{key}`"


if __name__ == "__main__":
    write_atomic(PAGE, page())
    print(f"written: {PAGE}")
