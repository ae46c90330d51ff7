"""Each adapter's arithmetic is known where the card's peak is: a run with a made-up peak reports its share."""

import pytest

from library import outputs
from tests.cli.runs import column
from tests.contract.conftest import CACHED, dataset_file, make_pictures


def test_the_share_of_the_peak(case, train, tmp_path, monkeypatch):
    if case.variant:
        pytest.skip("the architecture's first case shows it")
    monkeypatch.setattr(outputs, "peak_flops", lambda device, dtype: 1e12)
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 2))
    out = train(tmp_path / "out", data, *CACHED, "--max_train_steps", "2", "--gradient_checkpointing")
    shares = [float(share) for share in column(out, "mfu")]
    work = [share * float(seconds) for share, seconds in zip(shares, column(out, "seconds"), strict=True)]
    assert len(work) == 2 and work[0] > 1e-6 and work[1] == pytest.approx(work[0])  # 1e-6 of a tera: these models are tiny
