"""What one showing is: its size conditioning is that of the crop really made."""

from dataclasses import replace

import numpy
from PIL import Image

from library.data.augment import View
from library.data.bucket import Placement
from library.data.showing import Course, show
from tests.unit.data_helpers import one_folder, picture
from tests.unit.image_helpers import pixels

COURSE = Course(seed=1, total_steps=100)


def test_size_conditioning_names_the_part_that_is_shown(tmp_path):
    """A picture cut at these numbers, the mirrored picture for a mirrored showing, is what the model is given."""
    path = picture(tmp_path / "pictures" / "a.png", (300, 190))
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    item = one_folder(tmp_path / "pictures", subset="flip_aug = true\nrandom_crop = true")[0]
    item = replace(item, placement=Placement((48, 48), (120, 76), (0, 0)))  # room on every side
    seen = set()
    for epoch in range(30):
        shown = show(item, 0, COURSE, epoch, epoch)
        height, width, top, left, high, wide = shown.geometry
        assert (height, width, high, wide) == (190, 300, 48, 48)
        source = tmp_path / "mirrored.png" if shown.view.flip else path
        cut = View(Placement((48, 48), (120, 76), (left, top)))
        assert numpy.abs(pixels(source, cut) - pixels(path, shown.view)).max() <= 1
        seen.add((shown.view.flip, left, top))
    assert len(seen) > 20 and len({flip for flip, _, _ in seen}) == 2
