"""When states are written, how they are called, and which ones stay."""

import pytest
import torch

from library.checkpoint.train_state import save
from library.config.schema import SavingOptions
from library.config.state_options import StateOptions
from library.errors import UserError
from library.state_saving import StateSaver
from tests.unit.state_helpers import facts


def run(folder, states: dict, saving: dict, steps=12, per_epoch=4, write=None):
    """The names of the states that stand after each step of a run."""
    def put(path, step, epoch, then, at_once=False):
        save(path, facts(step, epoch=epoch, serial=step), {"a": torch.zeros(2)}, {})
        then()
    saver = StateSaver(folder, "run", StateOptions(**states), SavingOptions(**saving), total_epochs=-(-steps // per_epoch),
                       write=write or put)
    for step in range(1, steps + 1):
        saver.after_step(step, -(-step // per_epoch))
        if step % per_epoch == 0:
            saver.after_epoch(step // per_epoch, step)
    return saver


def names(folder):
    return sorted(path.name.removeprefix("run").removesuffix("-state") for path in folder.iterdir())


@pytest.mark.parametrize("states, saving, expected", [
    ({}, {"save_every_n_steps": 2}, []),
    ({"save_state": True}, {}, [""]),
    ({"save_state_on_train_end": True}, {"save_every_n_steps": 2}, [""]),
    ({"save_state": True}, {"save_every_n_steps": 5}, ["", "-step00000005", "-step00000010"]),
    ({"save_state": True}, {"save_every_n_epochs": 1}, ["", "-000001", "-000002"]),
    ({"save_state": True}, {"save_n_epoch_ratio": 3}, ["", "-000001", "-000002"]),
    ({"save_state_every_n_steps": 5}, {}, ["-step00000005", "-step00000010"]),
    ({"save_state_every_n_steps": 5}, {"save_every_n_steps": 3}, ["-step00000005", "-step00000010"]),
    # a state exactly that many steps old stays, as with checkpoints
    ({"save_state_every_n_steps": 2, "save_last_n_steps_state": 4}, {}, ["-step00000008", "-step00000010", "-step00000012"]),
    ({"save_state_every_n_steps": 2}, {"save_last_n_steps": 2}, ["-step00000010", "-step00000012"]),
    ({"save_state": True, "save_last_n_steps_state": 6}, {"save_every_n_steps": 3, "save_last_n_steps": 3},
     ["", "-step00000006", "-step00000009", "-step00000012"]),
    ({"save_state": True, "save_last_n_epochs_state": 1}, {"save_every_n_epochs": 1}, ["", "-000002"]),
    ({"save_state": True}, {"save_every_n_epochs": 1, "save_last_n_epochs": 1}, ["", "-000002"]),
])
def test_what_stands_at_the_end(tmp_path, states, saving, expected):
    run(tmp_path, states, saving).final(12, 3)
    assert names(tmp_path) == expected


def test_a_failed_save_removes_nothing(tmp_path):
    def write(path, step, epoch, then, at_once=False):
        if step == 6:
            raise UserError("no space left on the disk")
        save(path, facts(step, serial=step), {"a": torch.zeros(2)}, {})
        then()
    with pytest.raises(UserError):
        run(tmp_path, {"save_state_every_n_steps": 2, "save_last_n_steps_state": 2}, {}, write=write)
    assert names(tmp_path) == ["-step00000002", "-step00000004"]


def test_a_stopped_run_leaves_a_state_whatever_the_settings(tmp_path):
    saver = run(tmp_path, {}, {})
    assert saver.emergency(0, 1) is None
    path = saver.emergency(7, 2)
    assert path.name == "run-step00000007-state" and saver.emergency(7, 2) == path and names(tmp_path) == ["-step00000007"]
