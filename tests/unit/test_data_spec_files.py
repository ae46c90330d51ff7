"""JSON dataset files, and the sources that are named on the command line: class folders, metadata files, Python classes."""

import json
from pathlib import Path

import pytest

import library.data.spec
from library.config.data_options import CachingOptions, DatasetOptions
from library.data.spec import load
from library.data.spec_file import load_json
from library.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def notes(monkeypatch):
    found = []
    monkeypatch.setattr(library.data.spec.log, "info", found.append)
    return found


def read(**given):
    return load(DatasetOptions(**given), CachingOptions(), 16)


def mistakes(**given):
    with pytest.raises(UserError) as caught:
        read(**given)
    return caught.value.problems


def folders(*names):
    for name in names:
        Path(name).mkdir(parents=True)


def dataset_json(text):
    Path("data.json").write_text(text, encoding="utf-8")
    return Path("data.json")


JSON = """{
  "general": {"caption_extension": ".cap", "flip_aug": true},
  "datasets": [
    {"resolution": [128, 64], "validation_split": 0,
     "subsets": [
       {"image_dir": "one",
        "num_repeats": 3},
       {"image_dir": "t\\u0077o"}]}
  ]
}
"""


def test_json_is_read_as_toml_is():
    folders("one", "two")
    spec, = read(dataset_config=dataset_json(JSON))
    assert spec.resolution == (128, 64) and [subset.image_dir.name for subset in spec.subsets] == ["one", "two"]
    assert [subset.place for subset in spec.subsets] == ["data.json:6", "data.json:8"]
    assert spec.subsets[0].num_repeats == 3 and spec.subsets[1].augment.flip
    Path("data.json").write_bytes(b"\xef\xbb\xbf" + JSON.encode().replace(b"\n", b"\r\n"))
    assert read(dataset_config=Path("data.json")) == (spec,)


def test_mistakes_in_json_have_their_line():
    folders("one")
    found = mistakes(dataset_config=dataset_json(JSON.replace("flip_aug", "flip_augg").replace("3}", '"3"}')))
    assert found[0] == "data.json:2: flip_augg: unknown key; did you mean 'flip_aug'?"
    assert found[1].startswith("data.json:7: num_repeats: '3' is not a whole number")
    assert found[2].startswith("data.json:8: image_dir: no such folder: two")


@pytest.mark.parametrize("text, expected", [
    ('{"datasets": [],}', "data.json:1: not valid JSON: .*; remove the comma before the closing bracket"),
    ('{"datasets": [\n{"resolution": 64},\n]}', "data.json:[23]: not valid JSON: .*; remove the comma before the closing"),
    ('{"datasets": [] // a\n}', "JSON has no comments"),
    ("{'datasets': []}", 'write "double quotes"'),
    ('{"datasets": [{"enable_bucket": True}]}', "write true, false and null in small letters"),
    ('{"image_dir": "C:\\data"}', "write Windows paths with / or with two"),
    ('{"datasets": [{} {}]}', "a comma or a bracket is missing"),
    ("", "data.json:1: not valid JSON"),
    ('{"general": {"flip_aug": true,\n"flip_aug": false}}', "data.json:2: flip_aug: this key stands twice"),
    ("[]", "this is a list, not a dataset file"),
    ('{"a.png": {"caption": "x"}, "b.png": {"tags": "y"}}', "this is a list of pictures and captions.*--in_json"),
    ('{"datasets": {}}', "data.json:1: datasets: this should be one or more tables"),
    ("{}", "data.json: there is no"),
    ("[" * 100000, "nested too deeply"),
    ('{"datasets": ' + "9" * 5000 + "}", "numbers too long"),
    ('{"datasets": [{"resolution": NaN, "subsets": [{"image_dir": "."}]}]}', "resolution: nan is not a size"),
])
def test_malformed_json(text, expected):
    with pytest.raises(UserError, match=expected):
        read(dataset_config=dataset_json(text))


def test_files_that_are_no_dataset_files():
    folders("folder.json")
    Path("latin.json").write_bytes(b'{"a": "\xe9"}')
    assert "no such file" in mistakes(dataset_config=Path("none.json"))[0]
    assert "no such file" in mistakes(dataset_config=Path("none.toml"))[0]
    assert "this is a folder, not a JSON file" in mistakes(dataset_config=Path("folder.json"))[0]
    assert "not a UTF-8 text file" in mistakes(dataset_config=Path("latin.json"))[0]
    assert "give it to --in_json" in mistakes(dataset_config=Path("list.jsonl"))[0]


def test_lines_of_json_with_everything_in_it(folder):
    value = {"a": [1, {"b": "x, {\"y\": []}"}, [[], {}], None], "c": {"d e": -1.5e3, "": True}, "f": []}
    text = json.dumps(value, indent=1)
    path = dataset_json(text)
    values, where = load_json(path)
    assert values == value
    for steps, word in ((("a",), '"a"'), (("a", 1, "b"), '"b"'), (("c", "d e"), '"d e"'), (("c", ""), '"":'), (("f",), '"f"')):
        assert word in text.splitlines()[where.line(*steps) - 1]


