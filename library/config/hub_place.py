"""What ``--resume`` means with ``--resume_from_huggingface``: a state in a repository of the hub, from one line of text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.config.schema import HubOptions

TYPES = ("model", "dataset", "space")
LATEST = "latest"
SYNTAX = "OWNER/REPOSITORY/STATE[:REVISION[:TYPE]]"


@dataclass(frozen=True)
class HubPlace:
    """``folder`` of the repository holds the state ``name`` (or ``latest``); it is empty for the repository's top."""

    repo: str
    folder: str
    name: str
    revision: str | None = None
    repo_type: str = "model"

    def path(self, name: str) -> str:
        """Of a state of that name, in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def __str__(self) -> str:
        return f"{self.repo}/{self.path(self.name)}" + (f" at {self.revision}" if self.revision else "")


def hub_place(text: str, hub: HubOptions) -> HubPlace:
    """The dialect's ``OWNER/REPOSITORY/PATH[:REVISION[:TYPE]]``, where a revision may also be left empty; or the name of a state
    alone, or ``latest``, in the repository and folder that this run uploads to. ValueError(what is wrong, remedy)."""
    head, *rest = text.split(":")
    revision, kind = (*rest, "", "")[:2]
    if len(rest) > 2:
        raise ValueError(f"{text!r} has more than two colons", f"write {SYNTAX}")
    if kind and kind not in TYPES:
        raise ValueError(f"{kind!r} is not a type of repository", f"write one of {', '.join(TYPES)} after the second colon")
    parts = head.strip("/").split("/")
    if any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise ValueError(f"{head!r} is no place in a repository", f"write {SYNTAX}, or {LATEST}")
    if len(parts) == 1:
        if hub.huggingface_repo_id is None:
            raise ValueError(f"of which repository {parts[0]!r} is, is not known",
                             f"write {SYNTAX}, or add --huggingface_repo_id OWNER/NAME")
        repo, folder = hub.huggingface_repo_id, (hub.huggingface_path_in_repo or "").strip("/")
    elif len(parts) == 2:
        raise ValueError(f"{head!r} is a repository, and a state in it is wanted",
                         f"write {head.strip('/')}/{LATEST}, or the name of a state: {SYNTAX}")
    else:
        repo, folder = "/".join(parts[:2]), "/".join(parts[2:-1])
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo, re.ASCII):
        raise ValueError(f"{repo!r} is not the name of a repository", f"write {SYNTAX}")
    own = hub.huggingface_repo_type if repo == hub.huggingface_repo_id else "model"
    return HubPlace(repo, folder, parts[-1], revision or None, kind or own)
