"""What is said about the data before the training: each finding, and that none is made up."""

import shutil
from dataclasses import replace

import numpy
import pytest
from PIL import Image

from library.data import findings
from library.data.bucket import assign
from library.data.duplicates import duplicates
from library.data.findings import Finding, brief, gather
from library.data.plan import StepPlan
from library.data.scan import Scan
from library.data.select import Selection, select
from library.data.tokens import Counted, TokenCount, count_longest
from tests.unit.data_helpers import SMALL, dataset_file, made_up_items, picture, scan_file, scan_folder


def found_in(scan: Scan, **how) -> dict[str, Finding]:
    selection = select(scan.items)
    plan = StepPlan(selection.train, [spec.batch_size for spec in scan.items.specs], 1)
    return {finding.kind: finding for finding in gather(scan, selection, plan, **how)}


def of_sizes(*sizes, **spec) -> dict[str, Finding]:
    """The findings about made-up pictures at a resolution of 64 x 64."""
    items = made_up_items(sizes)
    specs = tuple(replace(each, **spec) for each in items.specs)
    group, buckets = assign(items.sizes, specs[0].rule)
    items = replace(items, specs=specs, group=group, groups=tuple((0, bucket) for bucket in buckets))
    plan = StepPlan(items, [each.batch_size for each in items.specs], 1)
    nothing = Selection(items, items.take(numpy.zeros(len(items), dtype=bool)), {}, ())
    return {finding.kind: finding for finding in gather(Scan(items, (), (None,)), nothing, plan)}


def test_good_data_have_nothing_but_the_length_of_an_epoch():
    found = of_sizes((128, 128), (128, 128), (256, 128), batch_size=1)
    assert set(found) == {"epoch"}
    assert found["epoch"].severity == "note" and found["epoch"].title.startswith("an epoch is 3 steps: 3 showings of 3 pictures")


def test_tiny_and_enlarged_pictures_are_told_apart():
    found = of_sizes((128, 128), (20, 20), (50, 50), (32, 32), (63, 63))
    assert found["tiny"].title == "1 picture is tiny for its training size"
    assert found["tiny"].examples[0].text == "001.png (20x20)"
    assert found["enlarged"].title == "2 pictures are enlarged, by up to 2.0 times" and found["enlarged"].severity == "warning"
    examples = [example.text for example in found["enlarged"].examples]
    assert examples == ["003.png (32x32, 2.0 times)", "002.png (50x50, 1.3 times)"]
    assert of_sizes((50, 50))["enlarged"].severity == "note"


def test_tiny_without_enlarging():
    found = of_sizes((128, 128), (21, 21), bucket_no_upscale=True)
    assert "tiny" in found and "enlarged" not in found


def test_heavy_cropping_names_the_remedy_that_fits():
    found = of_sizes((400, 100), (128, 128), enable_bucket=False)
    assert found["cropped"].title == "1 picture loses more than 25% of its area to the crop"
    assert "75% cut away" in found["cropped"].examples[0].text and "enable_bucket" in found["cropped"].remedy
    assert "min_bucket_reso" in of_sizes((1000, 100))["cropped"].remedy
    steps = of_sizes((60, 100), bucket_reso_steps=64, min_bucket_reso=64)["cropped"].remedy
    assert "a smaller bucket_reso_steps (now 64)" in steps


def test_buckets_that_do_not_fill_a_batch():
    found = of_sizes(*[(128, 128)] * 4, (256, 128), batch_size=4)
    assert found["lonely"].title.startswith("1 of 2 buckets do not fill a batch (1 showings")
    assert found["lonely"].severity == "note"


@pytest.fixture
def folder(tmp_path):
    for index in range(6):
        picture(tmp_path / "pictures" / f"{index}.png", (128, 128), seed=index)
    return tmp_path / "pictures"


def test_problems_of_the_scan_become_findings(folder):
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "1.txt").unlink()
    found = found_in(scan_folder(folder))
    unreadable, missing = found["pictures that cannot be read"], found["pictures without a caption"]
    assert unreadable.severity == missing.severity == "error"
    assert unreadable.title == "pictures that cannot be read: 1" and "0.png" in unreadable.examples[0].text and unreadable.remedy
    line = brief(found.values())[0]  # the file and what is wrong with it, once
    assert line.count("0.png") == 1 and "pictures that cannot be read" not in line and line.endswith(unreadable.remedy)


