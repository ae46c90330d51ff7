"""The shard format and the lookup of keys."""

import json
import struct

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as some
from safetensors.numpy import load_file

from library.atomic import atomic_file
from library.data import shards
from library.data.lookup import Lookup
from library.data.open_files import OpenFiles
from library.data.shards import Damaged, Field, Foreign, ShardBuilder, open_shard

PAIR = (Field("wide", "F32", (2, 3)), Field("bytes", "U8", (5,), 9))


def write(path, records, kind="latents"):
    """``records``: (key, layout, bytes)."""
    with atomic_file(path) as file:
        shard = ShardBuilder(file, kind)
        for key, layout, data in records:
            shard.add(key, layout, [data])
        shard.finish()
    return path


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "latents-1.safetensors", [(key(i), PAIR, bytes([i]) * 29) for i in range(3)])


def test_a_shard_is_an_ordinary_safetensors_file(shard):
    tensors = load_file(shard)
    assert tensors["data"].tobytes() == b"".join(bytes([i]) * 29 for i in range(3)) + b"\0"  # padded to eight bytes
    assert tensors["keys"].tobytes() == b"".join(map(key, range(3)))
    assert tensors["offsets"].tolist() == [0, 29, 58] and tensors["lengths"].tolist() == [29, 29, 29]
    assert json.loads(tensors["layouts"].tobytes()) == [[["wide", "F32", [2, 3], None], ["bytes", "U8", [5], 9]]]


def test_what_was_written_is_what_is_opened(shard):
    opened = open_shard(shard)
    assert (opened.kind, len(opened), opened.layouts) == ("latents", 3, (PAIR,))
    assert opened.offsets.tolist() == [4096, 4096 + 29, 4096 + 58]
    assert opened.keys.tobytes() == b"".join(map(key, range(3)))
    assert not opened.bad().any()


def test_every_different_layout_is_kept(tmp_path):
    layouts = [(Field("t", "F16", (length, 4), 8),) for length in (0, 3, 8, 3)]
    path = write(tmp_path / "text-1.safetensors", [(key(i), layout, bytes(layout[0].nbytes)) for i, layout in enumerate(layouts)])
    opened = open_shard(path)
    assert [opened.layouts[number] for number in opened.layout] == layouts
    assert len(opened.layouts) == 3
    assert layouts[1][0].full_shape == (8, 4)


@pytest.mark.parametrize("size", [0, 100, 4095, 4096, 4200, -1])
def test_a_shard_that_is_cut_off_is_damaged(shard, size):
    data = shard.read_bytes()
    shard.write_bytes(data[:size])
    with pytest.raises(Damaged):
        open_shard(shard)


def test_a_shard_that_grew_is_damaged(shard):
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(Damaged, match="bytes instead of"):
        open_shard(shard)


def test_any_flipped_byte_of_the_index_is_noticed(shard):
    data = shard.read_bytes()
    index = 4096 + 88  # 3 x 29 bytes of data, padded
    for at in range(index, len(data)):
        altered = bytearray(data)
        altered[at] ^= 1
        shard.write_bytes(altered)
        with pytest.raises(Damaged, match="checksum of its index"):
            open_shard(shard)


def test_an_unreadable_header_is_damage(shard):
    data = bytearray(shard.read_bytes())
    data[8] = ord("x")
    shard.write_bytes(data)
    with pytest.raises(Damaged, match="header"):
        open_shard(shard)


def test_files_of_others_are_foreign(tmp_path, shard):
    other = tmp_path / "other.safetensors"
    header = b'{"a":{"dtype":"U8","shape":[5000],"data_offsets":[0,5000]}}'
    other.write_bytes(struct.pack("<Q", len(header)) + header + bytes(5000))
    with pytest.raises(Foreign):
        open_shard(other)
    other.write_bytes(b"no safetensors at all " * 500)
    with pytest.raises(Foreign):
        open_shard(other)
    later = shard.read_bytes().replace(b"kiln-shard-1", b"kiln-shard-9")
    shard.write_bytes(later)
    with pytest.raises(Foreign, match="version"):
        open_shard(shard)


