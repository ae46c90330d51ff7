"""What is left out, held out and repeated, as properties and as the cases a user meets."""

from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.select import HELD_OUT, SKIPPED, SURPLUS, select
from library.errors import UserError, UserErrors
from tests.unit.plan_items import made_items, made_subset


def names(count, prefix=""):
    return [f"{prefix}{index}.png" for index in range(count)]


def ids(items):
    return {items.sample_id(index): int(items.repeats[index]) for index in range(len(items))}


@st.composite
def data_sets(draw):
    """Two datasets of a training and a regularisation subset each, with every setting that selects."""
    datasets = []
    for _ in range(2):
        subsets = []
        for reg in (False, True):
            count = draw(st.integers(0 if reg else 1, 12))
            subsets.append(made_subset(names(count), draw(st.lists(st.sampled_from([(64, 64), (70, 60), (200, 90)]),
                                                                   min_size=count, max_size=count)),
                                       draw(st.integers(1, 3)), is_reg=reg))
        datasets.append((subsets, dict(validation_split=draw(st.sampled_from([0, 0.01, 0.3, 0.5, 0.99])),
                                       validation_seed=draw(st.sampled_from([None, 1, 2])),
                                       skip_image_resolution=draw(st.sampled_from([None, (66, 64)])))))
    return made_items(*datasets)


@given(data_sets())
def test_every_picture_is_in_one_place(items):
    try:
        chosen = select(items)
    except UserError as error:
        assert "no picture is left to train on" in str(error)
        return
    assert set(chosen.dropped) == {SKIPPED, HELD_OUT, SURPLUS}
    everything = [items.sample_id(int(row)) for rows in chosen.dropped.values() for row in rows] + list(ids(chosen.train))
    assert sorted(everything) == sorted(ids(items))  # no picture in two places, none nowhere
    assert set(ids(chosen.validation)) == {items.sample_id(int(row)) for row in chosen.dropped[HELD_OUT]}
    assert (chosen.validation.repeats == 1).all() and (chosen.train.repeats >= 1).all()
    assert not any(each.subset.is_reg for each in chosen.validation)
    for number, spec in enumerate(items.specs):
        here = [each for each in chosen.train if each.subset.dataset == number]
        training = sum(each.repeats for each in here if not each.subset.is_reg)
        regular = sum(each.repeats for each in here if each.subset.is_reg)
        usable = sum(each.subset.is_reg and each.subset.dataset == number and (spec.skip_image_resolution is None or
                     each.size[0] * each.size[1] > 66 * 64) for each in items)
        assert training > 0 and regular == (training if usable else 0)
        for each in (*here, *(each for each in chosen.validation if each.subset.dataset == number)):
            assert spec.skip_image_resolution is None or each.size[0] * each.size[1] > 66 * 64


def test_nothing_set_changes_nothing():
    items = made_items([made_subset("abc", (64, 64), 2)], [made_subset("ab", (64, 64))])
    chosen = select(items)
    assert ids(chosen.train) == ids(items) and not len(chosen.validation) and chosen.remarks == ()
    assert all(not len(rows) for rows in chosen.dropped.values())


@pytest.mark.parametrize("count, split, held", [(10, 0.2, 2), (10, 0.25, 2), (3, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0),
                                                (10, 0.96, 9)])
def test_size_of_the_hold_out(count, split, held):
    chosen = select(made_items(([made_subset(names(count), (64, 64), 4)], dict(validation_split=split))))
    assert len(chosen.validation) == held and len(chosen.train) == count - held
    assert len(chosen.dropped[HELD_OUT]) == held
    assert [(each.reason, each.severity, "its only picture is trained on" in each.text) for each in chosen.remarks] == (
        [(HELD_OUT, "note", True)] if count == 1 else [])


def held_out(count=40, left_out=(), split=0.25, **keys):
    chosen = select(made_items(([made_subset([name for name in names(count) if name not in left_out], (64, 64))],
                                dict(validation_split=split, **keys))))
    return {each.path.name for each in chosen.validation}


def test_hold_out_follows_the_seed_and_is_steady():
    assert held_out() == held_out() == held_out(validation_seed=0) != held_out(validation_seed=1)
    trained = sorted(set(names(40)) - held_out())
    # One training picture gone (9.75 of 39 are held out): at most the last of the held-out ones comes back.
    assert len(held_out() ^ held_out(left_out=trained[:1])) <= 1
    assert held_out(split=0.1) < held_out(split=0.25) < held_out(split=0.5)


