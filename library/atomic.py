"""Files that appear whole or not at all: written aside, fsynced, renamed."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from library.errors import UserError


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


_UMASK = _umask()  # read once, while there is one thread: it can only be read by setting it


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file (read/write) that replaces ``path`` when the block ends, and vanishes when it raises.

    The temporary name stands in the same folder (a rename is atomic only within one file system) and starts with a
    dot, so that no reader takes it for the real thing. Raises UserError for a full disk or a folder without write access.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # some foreign and network file systems know no permissions
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes private files; the result should be an ordinary one
        os.replace(temporary, path)
        temporary = None
        _fsync_folder(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        if temporary is not None:
            try:
                os.unlink(temporary)
            except OSError:
                pass


def write_atomic(path: Path, data: bytes | str) -> None:
    """``data`` (text as UTF-8) becomes the whole content of ``path``."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def sweep(folder: Path, name: str, idle_seconds: float = 3600) -> list[Path]:
    """Remove what killed runs left half-written in ``folder`` of files whose names begin with ``name``; returns the paths.

    Only temporary files that nobody has written to for ``idle_seconds`` go: another run may be writing now.
    """
    swept = []
    for path in Path(folder).glob(f".{glob.escape(name)}*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > idle_seconds:
                path.unlink()
                swept.append(path)
        except OSError:
            continue  # gone already, or open in another process on Windows
    return swept


def _explain(error: OSError, path: Path) -> OSError | UserError:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return UserError(f"no space left on the disk while writing {path}", remedy="free some space or choose another folder; "
                         "nothing was left half-written and the previous file is untouched")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write {path}: {error.strerror}", remedy="make the folder writable or choose another one")
    return error


def _fsync_folder(folder: Path) -> None:
    """Makes the rename itself durable; Windows cannot open folders, and needs no such step."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse to fsync a folder
    finally:
        os.close(handle)
