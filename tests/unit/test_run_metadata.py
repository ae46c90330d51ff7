"""What goes into ``ss_*`` fields and how much of it. The fields of real runs: ``tests/cli/test_outputs.py``."""

import hashlib
from types import SimpleNamespace

import numpy
import pytest

from library import run_metadata
from library.run_metadata import TABLE, short_hash, source_name, tag_frequency
from tools import outputs_page


def items_of(*captions_of_subsets):
    """Items of subsets with these captions; only what tags are counted from."""
    listings = [SimpleNamespace(captions=list(captions)) for captions in captions_of_subsets]
    rows = [(number, row) for number, captions in enumerate(captions_of_subsets) for row in range(len(captions))]
    subsets = [SimpleNamespace(image_dir=None, metadata_file=None, source=f"package.Set{number}") for number in range(len(listings))]
    return SimpleNamespace(subsets=subsets, listings=listings, listing=numpy.array([number for number, _ in rows]),
                           row=numpy.array([row for _, row in rows]))


def test_tags_are_counted_once_for_each_picture_most_frequent_first():
    counts, left_out = tag_frequency(items_of(["Cat, sits, cat", "cat,  red box ,,", "dog\nsits"], ["cat"]))
    assert counts == {"Set0": {"cat": 2, "sits": 2, "dog": 1, "red box": 1}, "Set1": {"cat": 1}} and left_out == 0
    assert list(counts["Set0"]) == ["cat", "sits", "dog", "red box"]


def test_tags_stay_small_whatever_the_captions(monkeypatch):
    many = ", ".join(f"tag{number}" for number in range(3000))
    counts, left_out = tag_frequency(items_of([many, "x" * 101]))
    assert len(counts["Set0"]) == run_metadata.MOST_TAGS and left_out == 2001
    monkeypatch.setattr(run_metadata, "MOST_TAG_BYTES", 200)
    counts, left_out = tag_frequency(items_of([many], [many]))
    assert sum(len(tag) + 12 for tags in counts.values() for tag in tags) <= 200 and left_out + sum(map(len, counts.values())) == 6000


def test_bytes_that_are_no_text_do_not_break_the_header():
    counts, _ = tag_frequency(items_of(["caf\udce9"]))
    assert list(counts["Set0"]) == ["caf?"]


@pytest.mark.parametrize("size", [100, (1 << 20) + 100, (1 << 20) + (1 << 17)])
def test_short_hash_of_a_file(tmp_path, size):
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "m").write_bytes(data[:size])
    assert short_hash(tmp_path / "m") == hashlib.sha256(data[:size][0x100000:0x110000]).hexdigest()[:8]


def test_no_short_hash_of_anything_else(tmp_path):
    assert short_hash(tmp_path) is None and short_hash(tmp_path / "gone") is None and short_hash(None) is None


def test_sources_are_named_without_their_path(tmp_path):
    subset = {"image_dir": None, "metadata_file": None, "source": "package.sets.Birds"}
    assert source_name(SimpleNamespace(**subset)) == "Birds"
    assert source_name(SimpleNamespace(**subset | {"metadata_file": tmp_path / "all.json"})) == "all.json"
    assert source_name(SimpleNamespace(**subset | {"image_dir": tmp_path / "cats"})) == "cats"


def test_averaged_files_say_so_and_paths_stay_out_of_arguments():
    config = SimpleNamespace(ema=SimpleNamespace(ema_decay=0.99),
                             optimizer=SimpleNamespace(chosen_type="X", optimizer_args=("a=1", "file=/home/me/x", "b=2")))
    value = next(one.value for one in TABLE if one.name == "ss_ema_decay")
    assert value(SimpleNamespace(config=config), run_metadata.Moment(1, 1, 0.0, True)) == 0.99
    assert value(SimpleNamespace(config=config), run_metadata.Moment(1, 1, 0.0)) is None
    assert run_metadata._optimizer(SimpleNamespace(config=config)) == "X(a=1,b=2)"


def test_every_field_has_one_record_and_a_source():
    names = [one.name for one in TABLE]
    assert len(set(names)) == len(names) and all(name.startswith(("ss_", "sshs_")) for name in names)
    assert all(one.source and one.group for one in TABLE)


def test_the_page_lists_every_field():
    assert outputs_page.PAGE.read_text(encoding="utf-8") == outputs_page.page(), "run: python tools/outputs_page.py"
    assert all(f"`{one.name}`" in outputs_page.page() for one in TABLE)
