"""Which state to go on from: names of states, the newest whole one, and which old ones may go."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from library.checkpoint.train_state import FACTS, SavedState, is_state, leftovers, open_state
from library.config.hub_place import LATEST
from library.errors import UserError
from library.log import log

SUFFIX = "-state"


def found_states(folder: Path, output_name: str) -> list[Path]:
    """The states of a run of this name, newest first; broken ones, and ones that a killed run had moved aside, included."""
    ours = state_names(output_name)
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if ours.fullmatch(path.name) and path.is_dir()]
    aside = [path for path in folder.glob(f".*{SUFFIX}.*.previous/*{SUFFIX}") if ours.fullmatch(path.name)]
    states = [path for path in (*named, *aside) if is_state(path)]
    return sorted(states, key=lambda path: (_serial(path), path.name), reverse=True)


def state_names(output_name: str) -> re.Pattern[str]:
    """What the states of a run of this name are called."""
    return re.compile(rf"{re.escape(output_name)}(-step\d{{8,}}|-\d{{6,}})?{SUFFIX}")


def next_serial(folder: Path, output_name: str) -> int:
    """For ``StateFacts.serial`` of a state that is about to be written."""
    return 1 + max((_serial(path) for path in found_states(folder, output_name)), default=0)


def _serial(path: Path) -> int:
    """0 for a state that does not tell."""
    try:
        return int(json.loads((path / FACTS).read_text(encoding="utf-8"))["serial"])
    except (OSError, ValueError, TypeError, LookupError):
        return 0


def find_state(folder: Path, output_name: str, wanted: str | Path) -> SavedState | None:
    """What ``--resume`` names: ``latest``, the newest whole state of the run in ``folder``, or the path of a state.

    Broken states are passed over with a line in the log each. None when ``latest`` is wanted and there is none yet, so that a job
    that is started again and again can always say so. UserError when all there are are broken, or the one that was named is.
    """
    if str(wanted) != LATEST:
        path = Path(wanted)
        inside = [] if is_state(path) or not path.is_dir() else sorted(each.name for each in path.iterdir() if is_state(each))
        if inside:
            raise UserError(f"is a folder of states, and one of them is wanted ({', '.join(inside[:3])})",
                            place=f"--resume {path}", remedy=f"add its name, or give {LATEST}")
        return open_state(path)
    states = found_states(Path(folder), output_name)
    for path in states:
        try:
            return open_state(path)
        except UserError as error:
            log.warning("passed over %s: %s", path, error.message)
    if states:
        raise UserError(f"all {len(states)} states of {output_name} are broken", place=str(folder), remedy="look at the disk; to "
                        "begin anew, move them away or choose another --output_name; checkpoints can be used as the model to "
                        "start from")
    log.info("no state of %s in %s yet: the training starts at its beginning", output_name, folder)
    return None


def remove_states(paths: Iterable[Path], newest: Path, read_back: bool = False) -> list[Path]:
    """Remove states that are no longer kept, once ``newest`` was read back whole; returns what was removed.

    ``read_back``: it was, just now. Nothing goes as long as the newest is not whole. A folder leaves under a hidden name first,
    so that a run killed while its files go leaves nothing that looks like a state.
    """
    going = [path for path in paths if is_state(path) and not path.is_symlink() and path.resolve() != newest.resolve()]
    if not going:
        return []
    try:
        open_state(newest, verify=not read_back)
    except UserError as error:
        log.error("older states are kept, as the newest could not be read back: %s", error)
        return []
    removed = []
    for path in going:
        try:
            hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            try:
                path.rename(hidden / path.name)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
            removed.append(path)
        except OSError as error:  # on Windows a file that another program has open cannot be moved
            log.warning("%s is no longer kept, but could not be removed: %s", path, error.strerror or error)
    for path in going:
        for left in leftovers(path):
            shutil.rmtree(left.parent, ignore_errors=True)
    return removed
