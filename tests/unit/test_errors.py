import pytest

from library.errors import UserError, UserErrors, nearest, raise_all


def test_an_error_is_one_line_of_place_message_and_remedy():
    error = UserError("no such\nthing  as 7", place="file.toml:3: key", remedy="write 8")
    assert str(error) == "file.toml:3: key: no such thing as 7; write 8"
    assert error.problems == (str(error),)
    assert str(UserError("bare")) == "bare"


def test_errors_are_raised_together():
    raise_all([])
    one, two = UserError("one"), UserError("two", place="here")
    with pytest.raises(UserError) as single:
        raise_all([one])
    assert single.value is one
    with pytest.raises(UserErrors) as both:
        raise_all([one, UserErrors([two, one])])
    assert both.value.problems == ("one", "here: two", "one")


def test_nearest_known_name():
    assert nearest("lerning_rate", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert nearest("xyz", ["learning_rate"]) == ""
