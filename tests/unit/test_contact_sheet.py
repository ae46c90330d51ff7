import pytest
from PIL import Image, ImageChops, ImageFont

from library import contact_sheet
from library.contact_sheet import CELL, GAP, LABEL_WIDTH, MARGIN, find_pictures, font_for, picture_name, spread, wrap, write_contact_sheet
from library.preview import render_all
from library.prompts import FIRST_SEED, Prompt, with_seeds

RED, BLUE = (200, 10, 10), (10, 10, 200)


def render(folder, prompts, step, color=RED, name="run"):
    def sample(batch):
        return [Image.new("RGB", (prompt.width, prompt.height), color) for prompt in batch]

    render_all(prompts, sample, folder, name, step)
    return write_contact_sheet(folder, name, with_seeds(prompts), step)


def cells(path, prompts, columns):
    """The colour in the middle of every place of the sheet, row by row; prompts are square."""
    top, left = MARGIN + 86, MARGIN + LABEL_WIDTH + GAP
    with Image.open(path) as sheet:
        assert sheet.width == 2 * MARGIN + LABEL_WIDTH + columns * (CELL + GAP)
        middles = [place * (CELL + GAP) + CELL // 2 for place in range(max(columns, len(prompts)))]
        return [[sheet.getpixel((left + x, top + y)) for x in middles[:columns]] for y in middles[:len(prompts)]]


TWO = (Prompt("a", width=64, height=64), Prompt("b", width=512, height=512))


def test_the_sheet_grows_by_a_column_per_step(tmp_path):
    render(tmp_path, TWO, 0, RED)
    sheet = render(tmp_path, TWO, 10, BLUE)
    assert cells(sheet, TWO, 2) == [[RED, BLUE], [RED, BLUE]]


def test_pictures_from_before_a_restart_stay_and_later_ones_of_another_run_do_not_show(tmp_path):
    for step in (0, 10, 90):
        render(tmp_path, TWO, step)
    assert sorted({step for step, _ in find_pictures(tmp_path, "run", with_seeds(TWO), 20)}) == [0, 10]
    assert cells(render(tmp_path, TWO, 20, BLUE), TWO, 3) == [[RED, RED, BLUE]] * 2


def test_an_edited_prompt_starts_anew(tmp_path):
    render(tmp_path, TWO, 0)
    edited = (TWO[0], Prompt("c", width=512, height=512))
    (first, second) = cells(render(tmp_path, edited, 10, BLUE), edited, 2)
    assert first == [RED, BLUE]
    assert second[1] == BLUE and second[0] not in (RED, BLUE)


def test_other_files_and_damaged_pictures_are_no_obstacle(tmp_path):
    render(tmp_path, TWO, 0)
    damaged = tmp_path / picture_name("run", 0, 0, FIRST_SEED)
    damaged.write_bytes(b"")
    render(tmp_path, TWO, 5)
    cut = tmp_path / picture_name("run", 5, 0, FIRST_SEED)
    cut.write_bytes(cut.read_bytes()[:-40])
    for name in ("run_notes.txt", "run_000001_00_x.png", "runs_000001_00_1000.png"):
        (tmp_path / name).write_bytes(b"foreign")
    first, second = cells(render(tmp_path, TWO, 10), TWO, 3)
    assert first[0] != RED and first[2] == RED and second == [RED, RED, RED]


def test_runs_with_other_names_are_kept_apart(tmp_path):
    render(tmp_path, TWO, 0, name="a")
    assert cells(render(tmp_path, TWO, 5, BLUE, name="b"), TWO, 1) == [[BLUE], [BLUE]]


def test_at_most_eight_columns(tmp_path):
    for step in range(0, 110, 10):
        sheet = render(tmp_path, TWO[:1], step)
    assert len(cells(sheet, TWO[:1], 8)[0]) == 8


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 8, [0, 1, 2]), (8, 8, list(range(8))), (9, 3, [0, 4, 8]),
                                                         (100, 4, [0, 33, 66, 99])])
def test_steps_are_spread_from_the_first_to_the_last(count, most, expected):
    assert spread(range(count), most) == expected


def test_spread_steps_are_all_different():
    for count in range(1, 200):
        chosen = spread(range(count), 8)
        assert len(set(chosen)) == len(chosen) == min(count, 8) and chosen[0] == 0 and chosen[-1] == count - 1


def test_wide_and_high_pictures_keep_their_shape(tmp_path):
    prompts = (Prompt("wide", width=128, height=64), Prompt("high", width=64, height=128))
    with Image.open(render(tmp_path, prompts, 0)) as sheet:
        assert sheet.height == MARGIN + 86 + 128 + GAP + 256 + MARGIN
        red = Image.eval(sheet.getchannel("R"), lambda value: 255 if value == RED[0] else 0)
        green = Image.eval(sheet.getchannel("G"), lambda value: 255 if value == RED[1] else 0)
        box = ImageChops.multiply(red, green).crop((0, MARGIN + 86 + 128 + GAP, *sheet.size)).getbbox()
    assert (box[2] - box[0], box[3] - box[1]) == (128, 256)


def test_very_many_prompts_make_smaller_thumbnails(tmp_path):
    prompts = [Prompt(f"prompt {index}", width=16, height=16) for index in range(120)]
    with Image.open(render(tmp_path, prompts, 0)) as sheet:
        assert sheet.height < contact_sheet.MAX_SHEET_HEIGHT + 200


def test_the_prompt_and_the_step_are_written_on_the_sheet(tmp_path):
    def ink(box, prompt, step):
        with Image.open(render(tmp_path / prompt.text[:1], [prompt], step)) as sheet:
            return sheet.convert("L").crop(box).point(lambda value: value < 128).histogram()[1]

    label = (MARGIN, MARGIN + 86, MARGIN + LABEL_WIDTH, MARGIN + 86 + 150)
    short, long = Prompt("x", width=64, height=64), Prompt("yes, a far longer prompt " * 9, width=64, height=64)
    assert ink(label, long, 0) > 5 * ink(label, short, 0) > 0
    steps = (MARGIN + LABEL_WIDTH, MARGIN + 40, MARGIN + LABEL_WIDTH + CELL, MARGIN + 84)
    assert ink(steps, short, 0) > 0


def test_lines_fit_and_lose_no_letter():
    font = ImageFont.load_default(17)
    text = "a short word, Donaudampfschifffahrtsgesellschaftskapitaensmuetzenabzeichen and some more of the usual kind"
    lines = wrap(text, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("", font, 150) == []


def test_a_font_that_has_the_letters_is_chosen():
    pytest.importorskip("matplotlib")
    assert contact_sheet._undrawable("K\u00e4tzchen", ImageFont.load_default(17)) == 1
    assert font_for("kitten", 17).getname() == ImageFont.load_default(17).getname()
    assert contact_sheet._undrawable("K\u00e4tzchen \u0416\u00e9\u0142", font_for("K\u00e4tzchen \u0416\u00e9\u0142", 17)) == 0


def test_the_sheet_replaces_the_old_one_whole(tmp_path):
    render(tmp_path, TWO, 0)
    assert write_contact_sheet(tmp_path, "run", with_seeds(TWO), 0) == tmp_path / "run_contact_sheet.png"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
