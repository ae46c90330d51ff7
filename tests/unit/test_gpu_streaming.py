"""The GPU benchmark of block streaming runs on a CPU with tiny models, its check of equality included."""

from benchmarks.gpu_streaming import main
from benchmarks.streaming_models import MODELS


def test_dry_run(capsys):
    main(["--toy", "--shares", "0", "1", "--batches", "1", "--steps", "1", "--seconds", "120"])
    out = capsys.readouterr().out
    assert out.count("equal bit for bit") == 4 and "out of memory" not in out and "no time left" not in out
    for model in MODELS:
        rows = [line for line in out.splitlines() if line.startswith(f"{model.name} ")]
        assert [row.removeprefix(model.name).split()[0] for row in rows] == ["0%", "100%"]
        assert all(float(row.split()[-1]) > 0 for row in rows[1:])


def test_dry_run_with_streamed_states(capsys):
    main(["--toy", "--models", "FLUX", "--shares", "1", "--batches", "2", "--steps", "1", "--optimizer", "AdamW8bit", "--states"])
    assert "states streamed" in capsys.readouterr().out
