"""Saved files go to a repository of the Hugging Face hub. Nothing that happens there can end a training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from library.background import Background
from library.checkpoint.hub import Hub
from library.config.schema import HubOptions
from library.errors import UserError
from library.log import log, without

_PLACE = "--huggingface_token"
_NO_TOKEN = "set HF_TOKEN, run `hf auth login`, or give --huggingface_token; make one at huggingface.co/settings/tokens"


def find_token(options: HubOptions) -> str | None:
    """``--huggingface_token``, HF_TOKEN, or what `hf auth login` stored."""
    from huggingface_hub import get_token

    return options.huggingface_token or get_token()


class Uploader:
    """Uploads files and folders in the order they were saved. Without ``--huggingface_repo_id`` it does nothing.

    ``api`` makes huggingface_hub's HfApi from a token; ``hub`` tells whether the hub can be reached. Both are replaced in tests.
    """

    def __init__(self, options: HubOptions, api: Callable[[str | None], Any] | None = None, hub: Hub | None = None):
        self.options, self.hub = options, hub or Hub(offline=False)
        self.token: str | None = None
        self.thread = Background("uploading", lasting=False)
        self.waiting: dict[Path, str] = {}  # given, and not there yet; with the name that each is to have
        self._make, self._api, self._made = api or default_api, None, False

    @property
    def repo(self) -> str | None:
        return self.options.huggingface_repo_id

    def check(self) -> None:
        """Before training: make the repository where it is missing, and see that the token may write to it.

        UserError for a token that is missing or wrong or may not write. A hub that cannot be reached is only named: it may
        be there when the first file is.
        """
        if self.repo is None:
            return
        self.token = find_token(self.options)
        if self.token is None:
            raise UserError(f"there is no access token, and {self.repo} is to be written to", place=_PLACE, remedy=_NO_TOKEN)
        self._api = self._make(self.token)
        if reason := self.hub.why_not():
            log.warning("%s: whether files can be uploaded to %s is not known; it is tried after every save", reason, self.repo)
            return
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        kind = {"repo_id": self.repo, "repo_type": self.options.huggingface_repo_type}
        try:
            self._api.whoami()
            self._make_repository()
            self._api.auth_check(**kind, write=True)
        except HFValidationError as error:
            raise UserError(self.hidden(error), place="--huggingface_repo_id", remedy="write OWNER/NAME") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in (401, 403, 404):
                log.warning("the hub answered %s: whether files can be uploaded to %s is not known", status, self.repo)
                return
            what = {401: "the hub does not know this access token"}.get(
                status, f"this access token may not write to {self.repo}, or make it")
            raise UserError(what, place=_PLACE, remedy=_NO_TOKEN if status == 401 else
                            "use a token with the right to write, of an account that may write there") from None
        except OSError as error:  # a connection that broke
            log.warning("the hub could not be asked about %s: %s", self.repo, type(error).__name__)
            return
        log.info("saved files are uploaded to %s", self.repo)

    def upload(self, path: Path, name: str | None = None) -> None:
        """Upload a file or folder as ``name`` (its own by default) below ``--huggingface_path_in_repo``; with ``--async_upload``
        meanwhile. What fails is told, and tried once more at the end."""
        if self.repo is None:
            return
        self.waiting[path] = name or path.name
        if self.options.async_upload:
            self.thread.start(lambda: self._put(path))
        else:
            self._put(path)

    def put(self, path: Path, name: str, whole: bool = False) -> bool:
        """Upload ``path`` as ``name`` now, in one commit; whether it is there. Never raises: what fails is told in the log.

        ``whole``: of a folder that was there under this name nothing stays but what is uploaded.
        """
        options, target = self.options, self.target(name)
        where = {"repo_id": self.repo, "repo_type": options.huggingface_repo_type, "commit_message": f"Upload {name}"}
        try:
            self._make_repository()
            if path.is_dir():
                self._api.upload_folder(folder_path=str(path), path_in_repo=target, **where,
                                        **({"delete_patterns": ["*"]} if whole else {}))
            else:
                self._api.upload_file(path_or_fileobj=str(path), path_in_repo=target, **where)
        except Exception as error:  # a broken connection, a full quota, a defect of the hub: the file is on the disk
            log.error("NOT UPLOADED, training goes on: %s to %s: %s: %s", path.name, self.repo, type(error).__name__,
                      self.hidden(error))
            return False
        log.info("uploaded %s to %s/%s", path.name, self.repo, target)
        return True

    def target(self, name: str) -> str:
        """Where ``name`` is in the repository."""
        return "/".join(part for part in ((self.options.huggingface_path_in_repo or "").strip("/"), name) if part)

    def folders(self) -> list[str]:
        """Names of the folders below ``--huggingface_path_in_repo``. Whatever huggingface_hub raises."""
        found = self._api.list_repo_tree(self.repo, path_in_repo=self.target("") or None,
                                         repo_type=self.options.huggingface_repo_type)
        return [entry.path.rpartition("/")[2] for entry in found if hasattr(entry, "tree_id")]

    def remove_folders(self, names: Sequence[str]) -> None:
        """In one commit. Whatever huggingface_hub raises."""
        from huggingface_hub import CommitOperationDelete

        going = [CommitOperationDelete(f"{self.target(name)}/", is_folder=True) for name in names]
        self._api.create_commit(self.repo, going, repo_type=self.options.huggingface_repo_type,
                                commit_message=f"Remove {', '.join(names)}")

    def in_use(self, path: Path) -> bool:
        """Whether ``path`` still has to be read."""
        return self.thread.busy and path in self.waiting

    def close(self) -> None:
        """Wait for all uploads, and try once more what has failed."""
        if self.repo is None:
            return
        if self.thread.busy:
            log.info("waiting for uploads to %s", self.repo)
        self.thread.wait()
        for path in [path for path in self.waiting if path.exists()]:
            self._put(path)

    def _put(self, path: Path) -> None:
        if self.put(path, self.waiting.get(path, path.name)):
            self.waiting.pop(path, None)

    def _make_repository(self) -> None:
        if self._made:
            return
        private = self.options.huggingface_repo_visibility == "private"
        self._api.create_repo(self.repo, repo_type=self.options.huggingface_repo_type, private=private, exist_ok=True,
                              **({"space_sdk": "static"} if self.options.huggingface_repo_type == "space" else {}))
        self._made = True

    def hidden(self, error: Exception) -> str:
        return without(filter(None, (self.token,)), " ".join(str(error).split()))


def default_api(token: str | None) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
        disable_progress_bars()  # they would be drawn into the bar of the training
    return HfApi(token=token)
