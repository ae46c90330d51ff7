"""The report: what is on it, how big it gets, and that writing it never stops anything. One test opens it in a browser."""

import csv
import json
import logging
import math
import re
import threading

import numpy
import pytest
import torch
from PIL import Image

from library.checkpoint.train_state import save
from library.contact_sheet import picture_name
from library.data.showing import Course
from library.preview import save_picture
from library.report import pictures
from library.report.curves import charts, duration, standing, thin
from library.report.pictures import Album
from library.report.report import FINISHED, STOPPED, TRAINING, Report, data_sheet, shown_settings
from library.report.rows import Rows
from tests.unit.browser import open_page
from tests.unit.data_helpers import one_folder, picture
from tests.unit.state_helpers import facts

SETTINGS = '[optimizer]\nlearning_rate = 1e-05\nargs = ["a=1"]\n[saving]\noutput_dir = "/home/ann/secret/out"\n'


def write_log(folder, steps, name="run", held_out=lambda step: "", first=1):
    folder.mkdir(parents=True, exist_ok=True)
    fields = ["step", "epoch", "loss", "seconds", "images_per_second", "peak_bytes", "validation_loss", "lr/denoiser", "lr/clip_l"]
    with (folder / f"{name}_log.csv").open("w" if first == 1 else "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if first == 1:
            writer.writerow(fields)
        for step in range(first, steps + 1):
            writer.writerow([step, 1 + step // 100, 0.2 + 1 / step, 2.0, 1.5, 3 * 2**30, held_out(step), 1e-5, 5e-6])


def draw(folder, step, index=0, prompt="a cat", seed=7, name="run", size=(64, 48), color=None, noise=False):
    color = (step * 10 % 256, index * 40, 128) if color is None else color
    image = Image.new("RGB", size, color)
    if noise:
        image = Image.fromarray(numpy.random.default_rng(step * 100 + index).integers(0, 256, (*size[::-1], 3), dtype=numpy.uint8))
    path = folder / "sample" / picture_name(name, step, index, seed)
    save_picture(image, path, {"prompt": prompt, "negative_prompt": "", "seed": str(seed), "size": "64x48", "step": str(step)})
    return path


def make(folder, **more):
    return Report(folder, "run", **{"total_steps": 100, "program": "train.py", "settings": SETTINGS, "changed": {"learning_rate"},
                                    **more})


def text_of(report):
    return report.path.read_text(encoding="utf-8")


def numbers(page):
    found = json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.S).group(1))
    return {chart["key"]: chart for chart in found}


def test_a_run_from_beginning_to_end(tmp_path):
    report = make(tmp_path, data=lambda: "<p>the data</p>")
    report.write(TRAINING)
    page = text_of(report)
    assert "There are no steps yet" in page and "No model has been saved yet" in page and "No state to resume from" in page
    assert 'id="previews"' not in page and "<p>the data</p>" in page
    write_log(tmp_path, 40, held_out=lambda step: 0.5 if step % 20 == 0 else "")
    for step in (0, 20, 40):
        draw(tmp_path, step)
    (tmp_path / "run-step00000020.safetensors").write_bytes(b"x" * 1000)
    save(tmp_path / "run-step00000020-state", facts(20, serial=1), {"a": torch.zeros(4)}, {})
    report.write(STOPPED, "stopped by SIGTERM & co")
    page = text_of(report)
    assert "stopped by SIGTERM &amp; co" in page and ">stopped<" in page
    assert page.count("data:image/jpeg") == 3 and re.findall(r'data-step="(\d+)"', page) == ["0", "20", "40"]
    assert "run-step00000020.safetensors</span> (step 20)" in page and "--resume latest</pre>" in page
    assert "--resume_from_huggingface" not in page
    on_hub = '[hub]\nhuggingface_repo_id = "ann/cats"\n[state]\nsave_state_to_huggingface = true\n'
    other = make(tmp_path, settings=on_hub)
    other.write(STOPPED)
    assert "from the newest state in ann/cats" in text_of(other)
    assert "--resume latest --resume_from_huggingface</pre>" in text_of(other)
    other.write(FINISHED)
    assert "--max_train_steps N --resume_anyway</pre>" in text_of(other)  # a schedule that is not known here
    steady = make(tmp_path, settings='[optimizer]\nlr_scheduler = "constant"\nlr_warmup_steps = 9\n[training]\nmax_train_epochs = 3\n')
    steady.write(FINISHED)
    assert "exactly as if there had been no stop" in text_of(steady)
    assert "--resume latest --max_train_epochs N</pre>" in text_of(steady)
    assert "<b>40</b>" in page and "of 100 steps" in page and "120" in page  # 40 steps of 3 pictures
    assert numbers(page).keys() == {"loss", "rate", "speed", "memory"}
    assert [series["title"] for series in numbers(page)["rate"]["series"]] == ["denoiser", "clip l"]
    assert numbers(page)["loss"]["series"][1] == {"title": "held-out pictures", "role": "marks", "x": [20, 40], "y": [0.5, 0.5]}


def test_the_whole_course_of_the_learning_rate(tmp_path):
    report = make(tmp_path, total_steps=1000, rates=lambda step: {"denoiser": 1e-5 * (1 - step / 1000), "clip_l": 0.0})
    report.write(TRAINING)
    before = numbers(text_of(report))
    write_log(tmp_path, 3)
    report.write(TRAINING)
    rate = numbers(text_of(report))["rate"]
    assert before["rate"]["ahead"] == rate["ahead"] and not before["rate"]["series"]
    assert [series["title"] for series in rate["ahead"]] == ["denoiser, planned", "clip l, planned"]
    assert (rate["ahead"][0]["x"][0], rate["ahead"][0]["x"][-1], rate["ahead"][0]["y"][-1]) == (1, 1000, 0.0)
    assert len(rate["series"]) == 2


def test_a_resumed_run_goes_on_with_the_curves(tmp_path):
    write_log(tmp_path, 40)
    make(tmp_path).write(STOPPED)
    write_log(tmp_path, 60, first=41)
    report = make(tmp_path)
    report.write(TRAINING)
    assert numbers(text_of(report))["loss"]["series"][0]["x"] == list(range(1, 61))


def test_nothing_of_a_caption_can_run(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    write_log(tmp_path, 3)
    draw(tmp_path, 0, prompt=evil)
    report = make(tmp_path, program=evil, settings=f"[a]\nb = '{evil}'\n")
    report.write(TRAINING, evil)
    page = text_of(report)
    assert evil not in page and "<img src=x" not in page and page.count("<script") == 2
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


def test_no_absolute_paths(tmp_path):
    items = one_folder(picture(tmp_path / "photos" / "a.png").parent)
    write_log(tmp_path, 3)
    draw(tmp_path, 0)
    report = make(tmp_path, data=lambda: data_sheet(items, Course(1, 10), 5))
    report.write(FINISHED)
    page = text_of(report)
    assert "a.png" in page and str(tmp_path) not in page and "/home/ann" not in page and "…/secret/out" in page
    assert shown_settings('[a]\np = "C:\\\\Users\\\\ann\\\\x.toml"\nq = "a/b/c"\n', ()) == [
        ("a", "p", '"…/ann/x.toml"', False), ("a", "q", '"a/b/c"', False)]


def test_a_long_log_is_thinned(tmp_path):
    """Every step stays visible: the band of a point reaches over the lowest and highest of the steps it stands for."""
    steps = numpy.arange(1, 10_001, dtype=float)
    values = numpy.sin(steps / 500)
    values[4321] = 9.0
    thinned = thin(steps, values, 600)
    assert len(thinned.steps) == 600 and thinned.steps[-1] == 10_000 and thinned.high.max() == 9 and thinned.low.min() == values.min()
    weights = numpy.diff(thinned.steps, prepend=0)
    assert math.isclose((thinned.mean * weights).sum(), values.sum(), rel_tol=1e-9, abs_tol=1e-6)
    write_log(tmp_path, 5000)
    rows = Rows(tmp_path / "run_log.csv")
    rows.read()
    assert len(json.dumps(charts(rows))) < 150_000


def test_where_the_training_is(tmp_path):
    write_log(tmp_path, 60, held_out=lambda step: abs(step - 20) / 100 + 0.5 if step % 10 == 0 else "")
    rows = Rows(tmp_path / "run_log.csv")
    rows.read()
    at = standing(rows)
    assert (at.step, at.samples, at.seconds, at.best_step, at.best_loss, at.turned) == (60, 180, 120.0, 20, 0.5, True)
    assert math.isclose(at.loss, sum(0.2 + 1 / step for step in range(41, 61)) / 20)
    report = make(tmp_path)
    report.write(TRAINING)
    assert "was lowest at step 20 (0.5) and has risen since (0.9 now)" in text_of(report)


@pytest.mark.parametrize("held_out", [lambda step: 1 / step, lambda step: 0.5 + (step == 60) * 0.2, lambda step: 0.5])
def test_no_alarm_without_a_reason(tmp_path, held_out):
    write_log(tmp_path, 60, held_out=lambda step: held_out(step) if step % 10 == 0 else "")
    report = make(tmp_path)
    report.write(TRAINING)
    assert "risen since" not in text_of(report)


@pytest.mark.parametrize("seconds, text", [(5.4, "5 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h 00"), (7500, "2 h 05"),
                                           (200_000, "2 d 7 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_pictures_of_another_run_or_prompt(tmp_path):
    """A strip holds what can be compared: an edited prompt begins another one, and later steps belong to an earlier run."""
    for step in (0, 10, 20, 90):
        draw(tmp_path, step)
    draw(tmp_path, 10, prompt="a dog", seed=8)
    draw(tmp_path, 20, index=1, prompt="a bird")
    draw(tmp_path, 5, name="other")
    (tmp_path / "sample" / picture_name("run", 15, 0, 7)).write_bytes(b"no picture")
    strips = Album(tmp_path / "sample", "run").find(last_step=50)
    assert [(strip.index, strip.settings["prompt"], [each.step for each in strip.previews]) for strip in strips] == [
        (0, "a dog", [10]), (0, "a cat", [0, 10, 20]), (1, "a bird", [20])]
    assert Album(tmp_path / "none", "run").show(50).strips == ()


def test_many_previews_fit_the_budget(tmp_path):
    """First and last stay; which others do changes as little as possible when steps are added, so little is made again."""
    for step in range(0, 170, 10):
        for index in range(2):
            draw(tmp_path, step, index, noise=True, size=(96, 96))
    album = Album(tmp_path / "sample", "run")
    made = []
    real = album._shrunk
    album._shrunk = lambda preview, size: (made.append(preview) if (preview, size) not in album._small else None) or real(preview, size)
    everything = album.show(1000, budget=10**9)
    assert [len(images) for _, images in everything.strips] == [17, 17] and everything.left_out == 0
    budget = 60_000
    shown = album.show(1000, budget=budget)
    steps = [step for step, _ in shown.strips[0][1]]
    assert 3 <= len(steps) < 17 and steps[0] == 0 and steps[-1] == 160 and shown.left_out == 17 - len(steps)
    assert sum(len(url) for _, images in shown.strips for _, url in images) * 3 / 4 < budget + 100
    made.clear()
    draw(tmp_path, 170, 0, noise=True, size=(96, 96))
    assert album.show(1000, budget=budget).strips[0][1][-1][0] == 170
    assert len(made) <= 2 * 17  # at worst all at another density; never the whole folder at every size


def test_more_prompts_than_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PROMPTS", 3)
    write_log(tmp_path, 3)
    for index in range(5):
        draw(tmp_path, 0, index, prompt=f"prompt {index}", noise=True, size=(600, 600))
    shown = Album(tmp_path / "sample", "run").show(10, budget=100_000)
    assert len(shown.strips) == 3 and shown.prompts_left_out == 2
    assert sum(len(url) for _, images in shown.strips for _, url in images) * 3 / 4 < 100_000
    report = make(tmp_path)
    report.write(TRAINING)
    assert "2 prompts are left out; the folder sample has all of them" in text_of(report)


def test_a_preview_that_was_drawn_again(tmp_path):
    path = draw(tmp_path, 0, color=(255, 0, 0))
    album = Album(tmp_path / "sample", "run")
    before = album.show(10).strips[0][1][0][1]
    path.unlink()
    draw(tmp_path, 0, color=(0, 255, 0), prompt="a cat")
    assert album.show(10).strips[0][1][0][1] != before


def test_it_is_written_now_and_then(tmp_path):
    """At the first step, then when the time has come; a writing that goes on is not joined by a second one."""
    now, written, gate = [0.0], [], threading.Event()
    report = make(tmp_path, every_seconds=60, clock=lambda: now[0])

    def write(status, note=""):
        written.append((now[0], status))
        gate.wait(5)
    report.write = write
    report.update()
    now[0] = 100
    report.update()  # the first one still goes on
    assert written == [(0.0, TRAINING)]
    gate.set()
    report._worker.join()
    for now[0] in (161, 2000, 2101, 2110):  # writing took 100 seconds, so the next one waits
        report.update()
        report._worker.join()
    report.finish(FINISHED)
    assert written == [(0.0, TRAINING), (2101, TRAINING), (2110, FINISHED)]


def test_a_slow_disk_is_asked_less_often(tmp_path):
    now = [0.0]
    report = make(tmp_path, every_seconds=10, clock=lambda: now[0])
    written = []

    def write(status, note=""):
        now[0] += 5
        written.append(status)
    report.write = write
    report.update()
    report._worker.join()
    for now[0] in (20, 60, 104, 106):
        report.update()
        report._worker.join()
    assert len(written) == 2  # 5 seconds of writing, so 100 seconds of rest


def test_failures_are_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kiln"), "propagate", True)
    (tmp_path / "run_report.html").mkdir()
    report = make(tmp_path)
    report.finish(TRAINING)
    report.finish(TRAINING)
    told = {id(record): record.message for record in caplog.records}
    assert sum("the report could not be written, training goes on" in message for message in told.values()) == 1
    report.path.rmdir()
    report.finish(FINISHED)
    assert report.path.is_file()


def test_the_page_in_a_browser(tmp_path):
    """It opens from the disk, asks for nothing, its script runs under its own policy, and a narrow window needs no scrolling to
    the side. The slider shows the pictures of its step."""
    write_log(tmp_path, 300, held_out=lambda step: 0.5 if step % 50 == 0 else "")
    for step in (0, 100, 200, 300):
        draw(tmp_path, step)
        if step:
            draw(tmp_path, step, 1, prompt="a second prompt " * 30)
    save(tmp_path / "run-step00000100-state", facts(100, serial=1), {"a": torch.zeros(4)}, {})
    items = one_folder(picture(tmp_path / "photos" / "a.png").parent)
    report = make(tmp_path, total_steps=300, data=lambda: data_sheet(items, Course(1, 10), 5))
    report.write(FINISHED)
    dom, logged = open_page(report.path, tmp_path)
    assert "Refused to" not in logged and "CONSOLE" not in logged
    assert dom.count("<svg") >= 4 and len(re.findall(r'<path d="M', dom)) + dom.count(' d="M') >= 5
    assert re.search(r'class="readout">step 300 ', dom) and '<output id="slide-step" for="slider">step 300</output>' in dom
    assert re.findall(r'data-step="(\d+)" alt="step \d+" class="on"', dom) == ["300", "300"]
    assert f'--config_file "<span class="here">{tmp_path.as_posix()}/run_config.toml' in dom
    script = ("<script>addEventListener('load', () => { slider.value = 1; slider.dispatchEvent(new Event('input')); "
              "document.body.dataset.report = JSON.stringify({wide: document.documentElement.scrollWidth - innerWidth, broken: "
              "[...document.images].filter(each => !each.naturalWidth).length, on: [...document.querySelectorAll('.on')].map("
              "each => +each.dataset.step), label: document.getElementById('slide-step').textContent}); })</script>")
    probe = tmp_path / "probe.html"
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text_of(report)).replace("</head>", script + "</head>")
    probe.write_text(page.replace(' loading="lazy"', ""), encoding="utf-8")
    shown, _ = open_page(probe, tmp_path, "--window-size=500,900")
    told = json.loads(re.search(r'data-report="([^"]*)"', shown).group(1).replace("&quot;", '"'))
    assert told == {"wide": 0, "broken": 0, "on": [100, 100], "label": "step 100"}
