import random
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.preview import due, preserved_random_state, render_all
from library.prompts import FIRST_SEED, Prompt, batches

PROMPTS = (Prompt("a fox", width=32, height=16), Prompt("K\u00e4tzchen \u732b", seed=5, width=16, height=16, steps=3))


def plain(prompts):
    return [Image.new("RGB", (prompt.width, prompt.height), (prompt.steps, 90, 20)) for prompt in prompts]


@pytest.mark.parametrize(("step", "epoch", "ended", "settings", "expected"), [
    (0, 0, False, {"every_n_steps": 5}, False),
    (0, 0, False, {"every_n_steps": 5, "at_first": True}, True),
    (10, 1, False, {"every_n_steps": 5, "at_first": True}, True),
    (9, 1, False, {"every_n_steps": 5, "at_first": True}, False),
    (9, 2, True, {"every_n_epochs": 2}, True),
    (9, 2, False, {"every_n_epochs": 2}, False),
    (9, 3, True, {"every_n_epochs": 2}, False),
    (10, 1, False, {"every_n_steps": 5, "every_n_epochs": 2}, False),  # epochs win where both are set
    (10, 1, True, {"every_n_steps": 0, "every_n_epochs": 0}, False),
    (10, 1, False, {"every_n_steps": -5}, False),
    (10, 1, False, {"every_n_steps": 5, "every_n_epochs": -1}, True),
    (10, 1, True, {}, False),
])
def test_when_previews_are_due(step, epoch, ended, settings, expected):
    assert due(step, epoch, ended, **settings) is expected


def test_one_picture_per_prompt_with_its_settings_in_the_file(tmp_path):
    rendered = render_all(PROMPTS, plain, tmp_path / "sample", "run", 40)
    assert [path.name for path in rendered.images] == [f"run_000040_00_{FIRST_SEED}.png", "run_000040_01_5.png"]
    assert set((tmp_path / "sample").iterdir()) == set(rendered.images)
    with Image.open(rendered.images[1]) as image:
        assert image.size == (16, 16) and image.getpixel((0, 0)) == (3, 90, 20)
        texts = {key: image.info[key] for key in ("prompt", "seed", "step", "sample_steps", "size")}
    assert texts == {"prompt": "K\u00e4tzchen \u732b", "seed": "5", "step": "40", "sample_steps": "3", "size": "16x16"}


def test_sample_gets_a_seed_and_no_gradients(tmp_path):
    calls = []

    def sample(prompts):
        calls.extend((prompt.text, prompt.seed, torch.is_grad_enabled()) for prompt in prompts)
        return plain(prompts)

    render_all(PROMPTS, sample, tmp_path, None, 0)
    assert calls == [("a fox", FIRST_SEED, False), ("K\u00e4tzchen \u732b", 5, False)]
    assert torch.is_grad_enabled() and (tmp_path / "000000_01_5.png").is_file()


def draws():
    return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()


def restart():
    torch.manual_seed(1), numpy.random.seed(1), random.seed(1)


def test_random_numbers_go_on_as_if_nothing_had_been_drawn(tmp_path):
    restart()
    expected = draws()
    restart()

    def sample(prompts):
        draws()
        restart()
        draws()
        return plain(prompts)

    render_all(PROMPTS, sample, tmp_path, "run", 1)
    assert draws() == expected


def test_random_numbers_go_on_after_an_error_too():
    restart()
    expected = draws()
    restart()
    with pytest.raises(ZeroDivisionError), preserved_random_state():
        draws()
        raise ZeroDivisionError
    assert draws() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_the_device_go_on_too(tmp_path):
    torch.cuda.manual_seed_all(3)
    expected = torch.rand(4, device="cuda").tolist()
    torch.cuda.manual_seed_all(3)

    def sample(prompts):
        torch.rand(7, device="cuda")
        return plain(prompts)

    render_all(PROMPTS, sample, tmp_path, "run", 1)
    assert torch.rand(4, device="cuda").tolist() == expected


