"""Preview pictures during training: when they are due, and how they are rendered and put on disk."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.atomic import atomic_file
from library.contact_sheet import picture_name, settings_of
from library.errors import UserError
from library.log import log
from library.prompts import Prompt, batches, with_seeds

if TYPE_CHECKING:
    from PIL import Image


def due(step: int, epoch: int, epoch_ended: bool, *, every_n_steps: int | None = None, every_n_epochs: int | None = None,
        at_first: bool = False) -> bool:
    """Whether to render after ``step`` steps (0 = before training).

    ``epoch`` counts from 1; ``epoch_ended`` says that this step was its last one. As in the dialect the epoch rule
    wins where both are set, and None, 0 or less switches a rule off.
    """
    if step == 0:
        return at_first
    if every_n_epochs and every_n_epochs > 0:
        return epoch_ended and epoch % every_n_epochs == 0
    return bool(every_n_steps) and every_n_steps > 0 and step % every_n_steps == 0


@dataclass(frozen=True)
class Rendered:
    """What one round of previews wrote: a PNG per prompt, in their order. ``batch_size``: how many were drawn together; 1 when
    there was no memory for as many as asked for."""

    images: tuple[Path, ...]
    batch_size: int


Sample = Callable[[Sequence[Prompt]], "Sequence[Image.Image]"]


def render_all(prompts: Sequence[Prompt], sample: Sample, folder: Path, name: str | None, step: int,
               batch_size: int = 1, share: tuple[int, int] = (0, 1)) -> Rendered:
    """Render every prompt as ``folder/{name}_{step}_{index}_{seed}.png``; of n processes that do so together, number k has
    ``share`` (k, n) and renders a part.

    ``sample(prompts)`` returns the pictures of up to ``batch_size`` prompts that can be drawn together (``prompts.batches``);
    their seeds are always set there. It runs without gradients, and the random state of torch (CPU and CUDA), numpy and
    ``random`` is the same afterwards as before, so that previews leave the training as it would be without them. Switching a
    module between training and evaluation is the caller's part. When the device's memory runs out, the rest is drawn one by
    one. Errors of ``sample`` pass through; UserError when one picture does not fit the memory, the disk is full or the folder
    not writable.
    """
    import torch

    if Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"{folder} is a file, and previews need a folder of that name",
                        remedy="move it away, or choose another --output_dir")
    prompts = with_seeds(prompts)
    images = [Path(folder) / picture_name(name, step, index, prompt.seed) for index, prompt in enumerate(prompts)]
    with preserved_random_state(), torch.no_grad():
        number, sharing = share
        waiting = batches(prompts, min(batch_size, math.ceil(len(prompts) / sharing)))[number::sharing]
        while waiting:
            batch = waiting.pop(0)
            drawn = _drawn([prompts[index] for index in batch], sample)
            if drawn is None:
                log.warning("no memory to draw %d previews together: they are drawn one by one from now on", len(batch))
                waiting, batch_size = sorted([index] for group in (batch, *waiting) for index in group), 1
                continue
            for index, picture in zip(batch, drawn, strict=True):
                save_picture(picture, images[index], {**settings_of(prompts[index]), "step": str(step)})
    return Rendered(tuple(images), batch_size)


def _drawn(prompts: Sequence[Prompt], sample: Sample) -> Sequence[Image.Image] | None:
    """Their pictures; None when there is no memory to draw them together. UserError when there is none for one."""
    import torch

    try:
        return sample(prompts)
    except torch.OutOfMemoryError as error:
        short = str(error).splitlines()[0]
    # The error is gone by now, and with it what its frames held of the device's memory.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if len(prompts) > 1:
        return None
    (prompt,) = prompts
    raise UserError(f"a preview of {prompt.width} x {prompt.height} pixels does not fit the memory of the device ({short})",
                    place=prompt.place, remedy="give the prompt a smaller --w and --h, free memory (--blocks_to_swap, "
                                               "--optimizer_type AdamW8bit), or leave out --sample_prompts")


def save_picture(image: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """``image`` as a PNG that carries ``texts`` as metadata (text chunks; UTF-8 where they need it)."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with atomic_file(path) as file:
        image.convert("RGB").save(file, format="PNG", pnginfo=info)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Afterwards every global random generator goes on where it stood: torch CPU and CUDA, numpy, ``random``."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy_state is not None:
                numpy.random.set_state(numpy_state)
