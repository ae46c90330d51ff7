import errno
import re
from pathlib import Path

import pytest

from library.checkpoint.verify import Damaged
from library.errors import NoRoom, UserError
from library.log import log
from library.saving import LONGEST_PAUSE, Retry, Saver, endangered, epochs_between_saves, is_full, may_pass, outdated


class Folder:
    """A saver whose files are empty; ``run`` goes through a whole run as the loop does."""

    def __init__(self, path, **settings):
        self.path, self.written = path, []
        self.saver = Saver(path, "m", write=self.write, **{"total_epochs": 4, **settings})

    def write(self, path, info, then, at_once=False):
        path.write_bytes(b"")
        self.written.append((path.name, info["step"], info["epoch"]))
        then()

    def run(self, steps, steps_per_epoch):
        for step in range(1, steps + 1):
            epoch = (step - 1) // steps_per_epoch + 1
            self.saver.after_step(step, epoch)
            if step % steps_per_epoch == 0:
                self.saver.after_epoch(epoch, step)
        self.saver.final(steps, epoch)
        return sorted(entry.name for entry in self.path.iterdir())


def test_only_the_final_file_without_settings(tmp_path):
    folder = Folder(tmp_path)
    assert folder.run(8, 2) == ["m.safetensors"]
    assert folder.written == [("m.safetensors", 8, 4)]


def test_names_of_steps(tmp_path):
    assert Folder(tmp_path, every_n_steps=3).run(8, 2) == ["m-step00000003.safetensors", "m-step00000006.safetensors", "m.safetensors"]


def test_the_last_epoch_is_the_final_file(tmp_path):
    assert Folder(tmp_path, every_n_epochs=1).run(8, 2) == ["m-000001.safetensors", "m-000002.safetensors", "m-000003.safetensors", "m.safetensors"]


@pytest.mark.parametrize(("every", "ratio", "epochs", "expected"), [(None, None, 9, None), (0, None, 9, None), (2, None, 9, 2), (None, 4, 9, 2),
                                                                    (None, 20, 9, 1)])
def test_epochs_between_saves(every, ratio, epochs, expected):
    assert epochs_between_saves(every, ratio, epochs) == expected


def test_retention_counts_steps_and_spares_everything_else(tmp_path):
    for name in ("m-step00000001.safetensors", "m-step00000099.safetensors", "m-step00000002.ckpt", "other-step00000001.safetensors", "m-000001.safetensors"):
        (tmp_path / name).write_bytes(b"")
    left = Folder(tmp_path, every_n_steps=2, last_n_steps=4).run(8, 8)
    assert left == sorted(["m-step00000004.safetensors", "m-step00000006.safetensors", "m-step00000008.safetensors",
                           "m-step00000099.safetensors", "m-step00000002.ckpt",
                           "other-step00000001.safetensors", "m-000001.safetensors", "m.safetensors"])


def test_retention_of_epochs(tmp_path):
    assert Folder(tmp_path, every_n_epochs=1, last_n_epochs=2).run(8, 2) == ["m-000002.safetensors", "m-000003.safetensors", "m.safetensors"]


def test_retention_of_epochs_counts_files(tmp_path):
    left = Folder(tmp_path, every_n_epochs=2, last_n_epochs=2, total_epochs=9).run(9, 1)
    assert left == ["m-000006.safetensors", "m-000008.safetensors", "m.safetensors"]


def test_a_protected_file_is_never_removed(tmp_path):
    start = tmp_path / "m-step00000001.safetensors"
    start.write_bytes(b"the model this run started from")
    Folder(tmp_path, every_n_steps=2, last_n_steps=2, protected=[start]).run(8, 8)
    assert start.read_bytes() == b"the model this run started from"


