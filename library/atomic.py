"""Files and folders that appear whole or not at all: written aside, fsynced, renamed."""

from __future__ import annotations

import errno
import glob
import os
import shutil
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``path`` when the block ends, and vanishes when it raises.

    Two renames, as no system replaces a full folder in one: a run killed between them leaves the previous folder whole under a
    hidden name beside ``path``, which stands for nothing then. The caller fsyncs what it puts in. UserError as ``atomic_file``.
    """
    path = Path(path)
    new = old = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield new
        with suppress(OSError):
            os.chmod(new, 0o777 & ~_UMASK)  # mkdtemp makes private folders
        for folder in [new, *(entry for entry in new.rglob("*") if entry.is_dir())]:
            _fsync_folder(folder)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".previous", dir=path.parent))  # never swept
            os.replace(path, old / path.name)
        try:
            os.replace(new, path)
        except OSError:
            if old is not None:
                os.replace(old / path.name, path)
            raise
        new = None
        _fsync_folder(path.parent)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        for folder in filter(None, (new, old)):
            shutil.rmtree(folder, ignore_errors=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """``data`` (text as UTF-8) becomes the whole content of ``path``."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def sweep(folder: Path, name: str, idle_seconds: float = 3600) -> list[Path]:
    """Remove what killed runs left half-written in ``folder`` of files whose names begin with ``name``; returns the paths.

    Only temporary files and folders that nobody has written to for ``idle_seconds`` go: another run may be writing now.
    """
    swept = []
    for path in Path(folder).glob(f".{glob.escape(name)}*.tmp"):
        try:
            touched = [entry.stat().st_mtime for entry in (path, *path.rglob("*"))]  # of a file: its own
            if time.time() - max(touched) > idle_seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
