import errno

import pytest

from library import app
from library.errors import UserError, UserErrors


@pytest.fixture
def failing(monkeypatch):
    def arrange(error):
        def parse(_entry, _argv):
            raise error

        monkeypatch.setattr(app, "parse", parse)
        return app.main(None, [])

    return arrange


def test_user_errors_are_lines_on_stderr_and_status_2(failing, capsys):
    assert failing(UserErrors([UserError("one"), UserError("two", place="here", remedy="mend it")])) == 2
    assert capsys.readouterr().err.splitlines() == ["error: one", "error: here: two; mend it", "error: 2 problems, nothing was trained"]


def test_only_the_first_rank_speaks(failing, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert failing(UserError("one")) == 2
    assert capsys.readouterr().err == ""


def test_a_second_ctrl_c_is_130(failing, capsys):
    assert failing(KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_failure_of_the_machine_names_file_and_remedy(failing, capsys):
    assert failing(PermissionError(errno.EACCES, "Permission denied", "some/file")) == 2
    line = capsys.readouterr().err
    assert "file: Permission denied; check the path" in line and line.count("\n") == 1


def test_out_of_memory_names_the_flags_that_help(failing, capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    assert failing(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")) == 2
    line = capsys.readouterr().err
    assert "--gradient_checkpointing" in line and "more" not in line


def test_a_defect_of_ours_keeps_its_trace(failing):
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())
