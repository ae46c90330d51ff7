"""From a command line to an exit status: the only place that turns errors into words and codes.

Exit status: 0 done, 75 (``interrupt.STOPPED_STATUS``) stopped by a signal with everything saved, so that it can go on, 2 a
mistake the user can mend (one line each on stderr, no stack trace), 130 stopped at once by Ctrl-C: before training, or the
second one. Anything else is a defect of ours and keeps its trace.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from library.config.check import check
from library.config.parse import Entry, OutputWritten, parse
from library.errors import UserError
from library.out_of_memory import told


def main(entry: Entry, argv: Sequence[str]) -> int:
    """Parse, check and run one training script. Returns the exit status."""
    for library in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(library, "error")  # read when they are imported: their advice is not for users of a script
    try:
        config = parse(entry, argv)
        check(config)
        from library.run import run  # heavy imports (torch, diffusers) start here, after every refusal that needs none

        return run(entry, config)
    except OutputWritten as written:
        print(written)
    except UserError as error:
        _report(error.problems, of_one_process=error.of_one_process)
        return 2
    except KeyboardInterrupt:
        _report(["stopped by Ctrl-C; files that were complete are untouched, nothing is half-written"])
        return 130
    except Exception as error:
        lines = _known_failure(error)
        if lines is None:
            raise
        _report(lines)
        return 2
    return 0


def _report(problems: Sequence[str], of_one_process: bool = False) -> None:
    """One line per problem, from the first process only: eight ranks would say it eight times."""
    if os.environ.get("RANK", "0") != "0" and not of_one_process:
        return
    sys.stdout.flush()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > 1:
        print(f"error: {len(problems)} problems, nothing was trained", file=sys.stderr)


def _known_failure(error: Exception) -> list[str] | None:
    """Failures of the machine that have a remedy on the command line."""
    memory = told(error)
    if memory is not None:
        return [str(memory)]
    peer_is_gone = isinstance(error, RuntimeError) and "Connection closed by peer" in str(error)
    if peer_is_gone or type(error).__name__ == "DistBackendError":
        return ["another process of this run has ended; its own message tells why"]
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return ["no space left on the disk; free some space, or write to another disk (--output_dir, --logging_dir, --cache_dir)"]
    if isinstance(error, OSError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        return [f"{path}: {error.strerror or error}; check the path, its permissions and the free space"]
    return None
