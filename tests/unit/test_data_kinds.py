"""Rules that hold for every kind of subset: held-out pictures and dropped captions of metadata files, masks and kept indexes."""

import json

from PIL import Image

from library.data.select import select
from library.data.showing import EMPTY, Course, show
from tests.unit.data_helpers import dataset_file, make_older, picture, scan_file


def words(items):
    return {item.path.name: item.caption for item in items}


def of_file(folder, dataset, subset, **more):
    return scan_file(dataset_file(folder, f"[[datasets]]\nresolution = 64\n{dataset}\n[[datasets.subsets]]\n{subset}\n"), **more)


def test_held_out_pictures_of_a_metadata_file_are_not_trained(tmp_path):
    records = {picture(tmp_path / "pictures" / f"{number}.png", caption=None).name: {"caption": f"words {number}"}
               for number in range(8)}
    (tmp_path / "meta.json").write_text(json.dumps(records), encoding="utf-8")
    subset = f"image_dir = '{tmp_path / 'pictures'}'\nmetadata_file = '{tmp_path / 'meta.json'}'"
    chosen = select(of_file(tmp_path, "validation_split = 0.25", subset).items)
    train, held_out = words(chosen.train), words(chosen.validation)
    assert (len(train), len(held_out)) == (6, 2) and not set(train) & set(held_out)
    assert {**train, **held_out} == {name: record["caption"] for name, record in records.items()}


def test_held_out_pictures_keep_their_captions_in_a_kept_index(tmp_path):
    """Also when another share is held out at a later start, and a picture has come before them all."""
    for number in range(8):
        picture(tmp_path / "pictures" / f"{number}.png", caption=f"words {number}")
    subset = f"image_dir = '{tmp_path / 'pictures'}'\ncache_info = true"
    for split, count in ((0.25, 8), (1 / 3, 9)):
        chosen = select(of_file(tmp_path, f"validation_split = {split}", subset, index_dir=tmp_path / "index").items)
        found = [*words(chosen.train).items(), *words(chosen.validation).items()]
        assert len(chosen.validation) == round(count * split) and len(dict(found)) == len(found) == count
        assert all(caption == f"words {name.partition('.')[0]}" for name, caption in found)
        picture(tmp_path / "pictures" / "-1.png", caption="words -1")


def test_pictures_with_masks_lose_their_captions_in_every_nth_epoch_only(tmp_path):
    picture(tmp_path / "pictures" / "a.png", caption="a cat")
    (tmp_path / "masks").mkdir()
    Image.new("L", (96, 64), 255).save(tmp_path / "masks" / "a.png")
    make_older(tmp_path / "masks" / "a.png")
    subset = (f"image_dir = '{tmp_path / 'pictures'}'\nconditioning_data_dir = '{tmp_path / 'masks'}'\n"
              "caption_dropout_every_n_epochs = 3")
    item, = of_file(tmp_path, "", subset, masked_loss=True).items
    shown = [show(item, 0, Course(seed=1, total_steps=10), epoch, epoch) for epoch in range(6)]
    assert [each.caption for each in shown] == ["a cat", "a cat", "", "a cat", "a cat", ""]
    assert [each.variant == EMPTY for each in shown] == [False, False, True] * 2
    assert {each.mask for each in shown} == {tmp_path / "masks" / "a.png"}