def test_class_folders(notes):
    folders("train/10_a cat", "train/3_dog_big", "train/2_", "train/.hidden", "train/0_off", "train/misc", "train/1.5_x")
    folders("reg/1_cat")
    Path("train/loose.PNG").write_bytes(b"")
    Path("train/readme.txt").write_text("")
    spec, = read(train_data_dir=Path("train"), reg_data_dir=Path("reg"), resolution="64", dataset_repeats=9, flip_aug=True)
    found = [(subset.image_dir.as_posix(), subset.num_repeats, subset.class_tokens, subset.is_reg) for subset in spec.subsets]
    assert found == [("train/10_a cat", 10, "a cat", False), ("train/2_", 2, None, False),
                     ("train/3_dog_big", 3, "dog_big", False), ("reg/1_cat", 1, "cat", True)]
    assert all(subset.augment.flip and subset.mask == "none" for subset in spec.subsets)
    assert spec.subsets[0].place == f"--train_data_dir: {Path('train/10_a cat')}"
    assert notes == ["--train_data_dir: 1.5_x, misc in train does not begin with a number and _, so it is left out",
                     "--train_data_dir: 0_off in train has no repeats and is left out",
                     "--train_data_dir: pictures directly in train are left out (1); move them to a folder such as 1_words",
                     "--dataset_repeats: has no effect here: the names of the folders say how often"]


def test_class_folders_that_are_none():
    folders("flat", "empty", "10_cat/sub", "tree/cat", "tree/0_dog", "many/1_a", "reg/x")
    folders("huge/99999999999999_a", "big/1000001_a")
    Path("flat/a.jpg").write_bytes(b"")
    Path("10_cat/a.jpg").write_bytes(b"")
    line, = mistakes(train_data_dir=Path("flat"), resolution="64")
    assert "no folder in flat is named" in line and "pictures directly in it: 1" in line and "such as 10_a cat" in line
    assert mistakes(train_data_dir=Path("10_cat"), resolution="64")[0].endswith(f"name the folder around it: {Path.cwd()}")
    assert "it is empty" in mistakes(train_data_dir=Path("empty"), resolution="64")[0]
    line, = mistakes(train_data_dir=Path("tree"), resolution="64")
    assert "(folders: 0_dog, cat)" in line and line.endswith("0 leaves a folder out: rename 0_dog to 1_dog")
    line, = mistakes(train_data_dir=Path("many"), reg_data_dir=Path("reg"), resolution="64")
    assert line.startswith("--reg_data_dir: no folder in reg is named")
    for name in ("huge", "big"):
        assert "asks for more than 1000000 repeats" in mistakes(train_data_dir=Path(name), resolution="64")[0]
    assert mistakes(train_data_dir=Path("nowhere"), resolution="64")[0].startswith("--train_data_dir: cannot be read: nowhere")
    assert mistakes(train_data_dir=Path("many")) == ("--train_data_dir: this dataset has no resolution; add --resolution 1024",)


def test_masks_of_class_folders(notes):
    folders("train/1_a", "train/1_b", "reg/1_a", "masks/1_a")
    given = dict(train_data_dir=Path("train"), reg_data_dir=Path("reg"), conditioning_data_dir=Path("masks"), resolution="64")
    spec, = read(**given, masked_loss=True)
    assert [(subset.mask, subset.mask_dir) for subset in spec.subsets] == [
        ("files", Path("masks/1_a")), ("files", Path("masks")), ("none", None)]
    assert notes == []


def test_metadata_file(notes):
    folders("pictures")
    Path("meta.jsonl").write_text("")
    spec, = read(in_json=Path("meta.jsonl"), train_data_dir=Path("pictures"), resolution="64", dataset_repeats=2,
                 caption_separator="; ")
    subset, = spec.subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == (Path("meta.jsonl"), Path("pictures"), 2)
    assert subset.captions.separator == "; " and subset.place == "--in_json" and notes == []
    spec, = read(in_json=Path("meta.jsonl"), resolution="64", recursive=True)
    assert spec.subsets[0].image_dir is None and notes == ["--recursive: has no effect: the pictures come from a list"]
    assert "neither .json nor .jsonl" in mistakes(in_json=Path("data.toml"), resolution="64")[0]
    assert mistakes(in_json=Path("meta.json"), resolution="64")[0].startswith("--in_json: no such file: meta.json")


def test_metadata_file_of_a_subset():
    folders("pictures")
    Path("meta.json").write_text("{}")
    Path("data.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'meta.json'\n"
                                 "[[datasets.subsets]]\nimage_dir = 'pictures'\n")
    first, second = read(dataset_config=Path("data.toml"))[0].subsets
    assert first.metadata_file == Path("meta.json") and first.image_dir is None and second.metadata_file is None
    with Path("data.toml").open("a") as file:
        file.write("[[datasets.subsets]]\nmetadata_file = './meta.json'\nimage_dir = 'pictures'\n"
                   "[[datasets.subsets]]\nmetadata_file = 'meta.json'\nis_reg = true\n")
    found = mistakes(dataset_config=Path("data.toml"))
    assert found == ("data.toml:12: is_reg: regularisation pictures cannot come from a metadata file; put them into a folder and "
                     "name it as image_dir",
                     "data.toml:8: metadata_file: this file stands in the dataset twice, first at data.toml:3; remove one of "
                     "them and set num_repeats on the other")


def test_class_of_the_user():
    spec, = read(dataset_class="my.pictures.Birds", resolution="64", enable_bucket=True, train_batch_size=3, masked_loss=True)
    subset, = spec.subsets
    assert (subset.source, subset.image_dir, subset.metadata_file) == ("my.pictures.Birds", None, None)
    assert spec.enable_bucket and spec.batch_size == 3 and subset.place == "--dataset_class"


def test_the_dataset_file_wins_over_the_others(notes):
    folders("one")
    Path("data.toml").write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'one'\n")
    spec, = read(dataset_config=Path("data.toml"), train_data_dir=Path("nowhere"), in_json=Path("none.json"))
    assert spec.subsets[0].image_dir == Path("one")
    assert notes == ["--train_data_dir: has no effect beside --dataset_config, as in the dialect",
                     "--in_json: has no effect beside --dataset_config, as in the dialect"]


def test_no_source():
    assert mistakes() == ("--dataset_config: is required; add --dataset_config FILE, or --train_data_dir DIR",)
