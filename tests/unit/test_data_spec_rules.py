"""Settings that exclude each other: captions, masks, augmentation and caches, the held-out part."""

from pathlib import Path

import pytest

from library.config.data_options import CachingOptions, DatasetOptions
from library.data.spec import load
from library.errors import UserError
from tests.unit.test_data_spec import PLAIN, SUBSET, folder, notes, problems, read  # noqa: F401  # two fixtures

TEXT, LATENTS = {"cache_text_encoder_outputs": True}, {"cache_latents_to_disk": True}


@pytest.mark.parametrize("lines, caching, expected", [
    ("keep_tokens = 1\nkeep_tokens_separator = '|||'", {}, ":5: keep_tokens: keep_tokens and keep_tokens_separator both say"),
    ("keep_tokens_separator = ','", {}, ":5: keep_tokens_separator: ',' is the caption_separator as well"),
    ("secondary_separator = ', '", {}, ":5: secondary_separator: ', ' is the caption_separator as well"),
    ("secondary_separator = '|||'\nkeep_tokens_separator = '|||'", {}, ":5: secondary_separator: '|||' is the keep_tokens_sep"),
    ("shuffle_caption = true", TEXT, ":5: shuffle_caption: cached text would freeze each caption in one form; add --text_cache_"),
    ("enable_wildcard = true", TEXT, ":5: enable_wildcard: cached text would freeze"),
    ("caption_tag_dropout_rate = 0.1", TEXT, ":5: caption_tag_dropout_rate: cached text would freeze"),
    ("token_warmup_step = 10", TEXT, ":5: token_warmup_step: captions that grow with the steps cannot be cached"),
    ("token_warmup_step = 10", {**TEXT, "text_cache_variants": 4}, ":5: token_warmup_step: captions that grow with the steps"),
    ("color_aug = true", LATENTS, ":5: color_aug: cached latents would freeze this augmentation; remove it, or leave out"),
    ("random_crop = true", LATENTS, ":5: random_crop: cached latents would freeze"),
    ("face_crop_aug_range = [1, 2]", LATENTS, ":5: face_crop_aug_range: cached latents would freeze"),
    ("conditioning_data_dir = 'masks'", {}, ":5: conditioning_data_dir: mask pictures are not used without --masked_loss"),
    ("is_reg = true", {}, ":1: all subsets of this dataset hold regularisation pictures; add a subset"),
])
def test_refusals(folder, lines, caching, expected):  # noqa: F811
    found = problems(folder, f"{PLAIN}{SUBSET}{lines}\n", caching)
    assert len(found) == 1 and expected in found[0]


def test_refusals_that_flags_are_part_of(folder):  # noqa: F811
    assert problems(folder, PLAIN + SUBSET, TEXT, shuffle_caption=True)[0].startswith("--shuffle_caption: cached text would")
    assert problems(folder, PLAIN + SUBSET, masked_loss=True)[0].startswith("--masked_loss: no subset has masks; give mask pict")
    both = f"{PLAIN}{SUBSET}conditioning_data_dir = 'masks'\nalpha_mask = true\n"
    assert "masks from pictures or from transparency, not from both" in problems(folder, both, masked_loss=True)[0]
    assert "no such folder: mask" in problems(folder, f"{PLAIN}{SUBSET}conditioning_data_dir = 'mask'\n", masked_loss=True)[0]
    for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
        assert problems(folder, PLAIN + SUBSET, **{name: 5}) == [
            f"--{name}: there is nothing to validate on; add --validation_split 0.1, or leave it out"]


def test_a_cache_dir_needs_something_to_keep_there(folder):  # noqa: F811
    place = {"cache_dir": Path("cache")}
    refused, = problems(folder, PLAIN + SUBSET, {**place, "cache_latents": True})
    assert refused.startswith("--cache_dir: nothing is kept on disk; add --cache_latents_to_disk")
    for lines, caching, given in (("", {"cache_latents_to_disk": True}, {}), ("cache_info = true", {}, {}), ("", {}, {"cache_info": True})):
        assert read(folder, f"{PLAIN}{SUBSET}{lines}\n", {**place, **caching}, **given)
    assert problems(folder, f"{PLAIN}{SUBSET}cache_info = false\n", place, cache_info=True) == [refused]


