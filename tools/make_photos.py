#!/usr/bin/env python
"""Cut the quickstart's dozen photographs out of the public-domain pictures that three Python wheels carry.

The result is in the repository (`configs/quickstart/photos`), so nobody has to run this; it is here so that every
picture can be traced to its source and made again. Needs an environment of its own, since none of the packages is one
of the project's requirements:

    python -m venv /tmp/photos
    /tmp/photos/bin/pip install scikit-image==0.26.0 scipy==1.11.4 matplotlib==3.11.2
    /tmp/photos/bin/python tools/make_photos.py --output configs/quickstart/photos

scipy is pinned because 1.11 is the last release that carries its pictures inside the wheel. The packages are only
looked up, never imported: Pillow does the work. Writes `NN_name.jpg` and `NN_name.txt` per picture and CREDITS.md one
folder above.
"""

import argparse
import bz2
import importlib.util
import pickle
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

JPEG_QUALITY = 92
SQUARE, TALL, WIDE = (256, 256), (192, 320), (320, 192)  # (width, height): 1:1, 3:5 and 5:3


@dataclass(frozen=True)
class Photo:
    """One picture of the quickstart: where it is cut from, what it shows, whom to thank."""

    name: str
    package: str
    file: str  # inside the package
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the source
    size: tuple[int, int]  # (width, height) written
    caption: str
    author: str
    licence: str
    origin: str


NASA = "public domain (work of NASA)"
CC0 = "CC0 1.0 (given by the author to scikit-image)"
SKIMAGE_DOCS = "https://scikit-image.org/docs/stable/api/skimage.data.html"

PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png", (50, 0, 357, 512), TALL,
          "a smiling astronaut in an orange space suit",
          "NASA (portrait of Eileen Collins)", NASA, "https://flic.kr/p/r9qvLn"),
    Photo("shuttle", "skimage", "data/astronaut.png", (368, 6, 512, 246), TALL,
          "a white space shuttle with a brown fuel tank",
          "NASA (background of the portrait of Eileen Collins)", NASA, "https://flic.kr/p/r9qvLn"),
    Photo("rocket", "skimage", "data/rocket.jpg", (190, 0, 446, 427), TALL,
          "a rocket on the launch pad at night with bright lights",
          "SpaceX (DSCOVR on Falcon 9)", "public domain (released by SpaceX)",
          "https://www.flickr.com/photos/spacexphotos/16511594820/"),
    Photo("officer", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", (76, 0, 436, 600), TALL,
          "a navy officer with glasses and a dark uniform in front of a flag",
          "James S. Davis, U.S. Navy (portrait of Grace Hopper)", "public domain (work of the U.S. Navy)",
          "https://commons.wikimedia.org/wiki/File:Grace_Hopper.jpg"),
    Photo("cat", "skimage", "data/chelsea.png", (0, 15, 451, 286), WIDE,
          "a tabby cat looking at the camera",
          "Stefan van der Walt", CC0, SKIMAGE_DOCS),
    Photo("coffee", "skimage", "data/coffee.png", (0, 20, 600, 380), WIDE,
          "a red cup of coffee on a wooden table",
          "Rachel Michetti, courtesy of Pikolo Espresso Bar", CC0, SKIMAGE_DOCS),
    Photo("raccoon", "scipy", "misc/face.dat", (0, 60, 1024, 674), WIDE,
          "a raccoon among green leaves",
          "pixnio.com", "public domain / CC0", "https://pixnio.com/fauna-animals/raccoons/raccoon-procyon-lotor"),
    Photo("photographer", "skimage", "data/camera.png", (0, 0, 512, 512), SQUARE,
          "a black and white picture of a man with a camera on a tripod",
          "Lav Varshney", CC0, SKIMAGE_DOCS),
    Photo("retina", "skimage", "data/retina.jpg", (0, 0, 1411, 1411), SQUARE,
          "a round red retina of an eye",
          "Mikael Häggström", "CC0 1.0", "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg"),
    Photo("galaxies", "skimage", "data/hubble_deep_field.jpg", (630, 380, 806, 556), SQUARE,
          "many galaxies and stars in deep space",
          "NASA, ESA (Hubble eXtreme Deep Field)", NASA,
          "https://hubblesite.org/newscenter/archive/releases/2012/37/image/a/"),
    Photo("stairs", "scipy", "misc/ascent.dat", (0, 0, 512, 512), SQUARE,
          "people climbing the metal stairs of a tower",
          "public-domain-image.com", "public domain",
          "https://docs.scipy.org/doc/scipy-1.11.4/reference/generated/scipy.misc.ascent.html"),
    Photo("bricks", "skimage", "data/brick.png", (0, 0, 512, 512), SQUARE,
          "a gray brick wall",
          "cc0textures.com (Bricks25)", "CC0 1.0", "https://cc0textures.com/view.php?tex=Bricks25"),
)


