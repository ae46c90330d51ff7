"""Running out of memory, told in one line with what to change, whatever the run was doing. No torch here: ``app`` asks too."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from library.errors import UserError

# Of errors that torch raises as plain RuntimeErrors: by libraries on the card, and when pinned or ordinary memory is asked for.
_ON_DEVICE = ("CUDA out of memory", "HIP out of memory", "MPS backend out of memory", "error: out of memory",
              "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")
_ON_HOST = ("can't allocate memory", "not enough memory: you tried to allocate")
_DETAILS = (" Including non-PyTorch memory", " Of the allocated memory", " If reserved but unallocated", " See documentation")

ENCODING = ("while pictures and captions were encoded", "lower --vae_batch_size and --text_encoder_batch_size or the resolution, "
            "and add --mixed_precision bf16, which encodes in half the memory")
LOADING = ("while the model was loaded", "add --blocks_to_swap N, which keeps blocks in main memory, or --full_bf16, which "
           "halves the weights")
DRAWING = ("while previews were drawn", "give the prompts smaller sizes (--w, --h)")
REMEDY = ("lower --train_batch_size or the resolution, add --gradient_checkpointing, --cache_latents and "
          "--cache_text_encoder_outputs, or use --optimizer_type AdamW8bit or Adafactor; --plan shows what takes how much")
HOST_REMEDY = ("close other programs, lower --max_data_loader_n_workers, or leave out what is kept in main memory: "
               "--blocks_to_swap, --ema_decay, --async_save, caches that are not on disk")


def out_of_memory(error: BaseException) -> str | None:
    """``the device`` or ``main memory`` where that is what ``error`` means, else None."""
    text = str(error)
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "main memory"
    if type(error).__name__ == "OutOfMemoryError":
        return "the device"
    if isinstance(error, RuntimeError):
        if any(words in text for words in _ON_HOST):
            return "main memory"
        if any(words in text for words in _ON_DEVICE):
            return "the device"
    return None


def told(error: BaseException, doing: str = "", remedy: str = REMEDY) -> UserError | None:
    """The line for a user, or None for all other errors. ``remedy`` is about the device; main memory has one of its own."""
    where = out_of_memory(error)
    if where is None:
        return None
    first = (str(error).splitlines() or [""])[0]
    for words in _DETAILS:  # torch's advice to programmers
        first = first.partition(words)[0]
    what = f"out of memory on {where}" if where == "the device" else "out of main memory"
    return UserError(": ".join(filter(None, (" ".join(filter(None, (what, doing))), first.strip().rstrip(".")))),
                     remedy=remedy if where == "the device" else HOST_REMEDY)


@contextmanager
def telling(doing: str, remedy: str) -> Iterator[None]:
    """Inside, running out of memory becomes a UserError that says what was being done and what to change."""
    try:
        yield
    except Exception as error:
        line = told(error, doing, remedy)
        if line is None:
            raise
        raise line from error
