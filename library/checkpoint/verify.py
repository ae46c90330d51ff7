"""Whether what stands on the disk is what was written: read back before anything older is removed for it.

Reading goes through the file cache of the system, which is what makes it cheap: it finds files that are cut short or mangled on
their way (full quotas, network and cloud drives that report success), and no decay of the disk itself.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from library.checkpoint.header import read_header
from library.errors import UserError

HASHES = ("modelspec.hash_sha256", "sshs_model_hash")  # metadata that holds the sha256 of all tensor data
_CHUNK = 8 << 20


class Damaged(UserError):
    """A file that was just written and does not read back as it should."""


def verify(path: Path) -> None:
    """Raise ``Damaged`` where ``path``, a file of weights or a folder of them, is not whole.

    Safetensors: the header fits the file's size and, where the metadata holds a hash, the data fit the hash. ``.ckpt`` and
    ``.bin``: the checksum of every entry of the archive. A folder: all such files in it.
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in (".safetensors", ".bin"):
                verify(file)
        return
    try:
        reason = _archive(path) if path.suffix in (".ckpt", ".bin") else _safetensors(path)
    except (UserError, OSError, zipfile.BadZipFile) as error:
        reason = str(error)
    if reason:
        raise Damaged(f"does not read back as it was written: {reason}", place=str(path),
                      remedy="look at the disk and its free space; older files were kept")


def _safetensors(path: Path) -> str:
    """What is wrong, or an empty text."""
    header = read_header(path)
    stated = next((header.metadata[key] for key in HASHES if key in header.metadata), None)
    if stated is None:
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return "" if digest.hexdigest() == stated.removeprefix("0x") else "its data do not fit the hash in its header"


def _archive(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    return f"its entry {bad} is damaged" if bad else ""
