from library.optim.records import RECORDS
from tools import optimizers_page


def test_optimizers_page_is_current():
    assert optimizers_page.PAGE.read_text(encoding="utf-8") == optimizers_page.page(), "run: python tools/optimizers_page.py"


def test_every_optimizer_has_one_row():
    rows = [line for line in optimizers_page.page().splitlines() if line.startswith("| `")]
    assert all(sum(row.startswith(f"| `{record.name}`") for row in rows) == 1 for record in RECORDS)
