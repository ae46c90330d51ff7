"""Threads and processes share the cores of a machine with the other processes of a launcher."""

import os

import pytest

from library.data import cores
from library.data.filling import thread_count


@pytest.mark.parametrize("environment, own", [({}, 12), ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "16"}, 3), ({"WORLD_SIZE": "2"}, 6),
                                              ({"LOCAL_WORLD_SIZE": "40"}, 1), ({"LOCAL_WORLD_SIZE": ""}, 12)])
def test_cores_are_shared_out(monkeypatch, environment, own):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores.own_cores() == own and thread_count() == max(2, min(8, own))
    monkeypatch.delattr(os, "sched_getaffinity")  # not every system has it
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores.own_cores() == own
