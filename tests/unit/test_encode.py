"""What training reads is the same with caches and without; models are loaded only when something has to be encoded."""

from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch

from library.architectures.base import LatentSpec
from library.config.data_options import CachingOptions
from library.data import caption
from library.data.augment import Augment, View
from library.data.dataset import batches
from library.data.image import load_view, to_signal
from library.data.plan import StepPlan
from library.data.select import select
from library.data.showing import EMPTY, Course, show
from library.encode import Announce, CaptionVariants, encode_all, without_padding
from library.prompts import Prompt
from tests.unit.data_helpers import one_folder, picture

RUNTIME = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32, rank=0, world_size=1, is_main=True, beside_main=1,
                          exchange=lambda value: [value])
LENGTH = 24


class Model:
    """An architecture of arithmetic; counts what it loads and encodes."""

    latent = LatentSpec(3, 8, 2)

    def __init__(self, trim=False):
        self.text_trim = {"states": "mask"} if trim else {}
        self.loaded, self.texts = [], []

    def vae_identity(self, dtype):
        return "vae"

    text_encoders = ("letters",)

    def text_identity(self, names, dtype):
        return "text"

    def load_vae(self, device, dtype):
        self.loaded.append("vae")
        return torch.nn.Linear(1, 1)

    def load_text_encoders(self, names, device, dtype):
        assert tuple(names) == self.text_encoders
        self.loaded.append("text")
        return SimpleNamespace()

    def encode_image(self, vae, pixels):
        assert pixels.dtype == torch.float32
        return torch.nn.functional.avg_pool2d(pixels, 8) / 3

    def encode_text(self, encoders, captions):
        self.texts += captions
        mask = torch.arange(LENGTH) < torch.tensor([max(len(words), 1) for words in captions])[:, None]
        letters = torch.tensor([[ord(letter) / 7 for letter in words[:LENGTH].ljust(LENGTH)] for words in captions])
        return {"states": letters[:, :, None].repeat(1, 1, 2) + 1e-4, "mask": mask, "pooled": letters.mean(1, keepdim=True)}


@pytest.fixture
def selection(tmp_path):
    for index in range(6):
        picture(tmp_path / "p" / f"{index}.png", (96, 64), seed=index, caption=f"a{index}, b, c")
    items = one_folder(tmp_path / "p", more="validation_split = 0.3", subset="flip_aug = true\nshuffle_caption = true\n"
                                                                              "caption_dropout_rate = 0.2")
    return select(items)


def caching(tmp_path, **given):
    return CachingOptions(**given, cache_dir=tmp_path / "cache")


def run(arch, selection, caching, variants, prompts=(), course=None):
    course = course or Course(3, 100, variants)
    encoded = encode_all(arch, RUNTIME, caching, selection, course, 2, prompts)
    plan = StepPlan(selection.train, [2], seed=3)
    steps = [group.micro[0] for group in batches(encoded.train, plan, 0, 0, 2 * plan.steps_per_epoch, 0)]
    return encoded, steps


ON_DISK = dict(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, text_cache_variants=3)
IN_MEMORY = dict(cache_latents=True, cache_text_encoder_outputs=True, text_cache_variants=3)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("how", [ON_DISK, IN_MEMORY, dict(cache_latents=True)], ids=["disk", "memory", "latents"])
def test_cached_or_not_the_numbers_are_the_same(selection, tmp_path, how, trim):
    plain = replace(selection, train=_with_alpha(selection.train))
    cached, steps = run(Model(trim), plain, caching(tmp_path, **how), 3 if "text_cache_variants" in how else None)
    online = encode_all(Model(trim), RUNTIME, CachingOptions(), plain, Course(3, 100), 2, ())
    for batch in steps:
        pixels = _online_twin(batch, plain.train)
        given, other = cached.batch(batch), online.batch(pixels)
        latents, text, mask, other_text = given.latents, given.text, given.mask, other.text
        assert torch.equal(given.geometry, batch.geometry) and torch.equal(other.geometry, batch.geometry)
        assert latents.dtype == torch.float32 and torch.equal(latents, other.latents)
        assert torch.equal(mask, other.mask) and mask.shape == (len(latents), 1, *latents.shape[2:])
        assert text.keys() == other_text.keys()
        for name, value in text.items():
            assert torch.equal(value, other_text[name]) and value.dtype == other_text[name].dtype
        if trim:
            assert (text["states"][~text["mask"]] == 0).all() and (text["states"][text["mask"]] != 0).all()


def _with_alpha(items):
    specs = tuple(replace(spec, subsets=tuple(replace(subset, mask="alpha") for subset in spec.subsets)) for spec in items.specs)
    return replace(items, specs=specs)


def _online_twin(batch, items):
    """The batch of the same showings as it is without caches."""
    by_path = {str(items.path(index)): items[index] for index in range(len(items))}
    pixels, masks = [], []
    for path, latents in zip(batch.paths, batch.latents, strict=True):
        item = by_path[path]
        views = [load_view(item.path, View(item.placement, flip), "here", item.mask) for flip in (False, True)]
        encoded = [torch.nn.functional.avg_pool2d(to_signal(picture), 8) / 3 for picture, _ in views]
        one, mask = views[min((0, 1), key=lambda side: (encoded[side] - latents.float()).abs().max())]
        pixels.append(one)
        masks.append(mask)
    return replace(batch, latents=None, text=None, mask=None, pixels=torch.stack(pixels), pixel_mask=torch.stack(masks))