def test_one_shared_mistake_is_told_once(folder):  # noqa: F811
    text = "[general]\ncolor_aug = true\n" + PLAIN + SUBSET + "[[datasets.subsets]]\nimage_dir = 'two'\n"
    assert len(problems(folder, text, LATENTS)) == 1


@pytest.mark.parametrize("lines, caching, given", [
    ("shuffle_caption = true", {**TEXT, "text_cache_variants": 8}, {}),
    ("caption_dropout_rate = 0.1\ncaption_dropout_every_n_epochs = 2\ncaption_prefix = 'p'", TEXT, {}),
    ("flip_aug = true\nresize_interpolation = 'area'\nalpha_mask = true", LATENTS, {}),
    ("random_crop = true\nface_crop_aug_range = [1, 2]\ncolor_aug = true", TEXT, {}),
    ("alpha_mask = true", {}, {"masked_loss": True}),
    ("conditioning_data_dir = 'masks'\nalpha_mask = false", {}, {"masked_loss": True}),
    ("keep_tokens = 1\nshuffle_caption = true", {}, {}),
    ("keep_tokens_separator = '|||'", {}, {}),
    ("caption_extension = '.json'\ncaption_separator = ';'", {}, {}),
    ("", {}, {"validation_split": 0.1, "validate_every_n_steps": 5, "max_validation_steps": 2, "validation_seed": 1}),
])
def test_what_goes_together(folder, notes, lines, caching, given):  # noqa: F811
    assert len(read(folder, f"{PLAIN}{SUBSET}{lines}\n", caching, **given)) == 1
    assert notes == []


def test_alpha_mask_alone_masks_the_loss(folder):  # noqa: F811
    subset = read(folder, PLAIN + SUBSET, alpha_mask=True)[0].subsets[0]
    assert (subset.mask, subset.mask_dir) == ("alpha", None)


def test_regularisation_pictures_take_no_masks_from_the_command_line(folder):  # noqa: F811
    text = PLAIN + SUBSET + "[[datasets.subsets]]\nimage_dir = 'two'\nis_reg = true\n"
    spec, = read(folder, text, masked_loss=True, conditioning_data_dir=folder / "masks")
    assert [subset.mask for subset in spec.subsets] == ["files", "none"]


@pytest.mark.parametrize("lines, caching, expected", [
    ("", {"text_cache_variants": 4}, "--text_cache_variants: has no effect: text encoder outputs are not cached"),
    ("", {**TEXT, "text_cache_variants": 4}, "--text_cache_variants: has no effect: no caption varies, so each has one text"),
    ("caption_dropout_rate = 1", {}, "dataset.toml:5: caption_dropout_rate: no caption is ever shown"),
    ("caption_dropout_every_n_epochs = 1", {}, "dataset.toml:5: caption_dropout_every_n_epochs: no caption is ever shown"),
])
def test_notes(folder, notes, lines, caching, expected):  # noqa: F811
    read(folder, f"{PLAIN}{SUBSET}{lines}\n", caching)
    assert len(notes) == 1 and notes[0].endswith(expected)


def test_mistakes_of_flags_and_of_the_file_are_told_together(folder):  # noqa: F811
    path = folder / "dataset.toml"
    path.write_text(PLAIN + SUBSET + "num_repeats = 0\n")
    with pytest.raises(UserError) as caught:
        load(DatasetOptions(dataset_config=path, color_aug=True), CachingOptions(cache_latents=True), 16)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("split", [1.0, 1.5])
def test_a_split_of_the_command_line_has_the_limits_of_the_file(folder, split):  # noqa: F811
    found = problems(folder, PLAIN + SUBSET, validation_split=split)
    limits = "a number of at least 0 and below 1"
    assert found == [f"--validation_split: {split} is not {limits}; give {limits}"]
