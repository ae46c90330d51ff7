"""The dataset file: inheritance, and every mistake as one line with file, line, key and remedy."""

import dataclasses
import json
from pathlib import Path

import pytest

import library.data.spec
from library.config.schema import DatasetOptions
from library.data.spec import load
from library.data.spec_keys import KEYS, UNBUILT
from library.errors import UserError
from tests.unit.data_helpers import dataset_file, options, picture

GOOD = """[general]
caption_extension = ".cap"
num_repeats = 2
[[datasets]]
resolution = 512
batch_size = 3
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "one"
  [[datasets.subsets]]
  image_dir = "two"
  num_repeats = 7
  class_tokens = " a cat "
[[datasets]]
resolution = [256, 128]
num_repeats = 5
  [[datasets.subsets]]
  image_dir = "one"
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        picture(tmp_path / name / "a.png", caption=None)
    return tmp_path


def problems(folder, text, step=16, **given):
    with pytest.raises(UserError) as caught:
        load(dataset_file(folder, text), options(**given), step)
    assert all("\n" not in line for line in caught.value.problems)
    return [line.replace(str(folder), "<folder>") for line in caught.value.problems]


def test_inheritance(folder):
    first, second = load(dataset_file(folder, GOOD), options(train_batch_size=9, resolution="64", dataset_repeats=8), 16)
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((512, 512), 3, True)
    assert [subset.num_repeats for subset in first.subsets] == [2, 7]
    assert [subset.class_tokens for subset in first.subsets] == [None, "a cat"]
    assert [subset.caption_suffixes for subset in first.subsets] == [(".cap",)] * 2
    assert (second.resolution, second.batch_size, second.enable_bucket) == ((256, 128), 9, False)
    assert second.subsets[0].num_repeats == 5
    assert first.subsets[1].place == f"{folder / 'dataset.toml'}:10" and second.place.endswith(":14")


def test_values_of_the_command_line_and_defaults(folder):
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{(folder / 'one').as_posix()}'\n"
    spec, = load(dataset_file(folder, text), options(resolution="128,64", bucket_reso_steps=32, dataset_repeats=4), 16)
    assert spec.resolution == (128, 64) and spec.bucket_reso_steps == 32 and spec.subsets[0].num_repeats == 4
    assert (spec.batch_size, spec.enable_bucket, spec.min_bucket_reso, spec.max_bucket_reso) == (1, False, 32, None)
    assert spec.subsets[0].caption_suffixes == (".txt", ".caption")
    spec, = load(dataset_file(folder, "[general]\nresolution = 1024\n" + text), options(resolution="64"), 16)
    assert spec.resolution == (1024, 1024) and (spec.min_bucket_reso, spec.bucket_reso_steps) == (256, 64)


def test_relative_folders_start_here_then_beside_the_file(folder, monkeypatch, tmp_path_factory):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'one'\n"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert load(dataset_file(folder, text), options(), 16)[0].subsets[0].image_dir == folder / "one"
    (elsewhere / "one").mkdir()
    assert load(dataset_file(folder, text), options(), 16)[0].subsets[0].image_dir == Path("one")


SUBSET = "[[datasets.subsets]]\nimage_dir = 'one'\n"
PLAIN = "[[datasets]]\nresolution = 64\n"
BUCKETS = PLAIN + "enable_bucket = true\n"


@pytest.mark.parametrize("text, expected", [
    ("[[datasets]]\nresolutoin = 512\n" + SUBSET,
     [":2: resolutoin: unknown key; did you mean 'resolution'?", "no resolution"]),
    (PLAIN + "zzz = 1\n" + SUBSET, [":3: zzz: unknown key; known here: batch_size, resolution"]),
    ("resolution = 64\n[[datasets]]\n" + SUBSET,
     [":1: resolution: unknown key at the top of the file; move it below a line [general]"]),
    (PLAIN + "image_dir = 'one'\n" + SUBSET,
     [":3: image_dir: this key does not belong here; move it to [[datasets.subsets]]"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir='one'\nbatch_size = 2\n",
     [":5: batch_size: this key does not belong here; move it to [general] or [[datasets]]"]),
    ("[[datasets]]\nresolution = 64.5\n" + SUBSET, [":2: resolution: 64.5 is not a whole number or [width, height]"]),
    ("[[datasets]]\nresolution = '64'\n" + SUBSET, [":2: resolution: '64' is not a whole number"]),
    ("[[datasets]]\nresolution = [64, 64, 64]\n" + SUBSET, [":2: resolution: [64, 64, 64] is not"]),
    ("[[datasets]]\nresolution = 100\n" + SUBSET,
     [":2: resolution: 100 x 100 is not a multiple of 16 pixels, which this model needs; use 96"]),
    ("[[datasets]]\nresolution = [64, 100]\n" + SUBSET, ["use [64, 96]"]),
    (PLAIN + "batch_size = 0\n" + SUBSET, [":3: batch_size: 0 is not a whole number of at least 1"]),
    (PLAIN + "batch_size = true\n" + SUBSET, [":3: batch_size: true is not a whole number"]),
    (PLAIN + "enable_bucket = 1\n" + SUBSET, [":3: enable_bucket: 1 is not true or false"]),
    (PLAIN + "bucket_reso_steps = 24\n" + SUBSET, [":3: bucket_reso_steps: 24 is not a multiple of 16"]),
    (BUCKETS + "bucket_reso_steps = 128\n" + SUBSET, [":4: bucket_reso_steps: 128 is larger than the resolution"]),
    (BUCKETS + "min_bucket_reso = 256\n" + SUBSET,
     [":4: min_bucket_reso: 256 is larger than the resolution's shorter side 64; use at most 64"]),
    ("[[datasets]]\nresolution = 512\nenable_bucket = true\nmax_bucket_reso = 256\n" + SUBSET,
     [":4: max_bucket_reso: 256 is smaller than the resolution's longer side 512; use at least 512"]),
    ("[[datasets]]\nresolution = 96\nenable_bucket = true\nmin_bucket_reso = 90\nbucket_reso_steps = 64\n" + SUBSET,
     [":5: bucket_reso_steps: no bucket"]),
    (PLAIN + SUBSET + "num_repeats = 0\n", [":5: num_repeats: 0 is not a whole number of at least 1"]),
    (PLAIN + SUBSET + "caption_extension = 'txt'\n", [":5: caption_extension: 'txt' is not a file name suffix"]),
    (PLAIN + SUBSET + "class_tokens = ''\n", [":5: class_tokens: '' is not a text"]),
    (PLAIN + SUBSET + "[[datasets.subsets]]\nimage_dir = './two/../one'\n",
     [":6: image_dir: this folder stands in the dataset twice, first at <folder>/dataset.toml:3"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = 'three'\n", [":4: image_dir: no such folder: three (looked for"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = 'dataset.toml'\n",
     [":4: image_dir: dataset.toml is a file, not a folder"]),
    (PLAIN + "[[datasets.subsets]]\nnum_repeats = 1\n", [":3: this subset has no image_dir"]),
    (PLAIN, [":1: this dataset has no [[datasets.subsets]]"]),
    ("[datasets]\nresolution = 64\n", [":1: datasets: this should be one or more tables; write [[datasets]]"]),
    (PLAIN + "[datasets.subsets]\nimage_dir = 'one'\n",
     [":3: subsets: this should be one or more tables; write [[datasets.subsets]]"]),
    ("[general]\nresolution = 64\n", ["dataset.toml: there is no [[datasets]]"]),
    ("general = 3\n[[datasets]]\nresolution = 64\n" + SUBSET, [":1: general: this should be a table"]),
    ("[genral]\n[[datasets]]\nresolution = 64\n" + SUBSET,
     [":1: genral: unknown key at the top of the file; did you mean 'general'?"]),
    ("[[datasets]\n", [":1: not valid TOML"]),
    (PLAIN + SUBSET + "is_reg = true\n", [":5: is_reg: this key is not built yet; remove it"]),
])
def test_mistakes(folder, text, expected):
    found = problems(folder, text)
    assert len(found) == len(expected), found
    for part in expected:
        assert any(part in line for line in found), found
    assert all("dataset.toml" in line for line in found)


def test_mistakes_of_the_command_line_are_named_as_such(folder):
    text = "[[datasets]]\n" + SUBSET
    assert problems(folder, text, resolution="100")[0].startswith("--resolution: 100 x 100 is not a multiple of 16")
    assert problems(folder, text, resolution="big")[0].startswith("--resolution: 'big' is not a whole number")
    assert problems(folder, text, resolution="64", train_batch_size=0)[0].startswith("--train_batch_size: 0 is not a whole")
    assert problems(folder, text, resolution="64", bucket_reso_steps=8)[0].startswith("--bucket_reso_steps: 8 is not a multiple")


def test_all_mistakes_at_once(folder):
    found = problems(folder, "[general]\nbatch_siz = 1\n[[datasets]]\nresolution = 100\n"
                             "[[datasets.subsets]]\nimage_dir = 'x'\nnum_repeats = 'y'\n")
    assert [line.split(": ")[1] for line in found] == ["batch_siz", "num_repeats", "resolution", "image_dir"]


@pytest.mark.parametrize("name", UNBUILT)
def test_every_unbuilt_key_answers(folder, name, monkeypatch):
    key = UNBUILT[name]
    text = "[general]\n{} = {}\n[[datasets]]\nresolution = 64\n" + SUBSET
    if key.inert:
        notes = []
        monkeypatch.setattr(library.data.spec.log, "info", notes.append)
        load(dataset_file(folder, text.format(name, 3)), options(), 16)
        assert len(notes) == 1 and f":2: {name}: without effect here: {key.inert}" in notes[0]
    else:
        assert f":2: {name}: this key is not built yet" in problems(folder, text.format(name, '"something"'))[0]
        for off in key.off:
            load(dataset_file(folder, text.format(name, json.dumps(off))), options(), 16)
    assert name not in KEYS


def test_off_means_the_right_type(folder):
    assert "not built yet" in problems(folder, "[general]\nshuffle_caption = 0\n[[datasets]]\nresolution = 64\n" + SUBSET)[0]


def test_json_and_missing_file(folder):
    with pytest.raises(UserError, match="TOML"):
        load(folder / "dataset.json", options(), 16)
    with pytest.raises(UserError, match="no such file"):
        load(folder / "none.toml", options(), 16)


def test_the_command_line_has_every_value_that_is_looked_for():
    known = {each.name for each in dataclasses.fields(DatasetOptions)}
    assert {key.option for key in KEYS.values() if key.option} <= known
    assert set(options().__dict__) <= known
    defaults = DatasetOptions()
    assert all(getattr(defaults, name) == value for name, value in options().__dict__.items())
