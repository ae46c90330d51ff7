import pytest
from PIL import Image

from library.optim.schedule import Schedule, Shape, curve
from library.plots import smooth, write_loss_curve, write_rate_curve


def write(path, losses):
    rows = [f"{step},1,{loss},1e-5\n" for step, loss in enumerate(losses, 1)]
    path.write_text("step,epoch,loss,learning_rate\n" + "".join(rows), encoding="utf-8")
    return path


def test_the_mean_of_a_constant_is_that_constant_from_the_start():
    assert smooth([3.0] * 20, 4) == pytest.approx([3.0] * 20)


def test_the_mean_follows_with_less_noise():
    noisy = [value + (0.5 if index % 2 else -0.5) for index, value in enumerate([1.0] * 50 + [0.0] * 50)]
    smoothed = smooth(noisy, 5)
    assert abs(smoothed[40] - 1) < 0.2 and abs(smoothed[90]) < 0.2 and abs(smoothed[99]) < 0.2


def test_a_picture_with_both_lines(tmp_path):
    assert write_loss_curve(write(tmp_path / "log.csv", [1 / step for step in range(1, 60)]), tmp_path / "loss.png", "run")
    with Image.open(tmp_path / "loss.png") as image:
        pixels = image.convert("RGB").getcolors(1 << 20)
        assert image.width > 600
    assert any(color == (0x1F, 0x4E, 0x79) and count > 300 for count, color in pixels)


def test_nothing_to_draw_writes_nothing(tmp_path):
    assert not write_loss_curve(write(tmp_path / "log.csv", []), tmp_path / "loss.png")
    assert not write_loss_curve(write(tmp_path / "log.csv", ["nan", "inf", ""]), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_one_step_is_enough(tmp_path):
    assert write_loss_curve(write(tmp_path / "log.csv", ["nan", 0.5]), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def colours(path, size=0):
    with Image.open(path) as image:
        return {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20) if count > size}


def test_the_learning_rates_of_two_groups_are_two_lines(tmp_path):
    steps, (unet, encoder) = curve(Schedule("cosine_with_restarts", 20, Shape(cycles=3)), 400, [1e-4, 2e-5])
    write_rate_curve(steps, {"unet": unet, "encoder": encoder}, tmp_path / "rates.png", "run")
    found = colours(tmp_path / "rates.png", 300)
    assert (0x1F, 0x4E, 0x79) in found and (0xC5, 0x5A, 0x11) in found
    write_rate_curve(steps, {f"block {number}": unet for number in range(9)}, tmp_path / "same.png")
    assert (0xC5, 0x5A, 0x11) not in colours(tmp_path / "same.png", 300)


def test_the_rate_of_a_single_step(tmp_path):
    write_rate_curve(*(curve(Schedule("constant"), 1, [1e-4])[0], {"all": [1e-4]}), tmp_path / "one.png")
    assert (0x1F, 0x4E, 0x79) in colours(tmp_path / "one.png", 10)
