"""Folders become items; whatever is wrong in them is gathered, named and counted."""

import os
from pathlib import Path

import pytest
from PIL import Image

from library.data import problems as kinds
from library.errors import UserError
from tests.unit.data_helpers import dataset_file, one_folder, picture, scan_file, scan_folder


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
    assert {item.repeats for item in items} == {3} and items[0].subset.place.endswith("dataset.toml:7")


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
    items = scan_file(dataset_file(tmp_path, block * 2)).items
    assert [item.sample_id for item in items] == ["0.0/a.png", "0.1/a.png", "1.0/a.png", "1.1/a.png"]
    assert [item.subset.dataset for item in items] == [0, 0, 1, 1]


def caption_of(folder, more="", subset="", **files):
    for name, content in files.items():
        (folder / f"a.{name}").write_bytes(content)
    return one_folder(folder, more=more, subset=subset)[0].caption


def test_captions(folder):
    picture(folder / "a.png", caption=None)
    assert caption_of(folder, more="class_tokens = 'a dog'") == "a dog"
    assert caption_of(folder, caption=b"from .caption") == "from .caption"
    assert caption_of(folder, txt="\ufeff  caf\u00e9 \r\n".encode()) == "caf\u00e9"
    assert caption_of(folder, txt=b"\n\n first\r\n \n\tsecond\n") == "first\nsecond"
    assert caption_of(folder, more="class_tokens = 'a dog'") == "first\nsecond"
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


def test_captions_with_another_ending_are_named(folder):
    picture(folder / "a.png", caption=None).with_suffix(".json").write_text("{}")
    line, = problems(folder)
    assert 'there is a.json: set caption_extension = ".json" at' in line and "class_tokens or" not in line
    (folder / "a.json").rename(folder / "a.png.txt").write_text("a cat", encoding="utf-8")
    line, = problems(folder)  # as some tools name them
    assert 'there is a.png.txt: set caption_extension = ".png.txt" at' in line
    assert one_folder(folder, subset='caption_extension = ".png.txt"')[0].caption == "a cat"


def test_many_mistakes_are_counted_by_kind(folder):
    for index in range(8):
        picture(folder / f"{index}.png", caption=None)
    (folder / "zero.png").write_bytes(b"")
    lines = problems(folder)
    assert sum("no caption" in line for line in lines) == 5
    assert any(line.startswith("3 more: pictures without a caption") for line in lines)
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
    assert "own [[datasets.subsets]]" in line and "recursive = true" in line


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    picture(folder / "a.png")
    picture(folder / "closed" / "b.png")
    real = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    line, = problems(folder, subset="recursive = true")
    assert "closed" in line and "Permission denied" in line


def test_subfolders(folder):
    for name in ("b.png", "x/a.png", "x/y/a.png", ".hidden/a.png", "x/.kiln_cache/a.png"):
        picture(folder / name, caption=f"caption of {name}")
    items = one_folder(folder, subset="recursive = true")
    assert [item.sample_id for item in items] == ["0.0/b.png", "0.0/x/a.png", "0.0/x/y/a.png"]
    assert [item.caption for item in items] == ["caption of b.png", "caption of x/a.png", "caption of x/y/a.png"]
    assert items[2].path == folder / "x" / "y" / "a.png"
    assert [item.sample_id for item in one_folder(folder)] == ["0.0/b.png"]


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links_between_folders(folder, tmp_path):
    picture(folder / "z" / "a.png")
    picture(tmp_path / "elsewhere" / "c.png")
    (folder / "b").symlink_to(folder / "z", target_is_directory=True)
    (folder / "z" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "outside").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    items = one_folder(folder, subset="recursive = true")
    assert [item.sample_id for item in items] == ["0.0/outside/c.png", "0.0/z/a.png"]


def test_caption_suffixes_in_order(folder):
    picture(folder / "a.png", caption=None)
    given = "caption_extension = ['.words', '_tags.txt', '.json']"
    assert caption_of(folder, subset=given, json=b'{"caption": "a cat", "tags": ["grey", "old"]}') == "a cat,grey, old"
    assert caption_of(folder, subset=given + "\ncaption_separator = ';'", json=b'{"tags": "one; two"}') == "one; two"
    (folder / "a_tags.txt").write_text("tags")
    assert caption_of(folder, subset=given) == "tags"
    assert caption_of(folder, subset=given, words=b"words") == "words"


@pytest.mark.parametrize("content, words", [
    (b"{", "not JSON"), (b"[]", "not a JSON object"), (b'{"caption": 3}', "its caption is not a text"), (b"{}", "empty"),
    (b'{"tags": [1]}', "its tags is not a text")])
def test_bad_sidecar_json(folder, content, words):
    picture(folder / "a.png", caption=None).with_suffix(".json").write_bytes(content)
    line, = problems(folder, subset="caption_extension = '.json'")
    assert str(folder / "a.json") in line and words in line


def test_captions_of_pictures_with_a_face_in_their_name(folder):
    picture(folder / "x_320_210_90_120.png", caption=None)
    (folder / "x.txt").write_text("of the plain name")
    assert one_folder(folder)[0].caption == "of the plain name"
    (folder / "x_320_210_90_120.caption").write_text("its own")
    assert one_folder(folder)[0].caption == "its own"


