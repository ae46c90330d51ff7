"""--debug_dataset: writes the page of the data and exits, without reading a weight."""

import shutil

from tests.cli.conftest import run_script, with_flag
from tests.contract.conftest import dataset_file


def debug(base, *more):
    return run_script(*base, "--debug_dataset", *more)


def test_the_page_is_written_and_nothing_is_trained(base, files, tmp_path):
    done = debug(base)
    assert done.status == 0, done.text
    page = tmp_path / "out" / "last_dataset.html"
    text = page.read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last_dataset.html"]
    assert "picture number 0 of a blue box" in text and "T5 " in text and "CLIP " in text
    assert text.count("<article") == 4 and "an epoch is 2 steps" in text
    assert str(page) in done.text and "nothing was trained" in done.text and "an epoch is 2 steps" in done.text


def test_weights_are_not_read(base, files, tmp_path):
    """The encoders may be missing altogether, and of the transformer the header is enough."""
    folder = tmp_path / "model"
    shutil.copytree(files.folder, folder)
    for name in ("ae.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors"):
        (folder / name).unlink()
    done = debug(with_flag(base, "pretrained_model_name_or_path", folder / files.checkpoint.name))
    assert done.status == 0, done.text
    assert "T5 " in (tmp_path / "out" / "last_dataset.html").read_text(encoding="utf-8")


def test_mistakes_in_the_data_are_on_the_page(base, pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "picture1.txt").unlink()
    (folder / "picture2.png").write_bytes(b"nothing")
    done = debug(with_flag(base, "dataset_config", dataset_file(tmp_path / "other.toml", folder)), "--output_name", "mine")
    assert done.status == 0 and not done.errors, done.text
    text = (tmp_path / "out" / "mine_dataset.html").read_text(encoding="utf-8")
    assert "pictures that cannot be read: 1" in text and "pictures without a caption: 1" in text
    assert "picture2.png: " in done.text and "picture1.png: the picture has no caption" in done.text
