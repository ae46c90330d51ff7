"""tools/cache.py: overview, check and compaction of shards, and the import of npz latents."""

import os

import numpy
import pytest
import torch
from PIL import Image

from library.architectures.base import NpzLayout
from library.data import maintenance, npz_import, store_writer
from library.data.keys import LatentKeys, content_hash
from library.data.shards import mark_bad, shard_files
from library.data.store import Store
from tests.unit.data_helpers import one_folder, picture
from tools import cache as tool

LAYOUT = NpzLayout(("{stem}_{width:04d}x{height:04d}_x.npz",), sized_keys=True, shift=1.0, scale=2.0)


def keys_of(*numbers: int) -> numpy.ndarray:
    return numpy.array([list(number.to_bytes(16, "little")) for number in numbers], dtype=numpy.uint8)


def fill(folder, numbers, kind="latents", value=None):
    before = set(shard_files(folder))
    with Store((folder,), kind).writer() as writer:
        for number in numbers:
            writer.put(number.to_bytes(16, "little"), {"x": torch.full((50,), float(number if value is None else value))})
    return sorted(set(shard_files(folder)) - before)


def values(folder, numbers, kind="latents"):
    store = Store((folder,), kind)
    rows = store.find(keys_of(*numbers))
    return [None if row < 0 else store.read(row)["x"][0].item() for row in rows]


