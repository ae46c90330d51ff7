"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from library.log import log

# The same examples on every machine and run, and no limits of time: CI is slow and shared.
settings.register_profile("kiln", derandomize=True, deadline=None, max_examples=50, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("kiln")


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """A run inside this process sets up the log; the next test finds it as it was."""
    handlers, propagate, level = list(log.handlers), log.propagate, log.level
    yield
    log.handlers[:] = handlers
    log.propagate = propagate
    log.setLevel(level)
