"""Hashes of pictures and of mask files: kept from one start to the next, forgotten with every change, never lost with a run."""

import os
from types import SimpleNamespace

import numpy
import pytest
import torch

import library.data.fill
from library.data import examine
from library.data import index as index_file
from library.data import problems as kinds
from library.data.keys import FOLDER
from library.data.scan import scan
from library.errors import UserError
from tests.unit.data_helpers import dataset_spec, make_older, picture, subset_spec
from tests.unit.test_data_fill import Encoder, fill_pictures, with_subset
from tests.unit.test_data_index import ALL, Folder, content_of


@pytest.fixture(params=["read", "mapped"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "mapped":
        monkeypatch.setattr(index_file, "MAPPED_FROM", 0)
    return Folder(tmp_path / "pictures", monkeypatch)


@pytest.fixture
def masks(tmp_path):
    """A mask for each picture; how to scan with them."""
    for name in "abcde":
        picture(tmp_path / "masks" / f"{name}.png", caption=None)
    return dict(mask="files", mask_dir=tmp_path / "masks")


def remember_masks(found):
    rows = numpy.arange(len(found.items.listings[0]))
    hashes = numpy.repeat(rows.astype(numpy.uint8)[:, None] + 1, 16, axis=1)
    found.remember(0, rows, hashes, hashes + 100)


def mask_content_of(found):
    return [int(row[0]) for row in found.items.listings[0].mask_content]


def test_masks_are_kept(folder, masks, tmp_path):
    first, _ = folder.scan(**masks)
    assert mask_content_of(first) == [0] * 5 and folder.scan()[0].items.listings[0].mask_content is None
    remember_masks(first)
    files = folder.files()
    for check in ("fast", "none"):
        found, read = folder.scan(check, **masks)
        assert read == [] and folder.files() == files
        assert content_of(found.items) == [1, 2, 3, 4, 5] and mask_content_of(found) == [101, 102, 103, 104, 105]
    (tmp_path / "masks" / "c.png").rename(tmp_path / "masks" / "c.webp")
    picture(tmp_path / "masks" / "e.png", (50, 50), caption=None)
    found, _ = folder.scan("none", **masks)
    assert found.items[2].mask == tmp_path / "masks" / "c.png" and mask_content_of(found) == [101, 102, 103, 104, 105]
    found, read = folder.scan(**masks)
    assert read == [] and found.items[2].mask == tmp_path / "masks" / "c.webp"
    assert content_of(found.items) == [1, 2, 3, 4, 5] and mask_content_of(found) == [101, 102, 0, 104, 0]
    assert mask_content_of(folder.scan(class_tokens="other settings", **masks)[0]) == [101, 102, 0, 104, 0]


def test_masks_follow_their_pictures(folder, masks, tmp_path):
    remember_masks(folder.scan(**masks)[0])
    for name in ("bb", "f"):
        folder.add(name)
        picture(tmp_path / "masks" / f"{name}.png", caption=None)
    for path in (folder.path / "a.png", tmp_path / "masks" / "a.png"):
        path.unlink()
    found, read = folder.scan(**masks)
    assert read == ["bb.png", "bb.txt", "f.png", "f.txt"]
    assert content_of(found.items) == [2, 0, 3, 4, 5, 0] and mask_content_of(found) == [102, 0, 103, 104, 105, 0]
    remember_masks(found)
    assert mask_content_of(folder.scan(**masks)[0]) == [101, 102, 103, 104, 105, 106]


def test_full_forgets_masks_and_those_written_just_now_are_not_believed(folder, masks, tmp_path):
    os.utime(tmp_path / "masks" / "b.png")
    remember_masks(folder.scan(**masks)[0])
    assert mask_content_of(folder.scan(**masks)[0]) == [101, 0, 103, 104, 105]
    make_older(tmp_path / "masks" / "b.png")
    found, _ = folder.scan(**masks)
    assert mask_content_of(found) == [101, 0, 103, 104, 105]
    remember_masks(found)
    assert mask_content_of(folder.scan(**masks)[0]) == [101, 102, 103, 104, 105]
    found, read = folder.scan("full", **masks)
    assert read == ALL and mask_content_of(found) == [0] * 5


def test_a_mask_that_is_gone_since_it_was_listed(folder, masks, tmp_path, monkeypatch):
    """A sequence may name masks that are not there."""
    look_at = examine.look_at

    def look_late(chunks):
        (tmp_path / "masks" / "d.png").unlink()
        return look_at(chunks)
    with monkeypatch.context() as patch:
        patch.setattr(examine, "look_at", look_late)
        found, _ = folder.scan(**masks)
    assert [(problem.kind, problem.path) for problem in found.problems] == [(kinds.NO_MASK, tmp_path / "masks" / "d.png")]
    with pytest.raises(ValueError, match="d.png: the mask cannot be read: No such file"):
        found.raise_errors()
    remember_masks(found)
    picture(tmp_path / "masks" / "d.png", caption=None)
    found, read = folder.scan("none", **masks)
    assert read == [] and not found.problems and mask_content_of(found) == [101, 102, 103, 0, 105]


class Masked:
    """Three pictures with mask files, an index of them, and the names of the files that are opened."""

    def __init__(self, path, monkeypatch):
        self.path, self.opened = path, []
        for index in range(3):
            picture(path / "p" / f"{index}.png", (64, 64), seed=index)
            self.mask(index, index + 10)
        read = library.data.fill._read

        def counted(file, what):
            self.opened.append(f"{what} {file.name}")
            return read(file, what)
        monkeypatch.setattr(library.data.fill, "_read", counted)

    def mask(self, index, seed):
        picture(self.path / "m" / f"{index}.png", (64, 64), seed=seed, caption=None)

    def scan(self, check="fast", masks="m", **given):
        subset = subset_spec(self.path / "p", mask="files", mask_dir=self.path / masks, **given)
        return scan([dataset_spec(subset)], index_dir=lambda _: self.path / "p" / FOLDER, check=check)

    def start(self, *how, **given):
        """A run's start: (pictures encoded, files opened, the store, its rows)."""
        self.opened.clear()
        found = self.scan(*how, **given)
        found.raise_errors()
        encoder, store, rows = fill_pictures(found.items, batch_size=1, remember=found.remember)
        return len(encoder.pictures), sorted(self.opened), store, rows[:, 0]


@pytest.fixture
def masked(tmp_path, monkeypatch):
    return Masked(tmp_path, monkeypatch)


ALL_FILES = [f"{what} {index}.png" for what in ("mask", "picture") for index in range(3)]


def test_unchanged_masks_are_not_opened(masked):
    encoded, opened, store, rows = masked.start()
    assert encoded == 3 and opened == ALL_FILES and store.read(rows[0])["mask"].shape == (8, 8)
    for check in ("fast", "none"):
        assert masked.start(check)[:2] == (0, []) and masked.start(check)[3].tolist() == rows.tolist()
    assert masked.start("full")[:2] == (0, ALL_FILES)
    assert masked.start()[:2] == (0, [])
    os.utime(masked.path / "m" / "0.png")
    assert masked.start()[:2] == masked.start()[:2] == (0, ["mask 0.png"]), "just now: it is not believed"
    make_older(masked.path / "m" / "0.png")
    assert [masked.start()[:2] for _ in range(2)] == [(0, ["mask 0.png"]), (0, [])]
    (masked.path / "m").rename(masked.path / "elsewhere")
    assert [masked.start(masks="elsewhere")[:2] for _ in range(2)] == [(0, ALL_FILES[:3]), (0, [])], "no picture is read again"


def test_an_edited_mask_is_one_value_more(masked):
    _, _, _, before = masked.start()
    masked.mask(1, 99)
    assert masked.start("none")[:2] == (0, [])
    encoded, opened, store, after = masked.start()
    assert encoded == 1 and opened == ["mask 1.png", "picture 1.png"]
    assert not torch.equal(store.read(before[1])["mask"], store.read(after[1])["mask"])
    assert masked.start()[:2] == (0, [])
    masked.mask(1, 11)  # and back: the old value is still there
    assert [masked.start()[:2] for _ in range(2)] == [(0, ["mask 1.png"]), (0, [])]


def test_a_deleted_mask(masked):
    masked.start()
    scanned = masked.scan("full")
    (masked.path / "m" / "2.png").unlink()
    with pytest.raises(UserError, match="2.png: the mask cannot be read: No such file"):
        fill_pictures(scanned.items)
    with pytest.raises(UserError, match="no mask for 2.png"):
        masked.start()


def test_masks_count_for_nothing_beside_transparency(masked):
    """A sequence may name masks although its subset takes them from the pictures' transparency."""
    items = with_subset(masked.scan().items, mask="alpha", mask_dir=None)
    for encoded in (3, 0):
        assert len(fill_pictures(items, batch_size=1)[0].pictures) == encoded
    assert not [name for name in masked.opened if name.startswith("mask")]


def test_hashes_are_kept_while_the_work_goes_on(masked, monkeypatch):
    """A killed run leaves what it learned: the index is read here as the next run would read it."""
    monkeypatch.setattr(library.data.fill, "REMEMBER_SECONDS", -1)
    found, seen = masked.scan(), []

    def encode(pixels):
        listing = masked.scan().items.listings[0]
        seen.append((int(listing.content.any(axis=1).sum()), int(listing.mask_content.any(axis=1).sum())))
        return Encoder().image(pixels)
    fill_pictures(found.items, batch_size=1, encoder=SimpleNamespace(image=encode), remember=found.remember)
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_hashes_are_kept_when_the_work_fails(masked):
    found = masked.scan()

    def encode(pixels):
        raise UserError("no memory")
    with pytest.raises(UserError, match="no memory"):
        fill_pictures(found.items, batch_size=1, encoder=SimpleNamespace(image=encode), remember=found.remember)
    listing = masked.scan().items.listings[0]
    assert listing.content.any(axis=1).tolist() == listing.mask_content.any(axis=1).tolist() == [True, False, False]
