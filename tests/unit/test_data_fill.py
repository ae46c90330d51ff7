"""Filling the caches: what is encoded again and what is not, several ranks, masks and flips, and what stops it."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

import library.data.fill
import library.data.filling
from library.data.augment import Augment, View
from library.data.fill import fill_latents
from library.data.fill_text import fill_text
from library.data.filling import Ranks
from library.data.image import load_view, mask_to_cells, to_signal
from library.data.keys import FOLDER, LatentKeys, cache_folders, content_hash, text_keys
from library.data.store import Store
from library.errors import UserError
from tests.unit.data_helpers import dataset_file, made_up_items, one_folder, picture, scan_file, scan_folder


class Encoder:
    """Counts what it is asked for."""

    def __init__(self):
        self.pictures, self.captions = [], []

    def image(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.device.type == "cpu"
        self.pictures.append(len(pixels))
        return torch.nn.functional.avg_pool2d(to_signal(pixels), 8).repeat(1, 6, 1, 1)[:, :16]

    def text(self, captions):
        assert isinstance(captions, list)
        self.captions += captions
        values = torch.tensor([[len(caption) / 7, float(len(set(caption)))] for caption in captions])
        return {"t5": values, "t5_mask": values > 5, "length": values[:, 0].long()}


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        size = (96, 64) if index % 2 else (64, 64)
        picture(tmp_path / "pictures" / f"{index}.png", size, seed=index, caption=f"{index % 3} caption")
    return tmp_path / "pictures"


def with_subset(items, **changes):
    """The same items with other settings of their subsets."""
    specs = tuple(replace(spec, subsets=tuple(replace(subset, **changes) for subset in spec.subsets)) for spec in items.specs)
    return replace(items, specs=specs)


def flipping(items):
    return with_subset(items, augment=Augment(flip=True))


def store_for(items, kind="latents", to_disk=True, cache_dir=None):
    places, folders = cache_folders(items, cache_dir)
    return Store(places if to_disk else (), kind), folders


def fill_pictures(items, to_disk=True, identity="vae", encoder=None, batch_size=2, **more):
    encoder = encoder or Encoder()
    store, folders = store_for(items, to_disk=to_disk)
    rows = fill_latents(items, store, encoder.image, identity, batch_size, folders=folders, **more)
    return encoder, store, rows


def fill_captions(items, identity="t5", **more):
    encoder = Encoder()
    store, folders = store_for(items, "text")
    texts = [items.caption(index) for index in range(len(items))]
    return encoder, store, fill_text(texts, folders[items.listing], store, encoder.text, identity, 2, **more)


def latent_keys(items, content, mask_content, identity, flip):
    """Of all items; ``mask_content`` None: there are no mask files."""
    masks = numpy.zeros_like(content) if mask_content is None else mask_content
    return LatentKeys(items, identity).of_many(numpy.arange(len(items)), flip, content, masks)


def test_everything_once_then_nothing(folder):
    items, seen = one_folder(folder), []
    encoder, store, rows = fill_pictures(items, progress=lambda *numbers: seen.append(numbers))
    assert sorted(encoder.pictures) == [1, 2, 2] and seen[-1] == (5, 5, 5)
    assert rows[:, 1].tolist() == [-1] * 5
    again, other, same = fill_pictures(items)
    assert again.pictures == []
    for index, item in enumerate(items):
        value = store.read(rows[index, 0])
        assert value.keys() == {"latents"} and value["latents"].dtype == torch.float16
        assert value["latents"].shape == (16, item.placement.bucket[1] // 8, item.placement.bucket[0] // 8)
        pixels, _ = load_view(item.path, View(item.placement), "here")
        assert torch.equal(value["latents"], encoder.image(pixels[None])[0].half())
        assert torch.equal(value["latents"], other.read(same[index, 0])["latents"])


def test_each_caption_once_then_nothing(folder):
    items = one_folder(folder)
    encoder, store, rows = fill_captions(items)
    assert sorted(encoder.captions) == ["0 caption", "1 caption", "2 caption"]
    assert rows.tolist()[:2] == rows.tolist()[3:] and len(set(rows.tolist())) == 3
    value = store.read(rows[1])
    assert value["t5"].dtype == torch.float16 and value["t5_mask"].dtype == torch.bool and value["length"].dtype == torch.int64
    assert value["t5"].tolist() == pytest.approx([9 / 7, len(set("1 caption"))], abs=1e-3)
    assert fill_captions(items)[0].captions == []


def test_memory_and_disk_hold_the_same(folder):
    items = flipping(one_folder(folder))
    (_, disk, at), (_, memory, where) = fill_pictures(items), fill_pictures(items, to_disk=False)
    assert (at >= 0).all() and (where >= 0).all()
    for one, other in zip(at.reshape(-1), where.reshape(-1), strict=True):
        assert torch.equal(disk.read(one)["latents"], memory.read(other)["latents"])


def test_shards_lie_beside_the_pictures_or_where_told(folder, tmp_path):
    items = one_folder(folder)
    fill_pictures(items)
    assert list((folder / FOLDER).glob("latents-*.safetensors"))
    store, folders = store_for(items, cache_dir=tmp_path / "x")
    fill_latents(items, store, Encoder().image, "vae", 1, folders=folders)
    assert list((tmp_path / "x").glob("latents-*.safetensors")) and folders.tolist() == [0]


def test_several_folders_each_keep_their_own(tmp_path):
    for name in ("a", "b"):
        for index in range(3):
            picture(tmp_path / name / f"{index}.png", (64, 64), seed=index + 10 * (name == "b"))
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / name).as_posix()}'\n" for name in ("a", "b"))
    items = scan_file(dataset_file(tmp_path, f"[[datasets]]\nresolution = 64\nbucket_reso_steps = 16\n{subsets}")).items
    _, store, rows = fill_pictures(items)
    assert len(store) == 6 and (rows[:, 0] >= 0).all()
    for name in ("a", "b"):
        assert len(Store([tmp_path / name / FOLDER], "latents")) == 3


def test_edited_picture_is_the_only_one_encoded_again(folder):
    fill_pictures(one_folder(folder))
    picture(folder / "3.png", (96, 64), seed=99, caption=None)
    assert fill_pictures(one_folder(folder))[0].pictures == [1]
    picture(folder / "3.png", (96, 64), seed=3, caption=None)  # and back: the old value is still there
    assert fill_pictures(one_folder(folder))[0].pictures == []


def test_edited_caption_is_the_only_one_encoded_again(folder):
    fill_captions(one_folder(folder))
    (folder / "2.txt").write_text("another caption")
    assert fill_captions(one_folder(folder))[0].captions == ["another caption"]


def test_renamed_and_copied_pictures_are_not_encoded_again(folder):
    fill_pictures(one_folder(folder))
    for suffix in (".png", ".txt"):
        (folder / f"0{suffix}").rename(folder / f"9{suffix}")
        (folder / f"7{suffix}").write_bytes((folder / f"1{suffix}").read_bytes())
    assert fill_pictures(one_folder(folder))[0].pictures == []


def test_copies_are_encoded_once(folder):
    for name in ("7", "8"):
        for suffix in (".png", ".txt"):
            (folder / f"{name}{suffix}").write_bytes((folder / f"1{suffix}").read_bytes())
    encoder, store, rows = fill_pictures(one_folder(folder))
    assert sum(encoder.pictures) == 5 and rows[1, 0] == rows[-1, 0] == rows[-2, 0] >= 0 and len(store) == 5


def test_flipping_added_later_encodes_only_the_flipped_ones(folder):
    items = one_folder(folder)
    _, _, plain = fill_pictures(items)
    encoder, store, rows = fill_pictures(flipping(items))
    assert sum(encoder.pictures) == 5 and (rows >= 0).all()
    again, _, unflipped = fill_pictures(flipping(items), flips=False)
    assert again.pictures == [] and (unflipped[:, 1] == -1).all()
    for index, item in enumerate(items):
        pixels, _ = load_view(item.path, View(item.placement, flip=True), "here")
        assert torch.equal(store.read(rows[index, 1])["latents"], encoder.image(pixels[None])[0].half())


def test_known_hash_spares_opening_the_file(folder, monkeypatch):
    scanned = scan_folder(folder, index_dir=folder / FOLDER)
    seen = []

    def remember(listing, rows, content, mask_content):
        assert mask_content is None
        seen.append((listing, rows.tolist(), [one.tobytes() for one in content]))
        scanned.remember(listing, rows, content, mask_content)
    _, _, rows = fill_pictures(scanned.items, remember=remember)
    assert [(listing, where) for listing, where, _ in seen] == [(0, [0, 1, 2, 3, 4])]
    assert seen[0][2] == [content_hash((folder / f"{index}.png").read_bytes()) for index in range(5)]
    again = scan_folder(folder, index_dir=folder / FOLDER)
    monkeypatch.setattr(library.data.fill, "_read", lambda path, what: pytest.fail(f"{path} was opened"))
    assert (fill_pictures(again.items, remember=lambda *new: pytest.fail("nothing is new"))[2] == rows).all()


def test_known_hash_of_a_file_that_changed_unseen_is_corrected(folder):
    items = one_folder(folder)
    items.listings[0].content[:] = 7  # as an index would give it that was told to look at no file
    encoder, store, rows = fill_pictures(items)
    assert sum(encoder.pictures) == 5 and (rows[:, 0] >= 0).all()
    assert fill_pictures(one_folder(folder))[0].pictures == []


def test_another_encoder_bucket_flip_mask_or_interpolation_is_another_key(folder):
    item, larger = one_folder(folder), one_folder(folder, resolution=128)
    alpha = one_folder(folder, subset="alpha_mask = true")
    box = one_folder(folder, subset="resize_interpolation = 'box'")
    content = numpy.arange(80, dtype=numpy.uint8).reshape(5, 16)
    keys = [latent_keys(items, hashes, mask, identity, flip)[1].tobytes()
            for items in (item, larger, alpha, box) for hashes in (content, content + 1)
            for mask in (None, content + 2) for identity in ("v", "w") for flip in (False, True)]
    assert len(set(keys)) == len(keys) == 64
    without = latent_keys(item, content, None, "v", False)
    assert (latent_keys(item, content, numpy.zeros_like(content), "v", False) == without).all()
    texts = [text_keys(["a", "b"], identity, trim) for identity in ("v", "w") for trim in ({}, {"t5": "t5_mask"})]
    assert len({key.tobytes() for some in texts for key in some}) == 8


def test_keys_follow_the_placement_of_every_item():
    """The columns that keys are made of agree with ``Rule.place`` for each picture."""
    sizes = [(40 + 7 * index % 90, 40 + 13 * index % 70) for index in range(200)]
    items = made_up_items(sizes)
    content = numpy.zeros((200, 16), dtype=numpy.uint8)
    keys = [key.tobytes() for key in latent_keys(items, content, None, "v", False)]
    places = [items[index].placement for index in range(200)]
    assert len(set(keys)) == len(set(places)) > 20
    assert len(set(zip(keys, places, strict=True))) == len(set(keys))


@pytest.mark.parametrize("flip", [False, True])
def test_alpha_masks_are_kept_beside_the_latents(tmp_path, flip):
    from PIL import Image

    colours = numpy.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=numpy.uint8)
    (tmp_path / "p").mkdir()
    Image.fromarray(colours).save(tmp_path / "p" / "a.png")
    picture(tmp_path / "p" / "b.png", (96, 64))
    (tmp_path / "p" / "a.txt").write_text("a caption")
    items = flipping(one_folder(tmp_path / "p", subset="alpha_mask = true"))
    _, store, rows = fill_pictures(items)
    stored = store.read_many(rows[:, int(flip)])
    _, mask = load_view(items[0].path, View(items[0].placement, flip=flip), "here", "alpha")
    expected = mask_to_cells(mask[None], *stored["latents"].shape[2:])[0, 0]
    assert stored["mask"].dtype == torch.uint8 and (stored["mask"][0] / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert (stored["mask"][1] == 255).all()


def test_values_that_half_precision_cannot_hold(folder):
    items = one_folder(folder)
    for value, words in ((1e6, "range of half precision"), (float("nan"), "NaN")):
        def encode(pixels, value=value):
            result = torch.zeros(len(pixels), 16, 4, 4)
            result[-1, 0, 0, 0] = value
            return result
        with pytest.raises(UserError, match=words) as caught:
            fill_pictures(items, encoder=SimpleNamespace(image=encode), to_disk=False)
        assert str(folder) in str(caught.value) and ".png" in str(caught.value)
    store = Store((), "text")
    with pytest.raises(UserError, match="0 caption"):
        fill_text(["0 caption"], numpy.array([0]), store, lambda words: {"t5": torch.full((len(words), 2), 1e6)}, "t5", 2)


def test_undecodable_pictures_are_gathered_and_the_rest_is_kept(folder):
    for seed, name in enumerate(("a", "b")):
        path = picture(folder / f"{name}.jpg", (96, 64), seed=seed)
        path.write_bytes(path.read_bytes()[:-300])
    items, told = one_folder(folder), []
    with pytest.raises(UserError) as caught:
        fill_pictures(items, remember=lambda listing, rows, *hashes: told.extend(rows.tolist()))
    assert len(caught.value.problems) == 2 and all(".jpg" in line and "damaged" in line for line in caught.value.problems)
    assert sorted(told) == [index for index, item in enumerate(items) if item.path.suffix == ".png"]
    for name in ("a", "b"):
        (folder / f"{name}.jpg").unlink()
    assert fill_pictures(one_folder(folder))[0].pictures == []


def test_picture_removed_after_the_scan(folder):
    items = one_folder(folder)
    (folder / "4.png").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        fill_pictures(items)
    (folder / "4.txt").unlink()
    assert fill_pictures(one_folder(folder))[0].pictures == []


def test_folder_that_cannot_be_written(folder):
    items = one_folder(folder)
    (folder / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(UserError, match="--cache_dir"):
        fill_pictures(items)


def test_a_drive_that_does_not_tell_its_size_is_tried(folder, monkeypatch):
    items = one_folder(folder)
    monkeypatch.setattr(library.data.filling.shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=0))
    assert (fill_pictures(items)[2][:, 0] >= 0).all()


def test_disk_that_is_too_small_is_told_before_it_is_full(folder, monkeypatch):
    items = one_folder(folder)
    monkeypatch.setattr(library.data.filling.shutil, "disk_usage", lambda path: SimpleNamespace(free=5000, total=10**6))
    encoder = Encoder()
    with pytest.raises(UserError, match="0.01 MB more.*0.005 MB.*--cache_dir"):
        fill_pictures(items, encoder=encoder)
    assert sum(encoder.pictures) <= 4
    with pytest.raises(UserError, match="--cache_dir"):
        store, folders = store_for(items, "text")
        fill_text(["a"], numpy.array([0]), store, lambda words: {"t5": torch.zeros(1, 2000, 2)}, "t5", 1)
    fill_pictures(items, to_disk=False)


def test_shards_that_vanish_while_filling_are_made_again(folder, monkeypatch):
    items, encoder = one_folder(folder), Encoder()
    store, folders = store_for(items)
    refresh, times = store.refresh, []

    def refresh_late():
        times.append(0)
        if len(times) == 1:
            for path in (folder / FOLDER).glob("latents-*"):
                path.unlink()
        refresh()
    monkeypatch.setattr(store, "refresh", refresh_late)
    rows = fill_latents(items, store, encoder.image, "vae", 2, folders=folders)
    assert sum(encoder.pictures) == 10 and (rows[:, 0] >= 0).all()
    monkeypatch.setattr(store, "find", lambda keys: numpy.full(len(keys), -1))
    with pytest.raises(UserError, match="cannot be found again"):
        fill_latents(items, store, encoder.image, "vae", 2, folders=folders)


def test_trimmed_text_reads_as_zeros_after_the_last_token(folder):
    def encode(words):
        count = torch.tensor([len(word) for word in words])
        return {"t5": torch.ones(len(words), 12, 3), "mask": torch.arange(12) < count[:, None],
                "pooled": torch.ones(len(words), 12)}
    store = Store([folder / FOLDER], "text")
    words = ["ab", "a caption", "", "twelve chars"]
    rows = fill_text(words, numpy.zeros(4, dtype=int), store, encode, "t5", 3, trim={"t5": "mask"})
    stored, whole = store.read_many(rows), encode(words)
    assert torch.equal(stored["mask"], whole["mask"]) and torch.equal(stored["pooled"].float(), whole["pooled"])
    assert stored["t5"].shape == (4, 12, 3)
    for index, word in enumerate(words):
        real = max(len(word), 1)  # an empty text keeps its first row
        assert (stored["t5"][index, :real] == 1).all() and (stored["t5"][index, real:] == 0).all()
    size = sum(path.stat().st_size for path in (folder / FOLDER).glob("text-*"))
    whole_rows = fill_text(words, numpy.zeros(4, dtype=int), store, encode, "t5", 3)
    assert sum(path.stat().st_size for path in (folder / FOLDER).glob("text-*")) - size > 100
    assert not set(rows.tolist()) & set(whole_rows.tolist())


class Group:
    """Ranks as threads: what they exchange is pickled as between processes."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)

    def rank(self, number):
        def exchange(value):
            self.slots[number] = pickle.dumps(value)
            self.barrier.wait(30)
            values = [pickle.loads(slot) for slot in self.slots]
            self.barrier.wait(30)
            return values
        return Ranks(number, self.size, exchange)

    def run(self, work):
        with ThreadPoolExecutor(self.size) as pool:
            return [future.result() if future.exception() is None else future.exception()
                    for future in [pool.submit(work, self.rank(number)) for number in range(self.size)]]


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_see_it_all(folder, to_disk, size, monkeypatch):
    monkeypatch.setattr(library.data.filling, "EXCHANGED_BYTES", 3000)  # several pieces
    items, told = flipping(one_folder(folder)), []
    (_, alone, expected), encoders = fill_pictures(items, to_disk=False), [Encoder() for _ in range(size)]

    def work(ranks):
        return fill_pictures(items, to_disk=to_disk, encoder=encoders[ranks.rank], batch_size=1, ranks=ranks,
                             remember=lambda *new: told.append((ranks.rank, *new)))
    results = Group(size).run(work)
    assert sum(sum(encoder.pictures) for encoder in encoders) == 10 and all(encoder.pictures for encoder in encoders)
    for rank in range(size):  # each tells its own, and the first one tells all
        mine = sorted(row for teller, _, rows, *_ in told if teller == rank for row in rows.tolist())
        assert mine == [0, 1, 2, 3, 4] if rank == 0 else 0 < len(mine) < 5
    for _, store, rows in results:
        for one, other in zip(rows.reshape(-1), expected.reshape(-1), strict=True):
            assert torch.equal(store.read(one)["latents"], alone.read(other)["latents"])
    captions = [Encoder() for _ in range(size)]
    words = [f"word {index}" for index in range(7)] * 2

    def write(ranks):
        store = Store([folder / FOLDER] if to_disk else (), "text")
        return store, fill_text(words, numpy.zeros(14, dtype=int), store, captions[ranks.rank].text, "t5", 2, ranks=ranks)
    for store, rows in Group(size).run(write):
        assert store.read_many(rows)["t5"][:, 0].tolist() == pytest.approx([6 / 7] * 14, abs=1e-3)
    assert sorted(word for encoder in captions for word in encoder.captions) == sorted(words[:7])


def test_ranks_that_read_different_indexes_agree(folder):
    """Another run adds to the index while the ranks of this one read it."""
    fill_pictures(one_folder(folder))
    knowing = one_folder(folder)
    for index in range(4):
        knowing.listings[0].content[index] = numpy.frombuffer(content_hash((folder / f"{index}.png").read_bytes()), numpy.uint8)

    def work(ranks):
        items = one_folder(folder) if ranks.rank else knowing
        return fill_pictures(items, ranks=ranks)
    results = Group(2).run(work)
    assert all(not encoder.pictures for encoder, *_ in results) and results[0][2].tolist() == results[1][2].tolist()


def test_a_mistake_of_one_rank_stops_all(folder):
    items = one_folder(folder)

    def work(ranks):
        def encode(pixels):
            if ranks.rank == 1:
                raise UserError("no memory", place="there", remedy="buy some")
            return Encoder().image(pixels)
        return fill_pictures(items, encoder=SimpleNamespace(image=encode), batch_size=1, ranks=ranks)
    results = Group(3).run(work)
    assert [str(error) for error in results] == ["there: no memory; buy some"] * 3
    assert len(Store([folder / FOLDER], "latents")) == 3  # what the others did is kept: two of the five were that rank's
