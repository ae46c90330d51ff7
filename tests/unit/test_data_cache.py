"""Caches: what is encoded again and what is not, damaged files, several writers, sudden death."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

import library.data.cache
from library.data.cache import Cache, latent_key, opener, text_key
from library.data.fill import fill_latents, fill_text
from library.errors import UserError
from tests.unit.data_helpers import one_folder, picture


class Encoder:
    """Counts what it is asked for."""

    def __init__(self):
        self.pictures, self.captions = [], []

    def image(self, pixels):
        assert pixels.dtype == torch.float32 and -1 <= pixels.min() and pixels.max() <= 1
        self.pictures.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 6, 1, 1)[:, :16]

    def text(self, captions):
        assert isinstance(captions, list)
        self.captions += captions
        values = torch.tensor([[len(caption) / 7, ord(caption[0])] for caption in captions])
        return {"t5": values, "t5_mask": values > 50, "length": values[:, 0].long()}


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        size = (96, 64) if index % 2 else (64, 64)
        picture(tmp_path / "pictures" / f"{index}.png", size, seed=index, caption=f"{index % 3} caption")
    return tmp_path / "pictures"


def fill(folder, to_disk=True, identity="vae", **more):
    encoder, items = Encoder(), one_folder(folder)
    cache_for = opener(None, to_disk)
    latents = fill_latents(items, cache_for, encoder.image, identity, 2, **more)
    text = fill_text(items, cache_for, encoder.text, identity, 2)
    return encoder, items, latents, text


def test_everything_once_then_nothing(folder):
    seen = []
    encoder, items, latents, text = fill(folder, progress=lambda *numbers: seen.append(numbers))
    assert sorted(encoder.pictures) == [1, 2, 2] and encoder.captions == ["0 caption", "1 caption", "2 caption"]
    assert seen[-1] == (5, 5) and [done for done, _ in seen] == sorted({done for done, _ in seen})
    again, _, same, same_text = fill(folder)
    assert again.pictures == [] and again.captions == []
    for item, one, other in zip(items, latents, same, strict=True):
        value = one.read()["latents"]
        assert value.dtype == torch.float16 and value.shape == (16, item.placement.bucket[1] // 8, item.placement.bucket[0] // 8)
        assert torch.equal(value, other.read()["latents"])
    value = text["1 caption"].read()
    assert value["t5"].dtype == torch.float16 and value["t5_mask"].dtype == torch.bool and value["length"].dtype == torch.int64
    assert value["t5"].tolist() == pytest.approx([9 / 7, ord("1")], abs=1e-3)
    assert same_text.keys() == text.keys()


def test_memory_and_disk_hold_the_same(folder):
    (_, _, disk, text_disk), (_, _, memory, text_memory) = fill(folder), fill(folder, to_disk=False)
    for one, other in zip(disk, memory, strict=True):
        assert torch.equal(one.read()["latents"], other.read()["latents"])
    assert all(torch.equal(text_disk[caption].read()["t5"], text_memory[caption].read()["t5"]) for caption in text_disk)


def test_files_lie_beside_the_pictures_or_where_told(folder, tmp_path):
    _, _, latents, _ = fill(folder)
    files = sorted((folder / ".kiln_cache").rglob("*"))
    assert latents[0].cache.path(latents[0].key) in files and sum(path.is_file() for path in files) == 5 + 3
    assert latents[0].cache.path(latents[0].key).parent.name == latents[0].key[:2]
    item = one_folder(folder)[0]
    assert opener(tmp_path / "x", True)(item).directory == tmp_path / "x"
    assert opener(tmp_path / "x", False)(item).directory is None


def test_edited_picture_is_the_only_one_encoded_again(folder):
    fill(folder)
    picture(folder / "3.png", (96, 64), seed=99, caption=None)
    encoder, *_ = fill(folder)
    assert encoder.pictures == [1] and encoder.captions == []
    picture(folder / "3.png", (96, 64), seed=3, caption=None)  # and back: the old value is still there
    assert fill(folder)[0].pictures == []


def test_edited_caption_is_the_only_one_encoded_again(folder):
    fill(folder)
    (folder / "2.txt").write_text("another caption")
    encoder, *_ = fill(folder)
    assert encoder.pictures == [] and encoder.captions == ["another caption"]


def test_renamed_and_copied_pictures_are_not_encoded_again(folder):
    fill(folder)
    (folder / "0.png").rename(folder / "9.png")
    (folder / "0.txt").rename(folder / "9.txt")
    (folder / "7.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "7.txt").write_text("1 caption")
    encoder, *_ = fill(folder)
    assert encoder.pictures == [] and encoder.captions == []


def test_another_encoder_or_placement_is_another_key(folder):
    fill(folder)
    encoder, *_ = fill(folder, identity="another")
    assert sum(encoder.pictures) == 5 and len(encoder.captions) == 3
    item, other = one_folder(folder)[0], one_folder(folder, resolution=128)[0]
    keys = {latent_key(hash_, identity, placement) for hash_ in ("a", "b") for identity in ("v", "w")
            for placement in (item.placement, other.placement)} | {text_key("a", "v"), text_key("a", "w"), text_key("b", "v")}
    assert len(keys) == 8 + 3


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "garbage", "header"])
def test_damaged_file_is_made_again_with_a_warning(folder, damage, monkeypatch):
    _, _, latents, _ = fill(folder)
    path = latents[2].cache.path(latents[2].key)
    good = path.read_bytes()
    path.write_bytes({"truncated": good[:-5], "emptied": b"", "flipped": good[:-1] + bytes([good[-1] ^ 1]),
                      "garbage": b"\xff" * 100,
                      "header": good[:8] + b"[1]".ljust(int.from_bytes(good[:8], "little")) + b"0" * 9}[damage])
    warnings = []
    monkeypatch.setattr(library.data.cache.log, "warning", lambda words, *values: warnings.append(words % values))
    encoder, _, latents, _ = fill(folder)
    assert encoder.pictures == [1] and encoder.captions == []
    assert len(warnings) == 1 and str(path) in warnings[0] and "damaged" in warnings[0]
    assert path.read_bytes() == good


def test_file_lost_while_training_is_an_error_not_a_crash(folder):
    _, _, latents, _ = fill(folder)
    latents[1].cache.path(latents[1].key).unlink()
    with pytest.raises(UserError, match="start again") as caught:
        latents[1].read()
    assert "1.png" in str(caught.value)


def test_values_that_half_precision_cannot_hold(folder):
    items = one_folder(folder)
    for value, words in ((1e6, "range of half precision"), (float("nan"), "NaN")):
        def encode(pixels, value=value):
            result = torch.zeros(len(pixels), 16, 4, 4)
            result[-1, 0, 0, 0] = value
            return result
        cache = Cache(None)
        with pytest.raises(UserError, match=words) as caught:
            fill_latents(items, lambda item: cache, encode, "vae", 2)
        assert str(folder) in str(caught.value) and ".png" in str(caught.value)
    with pytest.raises(UserError, match="0 caption"):
        fill_text(items, lambda item: cache, lambda captions: {"t5": torch.full((len(captions), 2), 1e6)}, "t5", 2)


def test_undecodable_pictures_are_gathered_and_the_rest_is_kept(folder):
    for seed, name in enumerate(("a", "b")):
        path = picture(folder / f"{name}.jpg", (96, 64), seed=seed)
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError) as caught:
        fill(folder)
    assert len(caught.value.problems) == 2 and all(".jpg" in line and "damaged" in line for line in caught.value.problems)
    for name in ("a", "b"):
        (folder / f"{name}.jpg").unlink()
    assert fill(folder)[0].pictures == []


def test_folder_that_cannot_be_written(folder):
    (folder / ".kiln_cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="--cache_dir"):
        fill(folder)
    with pytest.raises(UserError, match="--cache_dir"):
        Cache(folder / ".kiln_cache").put("ab", {"a": torch.zeros(1)})


def value_of(writer):
    return {"latents": torch.full((64, 64), float(writer)), "other": torch.arange(writer + 1)}


def write_often(directory, writer, count):
    cache = Cache(directory)
    for _ in range(count):
        cache.put("ab" * 20, value_of(writer))


def test_two_processes_writing_one_key_leave_one_whole_value(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_often, args=(tmp_path, writer, 40)) for writer in (1, 2)]
    for process in processes:
        process.start()
    cache, reads = Cache(tmp_path), 0
    while any(process.is_alive() for process in processes):
        value = cache.get("ab" * 20)
        if value is not None:
            writer = len(value["other"]) - 1
            assert torch.equal(value["latents"], value_of(writer)["latents"])
            reads += 1
        else:
            time.sleep(0.01)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert cache.get("ab" * 20) is not None and reads > 0
    assert [path.name for path in (tmp_path / "ab").iterdir()] == [f"{'ab' * 20}.safetensors"]


def write_forever(directory, ready):
    cache, index = Cache(directory), 0
    while True:
        cache.put(f"{index:040x}", {"latents": torch.full((64, 64), float(index))})
        index += 1
        if index == 3:
            ready.set()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_writer_leaves_whole_values_only(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=write_forever, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = Cache(tmp_path)
    paths = sorted(tmp_path.rglob("*.safetensors"))
    assert len(paths) >= 3
    for path in paths:
        assert torch.equal(cache.get(path.stem)["latents"], torch.full((64, 64), float(int(path.stem, 16))))
