import json

import pytest

from library.errors import UserError
from library.prompts import FIRST_SEED, Prompt, parse_prompts, with_seeds


@pytest.fixture
def parse(tmp_path):
    def run(text, suffix=".txt", pixel_step=16, encoding="utf-8", **settings):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(text.encode(encoding))
        return parse_prompts(path, pixel_step, **settings)

    return run


def problems(parse, text, suffix=".txt", **settings):
    """What is said about a file, without the path of its folder."""
    with pytest.raises(UserError) as caught:
        parse(text, suffix, **settings)
    return [line[line.index("prompts."):] for line in caught.value.problems]


def test_a_line_with_every_option(parse):
    parsed = parse("a red fox --w 640 --h 384 --d 7 --s 12 --n blurry, dark --l 2.5 --g 4\n")
    (prompt,) = parsed.prompts
    assert (prompt.text, prompt.negative, prompt.width, prompt.height) == ("a red fox", "blurry, dark", 640, 384)
    assert (prompt.seed, prompt.steps, prompt.cfg, prompt.guidance) == (7, 12, 2.5, 4.0)
    assert parsed.notes == ()


def test_what_is_left_out_comes_from_the_defaults(parse):
    defaults = Prompt("", width=1024, height=768, steps=36, cfg=7.5, guidance=0.0)
    (prompt,) = parse("a fox", defaults=defaults).prompts
    assert (prompt.width, prompt.height, prompt.steps) == (1024, 768, 36)
    assert (prompt.cfg, prompt.guidance, prompt.seed) == (7.5, 0.0, None)


@pytest.mark.parametrize("text", ["s 20 cats on a roof", "n is a letter", "w 512 is a bus line", "a cat -- asleep", "a --- b",
                                  "half-dead--w"])
def test_the_prompt_itself_is_never_taken_for_an_option(parse, text):
    (prompt,) = parse(f"{text} --s 3").prompts
    assert (prompt.text, prompt.steps, prompt.negative, prompt.width) == (text, 3, "", 512)


def test_the_value_of_an_option_is_not_read_as_another_option(parse):
    assert parse("a --n s 20 w 512 -- l 3 --l 2").prompts[0].negative == "s 20 w 512 -- l 3"


def test_comments_empty_lines_line_ends_byte_order_mark_and_capitals(parse):
    parsed = parse("\ufeff# first\r\n\r\n  # second\r\na\t--W\t64\r\nb")
    assert [(prompt.text, prompt.width) for prompt in parsed.prompts] == [("a", 64), ("b", 512)]
    assert [prompt.place.rsplit(":", 1)[1] for prompt in parsed.prompts] == ["4", "5"]


@pytest.mark.parametrize(("given", "step", "expected"), [(500, 16, 496), (504, 16, 512), (511, 16, 512), (3, 16, 16),
                                                         (512, 16, 512), (500, 8, 504)])
def test_sizes_are_rounded_to_the_nearest_multiple_with_a_note(parse, given, step, expected):
    parsed = parse(f"a --w {given} --h 64", pixel_step=step)
    assert parsed.prompts[0].width == expected
    notes = [note.split(": ", 1)[1] for note in parsed.notes]
    assert notes == ([f"width {given} is no multiple of {step}, {expected} is used"] if given != expected else [])


def test_options_without_effect_are_noted_once(parse):
    notes = parse("a --ss euler_a\nb --ss ddim --fs 3").notes
    assert [note.split(": ")[1].split()[0] for note in notes] == ["--ss", "--fs"]


def test_a_negative_prompt_that_nothing_uses_is_noted(parse):
    assert "no effect" in parse("a --n ugly").notes[0]
    assert parse("a --n ugly --l 3").notes == ()
    assert "no guidance" in parse("a --l 0.5").notes[0]


@pytest.mark.parametrize(("line", "message"), [
    ("a --w 12.5", "--w must be a whole number, from 1 to 8192, not 12.5"),
    ("a --w 1_0", "--w must be a whole number, from 1 to 8192, not '1_0'"),
    ("a --h 90000", "--h must be a whole number, from 1 to 8192, not 90000"),
    ("a --s 0", "--s must be a whole number, from 1 to 1000, not 0"),
    ("a --s 1001", "--s must be a whole number, from 1 to 1000, not 1001"),
    ("a --d -1", "--d must be a whole number, from 0 to"),
    ("a --l high", "--l must be a number, 0 or more, not 'high'"),
    ("a --g inf", "--g must be a number, 0 or more, not inf"),
    ("a --g nan", "--g must be a number, 0 or more, not nan"),
    ("a --n", "--n has no value"),
    ("a --w 64 --w 32", "--w is given twice"),
    ("a --width 64", "unknown option --width; known are --n (negative_prompt), --w (width), --h (height), --d (seed)"),
    ("a --cn edge.png", "--cn: ControlNet previews are not built; remove --cn"),
    ("--w 64", "there is no prompt before the first option"),
])
def test_mistakes_in_a_line(parse, line, message):
    (problem,) = problems(parse, f"# comment\n{line}\nfine")
    assert problem.startswith(f"prompts.txt:2: {message}")


