"""Pictures listed in metadata files and by Python classes."""

import json
import os
import sys

import pytest

from library.data import problems as kinds
from library.data.scan import scan
from library.errors import UserError
from tests.unit.data_helpers import dataset_spec, make_older, picture, subset_spec


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pictures"


def listed(path, records, image_dir=None, **given):
    """The scan of a metadata file with these records."""
    text = json.dumps(records) if path.suffix == ".json" else "".join(f"{json.dumps(record)}\n" for record in records)
    path.write_text(text, encoding="utf-8")
    make_older(path)
    return scan([dataset_spec(subset_spec(image_dir, metadata_file=path, **given))])


def test_json(folder, tmp_path):
    for name in ("a.png", "b.png", "sub/c.jpg", "sub/d.jpg", "not listed.png"):
        picture(folder / name, (60, 40), caption="not used")
    found = listed(tmp_path / "meta.json", {
        str(folder / "b.png"): {"caption": "a bee", "tags": "one, two", "loss_weight": 0.5, "train_resolution": [1, 1]},
        "a": {"tags": "only, tags"},
        "sub/c.jpg": {"caption": "a cat"},
        "d": {"caption": "two\nlines", "tags": ["x", "y"]},
    }, folder)
    found.raise_errors()
    assert [(item.sample_id, item.path, item.caption, item.weight, item.size) for item in found.items] == [
        ("0.0/a.png", folder / "a.png", "only, tags", 1.0, (60, 40)),
        ("0.0/b.png", folder / "b.png", "a bee,one, two", 0.5, (60, 40)),
        ("0.0/sub/c.jpg", folder / "sub/c.jpg", "a cat", 1.0, (60, 40)),
        ("0.0/sub/d.jpg", folder / "sub/d.jpg", "two,x, y\nlines,x, y", 1.0, (60, 40))]
    assert {problem.kind for problem in found.problems} == {kinds.NOT_LISTED, kinds.MORE_LINES}
    assert "1 pictures" in str(found.problems[0].error) and "not listed.png" in str(found.problems[0].error)