def test_old_files_go_only_after_the_new_one_stands(tmp_path):
    folder = Folder(tmp_path, every_n_steps=1, last_n_steps=1)
    folder.saver.after_step(1, 1)

    def fails(path, info, then, at_once):
        raise OSError("disk full")

    folder.saver._write_file = fails
    with pytest.raises(OSError):
        folder.saver.after_step(2, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m-step00000001.safetensors"]


def test_a_file_that_cannot_be_removed_stays_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    """On Windows another program may have it open."""
    def refuse(self, missing_ok=False):
        raise PermissionError(13, "in use", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(log, "propagate", True)
    left = Folder(tmp_path, every_n_steps=1, last_n_steps=1).run(4, 4)
    assert "m-step00000001.safetensors" in left and "m.safetensors" in left
    assert "m-step00000001.safetensors is no longer kept" in caplog.text


def test_an_emergency_saves_the_last_complete_step_once(tmp_path):
    folder = Folder(tmp_path, every_n_steps=2)
    assert folder.saver.emergency(0, 0) is None
    folder.saver.after_step(2, 1)
    assert folder.saver.emergency(2, 1) == tmp_path / "m-step00000002.safetensors" and len(folder.written) == 1
    assert folder.saver.emergency(3, 1) == tmp_path / "m-step00000003.safetensors" and len(folder.written) == 2


def test_numbers_above_the_current_one_belong_to_another_run():
    assert outdated(["a-1", "a-5", "a-9"], re.compile(r"a-(\d)"), current=6, keep=1) == ["a-1", "a-5"]


def test_a_file_that_is_in_use_stays_until_the_next_removal(tmp_path):
    in_use = {tmp_path / "m-step00000001.safetensors"}
    folder = Folder(tmp_path, every_n_steps=1, last_n_steps=1, in_use=in_use.__contains__)
    for step in (1, 2, 3):
        folder.saver.after_step(step, 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"m-step0000000{step}.safetensors" for step in (1, 2, 3)]
    in_use.clear()
    folder.saver.after_step(4, 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"m-step0000000{step}.safetensors" for step in (3, 4)]


def test_every_file_is_told_after_the_old_ones_are_gone(tmp_path):
    seen = []
    folder = Folder(tmp_path, every_n_steps=1, last_n_steps=1,
                    on_saved=lambda path: seen.append((path.name, len(list(tmp_path.iterdir())))))
    assert folder.run(3, 9) == ["m-step00000002.safetensors", "m-step00000003.safetensors", "m.safetensors"]
    assert seen == [("m-step00000001.safetensors", 1), ("m-step00000002.safetensors", 2), ("m-step00000003.safetensors", 2),
                    ("m.safetensors", 3)]


def test_nothing_counts_as_saved_before_it_stands(tmp_path):
    """A file that is written beside the training: what follows comes later, in any order of calls."""
    later = []
    saver = Saver(tmp_path, "m", total_epochs=1, every_n_steps=1, last_n_steps=1,
                  write=lambda path, info, then, at_once=False: later.append((path, then)))
    (tmp_path / "m-step00000001.safetensors").write_bytes(b"old")
    saver.retry.failed(2)
    saver.after_step(3, 1)
    assert saver.saved_step is None and saver.retry.step == 3 and len(list(tmp_path.iterdir())) == 1
    (path, then), = later
    path.write_bytes(b"new")
    then()
    assert saver.saved_step == (3, path) and saver.retry.step is None and list(tmp_path.iterdir()) == [path]


def test_the_pause_between_tries_doubles_up_to_a_limit():
    retry = Retry()
    assert retry.step is None
    assert [retry.failed(step) - step for step in range(100, 109)] == [1, 2, 4, 8, 16, 32, 64, 64, LONGEST_PAUSE]
    retry.clear()
    assert retry.step is None and retry.failed(7) == 8


def test_what_may_pass_and_what_is_a_full_disk():
    full = UserError("no space left on the disk")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    forbidden = UserError("cannot write")
    forbidden.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    cases = [(full, True, True), (NoRoom("too little"), True, True), (forbidden, False, True), (Damaged("bad"), False, True),
             (OSError(errno.EIO, "Input/output error"), False, True), (UserError("beyond F16"), False, False)]
    assert [(is_full(error), may_pass(error)) for error, _, _ in cases] == [case[1:] for case in cases]


# --- folders and other files ----------------------------------------------------------------------------------------------


class Folders(Folder):
    """Saves diffusers folders."""

    def write(self, path, info, then, at_once=False):
        path.mkdir()
        (path / "model_index.json").write_text("{}")
        self.written.append((path.name, info["step"], info["epoch"]))
        then()


def test_ckpt_files_have_names_of_their_own(tmp_path):
    (tmp_path / "m-step00000001.safetensors").write_bytes(b"of another run")
    left = Folder(tmp_path, every_n_steps=2, last_n_steps=2, suffix=".ckpt").run(6, 6)
    assert left == ["m-step00000001.safetensors", "m-step00000004.ckpt", "m-step00000006.ckpt", "m.ckpt"]


def test_retention_removes_folders_of_models_and_no_others(tmp_path):
    (tmp_path / "m-step00000001").mkdir()
    (tmp_path / "m-step00000001" / "holiday.jpg").write_bytes(b"")
    (tmp_path / "m-000001").write_bytes(b"a file")
    left = Folders(tmp_path, every_n_steps=2, last_n_steps=2, suffix="").run(6, 6)
    assert left == ["m", "m-000001", "m-step00000001", "m-step00000004", "m-step00000006"]


def test_a_folder_with_a_protected_file_stays(tmp_path):
    start = tmp_path / "m-step00000001" / "unet" / "weights.safetensors"
    start.parent.mkdir(parents=True)
    (tmp_path / "m-step00000001" / "model_index.json").write_text("{}")
    start.write_bytes(b"the model this run started from")
    Folders(tmp_path, every_n_steps=2, last_n_steps=2, suffix="", protected=[start]).run(6, 6)
    assert start.is_file() and not (tmp_path / "m-step00000002").exists()


def test_files_in_a_folder_that_would_be_replaced_are_endangered(tmp_path):
    inputs = [tmp_path / name for name in ("m/unet/a.safetensors", "m-000002/vae/b.safetensors", "m2/c.safetensors", "m.safetensors")]
    assert endangered(tmp_path, "m", inputs, suffix="") == sorted(inputs[:2])
    assert endangered(tmp_path, "m", inputs) == inputs[3:]