def test_an_error_of_the_sampler_passes_and_leaves_no_half_picture(tmp_path):
    def sample(prompts):
        if prompts[0].seed == 5:
            raise RuntimeError("no such kernel")
        return plain(prompts)

    with pytest.raises(RuntimeError, match="no such kernel"):
        render_all(PROMPTS, sample, tmp_path, "run", 1)
    assert [path.name for path in tmp_path.iterdir()] == [f"run_000001_00_{FIRST_SEED}.png"]


def test_a_file_where_the_folder_should_be_is_the_users_to_mend(tmp_path):
    (tmp_path / "sample").write_text("in the way")
    with pytest.raises(UserError, match="is a file, and previews need a folder"):
        render_all(PROMPTS, plain, tmp_path / "sample", "run", 1)
    assert (tmp_path / "sample").read_text() == "in the way"


ALIKE = tuple(Prompt(f"picture {index}", width=16 if index in (1, 4) else 32, height=16, seed=index) for index in range(6))


def test_prompts_that_agree_are_drawn_together(tmp_path):
    calls = []

    def sample(prompts):
        calls.append([prompt.seed for prompt in prompts])
        return plain(prompts)

    rendered = render_all(ALIKE, sample, tmp_path, "run", 1, batch_size=3)
    assert calls == [[0, 2, 3], [1, 4], [5]] and rendered.batch_size == 3
    assert [path.name for path in rendered.images] == [f"run_000001_{index:02d}_{index}.png" for index in range(6)]
    for prompt, path in zip(ALIKE, rendered.images, strict=True):
        with Image.open(path) as image:
            assert image.info["prompt"] == prompt.text and image.size == (prompt.width, prompt.height)


def test_processes_share_the_work(tmp_path):
    parts = []
    for number in range(3):
        calls = parts.append([]) or parts[-1]

        def sample(prompts, calls=calls):
            calls.append([prompt.seed for prompt in prompts])
            return plain(prompts)

        rendered = render_all(ALIKE, sample, tmp_path, "run", 1, batch_size=4, share=(number, 3))
    assert parts == [[[0, 2]], [[1, 4]], [[3, 5]]]
    assert all(path.is_file() for path in rendered.images) and rendered.batch_size == 4


@pytest.mark.parametrize("change", [{"cfg": 3.0}, {"guidance": 3.0}, {"steps": 3}, {"sampler": "euler"}, {"width": 64},
                                    {"height": 64}])
def test_prompts_that_differ_in_more_than_texts_and_seed_are_not_drawn_together(change):
    prompt = Prompt("a", "blurry", seed=1, place="file:1")
    assert batches([prompt, replace(prompt, **change)], 4) == [[0], [1]]
    assert batches([prompt, replace(prompt, text="b", negative="", seed=2, place="file:2")], 4) == [[0, 1]]
    assert batches([prompt, replace(prompt, **change), prompt], 1) == [[0], [1], [2]]  # one by one they keep their order


def test_without_memory_for_several_they_are_drawn_one_by_one(tmp_path, caplog):
    calls = []

    def sample(prompts):
        calls.append([prompt.seed for prompt in prompts])
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("tried to allocate much")
        return plain(prompts)

    with caplog.at_level("WARNING", logger="kiln"):
        rendered = render_all(ALIKE, sample, tmp_path, "run", 1, batch_size=2)
    assert calls == [[0, 2], [0], [1], [2], [3], [4], [5]] and rendered.batch_size == 1
    assert all(path.is_file() for path in rendered.images)
    assert "no memory to draw 2 previews together" in caplog.text


def test_a_picture_that_does_not_fit_the_memory_is_the_users_to_mend(tmp_path):
    def sample(prompts):
        raise torch.OutOfMemoryError("tried to allocate 4 GiB\nmore")

    with pytest.raises(UserError, match=r"a preview of 32 x 16 pixels does not fit .*\(tried to allocate 4 GiB\)") as caught:
        render_all(PROMPTS, sample, tmp_path, "run", 1)
    assert "--w and --h" in str(caught.value)