def mask(path, size, value):
    path.parent.mkdir(exist_ok=True)
    Image.new("L", size, value).save(path)


def test_masks_that_hide_everything(folder, tmp_path):
    for index in range(6):
        mask(tmp_path / "masks" / f"{index}.png", (128, 128), 0 if index == 4 else 200)
    found = found_in(scan_folder(folder, subset=f"conditioning_data_dir = '{(tmp_path / 'masks').as_posix()}'", masked_loss=True))
    black = found["black masks"]
    assert black.title.startswith("1 picture with a mask that hides all of it") and black.severity == "warning"
    assert [example.path.name for example in black.examples] == ["4.png"] and "no transparency" not in found


def test_transparency_that_is_not_there(folder, tmp_path):
    found = found_in(scan_folder(folder, subset="alpha_mask = true"))
    assert "no picture that was looked at in 1 subset has transparent parts" in found["no transparency"].title
    assert "6 pictures looked at" in found["no transparency"].examples[0].text and "black masks" not in found
    for index, alpha in ((1, 0), (2, 255)):
        with Image.open(folder / f"{index}.png") as opened:
            opened.putalpha(alpha)
            opened.save(folder / f"{index}.png")
    found = found_in(scan_folder(folder, subset="alpha_mask = true"))
    assert [example.path.name for example in found["black masks"].examples] == ["1.png"] and "no transparency" not in found
    assert "black masks" not in found_in(scan_folder(folder))  # masks that are not used


def test_captions_of_another_ending_behind_class_tokens(folder):
    """With class_tokens nothing is missing, so that a wrong ending would train every picture on the same words."""
    for index in range(6):
        (folder / f"{index}.txt").rename(folder / f"{index}.caption")
    (folder / "3.caption").rename(folder / "3_10_10_20_20.caption")  # not the caption of 3.png
    (folder / "3.json").write_text('{"downloaded": 2024}', encoding="utf-8")
    subset = "class_tokens = 'a cat'\ncaption_extension = '.txt'"
    unread = found_in(scan_folder(folder, subset=subset))["unread captions"]
    assert unread.severity == "warning" and unread.title == (
        "5 of 6 pictures looked at have a .caption file that is not read: “a cat” stands in as the caption")
    assert [example.path.name for example in unread.examples] == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert 'caption_extension = ".caption" at ' in unread.remedy and "dataset.toml:" in unread.remedy
    assert "unread captions" not in found_in(scan_folder(folder, subset="class_tokens = 'a cat'"))  # .caption is read
    for path in folder.glob("*.caption"):
        path.with_suffix(".txt").write_text("a cat", encoding="utf-8")  # the same words from the right file
    assert "unread captions" not in found_in(scan_folder(folder, subset=subset))


def test_what_settings_leave_out(folder):
    picture(folder / "small.png", (40, 40))
    found = found_in(scan_folder(folder, more="skip_image_resolution = 64\nvalidation_split = 0.34"))
    assert found["skip_image_resolution"].title == "1 picture left out because of skip_image_resolution"
    assert found["skip_image_resolution"].examples[0].path.name == "small.png"
    assert found["validation_split"].title == "2 pictures held out for validation"
    assert found["validation_split"].severity == "note"


def test_copies_are_found_by_their_bytes(folder):
    picture(folder / "other.png", (128, 128), seed=77)  # of the same size, perhaps of the same length
    for copy in ("copy.png", "zcopy.png"):
        shutil.copy2(folder / "2.png", folder / copy)
        (folder / copy).with_suffix(".txt").write_text("words", encoding="utf-8")
    found = found_in(scan_folder(folder))
    assert found["duplicates"].title == "2 pictures are copies of another one, byte for byte"
    assert [example.text for example in found["duplicates"].examples] == ["2.png = copy.png = zcopy.png"]


def test_copies_that_are_too_much_to_read_are_counted(folder):
    shutil.copy2(folder / "2.png", folder / "copy.png")
    (folder / "copy.txt").write_text("words", encoding="utf-8")
    found = found_in(scan_folder(folder), hash_bytes=10)
    assert found["duplicates"].severity == "note" and "were not compared" in found["duplicates"].title
    assert duplicates(scan_folder(folder).items, 0)[0] == []


