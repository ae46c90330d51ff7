"""A headless Chromium, where there is one: on PATH, or named by $KILN_CHROMIUM."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def chromium() -> str:
    """The command; skips the test where there is none."""
    found = os.environ.get("KILN_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: install one, or name it with $KILN_CHROMIUM")
    return found


def open_page(page: Path, work: Path, *more: str) -> tuple[str, str]:
    """(the page's elements as the browser understood them, what it logged)."""
    done = subprocess.run(
        [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         f"--user-data-dir={work / 'browser'}", "--enable-logging=stderr", *more, "--dump-dom", page.as_uri()],
        capture_output=True, timeout=120, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