class PlainUnpickler(pickle.Unpickler):
    """scipy stores one picture as a pickled list of rows of numbers: anything else in there is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in a picture file")


def read(photo: Photo) -> Image.Image:
    """The whole source picture, gray or RGB, as its package carries it."""
    spec = importlib.util.find_spec(photo.package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{photo.package} is not installed: see the top of {Path(__file__).name} for the environment")
    path = Path(spec.submodule_search_locations[0]) / photo.file
    if not path.is_file():
        raise SystemExit(f"{path} is missing: install the versions named at the top of {Path(__file__).name}")
    if photo.file.endswith("face.dat"):  # bz2 of 768 x 1024 RGB bytes
        return Image.frombytes("RGB", (1024, 768), bz2.decompress(path.read_bytes()))
    if photo.file.endswith("ascent.dat"):  # 512 rows of 512 gray levels
        with path.open("rb") as file:
            rows = PlainUnpickler(file).load()
        return Image.frombytes("L", (len(rows[0]), len(rows)), b"".join(bytes(row) for row in rows))
    return Image.open(path)


def cut(photo: Photo) -> Image.Image:
    """The picture as it is shipped: turned where the source lies on its side, cropped, scaled."""
    source = read(photo)
    source = source.convert("L" if source.mode in ("L", "I;16") else "RGB")
    if photo.name == "bricks":
        source = source.transpose(Image.Transpose.ROTATE_90)
    return source.crop(photo.box).resize(photo.size, Image.Resampling.LANCZOS)


def credits() -> str:
    """CREDITS.md: source, author and licence of each picture."""
    lines = [
        "# Credits of the quickstart's photographs", "",
        "Every picture is in the public domain or given away under CC0. Each was cropped and scaled by `tools/make_photos.py`",
        "from the copy inside the named Python wheel (scikit-image 0.26.0, scipy 1.11.4, matplotlib 3.11.2).", "",
        "| picture | author | licence | from | origin |", "|---|---|---|---|---|",
    ]
    for number, photo in enumerate(PHOTOS, start=1):
        lines.append(f"| `{number:02d}_{photo.name}.jpg` | {photo.author} | {photo.licence} "
                     f"| `{photo.package}/{photo.file}` | <{photo.origin}> |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's photographs, captions and credits.")
    parser.add_argument("--output", type=Path, default=Path("configs/quickstart/photos"), metavar="DIR")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(PHOTOS, start=1):
        stem = f"{number:02d}_{photo.name}"
        cut(photo).save(output / f"{stem}.jpg", quality=JPEG_QUALITY, optimize=True)
        (output / f"{stem}.txt").write_text(photo.caption + "\n", encoding="utf-8", newline="\n")
    (output.parent / "CREDITS.md").write_text(credits(), encoding="utf-8", newline="\n")
    print(f"{len(PHOTOS)} photographs in {output}")


if __name__ == "__main__":
    main()
