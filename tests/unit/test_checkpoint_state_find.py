"""The newest whole state is found; nothing is removed before a newer one was read back."""

import logging
import os
from pathlib import Path

import pytest
import torch

from library.checkpoint import state_find
from library.checkpoint.state_find import find_state, found_states, next_serial, remove_states
from library.checkpoint.train_state import is_state, leftovers, open_state, save
from library.errors import UserError
from tests.unit.state_helpers import facts


def write(folder: Path, name: str, step: int, serial: int | None = None) -> Path:
    serial = next_serial(folder, "run") if serial is None else serial
    save(folder / name, facts(step, serial=serial), {"a": torch.full((4,), float(step))}, {})
    return folder / name


def damage(path: Path) -> None:
    file = path / "weights.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kiln"), "propagate", True)
    caplog.set_level(logging.INFO, "kiln")
    return caplog


def test_the_newest_is_the_one_written_last(tmp_path):
    """Not the one with the highest step (an older run of the same name may have gone further), and clocks do not matter."""
    old = write(tmp_path, "run-step00000100-state", 100)
    write(tmp_path, "run-000002-state", 20)
    newest = write(tmp_path, "run-step00000030-state", 30)
    write(tmp_path, "running-step00000900-state", 900, 99)  # of another run
    os.utime(old)
    assert [path.name for path in found_states(tmp_path, "run")] == [newest.name, "run-000002-state", old.name]
    assert find_state(tmp_path, "run", "latest").path == newest
    assert find_state(tmp_path, "run", str(old)).facts.step == 100


def test_broken_ones_are_passed_over_with_a_line_each(tmp_path, told):
    good = write(tmp_path, "run-step00000001-state", 1)
    for step in (2, 3):
        damage(write(tmp_path, f"run-step0000000{step}-state", step))
    assert find_state(tmp_path, "run", "latest").path == good
    lines = [record.getMessage() for record in told.records]
    assert len(lines) == 2 and all("does not hold what was written" in line for line in lines)
    assert "step00000003" in lines[0] and "step00000002" in lines[1]
    damage(good)
    with pytest.raises(UserError, match="all 3 states of run are broken.*begin anew"):
        find_state(tmp_path, "run", "latest")
    with pytest.raises(UserError, match="broken: weights.safetensors .*--resume latest"):
        find_state(tmp_path, "run", good)


def test_no_state_yet(tmp_path, told):
    assert find_state(tmp_path, "run", "latest") is None and find_state(tmp_path / "none", "run", "latest") is None
    assert "the training starts at its beginning" in told.text


def test_a_folder_of_states(tmp_path):
    write(tmp_path, "run-state", 1)
    with pytest.raises(UserError, match=r"folder of states, and one of them is wanted \(run-state\)"):
        find_state(tmp_path, "run", tmp_path)


def test_a_run_killed_while_it_replaced_a_state(tmp_path):
    """Between the two renames the only whole state lies aside; it is found, and cleared away when the next one stands."""
    path = write(tmp_path, "run-state", 5)
    aside = tmp_path / ".run-state.abc.previous"
    aside.mkdir()
    path.rename(aside / path.name)
    assert leftovers(path) == [aside / path.name]
    assert find_state(tmp_path, "run", "latest").facts.step == 5
    assert next_serial(tmp_path, "run") == 2
    write(tmp_path, "run-state", 6)
    assert find_state(tmp_path, "run", "latest").facts.step == 6 and not aside.exists()


def test_old_ones_go_once_the_new_one_was_read(tmp_path):
    paths = [write(tmp_path, f"run-step0000000{step}-state", step) for step in range(4)]
    assert remove_states(paths, paths[3]) == paths[:3]
    assert [path.name for path in tmp_path.iterdir()] == [paths[3].name]


def test_nothing_goes_while_the_new_one_is_broken(tmp_path, told):
    paths = [write(tmp_path, f"run-step0000000{step}-state", step) for step in range(3)]
    damage(paths[2])
    assert remove_states(paths[:2], paths[2]) == [] and all(map(is_state, paths))
    assert "older states are kept" in told.text
    assert find_state(tmp_path, "run", "latest").path == paths[1]


def test_only_states_go(tmp_path):
    new = write(tmp_path, "run-step00000009-state", 9)
    other = tmp_path / "run-step00000001-state"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    link = tmp_path / "run-step00000002-state"
    elsewhere = write(tmp_path / "elsewhere", "x-state", 2)
    try:
        link.symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pass  # Windows without the right to make links
    assert remove_states([other, link, new], new) == [] and is_state(elsewhere) and (other / "thesis.tex").exists()


def test_a_state_that_cannot_be_moved_is_kept_whole(tmp_path, told, monkeypatch):
    paths = [write(tmp_path, f"run-step0000000{step}-state", step) for step in range(2)]

    def refuse(self, target):
        raise PermissionError(13, "in use")
    monkeypatch.setattr(Path, "rename", refuse)
    assert remove_states(paths[:1], paths[1]) == []
    assert "could not be removed: in use" in told.text and open_state(paths[0]).facts.step == 0
    assert not list(tmp_path.glob(".*"))


def test_a_kill_while_files_go_leaves_no_half_state(tmp_path, monkeypatch):
    paths = [write(tmp_path, f"run-step0000000{step}-state", step) for step in range(2)]

    def killed(path, **_more):
        (next(path.iterdir()) / "weights.safetensors").unlink()
        raise KeyboardInterrupt
    monkeypatch.setattr(state_find.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_states(paths[:1], paths[1])
    assert found_states(tmp_path, "run") == [paths[1]]
