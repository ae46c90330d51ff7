"""The adapters under contract: every test of this folder runs over all of them. A new architecture adds its rows here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flux_train
from library.config.parse import Entry
from tests.tiny import make_flux_files


@dataclass(frozen=True)
class Case:
    """``make(folder)`` writes a tiny complete checkpoint set and returns the path of the main file."""

    name: str
    entry: Entry
    make: Callable[[Path], Path]
    # The transformer's answer to "the velocity is v" in its own convention, for the oracle test.
    oracle: Callable[[Any, Any], Any]


def _packed(velocity, _level):
    from library.architectures.flux_call import pack

    return pack(velocity)


CASES = (
    Case("flux-dev", flux_train.ENTRY, lambda folder: make_flux_files(folder, variant="dev").checkpoint, _packed),
    Case("flux-schnell", flux_train.ENTRY, lambda folder: make_flux_files(folder, variant="schnell").checkpoint, _packed),
)