def test_a_caption_file_of_a_gigabyte_is_none(folder):
    picture(folder / "a.png", caption=None)
    with open(folder / "a.txt", "wb") as file:
        file.truncate(1 << 30)
    line, = problems(folder)
    assert "no caption" in line and str(1 << 30) in line


def test_captions_of_several_lines_are_noted_once(folder):
    for name in "abc":
        picture(folder / f"{name}.png", caption=f"{name}\nsecond" if name != "a" else "one")
    found = scan_folder(folder)
    found.raise_errors()
    problem, = found.problems
    assert (problem.kind, problem.severity, problem.count, problem.path) == (kinds.MORE_LINES, "warning", 2, folder / "b.png")
    assert "2 captions" in str(problem.error)
    assert not scan_folder(folder, subset="enable_wildcard = true").problems


def test_problems_are_kept_with_the_items(folder):
    for index in range(3):
        picture(folder / f"{index}.png", caption=None if index == 1 else "words")
    (folder / "2.png").write_bytes(b"")
    found = scan_folder(folder)
    assert [(item.sample_id, item.caption) for item in found.items] == [("0.0/0.png", "words"), ("0.0/1.png", "")]
    assert [(problem.kind, problem.path) for problem in found.problems] == [
        (kinds.NO_CAPTION, folder / "1.png"), (kinds.UNREADABLE, folder / "2.png")]


def test_a_thousand_problems_are_few_objects(folder):
    folder.mkdir()
    for index in range(700):
        (folder / f"{index:03d}.png").write_bytes(b"")
    found = scan_folder(folder)
    assert len(found.problems) == kinds.KEPT_PER_KIND and sum(problem.count for problem in found.problems) == 700
    assert "695 more: pictures that cannot be read" in problems(folder)


def test_formats_that_this_pillow_lacks(folder, monkeypatch):
    from library.data import listing

    picture(folder / "a.png")
    (folder / "b.jxl").write_bytes(b"x")
    monkeypatch.setattr(listing, "readable_suffixes", lambda: frozenset({".png"}))
    found = scan_folder(folder)
    assert len(found.items) == 1 and found.problems[0].kind == kinds.FORMAT and "b.jxl" in str(found.problems[0].error)


def test_pictures_of_a_telephone_are_not_passed_over(folder):
    picture(folder / "a.png")
    (folder / "IMG_0001.HEIC").write_bytes(b"x")
    (problem,) = scan_folder(folder).problems
    assert problem.kind == kinds.FORMAT and problem.severity == "warning" and "IMG_0001.HEIC" in str(problem.error)


def test_masks_by_stem(folder, tmp_path):
    for name in ("a.png", "b.jpg", "sub/a.png"):
        picture(folder / name)
        picture((tmp_path / "masks" / name).with_suffix(".webp"), caption=None)
    given = f"conditioning_data_dir = '{(tmp_path / 'masks').as_posix()}'\nrecursive = true"
    items = masked(folder, given).items
    assert [item.mask for item in items] == [tmp_path / "masks" / name for name in ("a.webp", "b.webp", "sub/a.webp")]
    (tmp_path / "masks" / "b.webp").rename(tmp_path / "masks" / "c.webp")
    found = masked(folder, given)
    assert [(problem.kind, problem.path) for problem in found.problems] == [
        (kinds.NO_MASK, folder / "b.jpg"), (kinds.SPARE_MASK, tmp_path / "masks" / "c.webp")]
    with pytest.raises(UserError, match="no mask for b.jpg.*b.png"):
        found.raise_errors()
    picture(tmp_path / "masks" / "a.png", caption=None)
    assert "a.png and a.webp" in str(masked(folder, given).problems[0].error)


def test_masks_inside_the_folder_are_not_pictures(folder):
    picture(folder / "a.png")
    picture(folder / "masks" / "a.png", caption=None)
    found = masked(folder, f"conditioning_data_dir = '{(folder / 'masks').as_posix()}'\nrecursive = true")
    assert not found.problems and [item.sample_id for item in found.items] == ["0.0/a.png"]


def masked(folder, subset):
    from library.config.data_options import CachingOptions
    from library.data.scan import scan
    from library.data.spec import load
    from tests.unit.data_helpers import options

    path = dataset_file(folder.parent, f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
                                       f"image_dir = '{folder.as_posix()}'\n{subset}\n")
    return scan(load(options(dataset_config=path, masked_loss=True), CachingOptions(), 16))


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_broken_link(folder):
    picture(folder / "a.png")
    (folder / "b.png").symlink_to(folder / "nowhere.png")
    line, = problems(folder)
    assert str(folder / "b.png") in line and "gone" in line


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_a_link_to_itself_spoils_nothing_else(folder):
    picture(folder / "a.png")
    (folder / "b.png").symlink_to(folder / "b.png")
    line, = problems(folder)
    assert str(folder / "b.png") in line and "symbolic links" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(folder):
    picture(folder / "a.png")
    os.mkfifo(folder / "b.png")
    (folder / "b.txt").write_text("a pipe", encoding="utf-8")
    line, = problems(folder)
    assert str(folder / "b.png") in line and "not a file" in line


def test_scanning_needs_no_torch():
    import subprocess
    import sys
    code = "import library.data.spec, library.data.scan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
