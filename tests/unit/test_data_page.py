"""The page of --debug_dataset: one file, nothing from outside, what the model sees and what is wrong."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy
import pytest
from PIL import Image

from library.data import page
from library.data.decode import decoded
from library.data.page_sheet import damaged, spread, thumbnail
from library.data.tokens import TokenCount
from library.errors import UserError
from tests.unit.browser import open_page
from tests.unit.data_helpers import SMALL, dataset_file, made_up_items, picture, scan_file, scan_folder
from tests.unit.image_helpers import UNDO, gradient, stored


class Outline(HTMLParser):
    """Elements in order, and whether every one that was opened is closed where it should be."""

    VOID = {"meta", "img", "rect", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def words(texts):
    """A stand-in for an architecture: a word is a token; "far" reads 6 of them, "near" 3."""
    def count(encoder, text, limit):
        tokens = text.split()
        return TokenCount(encoder, len(tokens), limit, " ".join(tokens[limit:]))
    return [[count("far", text, 6), count("near", text, 3)] for text in texts]


def no_words():
    raise UserError("no tokenizer", remedy="give one")


def write(tmp_path, scan, meter=lambda: words, **how):
    how = {"seed": 1, "max_steps": 10} | how
    path = tmp_path / "out" / "page.html"
    found = page.write(path, scan, page.Run(**how), meter)
    text = path.read_text(encoding="utf-8")
    return text, Outline(text), {finding.kind: finding for finding in found}


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        size = (128, 96 + 32 * (index % 2))
        picture(tmp_path / "pictures" / f"{index}.png", size, seed=index, caption=f"red, green, blue, {index}")
    return tmp_path / "pictures"


def pictures(outline) -> list[Image.Image]:
    """All pictures of the page, in order."""
    sources = [value for name, value in outline.attributes if name == "src"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def test_a_page_stands_alone(tmp_path, folder):
    text, outline, _ = write(tmp_path, scan_folder(folder))
    assert text.startswith("<!doctype html>") and "default-src 'none'" in text
    assert not {"script", "link", "iframe", "object"} & set(outline.tags)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert [tag for tag in outline.tags if tag in ("h1", "h2")] == ["h1", *["h2"] * 4]
    assert len(pictures(outline)) == 8  # each as it is seen and whole


def test_captions_and_names_are_only_text(tmp_path, folder):
    evil = "<img src=x onerror=alert(1)> & \"'</style><script>"
    picture(folder / "a&amp;'.png", caption=evil)
    text, outline, _ = write(tmp_path, scan_folder(folder), meter=no_words)
    assert "script" not in outline.tags and evil not in text
    assert "&lt;img src=x onerror=alert(1)&gt; &amp;" in text and "a&amp;amp;&#x27;.png" in text
    pictures(outline)


def test_the_same_data_make_the_same_page(tmp_path, folder):
    scan = scan_folder(folder, subset="shuffle_caption = true\nflip_aug = true")
    assert write(tmp_path, scan)[0] == write(tmp_path, scan)[0]
    assert write(tmp_path, scan)[0] != write(tmp_path, scan, seed=2)[0]


def test_what_is_shown_is_what_is_trained_on(tmp_path):
    """The card has the cropped and mirrored picture, not the file."""
    wide = numpy.zeros((64, 256, 3), dtype=numpy.uint8)
    wide[:, :128, 0] = wide[:, 128:, 2] = 255  # red on the left, blue on the right
    (tmp_path / "pictures").mkdir()
    Image.fromarray(wide).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("words", encoding="utf-8")
    scan = scan_folder(tmp_path / "pictures", subset="flip_aug = true")
    text, outline, _ = write(tmp_path, scan)
    shots = pictures(outline)[:4]
    assert text.count("mirrored") == sum(shot.getpixel((2, 8))[2] > 128 for shot in shots) and 0 < text.count("mirrored") < 4
    assert all(shot.getpixel((2, 8))[0] > 200 or shot.getpixel((2, 8))[2] > 200 for shot in shots)


def test_the_mask_is_laid_over_the_picture(tmp_path):
    grey = numpy.full((64, 64, 4), 128, dtype=numpy.uint8)
    grey[:, :32, 3], grey[:, 32:, 3] = 0, 255
    (tmp_path / "pictures").mkdir()
    Image.fromarray(grey).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("words", encoding="utf-8")
    text, outline, _ = write(tmp_path, scan_folder(tmp_path / "pictures", subset="alpha_mask = true"))
    seen = pictures(outline)[0]
    red, green, _ = seen.getpixel((10, 32))
    assert red > green + 40 and "50% counts" in text
    assert max(abs(value - 128) for value in seen.getpixel((54, 32))) < 12


def test_lost_words_are_marked(tmp_path, folder):
    (folder / "0.txt").write_text("one two three four five six seven eight", encoding="utf-8")
    text, _, _ = write(tmp_path, scan_folder(folder))
    assert ('one two three <mark class="partly" title="not read by near">four five six </mark>'
            '<mark class="lost" title="not read by far, near">seven eight</mark>') in text
    assert '<span class="over">far 8 of 6</span>' in text
    assert "1 caption is longer than the 6 tokens that far reads" in text
    assert "4 captions are longer than the 3 tokens that near reads" in text


def test_without_tokenizers_the_page_says_so(tmp_path, folder):
    text, _, found = write(tmp_path, scan_folder(folder), meter=no_words)
    assert "were not counted: no tokenizer; give one" in text and "too long" not in found


def test_pictures_that_vary_are_shown_several_times(tmp_path, folder):
    text, outline, _ = write(tmp_path, scan_folder(folder, subset="shuffle_caption = true\ncaption_dropout_rate = 0.5"))
    assert text.count("epoch 4") == 2 and len(pictures(outline)) == 2 * 4 + 2 + 4
    assert "(no caption, dropped)" in text and "the caption as written" in text


def test_cached_captions_are_those_of_the_cache(tmp_path, folder):
    """With one cached variant every showing has the same words."""
    scan = scan_folder(folder, subset="shuffle_caption = true")
    text = write(tmp_path, scan, variants=1)[0]
    shown = re.findall(r'epoch \d</div><p class="caption">(.*?)</p>', text)
    assert len(shown) == 8 and len(set(shown[:4])) == len(set(shown[4:])) == 1
    anew = re.findall(r'epoch \d</div><p class="caption">(.*?)</p>', write(tmp_path, scan)[0])
    assert len(set(anew[:4])) > 1


def test_findings_come_with_their_pictures(tmp_path, folder):
    picture(folder / "small.png", (20, 20))
    (folder / "broken.png").write_bytes(b"nothing")
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:len(whole) // 2])  # the header is intact, the rest is missing
    text, _, found = write(tmp_path, scan_folder(folder))
    assert found["damaged"].severity == "error" and "3.png" in found["damaged"].examples[0].text
    assert 'data-kind="damaged"' in text and 'data-kind="tiny"' in text and "broken.png" in text
    assert re.search(r'<ul class="pictures"><li><img src="data:[^"]*" alt="">small.png', text)


def test_data_that_cannot_be_trained_on_are_shown_all_the_same(tmp_path, folder):
    text, _, found = write(tmp_path, scan_folder(folder, more="skip_image_resolution = 1000"))
    assert found["settings"].severity == "error" and "skip_image_resolution" in found["settings"].title
    assert "pictures found" in text and "3.png" in text


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    text, outline, found = write(tmp_path, scan_folder(tmp_path / "pictures"))
    assert found["folders without pictures"].severity == "error" and not pictures(outline)
    assert "There is no picture to show" in text


def test_settings_as_they_came_out(tmp_path, folder):
    subset = "num_repeats = 3\ncaption_prefix = 'an old photo of'\nrandom_crop = true"
    text, _, _ = write(tmp_path, scan_folder(folder, subset=subset))
    assert "caption_prefix = &quot;an old photo of&quot;" in text and "random crop" in text
    assert '<td class="number">12</td>' in text  # 4 pictures shown 3 times
    assert "augment.random_crop = true" in text and "bucket_reso_steps = 16" in text


def test_several_datasets_have_a_histogram_each(tmp_path, folder):
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    datasets = "".join(f"[[datasets]]\nresolution = {size}\n{SMALL}\n{subset}" for size in (64, 96))
    scan = scan_file(dataset_file(tmp_path, datasets))
    text, outline, _ = write(tmp_path, scan)
    assert len(re.findall("<h3>[^<]*batches of 1", text)) == 2 and text.count('class="bucket"') == 4
    assert "batches" in text and outline.tags.count("article") == 8


def test_epochs_win_over_steps(tmp_path, folder):
    assert "steps in all (3.0 epochs)" in write(tmp_path, scan_folder(folder), max_epochs=3)[0]
    assert "steps in all (2.5 epochs)" in write(tmp_path, scan_folder(folder))[0]


def test_the_sheet_is_spread_over_buckets():
    items = made_up_items([(128, 128)] * 50 + [(256, 128)] * 3 + [(128, 256)] * 2)
    rows = spread(items, 9)
    groups = items.group[rows].tolist()
    assert len(set(rows)) == 9 and groups == sorted(groups)
    assert sorted(groups.count(group) for group in set(groups)) == [2, 3, 4]
    assert spread(items, 100) == sorted(spread(items, 100), key=lambda row: items.group[row]) and len(spread(items, 100)) == 55


@pytest.mark.parametrize("turn", UNDO)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_small_pictures_are_upright(tmp_path, turn, suffix):
    wide = gradient((480, 320))
    url = thumbnail(stored(wide, tmp_path / f"a{suffix}", turn))
    shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert shown.size == (112, 75)
    wanted = numpy.asarray(wide.resize(shown.size), dtype=int)
    assert numpy.abs(numpy.asarray(shown, dtype=int) - wanted)[5:-5, 5:-5].mean() < 6


def test_pictures_that_cannot_be_trained_on_are_damaged(tmp_path):
    """In the words of the training, without decoding large photographs in full."""
    Image.new("F", (40, 40)).save(tmp_path / "floats.tif")
    gradient((640, 480)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 3])
    paths = [tmp_path / name for name in ("floats.tif", "cut.jpg", "whole.jpg")]
    broken = damaged(paths)
    assert [error.place for error in broken] == [str(path) for path in paths[:2]]
    for path, error in zip(paths, broken, strict=False):
        with pytest.raises(UserError) as caught, decoded(path, str(path)):
            pass
        assert str(caught.value).partition(" (")[0] == str(error).partition(" (")[0]
    with decoded(paths[2], "", (112, 112)) as picture:
        assert picture.rgb.size == (160, 120)


def test_names_that_are_no_text(tmp_path, folder):
    try:
        (folder / "0.png").rename(folder / "bad\udcff.png")
        (folder / "0.txt").rename(folder / "bad\udcff.txt")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    assert "bad?.png" in write(tmp_path, scan_folder(folder))[0]


def test_the_page_in_a_browser(tmp_path, folder):
    """It opens from the disk, asks for nothing, and a narrow window needs no scrolling to the side."""
    scan = scan_folder(folder, subset="shuffle_caption = true\nflip_aug = true")
    write(tmp_path, scan)
    path = tmp_path / "out" / "page.html"
    probe = tmp_path / "probe.html"
    # The page allows no scripts, so a copy that does reports what a reader would see.
    script = ("<script>addEventListener('load', () => { document.body.dataset.report = JSON.stringify({wide: "
              "document.documentElement.scrollWidth - innerWidth, broken: [...document.images].filter(each => !each.naturalWidth)"
              ".length, images: document.images.length}); })</script>")
    text = path.read_text(encoding="utf-8")
    probe.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</head>", script + "</head>")
                     .replace(' loading="lazy"', ""), encoding="utf-8")
    shown, _ = open_page(probe, tmp_path, "--window-size=500,900")
    report = re.search(r'data-report="([^"]*)"', shown).group(1).replace("&quot;", '"')
    assert report == '{"wide":0,"broken":0,"images":14}'
    dom, logged = open_page(path, tmp_path)
    assert dom.count("<article") == 4 and "Refused to" not in logged and "CONSOLE" not in logged