def test_damaged_records_are_remembered(shard):
    assert shards.mark_bad(shard, key(1))
    assert open_shard(shard).bad().tolist() == [False, True, False]
    with open(f"{shard}.bad", "a", encoding="ascii") as file:
        file.write("00112")  # cut short by a crash
    assert shards.bad_keys(shard) == {key(1)}


def test_names_sort_by_time_and_never_meet(monkeypatch):
    monkeypatch.setattr(shards.time, "time", lambda: 1.5)
    first = {shards.shard_name("text") for _ in range(50)}
    monkeypatch.setattr(shards.time, "time", lambda: 1.75)
    assert len(first) == 50 and max(first) < shards.shard_name("text")
    assert next(iter(first)).startswith("text-19700101T000001500-")


def test_shard_files_are_those_of_the_kind(tmp_path):
    first, second, other = (f"{name}-20260102T030405{number}-12-0123abcd.safetensors"
                            for name, number in (("text", "001"), ("text", "002"), ("latents", "001")))
    for name in (second, first, other, f".{first}.x.tmp", f"{first}.bad", f"{second}.damaged", "text-of-mine.safetensors",
                 "text-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert [path.name for path in shards.shard_files(tmp_path, "text")] == [first, second]
    assert len(shards.shard_files(tmp_path)) == 3
    assert shards.shard_files(tmp_path / "missing", "text") == []
    assert shards.NAME.fullmatch(shards.shard_name("text"))


# Few values, so that halves and whole keys meet often.
KEYS = some.lists(some.tuples(some.integers(0, 3), some.integers(0, 3)), max_size=30)


def keys_of(pairs):
    return numpy.array([[a] + [0] * 7 + [b] + [0] * 7 for a, b in pairs], dtype=numpy.uint8).reshape(-1, 16)


@given(KEYS, KEYS, KEYS)
def test_lookup_agrees_with_a_dictionary(first, second, wanted):
    lookup = Lookup().extended(keys_of(first), numpy.arange(len(first)))
    lookup = lookup.extended(keys_of(second), numpy.arange(len(second)) + len(first))
    truth = {}
    for row, pair in enumerate(first + second):
        truth.setdefault(pair, row)
    assert lookup.find(keys_of(wanted)).tolist() == [truth.get(pair, -1) for pair in wanted]
    assert len(lookup) == len(first) + len(second)


@given(KEYS.filter(bool), some.data())
def test_lookup_without_a_row_finds_the_next_equal_key(pairs, data):
    row = data.draw(some.integers(0, len(pairs) - 1))
    lookup = Lookup().extended(keys_of(pairs), numpy.arange(len(pairs))).without(row)
    others = [number for number, pair in enumerate(pairs) if pair == pairs[row] and number != row]
    assert lookup.find(keys_of([pairs[row]])).tolist() == [min(others, default=-1)]


@pytest.mark.parametrize("positioned", [True, False])
def test_open_files_reads_pieces_and_closes_old_ones(tmp_path, monkeypatch, positioned):
    if not positioned:
        monkeypatch.delattr("os.preadv", raising=False)
    paths = [tmp_path / str(number) for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(range(number, number + 20)))
    files = OpenFiles(limit=2)
    for path in paths * 2:
        first, second = bytearray(3), bytearray(4)
        assert files.read_into(path, 5, [memoryview(first), memoryview(b"")[:0], memoryview(second)])
        assert bytes(first + second) == path.read_bytes()[5:12]
        assert len(files._files) <= 2
    assert not files.read_into(paths[0], 18, [memoryview(bytearray(3))])
    with pytest.raises(FileNotFoundError):
        files.read_into(tmp_path / "missing", 0, [])