def test_a_second_start_loads_and_encodes_nothing(selection, tmp_path):
    first = Model()
    run(first, selection, caching(tmp_path, **ON_DISK), 3)
    again = Model()
    encoded, steps = run(again, selection, caching(tmp_path, **ON_DISK), 3)
    assert sorted(first.loaded) == ["text", "vae"] and first.texts and again.loaded == [] and again.texts == []
    assert steps and encoded.vae is None


def test_held_out_pictures_are_cached_without_augmentation(selection, tmp_path):
    arch = Model()
    encoded, _ = run(arch, selection, caching(tmp_path, **ON_DISK), 3)
    held_out = encoded.validation
    assert len(held_out.items) == 2 and not held_out.course.augmented
    assert held_out.latents.rows[:, 0].min() >= 0 and (held_out.latents.rows[:, 1] == -1).all()
    assert held_out.text.rows.shape == (2, 1)
    assert encoded.train.text.rows.shape == (4, 3) and (encoded.train.latents.rows >= 0).all()
    group = next(iter(batches(held_out, StepPlan(held_out.items, [2], seed=3), 0, 0, 1, 0)))
    assert len(group.micro[0].latents) == 2
    without = encode_all(Model(), RUNTIME, CachingOptions(), select(_without_split(selection)), Course(3, 100), 2, ())
    assert without.validation is None


def _without_split(selection):
    items = selection.train
    return replace(items, specs=tuple(replace(spec, validation_split=0.0) for spec in items.specs))


def test_every_variant_is_encoded_once_and_the_empty_caption_too(selection, tmp_path):
    arch = Model()
    encoded, _ = run(arch, selection, caching(tmp_path, **ON_DISK), 3)
    wanted = {"", *CaptionVariants(encoded.train.items, encoded.train.course),
              *CaptionVariants(encoded.validation.items, encoded.validation.course)}
    assert sorted(arch.texts) == sorted(wanted) and len(arch.texts) > 8
    read = encoded.train.text.store.read(encoded.train.text.empty)
    assert torch.equal(read["states"][0], torch.full((2,), ord(" ") / 7 + 1e-4).half())


def test_the_empty_caption_costs_nothing_where_none_is_dropped(selection, tmp_path):
    specs = tuple(replace(spec, subsets=tuple(replace(subset, captions=replace(subset.captions, dropout_rate=0.0))
                                              for subset in spec.subsets)) for spec in selection.train.specs)
    never, arch = replace(selection, train=replace(selection.train, specs=specs)), Model()
    encoded, _ = run(arch, never, caching(tmp_path, **ON_DISK), 3)
    assert "" not in arch.texts and encoded.train.text.empty == -1


def test_caption_variants_repeat_where_there_are_fewer(selection):
    items = selection.train
    calm = replace(items, specs=tuple(replace(spec, subsets=tuple(replace(
        subset, captions=replace(subset.captions, shuffle=False)) for subset in spec.subsets)) for spec in items.specs))
    lively = CaptionVariants(items, Course(3, 100, 2))
    texts = CaptionVariants(calm, Course(3, 100, 2))
    assert len(lively) == 8 and list(lively) == [lively[index] for index in range(8)]
    assert len(texts) == 8 and list(texts) == [texts[index] for index in range(8)] and texts[0] == texts[1]


def test_one_text_is_made_at_a_time(selection, monkeypatch):
    made = []
    compose = caption._compose
    monkeypatch.setattr(caption, "_compose", lambda *given: made.append(1) or compose(*given))
    course = Course(3, 100, 50)
    assert CaptionVariants(selection.train, course)[49] and len(made) == 1
    shown = [show(selection.train[0], 0, course, epoch, 0) for epoch in range(20)]
    assert len(made) == 1 + sum(one.variant != EMPTY for one in shown)
    assert len(list(CaptionVariants(selection.train, course))) == 200 and len(made) == 201 + sum(one.variant != EMPTY for one in shown)
    of_first = list(CaptionVariants(selection.train, course))[:50]
    assert all(one.caption == (of_first[one.variant] if one.variant != EMPTY else "") for one in shown)


def test_prompts_are_encoded_and_the_autoencoder_is_kept_for_them(selection, tmp_path):
    arch = Model(trim=True)
    encoded, _ = run(arch, selection, caching(tmp_path, **IN_MEMORY), 3, (Prompt("a cat", negative="dog"),))
    assert encoded.prompts.keys() == {"a cat", "dog"} and encoded.vae is not None
    states = encoded.prompts["a cat"]["states"]
    assert states.shape == (1, LENGTH, 2) and (states[0, 5:] == 0).all() and (states[0, :5] != 0).all()


def test_padding_after_the_last_token_is_zero_and_nothing_else():
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    made = without_padding({"states": torch.ones(2, 4, 3), "mask": mask, "other": torch.ones(2)}, {"states": "mask"})
    assert made["states"][..., 0].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]] and made["other"].tolist() == [1, 1]
    assert numpy.array_equal(made["mask"], mask)


def test_flips_are_seen(selection, tmp_path):
    """The fixture flips, so that the tests above compare both sides."""
    assert selection.train.subsets[0].augment == Augment(flip=True)
    encoded, _ = run(Model(), selection, caching(tmp_path, **IN_MEMORY), 3)
    store, rows = encoded.train.latents.store, encoded.train.latents.rows
    assert not torch.equal(store.read(rows[0, 0])["latents"], store.read(rows[0, 1])["latents"])


def test_a_cache_says_what_it_encoded_or_that_all_was_there(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("library.encode.log.info", lambda words, *values: said.append(words % values))
    Announce("latents").close(12)
    some = Announce("text outputs")
    some(3, 5, 2)
    some(5, 5, 4)
    some.close(12)
    first, second = said
    assert first == "cached latents: all 12 are there already"
    assert second.startswith("encoded text outputs 4/4, ")