def flip_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_info_tells_what_is_there(tmp_path, capsys):
    cache = tmp_path / "pictures" / ".kiln_cache"
    fill(cache, [1, 2])
    (second,) = fill(cache, [2, 3])
    fill(cache, [4], kind="text")
    mark_bad(second, keys_of(3).tobytes())
    assert tool.main(["info", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert str(cache) in told and "text: 1 records in 1 files" in told
    assert "latents: 4 records in 2 files" in told and "1 repeated, 1 damaged" in told and "4 of x F32 50" in told


@pytest.mark.parametrize("command", ["info", "verify", "compact"])
def test_a_folder_without_a_cache_is_a_mistake(tmp_path, capsys, command):
    (tmp_path / "model-00001-of-2.safetensors").touch()  # not every such file is a cache
    assert tool.main([command, str(tmp_path)]) == 2
    assert "no cache" in capsys.readouterr().err


def test_verify_names_what_is_damaged_and_repairs_when_asked(tmp_path, capsys):
    (first,), (second,) = fill(tmp_path, [1, 2, 3]), fill(tmp_path, [4])
    assert tool.main(["verify", str(tmp_path)]) == 0
    assert "no faults" in capsys.readouterr().out
    flip_byte(first, 4096 + 250)  # of the second record
    os.truncate(second, 4200)
    assert tool.main(["verify", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "record 1" in told and str(second) in told and "2 faults" in told and second.exists()
    assert tool.main(["verify", "--repair", str(tmp_path)]) == 1
    assert not second.exists() and values(tmp_path, [1, 2, 3, 4]) == [1, None, 3, None]
    capsys.readouterr()
    assert tool.main(["verify", str(tmp_path)]) == 0  # nothing new


def test_compact_merges_small_shards_and_leaves_out_what_nobody_reads(tmp_path, capsys):
    fill(tmp_path, [1, 2])
    fill(tmp_path, [2, 3], value=99)  # 2 again: the first one wins, here and after
    (noted,) = fill(tmp_path, [4, 5])
    (altered,) = fill(tmp_path, [6, 7])
    (cut,) = fill(tmp_path, [8])
    mark_bad(noted, keys_of(4).tobytes())
    flip_byte(altered, 4096 + 3)
    os.truncate(cut, 4100)
    fill(tmp_path, [1], kind="text")
    Store((tmp_path,), "latents")  # sets the truncated one aside
    assert tool.main(["compact", str(tmp_path)]) == 0
    assert "record 0" in capsys.readouterr().out
    assert values(tmp_path, range(1, 9)) == [1, 2, 99, None, 5, None, 7, None]
    assert values(tmp_path, [1], "text") == [1]
    left = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert left == ["latents", "text"]  # one shard each, and nothing else
    before = set(tmp_path.iterdir())
    assert tool.main(["compact", str(tmp_path)]) == 0
    assert set(tmp_path.iterdir()) == before  # nothing more to do


def test_compact_leaves_large_shards_alone_and_keeps_to_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "SHARD_RECORDS", 4)
    large = fill(tmp_path, range(4))
    for number in range(4, 15):
        fill(tmp_path, [number])
    maintenance.compact(tmp_path, print)
    assert large[0].exists() and len(shard_files(tmp_path)) == 1 + 3
    assert values(tmp_path, range(15)) == list(range(15))


def test_compact_takes_the_whole_one_of_two_equal_records(tmp_path):
    (first,) = fill(tmp_path, [1], value=10)
    fill(tmp_path, [1], value=20)
    flip_byte(first, 4096 + 3)
    maintenance.compact(tmp_path, lambda line: None)
    assert values(tmp_path, [1]) == [20]


def test_compact_loses_nothing_when_it_is_cut_short(tmp_path, monkeypatch):
    for number in range(6):
        fill(tmp_path, [number])
    real = maintenance.ShardBuilder.finish

    def full(self):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(maintenance.ShardBuilder, "finish", full)
    with pytest.raises(ValueError, match="no space left"):
        maintenance.compact(tmp_path, print)
    monkeypatch.setattr(maintenance.ShardBuilder, "finish", real)
    assert values(tmp_path, range(6)) == list(range(6)) and not list(tmp_path.glob(".*"))


def npz(path, latents, size=(640, 512), bucket=(640, 512), suffix="_64x80", **more):
    scale = min(bucket[0] / size[0], bucket[1] / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    arrays = {"latents": latents, "original_size": numpy.array(size),
              "crop_ltrb": numpy.array([left, top, left + width, top + height]), **more}
    numpy.savez(path, **{name + suffix: value for name, value in arrays.items()})
    return path


def noise(*shape):
    return numpy.random.default_rng(0).normal(size=shape).astype(numpy.float32)


CELLS = (4, 64, 80)


def test_an_npz_file_is_read_in_our_scaling(tmp_path):
    latents, flipped = noise(*CELLS), noise(*CELLS)[:, :, ::-1]
    path = npz(tmp_path / "a.npz", latents, latents_flipped=flipped)
    plain, mirrored = npz_import.read(path, LAYOUT, (640, 512), (640, 512), CELLS)
    assert torch.equal(plain, ((torch.from_numpy(latents) - 1) * 2).half())
    assert torch.equal(mirrored, plain.flip(-1))
    unsized = NpzLayout(LAYOUT.files, sized_keys=False)
    again, none = npz_import.read(npz(path, latents, suffix=""), unsized, (640, 512), (640, 512), CELLS)
    assert torch.equal(again, torch.from_numpy(latents).half()) and none is None


@pytest.mark.parametrize("size, bucket", [((1000, 800), (640, 512)), ((3000, 1000), (832, 320)), ((333, 1000), (320, 832))])
def test_the_crop_of_a_picture_of_other_proportions_is_recognised(tmp_path, size, bucket):
    cells = (4, bucket[1] // 8, bucket[0] // 8)
    path = npz(tmp_path / "a.npz", noise(*cells), size, bucket, f"_{cells[1]}x{cells[2]}")
    npz_import.read(path, LAYOUT, size, bucket, cells)
    with pytest.raises(npz_import.Unfit, match="picture of"):
        npz_import.read(path, LAYOUT, (size[0] + 1, size[1]), bucket, cells)


def test_files_that_do_not_fit_say_why(tmp_path):
    def reason(path):
        with pytest.raises(npz_import.Unfit) as caught:
            npz_import.read(path, LAYOUT, (640, 512), (640, 512), CELLS)
        return str(caught.value)

    path, latents = tmp_path / "a.npz", noise(*CELLS)
    assert "80x64" in reason(npz(path, latents, suffix="_32x32"))
    assert "cropped" in reason(npz(path, latents, bucket=(512, 512)))
    assert "expected" in reason(npz(path, latents[:3]))
    assert "expected" in reason(npz(path, latents.astype(numpy.int64)))
    latents[0, 0, 0] = 1e30
    assert "not finite" in reason(npz(path, latents))
    os.truncate(path, 5000)
    assert "cannot be read" in reason(path)
    path.write_bytes(b"")
    assert "cannot be read" in reason(path)
    numpy.savez(path, latents_64x80=numpy.array([{}], dtype=object))
    assert "cannot be read" in reason(path)


def beside(item, **more):
    """The npz file of an item, with latents of its bucket."""
    (width, height), bucket = item.size, item.placement.bucket
    cells = (4, bucket[1] // 8, bucket[0] // 8)
    name = LAYOUT.files[0].format(stem=item.path.stem, width=width, height=height)
    return npz(item.path.with_name(name), noise(*cells), item.size, bucket, f"_{cells[1]}x{cells[2]}", **more)


def imported(items, folder, **options):
    store = Store((folder,), "latents")
    folders = numpy.zeros(len(items.listings), dtype=numpy.int64)
    return store, npz_import.import_latents(items, store, folders, "vae", LAYOUT, 4, 8, **options)


def rows_of(items, store, flip=False):
    content = numpy.array([list(content_hash(item.path.read_bytes())) for item in items], dtype=numpy.uint8)
    keys = LatentKeys(items, "vae").of_many(numpy.arange(len(items)), flip, content, numpy.zeros_like(content))
    return store.find(keys).tolist()


def test_latents_beside_pictures_become_the_records_a_run_looks_for(tmp_path):
    for number, size in enumerate([(96, 64), (64, 96), (70, 70)]):
        picture(tmp_path / "p" / f"{number}.png", size, seed=number)
    items = one_folder(tmp_path / "p", subset="flip_aug = true")
    flipped = items[0].placement.bucket
    beside(items[0], latents_flipped=noise(4, flipped[1] // 8, flipped[0] // 8)[:, :, ::-1])
    beside(items[1])
    store, done = imported(items, tmp_path / "cache")
    assert (done.records, done.known, done.without, done.unfit) == (3, 0, 1, [])
    assert [row >= 0 for row in rows_of(items, store)] == [True, True, False]
    assert [row >= 0 for row in rows_of(items, store, flip=True)] == [True, False, False]
    plain, mirrored = store.read(rows_of(items, store)[0]), store.read(rows_of(items, store, flip=True)[0])
    expected = ((torch.from_numpy(noise(4, flipped[1] // 8, flipped[0] // 8)) - 1) * 2).half()
    assert torch.equal(plain["latents"], expected) and torch.equal(mirrored["latents"], expected.flip(-1))
    again = imported(items, tmp_path / "cache")[1]
    assert (again.records, again.known) == (0, 2)


def test_a_file_of_a_longer_name_is_of_another_picture(tmp_path):
    """``img1`` neither takes the latents of ``img10`` nor its size, as looking for names that begin alike would have it."""
    for name, size in (("img1", (64, 96)), ("img10", (96, 64))):
        picture(tmp_path / "p" / f"{name}.png", size)
    items = one_folder(tmp_path / "p")
    beside(items[1])
    store, done = imported(items, tmp_path / "cache")
    assert (done.records, done.without, done.unfit) == (1, 1, []) and [row >= 0 for row in rows_of(items, store)] == [False, True]
    assert [(item.path.stem, item.size) for item in items] == [("img1", (64, 96)), ("img10", (96, 64))]


def test_a_mask_comes_from_the_picture(tmp_path):
    alpha = numpy.zeros((64, 64, 4), dtype=numpy.uint8)
    alpha[:, :32, 3] = 255
    (tmp_path / "p").mkdir()
    Image.fromarray(alpha).save(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "a.txt").write_text("half", encoding="utf-8")
    items = one_folder(tmp_path / "p", subset="alpha_mask = true\nflip_aug = true")
    beside(items[0], latents_flipped=noise(4, 8, 8))
    store, done = imported(items, tmp_path / "cache")
    assert done.records == 2
    assert store.read(rows_of(items, store)[0])["mask"].tolist() == [[255] * 4 + [0] * 4] * 8
    assert store.read(rows_of(items, store, flip=True)[0])["mask"].tolist() == [[0] * 4 + [255] * 4] * 8


def test_what_cannot_be_trusted_is_not_imported(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 3
    picture(tmp_path / "p" / "turned.jpg", (64, 64), exif=turned)
    picture(tmp_path / "p" / "twin.png", (64, 64), seed=1)
    picture(tmp_path / "p" / "twin.webp", (64, 64), seed=2)
    picture(tmp_path / "p" / "edited.png", (64, 64), seed=3)
    picture(tmp_path / "p" / "cut.png", (64, 64), seed=4)
    items = one_folder(tmp_path / "p")
    files = {item.path.stem: beside(item) for item in items}
    os.utime(files["edited"], (1, 1))
    os.truncate(files["cut"], 100)
    _, done = imported(items, tmp_path / "cache")
    reasons = {path.name.split("_")[0]: reason for path, reason in done.unfit}
    assert done.records == 0 and sorted(reasons) == ["cut", "edited", "turned", "twin"]
    assert "EXIF" in reasons["turned"] and "extension" in reasons["twin"] and "older" in reasons["edited"]
    assert imported(items, tmp_path / "cache", ignore_dates=True)[1].records == 1


def test_an_unknown_training_script_is_named(capsys):
    assert tool.main(["import", "flux_trian.py", "--output_name", "x"]) == 2
    assert "did you mean 'flux_train.py'" in capsys.readouterr().err
