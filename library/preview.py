"""Preview pictures during training: when they are due, and how they are rendered and put on disk."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.atomic import atomic_file
from library.contact_sheet import picture_name, settings_of, write_contact_sheet
from library.errors import UserError
from library.prompts import Prompt, with_seeds

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
    """What one round of previews wrote: a PNG per prompt, in their order, and the contact sheet of the run so far."""

    images: tuple[Path, ...]
    sheet: Path


def render_all(prompts: Sequence[Prompt], sample: Callable[[Prompt, int], Image.Image], folder: Path, name: str | None,
               step: int) -> Rendered:
    """Render every prompt as ``folder/{name}_{step}_{index}_{seed}.png``, then redraw ``folder/{name}_contact_sheet.png``.

    ``sample(prompt, index)`` returns the picture of one prompt; ``prompt.seed`` is always set there, ``index`` is the
    prompt's position. It runs without gradients, and the random state of torch (CPU and CUDA), numpy and ``random`` is
    the same afterwards as before, so that previews leave the training as it would be without them. Switching a module
    between training and evaluation is the caller's part. Errors of ``sample`` pass through; UserError when the disk
    is full or the folder not writable.
    """
    import torch

    if Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"{folder} is a file, and previews need a folder of that name",
                        remedy="move it away, or choose another --output_dir")
    prompts, images = with_seeds(prompts), []
    with preserved_random_state(), torch.no_grad():
        for index, prompt in enumerate(prompts):
            path = Path(folder) / picture_name(name, step, index, prompt.seed)
            save_picture(sample(prompt, index), path, {**settings_of(prompt), "step": str(step)})
            images.append(path)
    return Rendered(tuple(images), write_contact_sheet(folder, name, prompts, step))


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
