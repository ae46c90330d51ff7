"""Rows of keys, against a dictionary; keys that share their first half are told apart."""

import numpy
from hypothesis import given
from hypothesis import strategies as st

from library.data.lookup import Lookup

HALVES = st.sampled_from([bytes(8), b"\xff" * 8, b"abcdefgh", b"abcdefgi"])
KEYS = st.lists(st.tuples(HALVES, HALVES).map(b"".join), max_size=12)


def columns(keys):
    return numpy.frombuffer(b"".join(keys), dtype=numpy.uint8).reshape(-1, 16)


@given(st.lists(KEYS, max_size=3), KEYS, st.data())
def test_finds_what_was_added_first(parts, wanted, data):
    lookup, expected, row = Lookup(), {}, 0
    for keys in parts:
        lookup = lookup.extended(columns(keys), numpy.arange(row, row + len(keys)))
        for key in keys:
            expected.setdefault(key, row)
            row += 1
    assert len(lookup) == row
    assert lookup.find(columns(wanted)).tolist() == [expected.get(key, -1) for key in wanted]
    if row:
        gone = data.draw(st.integers(0, row - 1))
        every = [key for keys in parts for key in keys]
        left = {}
        for number, key in enumerate(every):
            if number != gone:
                left.setdefault(key, number)
        assert lookup.without(gone).find(columns(every)).tolist() == [left.get(key, -1) for key in every]
