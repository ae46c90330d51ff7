import errno
import os
import stat
import sys

import pytest

from library.atomic import atomic_file, atomic_folder, sweep, write_atomic
from library.errors import UserError


def test_the_file_appears_whole_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "a.bin"
    write_atomic(path, b"12345")
    assert path.read_bytes() == b"12345"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]
    if sys.platform != "win32":
        other = tmp_path / "plain"
        other.write_bytes(b"")
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_text_is_utf8_without_translated_newlines(tmp_path):
    write_atomic(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)):
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise failure
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_to_the_user(tmp_path):
    with pytest.raises(UserError, match="no space left .*a.bin; free some space"):
        with atomic_file(tmp_path / "a.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_to_the_user(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((UserError, OSError)):
        write_atomic(tmp_path / "file" / "a.bin", b"1")


def test_the_position_may_be_moved_back(tmp_path):
    """The checkpoint writer fills in a hash at the beginning once it knows it."""
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"0000-data")
        file.seek(0)
        file.write(b"1234")
    assert (tmp_path / "a.bin").read_bytes() == b"1234-data"


def test_leftovers_of_killed_runs_are_swept_when_nobody_writes_to_them(tmp_path):
    old, fresh, foreign, whole = (tmp_path / name for name in (".m[1]-step.abc.tmp", ".m[1].def.tmp", ".other.ghi.tmp", "m[1].safetensors"))
    for path in (old, fresh, foreign, whole):
        path.write_bytes(b"")
    for path in (old, foreign, whole):
        os.utime(path, (1, 1))
    assert sweep(tmp_path, "m[1]") == [old]
    assert sorted(tmp_path.iterdir()) == sorted([fresh, foreign, whole])
    assert sweep(tmp_path / "nowhere", "m") == []


def filled(path, text):
    with atomic_folder(path) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(text)


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    path = tmp_path / "new" / "model"
    filled(path, "old")
    (path / "left_over").write_text("")
    filled(path, "new")
    assert [entry.relative_to(path).as_posix() for entry in sorted(path.rglob("*"))] == ["part", "part/a.txt"]
    assert (path / "part" / "a.txt").read_text() == "new" and list(path.parent.iterdir()) == [path]
    if sys.platform != "win32":
        (tmp_path / "plain").mkdir()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, failure):
    filled(tmp_path / "model", "old")
    with pytest.raises(type(failure)):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("of the new")
            raise failure
    assert list(tmp_path.iterdir()) == [tmp_path / "model"] and (tmp_path / "model" / "part" / "a.txt").read_text() == "old"


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_named(tmp_path, monkeypatch):
    filled(tmp_path / "model", "old")
    rename = os.replace

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise PermissionError(errno.EACCES, "in use", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="cannot write"):
        filled(tmp_path / "model", "new")
    assert (tmp_path / "model" / "part" / "a.txt").read_text() == "old"
    assert not [entry for entry in tmp_path.iterdir() if entry.name != "model"]


def test_sweep_removes_folders_that_nobody_has_written_to_lately(tmp_path):
    for name, age in ((".m.old.tmp", 7200), (".m.new.tmp", 0), (".m.kept.previous", 7200)):
        (tmp_path / name / "part").mkdir(parents=True)
        for place in (tmp_path / name / "part", tmp_path / name):
            os.utime(place, (place.stat().st_mtime - age,) * 2)
    assert sweep(tmp_path, "m") == [tmp_path / ".m.old.tmp"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".m.kept.previous", ".m.new.tmp"]
