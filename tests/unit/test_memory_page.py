"""The page about memory: what it says is refused is refused, and it is what the tool writes."""

import pytest

from flux_train import ENTRY
from library.config.check import check
from library.config.parse import parse
from library.errors import UserError
from library.optim import fitting
from tools import memory_page


@pytest.mark.parametrize("flags", [flags for flags, _ in memory_page.REFUSED])
def test_what_does_not_go_together(flags, tmp_path):
    for name in ("model.safetensors", "data.toml"):
        (tmp_path / name).write_text("")
    config = parse(ENTRY, ["--pretrained_model_name_or_path", str(tmp_path / "model.safetensors"), "--dataset_config",
                           str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / "out"), *flags.split()], {})
    with pytest.raises(UserError) as caught:
        check(config)
        fitting.require_fit(config)
    (line,) = caught.value.problems
    named = [word for word in flags.split() if word.startswith("--")]
    assert line.startswith(tuple(f"{flag}: " for flag in named)) and "; " in line  # the place, what is wrong; the remedy


def test_the_page_says_so():
    text = memory_page.PAGE.read_text(encoding="utf-8")
    for part in (memory_page.INTRO, "\n".join(memory_page.refused()), memory_page.NOT_COUNTED):
        assert part.strip() in text, "run: python tools/memory_page.py"
    assert all(f"### {title}: " in text for title, *_ in memory_page.MODELS)
