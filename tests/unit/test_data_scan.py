"""Folders become items; whatever is wrong in them is gathered, named and counted."""

import os
from pathlib import Path

import pytest
from PIL import Image

from library.data.scan import scan
from library.data.spec import load
from library.errors import UserError
from tests.unit.data_helpers import dataset_file, one_folder, options, picture


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pictures"


def problems(folder, **more):
    with pytest.raises(UserError) as caught:
        one_folder(folder, **more)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def test_items(folder):
    for name, size in (("b.JPG", (300, 200)), ("a.png", (64, 64)), ("Z.webp", (20, 90))):
        picture(folder / name, size, caption=f"caption of {name}\n")
    (folder / "notes.md").write_text("not a picture")
    (folder / "._a.png").write_bytes(b"resource fork")
    (folder / ".kiln_cache").mkdir()
    items = one_folder(folder, more="num_repeats = 3")
    assert [item.sample_id for item in items] == ["0.0/Z.webp", "0.0/a.png", "0.0/b.JPG"]
    assert [item.size for item in items] == [(20, 90), (64, 64), (300, 200)]
    assert [item.caption for item in items] == ["caption of Z.webp", "caption of a.png", "caption of b.JPG"]
    assert [item.placement.bucket for item in items] == [(32, 128), (64, 64), (80, 48)]
    assert {item.repeats for item in items} == {3} and items[0].place.endswith("dataset.toml:7")


def test_size_follows_the_exif_orientation(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "a.jpg", (96, 32), exif=exif)
    assert one_folder(folder)[0].size == (32, 96)


def test_sample_ids_differ_between_subsets_and_datasets(tmp_path):
    picture(tmp_path / "one" / "a.png")
    picture(tmp_path / "two" / "a.png")
    subset = "[[datasets.subsets]]\nimage_dir = '{}'\n"
    block = "[[datasets]]\nresolution = 64\n" + "".join(subset.format((tmp_path / name).as_posix()) for name in ("one", "two"))
    items = scan(load(dataset_file(tmp_path, block * 2), options(), 16))
    assert [item.sample_id for item in items] == ["0.0/a.png", "0.1/a.png", "1.0/a.png", "1.1/a.png"]
    assert [item.dataset for item in items] == [0, 0, 1, 1]


def caption_of(folder, more="", **files):
    for name, content in files.items():
        (folder / f"a.{name}").write_bytes(content)
    return one_folder(folder, more=more)[0].caption


def test_captions(folder):
    picture(folder / "a.png", caption=None)
    assert caption_of(folder, more="class_tokens = 'a dog'") == "a dog"
    assert caption_of(folder, caption=b"from .caption") == "from .caption"
    assert caption_of(folder, txt="\ufeff  caf\u00e9 \r\n".encode()) == "caf\u00e9"
    assert caption_of(folder, txt=b"\n\nfirst\nsecond\n") == "first"
    assert caption_of(folder, more="class_tokens = 'a dog'") == "first"
    assert caption_of(folder, more="caption_extension = '.caption'") == "from .caption"


@pytest.mark.parametrize("content, words", [
    ("a caf\u00e9".encode("utf-16"), ["UTF-16", "iconv -f UTF-16"]), ("cat".encode("utf-16-le"), ["UTF-16"]),
    ("line\na caf\u00e9".encode("latin-1"), [":2:", "not UTF-8 (byte 0xe9)", "iconv -f WINDOWS-1252"]),
    (b"", ["empty", "class_tokens"]), (b" \n\t\n", ["empty"]), ("\ufeff".encode(), ["empty"]),
])
def test_bad_captions(folder, content, words):
    picture(folder / "a.png", caption=None).with_suffix(".txt").write_bytes(content)
    line, = problems(folder)
    assert str(folder / "a.txt") in line and all(word in line for word in words), line


def test_no_caption(folder):
    picture(folder / "a.png", caption=None)
    line, = problems(folder)
    assert "a.png" in line and "a.txt or a.caption" in line and "class_tokens at" in line and "dataset.toml:7" in line


def test_many_mistakes_are_counted_by_kind(folder):
    for index in range(8):
        picture(folder / f"{index}.png", caption=None)
    (folder / "zero.png").write_bytes(b"")
    lines = problems(folder)
    assert sum("no caption" in line for line in lines) == 5 and any(line.startswith("3 more: captions") for line in lines)
    assert sum("0 bytes" in line for line in lines) == 1 and len(lines) == 7


@pytest.mark.parametrize("content, words", [
    (b"", "0 bytes"), (b"this is text", "not a picture"), (b"\x89PNG\r\n\x1a\n\0\0", "picture")])
def test_bad_pictures(folder, content, words):
    picture(folder / "a.png")
    (folder / "b.png").write_bytes(content)
    line, = problems(folder)
    assert line.startswith(str(folder / "b.png")) and words in line and "replace or remove" in line


def test_folders_without_pictures(folder):
    folder.mkdir()
    line, = problems(folder)
    assert "no pictures in" in line and ".jpg" in line and "dataset.toml:7" in line
    picture(folder / "inner" / "a.png")
    line, = problems(folder)
    assert "own [[datasets.subsets]]" in line


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_broken_link(folder):
    picture(folder / "a.png")
    (folder / "b.png").symlink_to(folder / "nowhere.png")
    line, = problems(folder)
    assert str(folder / "b.png") in line and "gone" in line


def test_scanning_needs_no_torch():
    import subprocess
    import sys
    code = "import library.data.spec, library.data.scan, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