def test_known_hashes_spare_the_reading(folder):
    shutil.copy2(folder / "2.png", folder / "copy.png")
    (folder / "copy.txt").write_text("words", encoding="utf-8")
    scan = scan_folder(folder)
    rows = numpy.arange(len(scan.items))
    scan.remember(0, rows, (rows[:, None] + numpy.ones((1, 16))).astype(numpy.uint8))  # all different, whatever the files hold
    assert duplicates(scan.items, 0) == ([], 0)


def test_a_folder_in_two_datasets_is_no_copy_of_itself(tmp_path, folder):
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    text = "".join(f"[[datasets]]\nresolution = {size}\n{SMALL}\n{subset}" for size in (64, 128))
    scan = scan_file(dataset_file(tmp_path, text))
    assert len(scan.items) == 12 and duplicates(scan.items, 2**20) == ([], 0)


def test_captions_that_are_too_long(folder):
    long, short = TokenCount("T5", 600, 512, "the end"), TokenCount("T5", 5, 512)
    tokens = [("0.0/0.png", [long, TokenCount("CLIP", 600, 77, "much more")]), ("0.0/1.png", [short, TokenCount("CLIP", 5, 77)])]
    found = [each for each in gather(scan_folder(folder), None, None, Counted(tokens)) if each.kind == "too long"]
    assert [each.severity for each in found] == ["warning", "note"]
    assert found[0].title == "1 caption is longer than the 512 tokens that T5 reads"
    assert found[0].examples[0].text == "0.0/0.png: 600 tokens, lost: “the end”"
    assert not [each for each in gather(scan_folder(folder), None, None, Counted(tokens[1:])) if each.kind == "too long"]


def test_too_many_to_count_are_not_told_as_all():
    tokens = [(f"0.0/{index}", [TokenCount("T5", 600, 512)]) for index in range(3)]
    assert findings.too_long(Counted(tokens, complete=False))[0].title.startswith("3 or more captions are longer than the 512")
    rest = [*tokens, ("0.0/3", [TokenCount("T5", 500, 512)])]  # a shorter one fits, so those that were left out do
    assert findings.too_long(Counted(rest, complete=False))[0].title.startswith("3 captions are")
    assert findings.too_long(Counted(tokens[:1]), "preview prompt")[0].title.startswith("1 preview prompt is longer")


def test_the_longest_captions_are_counted(folder):
    for name, words in {"0": "one two three", "1": "one two three", "2": "one", "3": "one two three four", "4": "x"}.items():
        (folder / f"{name}.txt").write_text(words, encoding="utf-8")
    (folder / "5.txt").write_text("one two three four, five", encoding="utf-8")

    def meter(texts):
        return [[TokenCount("words", len(text.split()), 3)] for text in texts]

    items = scan_folder(folder).items
    counted = count_longest(items, 1, meter, 3)
    assert [(sample, count.tokens) for sample, (count,) in counted.samples] == [("0.0/5.png", 5), ("0.0/3.png", 4), ("0.0/0.png", 3)]
    assert not counted.complete
    everything = count_longest(items, 1, meter, 100)
    assert everything.complete and len(everything.samples) == 5, "equal ones are counted once"
    (folder / "2.txt").write_text("word " * 5000, encoding="utf-8")
    novel = count_longest(scan_folder(folder).items, 1, meter, 3)
    assert [sample for sample, _ in novel.samples] == ["0.0/2.png"] and not novel.complete


def test_what_a_selection_has_to_say_is_told(tmp_path):
    picture(tmp_path / "pictures" / "a.png", (128, 128))
    found = found_in(scan_folder(tmp_path / "pictures", more="validation_split = 0.5"))
    assert "its only picture is trained on" in found["validation_split"].title and found["validation_split"].severity == "note"


def test_the_worst_comes_first_and_the_log_gets_a_line_each():
    made = [Finding("a", "note", "a note", remedy="rest"),
            Finding("b", "warning", "a warning", (findings.Example("x.png"),), "mend it"),
            Finding("c", "error", "an error")]
    assert [each.kind for each in findings.worst_first(made)] == ["c", "b", "a"]
    assert brief(made) == ["a note", "a warning (such as x.png); mend it", "an error"]