def test_each_subset_gives_its_share_and_a_folder_in_two_datasets_the_same_one():
    def dataset():
        return [made_subset(names(20), (64, 64), root="/one"), made_subset(names(10, "x"), (64, 64), root="/two")], keys
    keys = dict(validation_split=0.3)
    chosen = select(made_items(dataset(), dataset()))
    first, second = ({each.path for each in chosen.validation if each.subset.dataset == number} for number in (0, 1))
    assert first == second and len(chosen.validation) == 2 * len(first) == 18
    assert not {each.path for each in chosen.train} & first
    assert chosen.remarks == ()


def test_a_folder_that_two_datasets_split_differently_is_named():
    items = made_items(([made_subset(names(20), (64, 64), root="/one")], dict(validation_split=0.3)),
                       [made_subset(names(20), (64, 64), root="/one")])
    (remark,) = select(items).remarks
    assert remark.text.startswith(f"{Path('/one')}: subsets on this folder differ in validation_split")
    assert (remark.reason, remark.severity) == (HELD_OUT, "warning")
    # Nothing is held out of /two, so its two datasets may differ.
    items = made_items(([made_subset(names(20), (64, 64), root="/one")], dict(validation_split=0.3)),
                       [made_subset(names(20), (64, 64), root="/two")],
                       ([made_subset(names(20), (64, 64), root="/two")], dict(skip_image_resolution=(10, 10))))
    assert select(items).remarks == ()


def test_small_pictures_are_left_out_by_area():
    sizes = [(64, 64), (65, 64), (4096, 1), (4097, 1), (10, 10)]
    items = made_items(([made_subset("abcde", sizes)], dict(skip_image_resolution=(64, 64))), [made_subset("e", (10, 10))])
    chosen = select(items)
    assert ids(chosen.train) == {"0.0/b": 1, "0.0/d": 1, "1.0/e": 1}
    assert chosen.dropped[SKIPPED].tolist() == [0, 2, 4]


def balance(training, regular, repeats=1, reg_repeats=1):
    items = made_items([made_subset(names(training), (64, 64), repeats),
                        made_subset(names(regular), (64, 64), reg_repeats, is_reg=True)])
    chosen = select(items)
    return sorted(int(each.repeats) for each in chosen.train if each.subset.is_reg), chosen


def test_regularisation_pictures_are_shown_as_often_as_the_others():
    assert balance(10, 4)[0] == [2, 2, 3, 3]
    assert balance(4, 4)[0] == [1] * 4
    assert balance(5, 2, repeats=4)[0] == [10, 10]
    assert balance(10, 4, reg_repeats=2)[0] == [2, 2, 3, 3]
    assert balance(1, 4)[0] == [1]
    assert balance(3, 2, reg_repeats=2)[0] == [1, 2]  # exactly as often, so the last one is cut short


def test_surplus_regularisation_pictures_are_named():
    repeats, chosen = balance(3, 9)
    assert repeats == [1, 1, 1] and len(chosen.dropped[SURPLUS]) == 6
    assert ids(balance(3, 9)[1].train) == ids(chosen.train)  # always the same ones
    few, more = ({name for name in ids(balance(count, 9)[1].train) if name.startswith("0.1")} for count in (3, 5))
    assert few < more


def test_held_out_pictures_are_not_balanced():
    items = made_items(([made_subset(names(10), (64, 64)), made_subset(names(20), (64, 64), is_reg=True)],
                        dict(validation_split=0.5)))
    chosen = select(items)
    assert sum(each.subset.is_reg for each in chosen.train) == 5 == len(chosen.validation)


def test_nothing_left_is_an_error_with_its_reason():
    with pytest.raises(UserError, match=r"data.toml:0: no picture is left to train on: 2 have .*64x64.*lower skip"):
        select(made_items(([made_subset("ab", (64, 64))], dict(skip_image_resolution=(64, 64)))))
    with pytest.raises(UserError, match="data.toml:1: this dataset has regularisation pictures only"):
        select(made_items([made_subset("a", (64, 64))], [made_subset("ab", (64, 64), is_reg=True)]))
    with pytest.raises(UserErrors) as caught:
        select(made_items(([made_subset("ab", (9, 9))], dict(skip_image_resolution=(64, 64))),
                          [made_subset("ab", (64, 64), is_reg=True)]))
    assert len(caught.value.problems) == 2


def test_given_items_stay_as_they_are():
    items = made_items(([made_subset(names(9), (64, 64), 3), made_subset(names(4), (64, 64), is_reg=True)],
                        dict(validation_split=0.5)))
    before = items.repeats.copy()
    select(items)
    assert numpy.array_equal(items.repeats, before)
