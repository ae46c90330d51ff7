"""The log is read as it grows, and cut back where a resumed run goes on."""

import csv

import numpy
import pytest

from library.report.rows import Rows, keep_rows

FIELDS = ("step", "loss", "validation_loss")


def write(path, rows, mode="w", fields=FIELDS):
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        if mode == "w":
            writer.writeheader()
        writer.writerows(dict(zip(fields, row)) for row in rows)


def test_only_what_is_new_is_read(tmp_path):
    path = tmp_path / "a_log.csv"
    rows = Rows(path)
    rows.read()
    assert len(rows) == 0 and rows.names == ()
    write(path, [(1, 0.5, ""), (2, "nan", 0.4)])
    rows.read()
    assert rows.names == FIELDS and len(rows) == 2
    with path.open("a", encoding="utf-8") as file:
        file.write("3,0.3,")  # the line is not finished
        file.flush()
        rows.read()
        assert len(rows) == 2
        file.write("0.2\r\n")
    rows.read()
    rows.read()
    assert rows.column("step").tolist() == [1, 2, 3]
    steps, losses = rows.points("loss")
    assert steps.tolist() == [1, 3] and losses.tolist() == [0.5, 0.3]
    assert [part.tolist() for part in rows.points("validation_loss")] == [[2, 3], [0.4, 0.2]]
    assert len(rows.column("other")) == 0 and rows.points("loss")[0].dtype == numpy.float64


@pytest.mark.parametrize("fields", [FIELDS, ("step", "loss", "mfu")])
def test_a_log_that_was_begun_anew(tmp_path, fields):
    path = tmp_path / "a_log.csv"
    rows = Rows(path)
    write(path, [(step, 0.5, "") for step in range(5)])
    rows.read()
    write(path, [(7, 0.25, "")], fields=fields)
    rows.read()
    assert rows.column("step").tolist() == [7] and rows.names == fields


def test_a_line_of_nonsense(tmp_path):
    path = tmp_path / "a_log.csv"
    path.write_bytes(b"step,loss\r\n1,0.5\r\n\xff\xfe,x,y\r\n\r\n2\r\n3,0.5\r\n")
    rows = Rows(path)
    rows.read()
    assert rows.points("loss")[0].tolist() == [1, 3]


def test_rows_after_the_state_go(tmp_path):
    path = tmp_path / "a_log.csv"
    write(path, [(step, step / 10, "") for step in range(1, 8)])
    with path.open("a", encoding="utf-8") as file:
        file.write("8,0.")  # killed while it wrote
    assert keep_rows(path, 4, ("step", "loss", "mfu")) == 4
    write(path, [(5, 0.9, 0.1)], "a", ("step", "loss", "mfu"))
    rows = Rows(path)
    rows.read()
    assert rows.names == ("step", "loss", "mfu") and rows.column("step").tolist() == [1, 2, 3, 4, 5]
    assert rows.column("loss").tolist() == [0.1, 0.2, 0.3, 0.4, 0.9]
    assert keep_rows(tmp_path / "new" / "log.csv", 4, FIELDS) == 0
    assert (tmp_path / "new" / "log.csv").read_text(encoding="utf-8") == "step,loss,validation_loss\n"


def test_a_step_that_stands_twice_counts_once(tmp_path):
    path = tmp_path / "a_log.csv"
    write(path, [(1, 0.1, ""), (2, 0.2, ""), (2, 0.3, ""), ("x", 1, "")])
    assert keep_rows(path, 10, FIELDS) == 2
    rows = Rows(path)
    rows.read()
    assert rows.column("loss").tolist() == [0.1, 0.3]
