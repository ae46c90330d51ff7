"""Captions: what each rule does, and that all of it is a function of the key alone."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.caption import CaptionRules, dropped, render, variant

PLAIN = CaptionRules()
TAGS = "a, b,c ,  d, e"


def texts(text, rules, count=200, **given):
    """The texts of ``count`` samples."""
    return [render(text, rules, 1, 0, f"0.0/{number}.png#0", given.get("step", 0), given.get("total", 100))
            for number in range(count)]


def one(text, rules, **given):
    """The text when every sample must have the same."""
    found = set(texts(text, rules, 50, **given))
    assert len(found) == 1, found
    return found.pop()


def test_plain_captions_are_left_as_written():
    assert one("A fox,  in snow |||{a|b}", PLAIN) == "A fox,  in snow |||{a|b}"
    assert one("first line\nsecond", PLAIN) == "first line"
    assert one("", PLAIN) == ""
    assert not PLAIN.varies and not PLAIN.follows_step


def test_prefix_and_suffix_belong_to_the_chosen_line():
    rules = CaptionRules(prefix="photo of", suffix="in snow", wildcard=True)
    assert set(texts("one fox\n\n two foxes ", rules)) == {"photo of one fox in snow", "photo of two foxes in snow"}
    assert one("a fox", CaptionRules(prefix="photo of")) == "photo of a fox"
    assert one("", CaptionRules(prefix="photo", suffix="film")) == "photo film"


def test_wildcards():
    rules = CaptionRules(wildcard=True)
    counts = Counter(texts("a {red|green|blue} box", rules, 3000))
    assert set(counts) == {"a red box", "a green box", "a blue box"} and min(counts.values()) > 900
    assert set(texts("{a|b{1|2}}x", rules)) == {"ax", "b1x", "b2x"}
    assert one("a {{b|c}} d", rules) == "a {b|c} d"
    assert one("{only} {} a} {b", rules) == "only {} a} {b"
    assert one("{a|b}} c", rules) == "{a|b} c"  # the pair is a literal brace while only one choice is open
    assert set(texts("{|very }dark", rules)) == {"dark", "very dark"}  # an empty choice is a choice
    assert rules.varies


def test_shuffle_keeps_the_first_tags_and_all_tags():
    rules = CaptionRules(shuffle=True, keep_tokens=2)
    found = texts(TAGS, rules)
    assert {text.split(", ")[0] + text.split(", ")[1] for text in found} == {"ab"}
    assert {tuple(sorted(text.split(", "))) for text in found} == {("a", "b", "c", "d", "e")}
    assert len(set(found)) == 6
    assert one("a, b", replace(rules, keep_tokens=5)) == "a, b"


def test_every_order_is_equally_likely():
    counts = Counter(texts("a,b,c", CaptionRules(shuffle=True), 6000))
    assert len(counts) == 6 and min(counts.values()) > 850


def test_keep_tokens_separator_marks_head_and_tail_and_never_stays():
    rules = CaptionRules(shuffle=True, keep_tokens_separator="|||")
    found = texts("a, b ||| c, d, e ||| y, z", rules)
    assert all(text.startswith("a, b, ") and text.endswith(", y, z") for text in found) and len(set(found)) == 6
    assert all(text.startswith("a, ") for text in texts("a ||| b, c, d", rules))
    assert one("a, b ||| c, d ||| z", CaptionRules(keep_tokens_separator="|||")) == "a, b, c, d, z"
    assert one("a cat", CaptionRules(keep_tokens_separator="|||")) == "a cat"
    assert "|||" not in one("a ||| b ||| c ||| d", CaptionRules(keep_tokens_separator="|||", tag_dropout_rate=1e-9))


def test_secondary_separator_glues_tags_together():
    rules = CaptionRules(shuffle=True, secondary_separator=";;;")
    assert set(texts("a;;;b, c", rules)) == {"a,b, c", "c, a,b"}


def test_another_separator():
    assert set(texts("a cat; a dog", CaptionRules(shuffle=True, separator=";"))) == {"a cat, a dog", "a dog, a cat"}


def test_tag_dropout_spares_what_is_kept():
    rules = CaptionRules(tag_dropout_rate=0.25, keep_tokens=1)
    found = texts(TAGS, rules, 4000)
    assert all(text.split(", ")[0] == "a" for text in found)
    left = Counter(tag for text in found for tag in text.split(", "))
    assert all(0.72 < left[tag] / 4000 < 0.78 for tag in "bcde")
    assert one(TAGS, replace(rules, tag_dropout_rate=1.0)) == "a"


@pytest.mark.parametrize("step, tags", [(0, 1), (1, 1), (25, 2), (50, 3), (99, 4), (100, 5), (5000, 5)])
def test_token_warm_up_in_steps_and_as_a_share_of_the_run(step, tags):
    for rules in (CaptionRules(warmup_step=100), CaptionRules(warmup_step=0.1)):
        assert len(one(TAGS, rules, step=step, total=1000).split(", ")) == tags
        assert rules.follows_step


def test_token_warm_up_begins_with_at_least_as_many():
    assert one(TAGS, CaptionRules(warmup_step=10, warmup_min=3, keep_tokens=1)) == "a, b, c, d"
    assert one("a, b", CaptionRules(warmup_step=10, warmup_min=3)) == "a, b"


def test_whole_captions_are_dropped_at_their_rate_and_in_every_nth_epoch():
    rules = CaptionRules(dropout_rate=0.2)
    share = sum(dropped(rules, 1, epoch, f"{n}") for epoch in range(5) for n in range(1000)) / 5000
    assert 0.18 < share < 0.22
    third = CaptionRules(dropout_every_n_epochs=3)
    assert [dropped(third, 1, epoch, "x") for epoch in range(7)] == [False, False, True] * 2 + [False]
    assert not any(dropped(PLAIN, 1, epoch, "x") for epoch in range(50))
    assert all(dropped(CaptionRules(dropout_rate=1.0), 1, 0, f"{n}") for n in range(50))


RULES = st.builds(
    CaptionRules, prefix=st.sampled_from(["", "photo of"]), suffix=st.sampled_from(["", "film"]), keep_tokens=st.integers(0, 3),
    keep_tokens_separator=st.sampled_from(["", "|||"]), secondary_separator=st.sampled_from(["", ";;;"]), wildcard=st.booleans(),
    shuffle=st.booleans(), tag_dropout_rate=st.sampled_from([0.0, 0.5, 1.0]), warmup_step=st.sampled_from([0.0, 0.5, 10.0]))
PIECES = ["a", "b c", "d", ",", ";;;", "|||", "{", "}", "|", "{x|y}", "{{", "}}", "\n", "é"]
WORDS = st.lists(st.sampled_from(PIECES)).map(" ".join)


@given(WORDS, RULES, st.integers(0, 2**32), st.integers(0, 50))
def test_a_function_of_its_arguments(text, rules, seed, step):
    first, again = (render(text, rules, seed, 3, "0.0/a.png#1", step, 100) for _ in range(2))
    assert first == again and "\n" not in first
    if rules.keep_tokens_separator:
        assert "|||" not in first
    if not rules.varies:
        assert first == render(text, rules, seed + 1, 4, "0.0/b.png#0", step + 1, 100)


@given(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8), st.integers(0, 9), st.integers(0, 2**32))
def test_shuffling_loses_and_invents_nothing(tags, keep, seed):
    text = render(",".join(tags), CaptionRules(shuffle=True, keep_tokens=keep), seed, 0, "x", 0, 1)
    found = [tag for tag in text.split(", ") if tag]
    assert sorted(found) == sorted(tags) and found[:keep] == tags[:keep]


@given(WORDS, RULES, st.integers(0, 2**32), st.integers(1, 6))
def test_a_variant_is_a_text_of_some_showing(text, rules, seed, number):
    """The same at every call, and without what varies the text that is shown online."""
    made = variant(text, rules, seed, "0.0/a.png", number)
    assert made == variant(text, rules, seed, "0.0/a.png", number) and "\n" not in made
    if not rules.varies:
        assert made == variant(text, rules, seed, "0.0/a.png", 0) == render(text, rules, seed, 0, "0.0/a.png#0", 0, 1)


def test_variants_differ_and_show_all_tags():
    rules = CaptionRules(shuffle=True, warmup_step=100, dropout_rate=1.0)
    made = [variant(TAGS, rules, 1, "0.0/a.png", number) for number in range(8)]
    assert len(set(made)) > 5 and all(sorted(text.split(", ")) == list("abcde") for text in made)
