"""Every key of a TOML file has its line, whatever way it is written."""

import pytest

from library.errors import UserError
from library.toml_lines import load_toml

TEXT = '''# a comment
resolution = 512 # trailing = comment
text = """
resolution = 1
[not_a_table]
""\\" quoted"""""
raw = \'\'\'
[x]
\'\'\'
"quoted key".inner = 'C:\\new'

[general]
a = [
  1, # one
  { b = 2, c = [3,
      4] },
]
[[datasets]]
x = 1979-05-27T07:32:00Z
  [[datasets.subsets]]
  image_dir = "a]#,"
  [[datasets.subsets]]
  image_dir = "b"
  [datasets.subsets.extra]
  deep = true
[[ datasets ]]
y = {}
  [[datasets."subsets"]]
  image_dir = "c"
[a.b]
c = []
'''


def expected_lines():
    return {
        ("resolution",): 2, ("text",): 3, ("raw",): 7, ("quoted key", "inner"): 10, ("general",): 12, ("general", "a"): 13,
        ("general", "a", 0): 14, ("general", "a", 1): 15, ("general", "a", 1, "b"): 15, ("general", "a", 1, "c", 1): 16,
        ("datasets", 0): 18, ("datasets", 0, "x"): 19, ("datasets", 0, "subsets", 0): 20,
        ("datasets", 0, "subsets", 1, "image_dir"): 23, ("datasets", 0, "subsets", 1, "extra", "deep"): 25,
        ("datasets", 1, "y"): 27, ("datasets", 1, "subsets", 0, "image_dir"): 29, ("a", "b", "c"): 31,
    }


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines(tmp_path, newline, mark):
    path = tmp_path / "a.toml"
    path.write_bytes((mark + TEXT.replace("\n", newline)).encode())
    values, where = load_toml(path)
    assert values["datasets"][1]["subsets"][0]["image_dir"] == "c"
    assert {key: where.line(*key) for key in expected_lines()} == expected_lines()


def test_every_value_has_a_line(tmp_path):
    (tmp_path / "a.toml").write_text(TEXT, encoding="utf-8")
    values, where = load_toml(tmp_path / "a.toml")

    def walk(value, path):
        if path and not (isinstance(value, (dict, list))):
            assert path in where.lines, path
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            walk(inner, path + (key,))
    walk(values, ())


def test_unknown_paths_fall_back_to_the_enclosing_table(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(TEXT, encoding="utf-8")
    _, where = load_toml(path)
    assert where.line("datasets", 0, "subsets", 1, "missing") == 22
    assert where.line("nowhere") is None
    assert where.place("general", "a", 1) == f"{path}:15: a"
    assert where.place("nowhere") == f"{path}: nowhere"


@pytest.mark.parametrize("content, words", [
    (b"a = 1\nb = \n", (":2: not valid TOML",)),
    (b"a = 1\na = 2\n", (":2: not valid TOML",)),
    (b'a = 1\n\nb = "C:\\quite"\n', (":3: not valid TOML", "single quotes")),
    (b'a = [1,\n2', (":2: not valid TOML",)),
    (b'{"datasets": []}', (":1: not valid TOML", "JSON", ".json")), (b"a:\n  - b\n", (":1: not valid TOML", "key = value")),
    (b"a = 1\nb = '\xe9'\n", (":2: not a UTF-8", "UTF-8")),
    ("a = 1".encode("utf-16"), ("not a UTF-8",)),
])
def test_syntax_errors_name_the_line(tmp_path, content, words):
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_toml(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value).splitlines()) == 1
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="folder"):
        load_toml(tmp_path)
