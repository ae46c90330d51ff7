"""Files of the Hugging Face hub: already in the local cache, or to be downloaded.

Asking (``offer``) and downloading (``download``) are two steps, so that a run which lacks one small file fails before it
has fetched ten gigabytes of another.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import getproxies

from library.errors import UserError
from library.log import log

SHARD_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class HubFile:
    """A file the hub has and the local cache has not; ``size`` in bytes where the hub tells."""

    repo: str
    name: str
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


@dataclass
class Hub:
    """The hub as seen from here. ``offline`` None asks huggingface_hub (HF_HUB_OFFLINE); after one failed connection the
    rest of the run does not wait for another. ``cache`` None is huggingface_hub's own folder (HF_HUB_CACHE)."""

    cache: Path | None = None
    offline: bool | None = None
    unreachable: str = field(default="", init=False)
    probed: bool = field(default=False, init=False)

    def cached(self, repo: str, name: str) -> Path | None:
        """The file in the local cache: the version of ``main``, else that of the newest snapshot holding it."""
        from huggingface_hub import constants, try_to_load_from_cache

        path = try_to_load_from_cache(repo, name, cache_dir=self.cache)
        if isinstance(path, str):
            return Path(path)
        root = Path(self.cache or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
        found = [folder / name for folder in root.glob("*") if (folder / name).is_file()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    def why_not(self) -> str:
        """Why nothing can be fetched, or an empty string."""
        from huggingface_hub import constants

        if self.offline or (self.offline is None and constants.is_offline_mode()):
            return "the hub is switched off by HF_HUB_OFFLINE"
        if not self.probed:
            self.probed = True
            self.unreachable = _probe(constants.ENDPOINT)
        return self.unreachable

    def offer(self, repo: str, name: str) -> HubFile | str:
        """The file if the hub would hand it out, else the reason why not, in a few words."""
        if reason := self.why_not():
            return reason
        from huggingface_hub import errors, hf_hub_download

        try:
            info = hf_hub_download(repo, name, cache_dir=self.cache, dry_run=True)
        except errors.GatedRepoError:
            return f"{repo} is gated: accept its licence on huggingface.co/{repo}, then `hf auth login`"
        except errors.RepositoryNotFoundError:
            return f"{repo} is not on the hub, or is private"
        except errors.EntryNotFoundError as error:
            if not isinstance(error, errors.LocalEntryNotFoundError):
                return f"{repo} has no {name}"
            self.unreachable = "the hub cannot be reached"  # huggingface_hub's word for a failed connection
            return self.unreachable
        except errors.HFValidationError:
            return f"{repo!r} is not the name of a hub repository"
        except (OSError, errors.HfHubHTTPError) as error:
            self.unreachable = f"the hub cannot be reached ({type(error).__name__})"
            return self.unreachable
        return HubFile(repo, name, info.file_size)

    def download(self, file: HubFile) -> Path:
        """Fetch ``file``, with all shards when it is an index. UserError when the connection breaks or the disk is full."""
        from huggingface_hub import errors, hf_hub_download

        size = f" ({file.size / 1e9:.1f} GB)" if file.size and file.size > 1e8 else ""
        log.info("downloading %s%s", file, size)
        try:
            path = Path(hf_hub_download(file.repo, file.name, cache_dir=self.cache))
            for shard in _shards(path) if file.name.endswith(SHARD_INDEX) else ():
                hf_hub_download(file.repo, str(PurePosixPath(file.name).parent / shard), cache_dir=self.cache)
        except (OSError, errors.HfHubHTTPError) as error:
            raise UserError(f"downloading {file} failed: {error}",
                            remedy="try again, or download it by hand and give its path") from error
        return path


def _probe(endpoint: str) -> str:
    """Why no connection can be opened, or an empty string: huggingface_hub itself tries for half a minute, aloud.

    Behind a proxy nothing is tried: the hub may be reachable through it and through nothing else.
    """
    place = urlsplit(endpoint)
    if getproxies():
        return ""
    try:
        socket.create_connection((place.hostname, place.port or (80 if place.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        return f"{place.hostname} cannot be reached ({error.strerror or error})"
    return ""


def _shards(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