def test_names_relative_to_where_the_program_was_started(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (folder / "a.png", folder / "sub" / "b.png", tmp_path / "other" / "c.png", tmp_path / "sub" / "b.png"):
        picture(path)
    found = listed(tmp_path / "meta.json", {name: {"caption": "x"} for name in ("pictures/a.png", "sub/b.png", "./other/c.png")}, folder)
    found.raise_errors()
    assert {item.path for item in found.items} == {folder / "a.png", folder / "sub" / "b.png", tmp_path / "other" / "c.png"}


def test_jsonl_beside_its_pictures(folder):
    for name in ("a.png", "b.png"):
        picture(folder / name, caption=None)
    found = listed(folder / "meta.jsonl", [{"file_name": "b.png", "caption": "bee"}, {"image_path": "a.png", "caption": "a"}])
    assert not found.problems
    assert [(item.path, item.caption) for item in found.items] == [(folder / "a.png", "a"), (folder / "b.png", "bee")]


def test_pictures_outside_the_folder(folder, tmp_path):
    other = picture(tmp_path / "other" / "x.png")
    picture(folder / "a.png")
    found = listed(folder / "meta.jsonl", [{"image": str(path), "caption": "x"} for path in (other, folder / "a.png")])
    assert not found.problems and {item.path for item in found.items} == {other, folder / "a.png"}


@pytest.mark.parametrize("record, words", [
    ({"caption": "no picture"}, ["names no picture"]), ([1], ["the record is not an object"]), ({"image": "a.png"}, ["a.png has no caption"]),
    ({"image": "a.png", "caption": 3}, ["caption is not a text"]), ({"image": "a.png", "tags": {}}, ["tags is not a text"]),
    ({"image": "a.png", "caption": "a", "loss_weight": "heavy"}, ["loss_weight is heavy"]),
    ({"image": "a.png", "caption": "a", "loss_weight": float("nan")}, ["loss_weight is nan"]),
    ({"image": "b.png", "caption": "b"}, ["twice", "meta.jsonl:1"]),
    ({"image": "none.png", "caption": "b"}, ["no such picture, but", "meta.jsonl lists it"]),
    ({"image": "none", "caption": "b"}, ["no picture named none in"]),
    ({"image": "same", "caption": "b"}, ["same.jpg or same.png"]), ({"image": "a\0.png", "caption": "b"}, ["names no picture"]),
    ({"image": "a.png", "caption": "half \ud800"}, ["characters that are none"]),
    ({"image": "a.png", "caption": "a", "mask": 3}, ["mask is not a path"]),
])
def test_bad_records(folder, record, words):
    for name in ("a.png", "b.png", "same.jpg", "same.png"):
        picture(folder / name, caption=None)
    found = listed(folder / "meta.jsonl", [{"image": "b.png", "caption": "b"}, record])
    with pytest.raises(UserError) as caught:
        found.raise_errors()
    line, = caught.value.problems
    assert all(word in line for word in words) and ("meta.jsonl:2" in line or "none.png" in line), line


@pytest.mark.parametrize("name, content, words", [
    ("meta.json", b"{", "not JSON"), ("meta.json", b"[]", "not an object of pictures"), ("meta.json", b"\xff\xfe{}", "not a UTF-8 text file; save it again"),
    ("meta.jsonl", b'{"image": "a.png", "caption": "a"}\n{"image"', r"jsonl:2: not JSON: [^;]*\(column 9\); mend that place"),
    ("meta.jsonl", b'{"image": "a.png", "caption": "caf\xe9"}', "not a UTF-8 text file"),
    ("meta.json", b'{"a.png":\n {"caption" "a"}}', r"json:2: not JSON: [^;]*\(column 13\);"),
    ("meta.json", b'{"a.png": "a cat"}', "json: a.png: the record is not an object: 'a cat'; write"),
    ("meta.json", b"{}", "no pictures in"),
    ("meta.jsonl", b"\n", "no pictures in"), ("meta.json", b"[" * 100_000, "not JSON"),
    ("meta.json", b'{"a.png": {"caption": "a", "tags": {}}}', "tags is not a text")])
def test_bad_files(folder, name, content, words):
    picture(folder / "a.png")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        scan([dataset_spec(subset_spec(folder, metadata_file=folder / name))]).raise_errors()
    with pytest.raises(UserError, match="cannot be read"):
        scan([dataset_spec(subset_spec(folder, metadata_file=folder / "none.json"))]).raise_errors()


def test_a_picture_that_stands_twice_in_one_object(folder):
    path = picture(folder / "a.png").parent / "m.json"
    path.write_text('{"a.png": {"caption": "one"}, "a.png": {"caption": "two"}}', encoding="utf-8")
    found = scan([dataset_spec(subset_spec(metadata_file=path))])
    assert ["listed twice" in str(problem.error) for problem in found.problems] == [True]


@pytest.mark.skipif(os.name == "nt", reason="there it is no question")
def test_names_written_on_windows(folder):
    picture(folder / "sub" / "a.png")
    picture(folder / "odd\\name.png")
    found = listed(folder / "m.jsonl", [{"image_path": name, "caption": "x"} for name in (".\\sub\\a.png", "odd\\name.png")])
    assert not found.problems and [str(item.path.relative_to(folder)) for item in found.items] == ["odd\\name.png", "sub/a.png"]


def test_class_tokens_stand_in(folder):
    picture(folder / "a.png")
    assert listed(folder / "meta.json", {"a.png": {}}, class_tokens="a dog").items[0].caption == "a dog"


def test_masks_beside_metadata(folder, tmp_path):
    picture(folder / "a.png")
    picture(tmp_path / "masks" / "a.png", caption=None)
    found = listed(folder / "meta.json", {"a": {"caption": "a"}}, mask="files", mask_dir=tmp_path / "masks")
    assert found.items[0].mask == tmp_path / "masks" / "a.png"


MODULE = """
import os
from pathlib import Path

class Pictures:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        assert index < 3
        folder = Path(os.environ["KILN_TEST_FOLDER"])
        values = {"image": folder / f"{index}.png", "caption": f"number {index}", "loss_weight": index}
        return values if index else values | {"mask": folder / "mask.png"}

class Broken(Pictures):
    def __getitem__(self, index):
        raise KeyError(index)

class Endless:
    pass
"""


@pytest.fixture
def module(folder, tmp_path, monkeypatch):
    for name in ("0.png", "1.png", "2.png", "mask.png"):
        picture(folder / name, caption=None)
    (tmp_path / "my_pictures.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KILN_TEST_FOLDER", str(folder))
    yield "my_pictures"
    sys.modules.pop("my_pictures", None)


def test_dataset_class(module, folder):
    found = scan([dataset_spec(subset_spec(source=f"{module}.Pictures"))])
    assert not found.problems
    assert [(item.path, item.caption, item.weight, item.mask) for item in found.items] == [
        (folder / "0.png", "number 0", 0.0, folder / "mask.png"), (folder / "1.png", "number 1", 1.0, None),
        (folder / "2.png", "number 2", 2.0, None)]


def test_relative_names_of_a_class_count_from_here(module, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("KILN_TEST_FOLDER", folder.name)
    found = scan([dataset_spec(subset_spec(source=f"{module}.Pictures"))])
    assert not found.problems and found.items[1].sample_id == f"0.0/{folder.name}/1.png"
    assert found.items[0].mask == folder / "mask.png" and os.path.samefile(found.items[1].path, folder / "1.png")


@pytest.mark.parametrize("name, words", [
    ("Endless", "has no len"), ("None", "AttributeError"), ("Broken", "KeyError: 0")])
def test_bad_classes(module, name, words):
    with pytest.raises(UserError) as caught:
        scan([dataset_spec(subset_spec(source=f"{module}.{name}"))]).raise_errors()
    assert words in str(caught.value)
    with pytest.raises(UserError, match="ModuleNotFoundError"):
        scan([dataset_spec(subset_spec(source="no.such.Thing"))]).raise_errors()
