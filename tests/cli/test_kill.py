"""Runs killed with SIGKILL at any time: the newest state always loads, and the end is that of a run that nobody killed."""

import subprocess
import sys

import pytest

from tests.cli.conftest import ROOT, environment


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has torch loaded")
def test_fifty_kills_change_nothing():
    """The same program measures with processes of their own for each life, see docs/benchmarks.md."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_harness.py"), "--fork", "--kills", "50", "--steps", "24", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = done.stdout.splitlines()[-2]
    assert summary.startswith("50 kills")
    inside = int(summary.partition(" inside a save")[0].rpartition(" ")[2])
    assert inside >= 15, summary
