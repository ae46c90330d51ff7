"""States on the Hugging Face hub: which one to go on from, and a copy of it here, checked like any other state.

A state is uploaded in one commit, so that it is there as a whole or not at all; whether it is, is seen from its manifest. Files
come into the folder in which huggingface_hub keeps all it downloads, and need not be fetched twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from library.checkpoint.hub import Hub
from library.checkpoint.state_find import state_names
from library.checkpoint.train_state import FACTS, MANIFEST, SavedState, open_state
from library.config.hub_place import LATEST, HubPlace
from library.errors import UserError
from library.log import log, without

_PLACE = "--resume"


class HubStates:
    """The states at ``place``. ``api``: huggingface_hub's HfApi with the token that it holds; ``cache`` None: its own folder."""

    def __init__(self, place: HubPlace, api: Any, cache: Path | None = None, hub: Hub | None = None):
        self.place, self._api, self._cache, self._hub = place, api, cache, hub or Hub(offline=False)
        self._where = {"repo_id": place.repo, "repo_type": place.repo_type}

    def find(self, output_name: str) -> SavedState | None:
        """The state that is wanted, on this disk and whole; None where ``latest`` is and there is none yet.

        With ``latest`` broken states are passed over, as they are in a folder. UserError: the hub cannot be reached, the
        repository is unknown or closed to this token, the state is not there or not whole, the disk is full.
        """
        if reason := self._hub.why_not():
            raise UserError(f"{reason}, and a state of {self.place.repo} is wanted", place=_PLACE,
                            remedy="try again later, or resume from a folder without --resume_from_huggingface")
        with self._told():  # one version of the repository from here on, whatever is uploaded meanwhile
            commit = self._api.repo_info(self.place.repo, revision=self.place.revision, repo_type=self.place.repo_type).sha
        if self.place.name != LATEST:
            return self._fetch(self.place.name, commit)
        names = self._newest_first(output_name, commit)
        for name in names:
            try:
                return self._fetch(name, commit)
            except _Broken as error:
                log.warning("passed over %s: %s", error.place, error.message)
        if names:
            raise UserError(f"all {len(names)} states of {output_name} there are broken", place=f"{_PLACE} {self.place}",
                            remedy="begin anew without --resume, from the last checkpoint for instance")
        log.info("no state of %s in %s yet: the training starts at its beginning", output_name, self.place.repo)
        return None

    def _newest_first(self, output_name: str, commit: str) -> list[str]:
        """By when they were uploaded, of which the hub's one clock knows; of one moment by what they say themselves."""
        ours = state_names(output_name)
        found = [(entry.last_commit.date, name) for entry in self._tree(self.place.folder, commit, expand=True)
                 if hasattr(entry, "tree_id") and ours.fullmatch(name := entry.path.rpartition("/")[2])]
        dates = [date for date, _ in found]
        ranked = [(date, self._serial(name, commit) if dates.count(date) > 1 else 0, name) for date, name in found]
        return [name for _, _, name in sorted(ranked, reverse=True)]

    def _serial(self, name: str, commit: str) -> int:
        if not any(entry.path == f"{self.place.path(name)}/{FACTS}" for entry in self._tree(self.place.path(name), commit)):
            return 0
        file = self._file(name, FACTS, commit)
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["serial"])
        except (OSError, ValueError, TypeError, LookupError):
            return 0

    def _fetch(self, name: str, commit: str) -> SavedState:
        path = self.place.path(name)
        here = {entry.path.removeprefix(f"{path}/"): entry.size for entry in self._tree(path, commit) if hasattr(entry, "size")}
        if not here:
            known = ", ".join(entry.path for entry in self._tree(self.place.folder, commit) if entry.path.endswith("-state"))
            raise UserError(f"there is no {path} in {self.place.repo}", place=_PLACE,
                            remedy=f"give one of these: {known}" if known else "look there for the names of its states")
        if MANIFEST not in here:
            raise self._broken(path, f"it has no {MANIFEST}, so it is no state, or not all of one")
        wanted = self._manifest(name, path, commit)
        missing = [file for file, size in wanted.items() if here.get(file) != size]
        if missing:
            raise self._broken(path, f"{missing[0]} is missing or has another length")
        total = sum(wanted.values())
        log.info("fetching the state %s of %s (%.2f GB)", path, self.place.repo, total / 1e9)
        for again in (False, True):
            files = [self._file(name, file, commit, again) for file in (*wanted, MANIFEST)]
            try:
                return open_state(files[0].parent)
            except UserError as error:
                if again:
                    raise self._broken(path, error.message) from error
                log.warning("%s: fetching it once more", error.message)  # an earlier download may be what is damaged
        raise AssertionError

    def _manifest(self, name: str, path: str, commit: str) -> dict[str, int]:
        """File -> bytes. Its checksums are looked at when all files are here."""
        file = self._file(name, MANIFEST, commit)
        try:
            files = json.loads(file.read_text(encoding="utf-8"))["files"]
            wanted = {each: int(facts["bytes"]) for each, facts in files.items()}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise self._broken(path, f"{MANIFEST} cannot be read") from error
        if any("/" in each or "\\" in each or each.startswith(".") for each in wanted):
            raise self._broken(path, f"{MANIFEST} names files elsewhere")
        return wanted

    def _file(self, name: str, file: str, commit: str, again: bool = False) -> Path:
        with self._told():
            return Path(self._api.hf_hub_download(filename=f"{self.place.path(name)}/{file}", revision=commit,
                                                  cache_dir=self._cache, force_download=again, **self._where))

    def _tree(self, path: str, commit: str, expand: bool = False) -> list[Any]:
        from huggingface_hub.errors import EntryNotFoundError

        with self._told():
            try:
                return list(self._api.list_repo_tree(path_in_repo=path or None, revision=commit, expand=expand, **self._where))
            except EntryNotFoundError:
                return []

    def _broken(self, path: str, why: str) -> UserError:
        return _Broken(f"this state is broken: {why}", place=f"{self.place.repo}/{path}",
                       remedy=f"--resume {LATEST} takes the newest one that is whole")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the hub or the disk refuse, in words for the user, and without the token."""
        from huggingface_hub import errors

        repo = self.place.repo
        try:
            yield
        except errors.GatedRepoError:
            raise UserError(f"{repo} is gated", place=_PLACE, remedy=f"accept its conditions on huggingface.co/{repo}") from None
        except errors.RevisionNotFoundError:
            raise UserError(f"{repo} has no revision {self.place.revision}", place=_PLACE,
                            remedy="give a branch, a tag or a commit behind the first colon, or none") from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"{repo} is not on the hub as a {self.place.repo_type}, or this access token may not read it",
                            place=_PLACE, remedy="check the name and the type; set HF_TOKEN or run `hf auth login`") from None
        except errors.LocalEntryNotFoundError:  # huggingface_hub's word for a failed connection
            raise UserError(f"the hub could not be reached while files of {repo} were fetched", place=_PLACE,
                            remedy="try again: what has arrived is kept") from None
        except errors.EntryNotFoundError:
            raise
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status in (401, 403):
                raise UserError(f"this access token may not read {repo}", place=_PLACE,
                                remedy="use a token with the right to read it, in HF_TOKEN or --huggingface_token") from None
            raise UserError(f"the hub answered {status} when it was asked for {repo}", place=_PLACE,
                            remedy="try again later") from None
        except Exception as error:  # a broken connection has many names; a full disk is an OSError
            if isinstance(error, UserError):
                raise
            words = without(filter(None, (self._api.token,)), " ".join(str(error).split()))
            raise UserError(f"fetching from {repo} failed: {type(error).__name__}: {words}", place=_PLACE,
                            remedy="try again: what has arrived is kept") from None


class _Broken(UserError):
    """A state that is there and not whole."""