def test_all_mistakes_are_told_together(parse):
    assert [line.split(": ")[0] for line in problems(parse, "a --w x\nb --q 1\nc --s 0 --d x")] == [
        "prompts.txt:1", "prompts.txt:2", "prompts.txt:3", "prompts.txt:3"]


def test_missing_folder_ending_and_empty_files(tmp_path, parse):
    (tmp_path / "folder.txt").mkdir()
    for name, message in (("absent.txt", "does not exist"), ("folder.txt", "is a folder"), ("prompts.yaml", "'.yaml'"),
                          ("prompts", "without an ending")):
        with pytest.raises(UserError, match=message):
            parse_prompts(tmp_path / name, 16)
    for text, suffix in (("", ".txt"), ("# only a comment\n", ".txt"), ("[]", ".json"), ("[prompt]\nsubset = []", ".toml")):
        assert "there is no prompt in this file" in problems(parse, text, suffix)[0]


def test_other_encodings(parse):
    (problem,) = problems(parse, "a\nK\u00e4tzchen", encoding="latin-1")
    assert problem.startswith("prompts.txt:2: this file is not UTF-8 text; save it as UTF-8")
    assert "UTF-16" in problems(parse, "K\u00e4tzchen", encoding="utf-16")[0]


def test_toml_defaults_are_overridden_by_subsets(parse):
    parsed = parse("""
[prompt]
width = 256
negative_prompt = "blurry"
scale = 2
[[prompt.subset]]
prompt = "a --w 3 stays text"
width = 128
seed = 5
[[prompt.subset]]
prompt = "b"
sample_steps = 4
guidance_scale = 1
""", ".toml")
    first, second = parsed.prompts
    assert (first.text, first.width, first.seed, first.negative, first.cfg) == ("a --w 3 stays text", 128, 5, "blurry", 2.0)
    assert (second.width, second.steps, second.guidance, second.seed) == (256, 4, 1.0, None)
    assert first.place.endswith(":6") and second.place.endswith(":10")


def test_toml_with_one_table_is_one_prompt(parse):
    assert [prompt.text for prompt in parse('[prompt]\nprompt = "alone"', ".toml").prompts] == ["alone"]


def test_mistakes_in_toml(parse):
    found = problems(parse, """[prompt]
width = "256"
wdth = 3
[[prompt.subset]]
prompt = "a"
[[prompt.subset]]
sample_step = 3
seed = true
""", ".toml")
    assert [line.split(": ")[0] for line in found] == [f"prompts.toml:{number}" for number in (3, 2, 6, 7, 8)]
    assert "did you mean 'width'?" in found[0] and "did you mean 'sample_steps'?" in found[3]
    assert "there is no [prompt] table" in problems(parse, "", ".toml")[0]
    assert "unknown key 'prompts'" in problems(parse, "[[prompts]]\nprompt = 'a'", ".toml")[0]
    assert "must be tables" in problems(parse, "prompt = 'a'", ".toml")[0]
    assert problems(parse, "[prompt\n", ".toml")[0].startswith("prompts.toml:1: ")


def test_json_objects_and_strings(parse):
    text = json.dumps(["a --w 64", {"prompt": "b", "seed": 3, "scale": 2}, {"prompt": ""}], indent=1)
    first, second, third = parse(text, ".json").prompts
    assert (first.text, first.width) == ("a", 64)
    assert (second.text, second.seed, second.cfg) == ("b", 3, 2.0) and isinstance(second.cfg, float)
    assert third.text == ""
    assert [prompt.place.rsplit(":", 1)[1] for prompt in (first, second, third)] == ["2", "3", "8"]


def test_mistakes_in_json(parse):
    found = problems(parse, '["a --w x",\n {"width": 12},\n {"prompt": "b", "height": 1.5, "sed": 1}, 3]', ".json")
    assert [line.split(": ")[0] for line in found] == [f"prompts.json:{number}" for number in (1, 2, 3, 3, 3)]
    assert "did you mean 'seed'?" in " ".join(found)
    assert problems(parse, '["a",\n', ".json")[0].startswith("prompts.json:2: not valid JSON")
    assert "must be a list of prompts, not dict" in problems(parse, '{"prompt": "a"}', ".json")[0]


def test_seeds_follow_the_position_and_given_ones_stay():
    seeded = with_seeds([Prompt("a"), Prompt("b", seed=0), Prompt("c")])
    assert [prompt.seed for prompt in seeded] == [FIRST_SEED, 0, FIRST_SEED + 2]
    assert with_seeds(seeded) == seeded
