"""States go to the hub as they are saved, and one on the hub is found to go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.checkpoint.hub import Hub
from library.checkpoint.hub_states import HubStates
from library.checkpoint.state_find import find_state
from library.checkpoint.train_state import SavedState
from library.config.hub_place import hub_place
from library.config.parse import Config
from library.log import log
from library.state_saving import Outdated
from library.upload import Uploader, default_api, find_token


class StateUploads:
    """Uploads each state in one commit, always beside the training: a state is larger than any other file of a run.

    In the order they were saved, and in turn with the checkpoints of ``uploader``. One that is removed here before its turn came
    is left out, as a newer one is behind it: so the disk does not fill up where the line is slower than the training.
    """

    def __init__(self, uploader: Uploader):
        self._uploader, self._reading = uploader, None
        self._owed: tuple[Path, Outdated] | None = None  # the newest, until it is there

    def upload(self, path: Path, outdated: Outdated) -> None:
        """Then, and never before it is there, those states on the hub are removed of which ``outdated(names)`` says so."""
        self._owed = (path, outdated)
        self._uploader.thread.start(lambda: self._put(path, outdated))

    def in_use(self, path: Path) -> bool:
        """Whether it is being read now."""
        return self._reading == path

    def close(self) -> None:
        """Wait for what is on its way, and try the newest once more when it failed. Older ones that failed are not tried again:
        on the hub they would look newer than it."""
        if self._uploader.thread.busy:
            log.info("waiting for uploads to %s", self._uploader.repo)
        self._uploader.thread.wait()
        if self._owed is not None:
            self._put(*self._owed)

    def _put(self, path: Path, outdated: Outdated) -> None:
        self._reading = path
        try:
            done = path.is_dir() and self._uploader.put(path, path.name, whole=True)
        finally:
            self._reading = None
        if not done:
            return
        if self._owed is not None and self._owed[0] == path:
            self._owed = None
        try:
            if going := outdated(self._uploader.folders()):
                self._uploader.remove_folders(going)
                log.info("removed %s from %s", ", ".join(going), self._uploader.repo)
        except Exception as error:  # nothing that happens there ends a training
            log.warning("older states stay in %s: %s: %s", self._uploader.repo, type(error).__name__,
                        self._uploader.hidden(error))


def find_saved(config: Config, api: Callable[[str | None], Any] = default_api, hub: Hub | None = None) -> SavedState | None:
    """The state that ``--resume`` names, every byte of it checked; None where ``latest`` is wanted and there is none yet.

    UserError where it cannot be had.
    """
    options, saving = config.state, config.saving
    if options.resume is None:
        return None
    if not options.resume_from_huggingface:
        return find_state(saving.output_dir, saving.output_name, options.resume)
    place = hub_place(options.resume, config.hub)
    return HubStates(place, api(find_token(config.hub)), hub=hub).find(saving.output_name)
