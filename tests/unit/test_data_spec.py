"""The dataset file: inheritance, and every mistake as one line with file, line, key and remedy."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import library.data.spec
from library.config.data_options import CachingOptions, DatasetOptions
from library.data.spec import load
from library.data.spec_keys import ELSEWHERE, KEYS, LEFTOVERS, SECTIONS
from library.errors import UserError

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
    for name in ("one", "two", "masks"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def notes(monkeypatch):
    found = []
    monkeypatch.setattr(library.data.spec.log, "info", found.append)
    return found


def read(folder, text, caching=None, step=16, name="dataset.toml", **given):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load(DatasetOptions(dataset_config=path, **given), CachingOptions(**caching or {}), step)


def problems(folder, text, caching=None, **given):
    with pytest.raises(UserError) as caught:
        read(folder, text, caching, **given)
    assert all("\n" not in line for line in caught.value.problems)
    return [line.replace(str(folder), "<folder>") for line in caught.value.problems]


def test_inheritance(folder):
    first, second = read(folder, GOOD, train_batch_size=9, resolution="64", dataset_repeats=8)
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((512, 512), 3, True)
    assert [subset.num_repeats for subset in first.subsets] == [2, 7]
    assert [subset.class_tokens for subset in first.subsets] == [None, "a cat"]
    assert [subset.caption_suffixes for subset in first.subsets] == [(".cap",)] * 2
    assert (second.resolution, second.batch_size, second.enable_bucket) == ((256, 128), 9, False)
    assert second.subsets[0].num_repeats == 5
    assert first.subsets[1].place == f"{folder / 'dataset.toml'}:10" and second.place.endswith(":14")
    assert [(subset.dataset, subset.number) for spec in (first, second) for subset in spec.subsets] == [(0, 0), (0, 1), (1, 0)]


def test_values_of_the_command_line_and_defaults(folder):
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{(folder / 'one').as_posix()}'\n"
    spec, = read(folder, text, resolution="128,64", bucket_reso_steps=32, dataset_repeats=4)
    assert spec.resolution == (128, 64) and spec.bucket_reso_steps == 32 and spec.subsets[0].num_repeats == 4
    assert (spec.batch_size, spec.enable_bucket, spec.min_bucket_reso, spec.max_bucket_reso) == (1, False, 32, None)
    assert spec.subsets[0].caption_suffixes == (".txt", ".caption")
    spec, = read(folder, "[general]\nresolution = 1024\n" + text, resolution="64")
    assert spec.resolution == (1024, 1024) and (spec.min_bucket_reso, spec.bucket_reso_steps) == (256, 64)


def test_relative_folders_start_here_then_beside_the_file(folder, monkeypatch, tmp_path_factory):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'one'\n"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert read(folder, text)[0].subsets[0].image_dir == folder / "one"
    (elsewhere / "one").mkdir()
    assert read(folder, text)[0].subsets[0].image_dir == Path("one")


SUBSET = "[[datasets.subsets]]\nimage_dir = 'one'\n"
PLAIN = "[[datasets]]\nresolution = 64\n"
BUCKETS = PLAIN + "enable_bucket = true\n"


@pytest.mark.parametrize("text, expected", [
    ("[[datasets]]\nresolutoin = 512\n" + SUBSET,
     [":2: resolutoin: unknown key; did you mean 'resolution'?", "no resolution"]),
    (PLAIN + "zzz = 1\n" + SUBSET, [":3: zzz: unknown key; known here: resolution, batch_size"]),
    (PLAIN + "train_batch_size = 1\n" + SUBSET, [":3: train_batch_size: unknown key; write batch_size"]),
    (PLAIN + SUBSET + "repeats = 3\n", [":5: repeats: unknown key; did you mean 'num_repeats'?"]),
    (PLAIN + SUBSET + "caption_extention = '.txt'\n", [":5: caption_extention: unknown key; write caption_extension"]),
    ("[general]\ncache_latents = true\n" + PLAIN + SUBSET,
     [":2: cache_latents: unknown key; this is a flag: give it on the command line"]),
    ("[general]\nmasked_loss = true\n" + PLAIN + SUBSET, [":2: masked_loss: unknown key; this is a flag"]),
    ("[general]\ndebug_dataset = true\n" + PLAIN + SUBSET,
     [":2: debug_dataset: this is a setting of the run, not of the data; remove it and give --debug_dataset"]),
    ("[general]\nmax_token_length = 225\n" + PLAIN + SUBSET, [":2: max_token_length: this is a setting of the run"]),
    ("resolution = 64\n[[datasets]]\n" + SUBSET,
     [":1: resolution: unknown key at the top of the file; move it below a line [general]"]),
    ("image_dir = 'one'\n" + PLAIN + SUBSET, [":1: image_dir: unknown key at the top of the file; move it below a line [[data"]),
    (PLAIN + "image_dir = 'one'\n" + SUBSET,
     [":3: image_dir: this key does not belong here; move it to [[datasets.subsets]]"]),
    (PLAIN + "is_reg = true\n" + SUBSET, [":3: is_reg: this key does not belong here; move it to [[datasets.subsets]]"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir='one'\nbatch_size = 2\n",
     [":5: batch_size: this key does not belong here; move it to [general] or [[datasets]]"]),
    ("[[datasets]]\nresolution = 64.5\n" + SUBSET, [":2: resolution: 64.5 is not a size in pixels; write N or W,H"]),
    ("[[datasets]]\nresolution = 'big'\n" + SUBSET, [":2: resolution: 'big' is not a size in pixels"]),
    ("[[datasets]]\nresolution = [64, 64, 64]\n" + SUBSET, [":2: resolution: [64, 64, 64] is not"]),
    ("[[datasets]]\nresolution = 100\n" + SUBSET,
     [":2: resolution: 100 x 100 is not a multiple of 16 pixels, which this model needs; use 96"]),
    ("[[datasets]]\nresolution = [64, 100]\n" + SUBSET, ["use [64, 96]"]),
    (PLAIN + "batch_size = 0\n" + SUBSET, [":3: batch_size: 0 is not a whole number of at least 1"]),
    (PLAIN + "batch_size = true\n" + SUBSET, [":3: batch_size: true is not a whole number"]),
    (PLAIN + "batch_size = 2.0\n" + SUBSET, [":3: batch_size: 2.0 is not a whole number of at least 1; write 2"]),
    (PLAIN + "batch_size = '2'\n" + SUBSET, [":3: batch_size: '2' is not a whole number of at least 1; write 2"]),
    (PLAIN + "enable_bucket = 1\n" + SUBSET, [":3: enable_bucket: 1 is not true or false"]),
    (PLAIN + "enable_bucket = 'true'\n" + SUBSET, [":3: enable_bucket: 'true' is not true or false; write true, without quotes"]),
    (PLAIN + "bucket_reso_steps = 24\n" + SUBSET, [":3: bucket_reso_steps: 24 is not a multiple of 16"]),
    (BUCKETS + "bucket_reso_steps = 128\n" + SUBSET, [":4: bucket_reso_steps: 128 is larger than the resolution"]),
    (BUCKETS + "min_bucket_reso = 256\n" + SUBSET,
     [":4: min_bucket_reso: 256 is larger than the resolution's shorter side 64; use at most 64"]),
    ("[[datasets]]\nresolution = 512\nenable_bucket = true\nmax_bucket_reso = 256\n" + SUBSET,
     [":4: max_bucket_reso: 256 is smaller than the resolution's longer side 512; use at least 512"]),
    ("[[datasets]]\nresolution = 96\nenable_bucket = true\nmin_bucket_reso = 90\nbucket_reso_steps = 64\n" + SUBSET,
     [":5: bucket_reso_steps: no bucket"]),
    (PLAIN + SUBSET + "num_repeats = 0\n", [":5: num_repeats: 0 is not a whole number of at least 1; give 1 or more"]),
    (PLAIN + SUBSET + "num_repeats = 10000000\n", [":5: num_repeats: 10000000 is not a whole number of at most 1000000"]),
    (PLAIN + SUBSET + "caption_extension = 'txt'\n",
     [":5: caption_extension: 'txt' is not an ending of file names; write .txt"]),
    (PLAIN + SUBSET + "caption_extension = ['.txt', '.txt']\n", [":5: caption_extension: ['.txt', '.txt'] is not a list of d"]),
    (PLAIN + SUBSET + "class_tokens = 3\n", [":5: class_tokens: 3 is not a text in quotes; write \"3\""]),
    (PLAIN + SUBSET + "loss_weight = 0\n", [":5: loss_weight: 0 is not a number above 0"]),
    (PLAIN + SUBSET + "loss_weight = inf\n", [":5: loss_weight: inf is not a number above 0"]),
    (PLAIN + SUBSET + "face_crop_aug_range = [4, 2]\n", [":5: face_crop_aug_range: [4, 2] is not two numbers above 0"]),
    (PLAIN + SUBSET + "resize_interpolation = 'lanczoz'\n", ["resize_interpolation: 'lanczoz' is not one of auto", "'lanczos'?"]),
    (PLAIN + SUBSET + "caption_dropout_rate = 10\n", [":5: caption_dropout_rate: 10 is not a number of at least 0 and at most"]),
    (PLAIN + SUBSET + "caption_dropout_rate = 10\n", [":5: caption_dropout_rate: 10 is", "write 0.1 for 10 percent"]),
    (PLAIN + SUBSET + "caption_dropout_rate = '10%'\n", ["'10%' is not a number of at least 0 and at most 1; write 0.1"]),
    (PLAIN + SUBSET + "keep_tokens = -1\n", [":5: keep_tokens: -1 is not a whole number of at least 0"]),
    (PLAIN + SUBSET + "caption_separator = ''\n", [":5: caption_separator: '' is not a text"]),
    (PLAIN + "validation_split = 1\n" + SUBSET, [":3: validation_split: 1 is not a number of at least 0 and below 1"]),
    (PLAIN + "validation_split = -0.1\n" + SUBSET, [":3: validation_split: -0.1 is not a number of at least 0 and below 1"]),
    (PLAIN + SUBSET + "[[datasets.subsets]]\nimage_dir = './two/../one'\n",
     [":6: image_dir: this folder stands in the dataset twice, first at <folder>/dataset.toml:3"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = 'three'\n", [":4: image_dir: no such folder: three (looked for"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = 'onne'\n", ["did you mean 'one'?"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = 'dataset.toml'\n",
     [":4: image_dir: dataset.toml is a file, not a folder; give the folder that holds the pictures"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = \"C:\\new\\train\"\n",
     [":4: image_dir: 'C:\\new\\train' is not a path: it holds a tab or a line break; write Windows paths with /"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = \"C:\\data\"\n", ["not valid TOML", "'single quotes'"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = ''\n", [":4: image_dir: '' is not a text in quotes"]),
    (PLAIN + "[[datasets.subsets]]\nnum_repeats = 1\n", [":3: this subset has no image_dir"]),
    (PLAIN + "[[datasets.subsets]]\nmetadata_file = 'a.json'\n", [":4: metadata_file: no such file: a.json"]),
    (PLAIN + "[[datasets.subsets]]\nmetadata_file = 'one'\n", [":4: metadata_file: one is neither .json nor .jsonl"]),
    (PLAIN, [":1: this dataset has no [[datasets.subsets]]"]),
    ("[datasets]\nresolution = 64\n", [":1: datasets: this should be one or more tables; write [[datasets]]"]),
    (PLAIN + "[datasets.subsets]\nimage_dir = 'one'\n",
     [":3: subsets: this should be one or more tables; write [[datasets.subsets]]"]),
    ("[general]\nresolution = 64\n", ["dataset.toml: there is no [[datasets]]"]),
    ("general = 3\n[[datasets]]\nresolution = 64\n" + SUBSET, [":1: general: this should be a table"]),
    ("[genral]\n[[datasets]]\nresolution = 64\n" + SUBSET,
     [":1: genral: unknown key at the top of the file; did you mean 'general'?"]),
    ("[general]\nflip_augg = true\n" + PLAIN + "[[datasets.subset]]\nimage_dirr = 'one'\n",
     [":5: subset: unknown table [[datasets.subset]]; write [[datasets.subsets]]", ":2: flip_augg: unknown key",
      ":6: image_dirr: unknown key; did you mean 'image_dir'?"]),
    ("[[dataset]]\nresolution = 64\n", [":1: dataset: unknown key at the top of the file; did you mean 'datasets'?"]),
    (PLAIN + SUBSET + "[[subsets]]\nimage_dir = 'two'\n",
     [":5: subsets: unknown key at the top of the file; write [[datasets.subsets]], below [[datasets]]"]),
    (PLAIN + "[[datasets.subsets]]\nimage_dir = one\n", [":4: not valid TOML: Invalid value; texts stand in \"quotes\""]),
    ("[[datasets]\n", [":1: not valid TOML"]),
])
def test_mistakes(folder, text, expected):
    found = problems(folder, text)
    assert len(found) <= len(expected), found
    for part in expected:
        assert any(part in line for line in found), found
    assert all("dataset.toml" in line for line in found)


def test_mistakes_of_the_command_line_are_named_as_such(folder):
    text = "[[datasets]]\n" + SUBSET
    assert problems(folder, text, resolution="100")[0].startswith("--resolution: 100 x 100 is not a multiple of 16")
    assert problems(folder, text, resolution="big")[0].startswith("--resolution: 'big' is not a size in pixels")
    assert problems(folder, text, resolution="64", bucket_reso_steps=8)[0].startswith("--bucket_reso_steps: 8 is not a multiple")


def test_mistakes_of_a_configuration_file_are_named_with_its_line(folder):
    path = folder / "dataset.toml"
    path.write_text("[[datasets]]\n" + SUBSET)
    with pytest.raises(UserError, match="^train.toml:7: resolution: 100 x 100"):
        load(DatasetOptions(dataset_config=path, resolution="100"), CachingOptions(), 16, "train.toml:7: {}".format)


def test_all_mistakes_at_once(folder):
    found = problems(folder, "[general]\nbatch_siz = 1\n[[datasets]]\nresolution = 100\n"
                             "[[datasets.subsets]]\nimage_dir = 'x'\nnum_repeats = 'y'\n")
    assert [line.split(": ")[1] for line in found] == ["batch_siz", "num_repeats", "resolution", "image_dir"]


# Of every key: a value that is not the default, and where it arrives
ARRIVES = {
    "resolution": ([128, 64], lambda spec, subset: spec.resolution, (128, 64)),
    "batch_size": (3, lambda spec, subset: spec.batch_size, 3),
    "enable_bucket": (True, lambda spec, subset: spec.enable_bucket, True),
    "min_bucket_reso": (48, lambda spec, subset: spec.min_bucket_reso, 48),
    "max_bucket_reso": (512, lambda spec, subset: spec.max_bucket_reso, 512),
    "bucket_reso_steps": (32, lambda spec, subset: spec.bucket_reso_steps, 32),
    "bucket_no_upscale": (True, lambda spec, subset: spec.bucket_no_upscale, True),
    "skip_image_resolution": (300, lambda spec, subset: spec.skip_image_resolution, (300, 300)),
    "validation_split": (0.25, lambda spec, subset: spec.validation_split, 0.25),
    "validation_seed": (5, lambda spec, subset: spec.validation_seed, 5),
    "prior_loss_weight": (0.5, lambda spec, subset: spec.prior_loss_weight, 0.5),
    "conditioning_data_dir": ("masks", lambda spec, subset: (subset.mask, subset.mask_dir.name), ("files", "masks")),
    "is_reg": (True, lambda spec, subset: subset.is_reg, True),
    "recursive": (True, lambda spec, subset: subset.recursive, True),
    "num_repeats": (4, lambda spec, subset: subset.num_repeats, 4),
    "loss_weight": (2, lambda spec, subset: subset.loss_weight, 2.0),
    "class_tokens": ("a dog", lambda spec, subset: subset.class_tokens, "a dog"),
    "caption_extension": ([".json", ".txt"], lambda spec, subset: subset.caption_suffixes, (".json", ".txt")),
    "cache_info": (True, lambda spec, subset: subset.cache_info, True),
    "alpha_mask": (True, lambda spec, subset: subset.mask, "alpha"),
    "resize_interpolation": ("box", lambda spec, subset: subset.interpolation, "box"),
    "flip_aug": (True, lambda spec, subset: subset.augment.flip, True),
    "color_aug": (True, lambda spec, subset: subset.augment.color, True),
    "random_crop": (True, lambda spec, subset: subset.augment.random_crop, True),
    "face_crop_aug_range": ([2, 4.5], lambda spec, subset: subset.augment.face_crop, (2.0, 4.5)),
    "caption_prefix": ("p", lambda spec, subset: subset.captions.prefix, "p"),
    "caption_suffix": ("s", lambda spec, subset: subset.captions.suffix, "s"),
    "caption_separator": (";", lambda spec, subset: subset.captions.separator, ";"),
    "keep_tokens": (2, lambda spec, subset: subset.captions.keep_tokens, 2),
    "keep_tokens_separator": ("|||", lambda spec, subset: subset.captions.keep_tokens_separator, "|||"),
    "secondary_separator": (";;;", lambda spec, subset: subset.captions.secondary_separator, ";;;"),
    "enable_wildcard": (True, lambda spec, subset: subset.captions.wildcard, True),
    "shuffle_caption": (True, lambda spec, subset: subset.captions.shuffle, True),
    "caption_dropout_rate": (0.5, lambda spec, subset: subset.captions.dropout_rate, 0.5),
    "caption_dropout_every_n_epochs": (3, lambda spec, subset: subset.captions.dropout_every_n_epochs, 3),
    "caption_tag_dropout_rate": (1, lambda spec, subset: subset.captions.tag_dropout_rate, 1.0),
    "token_warmup_min": (3, lambda spec, subset: subset.captions.warmup_min, 3),
    "token_warmup_step": (0.5, lambda spec, subset: subset.captions.warmup_step, 0.5),
}
ELSEWHERE_TESTED = {"image_dir", "metadata_file"}
RUN = {"conditioning_data_dir": {"masked_loss": True}}  # flags that a key needs
OTHER = {"is_reg": "[[datasets.subsets]]\nimage_dir = 'two'\n"}  # and tables


@pytest.mark.parametrize("name, section", [(key.name, section) for key in KEYS.values() for section in key.sections
                                           if key.name not in ELSEWHERE_TESTED])
def test_every_key_arrives_from_every_section(folder, name, section):
    value, arrived, expected = ARRIVES[name]
    line = f"{name} = {json.dumps(value)}\n"
    general, dataset, subset = (line if section == each else "" for each in SECTIONS)
    resolution = "" if name == "resolution" else "resolution = 64\n"
    text = f"[general]\n{general}[[datasets]]\n{resolution}{dataset}{SUBSET}{subset}{OTHER.get(name, '')}"
    spec = read(folder, text, **RUN.get(name, {}))[0]
    assert arrived(spec, spec.subsets[0]) == expected
    plain = read(folder, PLAIN + SUBSET)[0]
    assert name == "resolution" or _or_none(arrived, plain) != expected


def _or_none(arrived, spec):
    try:
        return arrived(spec, spec.subsets[0])
    except AttributeError:
        return None


def test_every_key_is_tested():
    assert set(ARRIVES) | ELSEWHERE_TESTED == set(KEYS)


@pytest.mark.parametrize("key", [key for key in KEYS.values() if key.option and key.name not in ELSEWHERE_TESTED],
                         ids=lambda key: key.name)
def test_every_flag_stands_in_for_its_key(folder, key):
    value, arrived, expected = ARRIVES[key.name]
    text = {"resolution": "128,64", "skip_image_resolution": "300", "caption_extension": ".json,.txt",
            "face_crop_aug_range": "2,4.5", "conditioning_data_dir": folder / "masks"}.get(key.name, value)
    resolution = "" if key.name == "resolution" else "resolution = 64\n"
    spec, = read(folder, f"[[datasets]]\n{resolution}{SUBSET}", **{key.option: text}, **RUN.get(key.name, {}))
    assert arrived(spec, spec.subsets[0]) == expected


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.sections == tuple(SECTIONS)])
def test_the_inner_section_wins(folder, name):
    value, arrived, expected = ARRIVES[name]
    wrong = json.dumps({True: False, False: True}.get(value, value)) if isinstance(value, bool) else {
        "caption_extension": '".other"', "face_crop_aug_range": "[1, 1]", "resize_interpolation": '"area"'}.get(
            name, '"other"' if isinstance(value, str) else "1")
    if name == "caption_tag_dropout_rate":
        wrong = "0.125"
    text = f"[general]\n{name} = {wrong}\n{PLAIN}{name} = {wrong}\n{SUBSET}{name} = {json.dumps(value)}\n"
    spec, = read(folder, text)
    assert arrived(spec, spec.subsets[0]) == expected


def test_off_values_of_a_subset_overrule_general(folder):
    text = ("[general]\nflip_aug = true\ncaption_prefix = 'p'\nclass_tokens = 'a'\nkeep_tokens_separator = '|||'\n"
            "caption_dropout_rate = 0.5\n" + PLAIN + SUBSET +
            "flip_aug = false\ncaption_prefix = ''\nclass_tokens = ''\nkeep_tokens_separator = ''\ncaption_dropout_rate = 0\n")
    subset = read(folder, text)[0].subsets[0]
    assert not subset.augment.flip and subset.captions.prefix == "" and subset.class_tokens is None
    assert subset.captions.keep_tokens_separator == "" and subset.captions.dropout_rate == 0.0


@pytest.mark.parametrize("name", LEFTOVERS)
def test_leftovers_are_named_once(folder, name, notes):
    value = "{a = 1}" if name == "custom_attributes" else "1.0"
    read(folder, f"[general]\n{name} = {value}\n[[datasets]]\nresolution = 64\n" + SUBSET)
    assert len(notes) == 1 and f":2: {name}: accepted without effect: " in notes[0]


def test_settings_of_the_run_that_ask_for_nothing_pass(folder, notes):
    read(folder, "[general]\ndebug_dataset = false\n" + PLAIN + SUBSET)
    assert notes == [] and set(ELSEWHERE) == {"debug_dataset", "max_token_length"}
    assert "this is a setting of the run" in problems(folder, "[general]\ndebug_dataset = 0\n" + PLAIN + SUBSET)[0]


def test_a_flag_that_the_file_overrules_is_named(folder, notes):
    read(folder, PLAIN + "batch_size = 2\n" + SUBSET, train_batch_size=4, resolution="64")
    assert notes == [f"{folder / 'dataset.toml'}:3: batch_size: overrules --train_batch_size, which has no effect here"]


def test_settings_without_effect_are_named_once(folder, notes):
    text = ("[general]\nkeep_tokens = 1\ntoken_warmup_min = 2\ncaption_separator = ';'\nmin_bucket_reso = 32\n"
            "validation_seed = 1\nprior_loss_weight = 0.5\n" + PLAIN + SUBSET + "[[datasets.subsets]]\nimage_dir = 'two'\n")
    read(folder, text)
    assert sorted(note.split(": ")[1] for note in notes) == ["caption_separator", "keep_tokens", "min_bucket_reso",
                                                            "prior_loss_weight", "token_warmup_min", "validation_seed"]
    assert all(": has no effect: " in note for note in notes)
    notes.clear()
    other = "[[datasets.subsets]]\nimage_dir = 'two'\nshuffle_caption = true\n"  # here it acts
    read(folder, "[general]\nkeep_tokens = 1\n" + PLAIN + SUBSET + other)
    assert notes == []


def test_folders_inside_each_other_are_named(folder, notes):
    (folder / "one" / "deep").mkdir()
    text = PLAIN + SUBSET + "recursive = true\n[[datasets.subsets]]\nimage_dir = 'one/deep'\n"
    assert len(read(folder, text)[0].subsets) == 2
    assert len(notes) == 1 and ":6: " in notes[0] and "its pictures are shown twice" in notes[0]


PAGE = (Path(__file__).parents[2] / "docs" / "dataset.md").read_text(encoding="utf-8")


def test_the_page_describes_every_key():
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    sections = {row[0].strip("| `"): row[1] for row in rows if re.fullmatch("[SDG ]+", row[1])}
    assert sections == {key.name: " ".join({"subsets": "S", "datasets": "D", "general": "G"}[home] for home in key.sections[::-1])
                        for key in KEYS.values()}
    assert all(f"`{name}`" in PAGE for name in (*LEFTOVERS, *ELSEWHERE))


@pytest.mark.parametrize("example", re.findall("```toml\n(.*?)```", PAGE, re.DOTALL))
def test_the_examples_of_the_page_are_right(folder, example):
    """All is right with them but for their folders."""
    found = problems(folder, example, masked_loss=True)
    assert found and all("no such folder: " in line for line in found)


def test_the_command_line_has_every_value_that_is_looked_for():
    known = {each.name for each in dataclasses.fields(DatasetOptions)}
    assert {key.option for key in KEYS.values() if key.option} <= known
