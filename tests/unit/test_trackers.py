import importlib.machinery
import io
import os
import re
import sys

import pytest
from accelerate import PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flux_train import ENTRY
from library.config import parse as parsing
from library.config import schema
from library.config.schema import ACCELERATE_TRACKERS, LoggingOptions
from library.errors import UserError
from library.log import log
from library.trackers import Tracker, open_tracker, public_settings, tracker_arguments


def parse_all(argv):
    """A configuration whatever its conflicts: the packages of trackers are not here."""
    reader = parsing._Reader(ENTRY)
    for flag in parsing.scan(argv, reader.takes)[0]:
        reader.take(flag.name, flag.value, f"--{flag.name}", parsing.COMMAND_LINE, parsing.from_text)
    assert not reader.errors
    return reader.config()


def config_file(folder, text):
    path = folder / "trackers.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_arguments_stand_in_tables_of_known_trackers(tmp_path):
    assert tracker_arguments(None) == {}
    assert tracker_arguments(config_file(tmp_path, "[tensorboard]\nmax_queue = 5\n")) == {"tensorboard": {"max_queue": 5}}
    assert tracker_arguments(config_file(tmp_path, "[mlflow]\nrun_name = 'x'\n")) == {"mlflow": {"run_name": "x"}}
    for text in ("[tensorbord]\nmax_queue = 5\n", "tensorboard = 5\n"):
        with pytest.raises(UserError, match="is not a table of a tracker"):
            tracker_arguments(config_file(tmp_path, text))


def read_events(folder):
    """Everything in a folder of TensorBoard events."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def picture(path, color):
    Image.new("RGB", (8, 6), color).save(path)
    return path


def test_tensorboard_gets_curves_pictures_and_settings(tmp_path):
    """Read back with TensorBoard's own reader."""
    tracker = open_tracker(LoggingOptions(logging_dir=tmp_path / "logs", log_prefix="a-", log_tracker_name="mine"),
                           {"seed": 1, "lr_scheduler": "cosine|x"}, is_main=True)
    for step, color in ((1, "red"), (2, "blue")):
        tracker.write(step, {"loss/step": 0.5 / step, "lr/denoiser": 1e-4})
        tracker.picture(step, "previews/00", picture(tmp_path / f"{step}.png", color))
    tracker.close()
    (run,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"a-\d{14}", run.name)
    events = read_events(run / "mine")
    assert [(point.step, point.value) for point in events.Scalars("loss/step")] == [(1, 0.5), (2, 0.25)]
    assert [point.value for point in events.Scalars("lr/denoiser")] == pytest.approx([1e-4, 1e-4])
    images = events.Images("previews/00")
    assert [(one.step, one.width, one.height) for one in images] == [(1, 8, 6), (2, 8, 6)]
    assert Image.open(io.BytesIO(images[1].encoded_image_string)).convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    (settings,) = events.Tensors("settings/text_summary")
    assert "| seed | 1 |" in str(settings.tensor_proto) and "cosine" in str(settings.tensor_proto)


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path):
    options = LoggingOptions(logging_dir=tmp_path)
    first = open_tracker(options, None, is_main=True)
    for step in (1, 2, 3):
        first.write(step, {"loss/step": 1.0})  # steps 2 and 3 come after the state
    ids = first.run_ids
    first.close()
    second = open_tracker(options, {"seed": 1}, is_main=True, resumed={**ids, "wandb": "kept"}, done=1)
    second.write(2, {"loss/step": 2.0})
    assert second.run_ids == {**ids, "wandb": "kept"}
    second.close()
    (run,) = tmp_path.iterdir()
    assert ids == {"tensorboard": run.name}
    assert [(point.step, point.value) for point in read_events(run / "finetuning").Scalars("loss/step")] == [(1, 1.0), (2, 2.0)]


def test_steps_that_are_done_again_stand_in_tensorboard_once(tmp_path):
    tracker = open_tracker(LoggingOptions(logging_dir=tmp_path), None, is_main=True)
    for step in (1, 2, 3):
        tracker.write(step, {"loss/step": 1.0})
    tracker.go_back(1)
    tracker.write(2, {"loss/step": 2.0})
    tracker.close()
    (run,) = tmp_path.iterdir()
    assert [(point.step, point.value) for point in read_events(run / "finetuning").Scalars("loss/step")] == [(1, 1.0), (2, 2.0)]


def test_a_state_from_elsewhere_names_no_folder_outside(tmp_path):
    tracker = open_tracker(LoggingOptions(logging_dir=tmp_path / "logs"), None, is_main=True, resumed={"tensorboard": "../../x"}, done=3)
    tracker.close()
    assert tracker.run_ids == {"tensorboard": "x"} and (tmp_path / "logs" / "x").is_dir()


class FakeWandb:
    """Stands for the package: keeps what it is told."""

    class Image:
        def __init__(self, path):
            self.path = path

    def __init__(self):
        self.calls, self.id, self.config = [], "run7", self

    def login(self, key):
        self.calls.append(("login", key))

    def init(self, project, **arguments):
        self.seen = (list(sys.argv), os.environ.get("WANDB_PROGRAM"), os.environ.get("WANDB_CONSOLE"))
        self.calls.append(("init", project, arguments))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def update(self, values, allow_val_change):
        self.calls.append(("config", values))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_keeps_project_run_name_and_arguments(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = LoggingOptions(log_with="wandb", log_tracker_name="project", wandb_run_name="first try", wandb_api_key="key-1",
                             log_tracker_config=config_file(tmp_path, '[wandb]\nentity = "us"\ntags = ["a"]\n'))
    tracker = open_tracker(options, {"seed": 1}, is_main=True)
    tracker.write(3, {"loss/step": 0.5})
    tracker.picture(3, "previews/00", tmp_path / "x.png")
    assert tracker.run_ids == {"wandb": "run7"}
    tracker.close()
    assert fake.calls[:4] == [("login", "key-1"), ("init", "project", {"name": "first try", "entity": "us", "tags": ["a"]}),
                              ("config", {"seed": 1}), ("log", 3, {"loss/step": 0.5})]
    assert fake.calls[4][2]["previews/00"].path == str(tmp_path / "x.png") and fake.calls[5] == ("finish",)
    open_tracker(LoggingOptions(log_with="wandb"), None, is_main=True, resumed={"wandb": "run7"})
    assert fake.calls[-1] == ("init", "finetuning", {"id": "run7", "resume": "allow"})


def test_a_tracker_sees_neither_the_command_line_nor_the_console(monkeypatch):
    fake, argv = FakeWandb(), ["/home/me/kiln/flux_train.py", "--huggingface_token", "hf_secret"]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sys, "argv", argv)
    for name in ("WANDB_PROGRAM", "WANDB_CONSOLE"):
        monkeypatch.delenv(name, raising=False)
    open_tracker(LoggingOptions(log_with="wandb"), None, is_main=True)
    assert fake.seen == (["flux_train.py"], "flux_train.py", "off")
    assert sys.argv is argv and "WANDB_CONSOLE" not in os.environ
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    open_tracker(LoggingOptions(log_with="wandb"), None, is_main=True)
    assert fake.seen[2] == "wrap" == os.environ["WANDB_CONSOLE"]


def test_other_trackers_run_through_the_classes_of_accelerate(tmp_path, monkeypatch):
    """A stub of the package swanlab under accelerate's real class for it."""
    fake = FakeWandb()
    fake.config = type("Config", (dict,), {"update": lambda self, values, allow_val_change: fake.calls.append(("config", values))})()
    PartialState()  # a run has one before its trackers
    fake.__spec__ = importlib.machinery.ModuleSpec("swanlab", None)
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    fake.Image = lambda image: ("image", image.shape)
    options = LoggingOptions(log_with="swanlab", log_tracker_name="project",
                             log_tracker_config=config_file(tmp_path, '[swanlab]\nworkspace = "us"\n'))
    tracker = open_tracker(options, {"seed": 1}, is_main=True)
    tracker.write(3, {"loss/step": 0.5})
    tracker.picture(3, "loss", picture(tmp_path / "x.png", "red"))
    tracker.close()
    assert fake.calls == [("init", "project", {"workspace": "us"}), ("config", {"seed": 1}), ("log", 3, {"loss/step": 0.5}),
                          ("log", 3, {"loss": [("image", (6, 8, 3))]}), ("finish",)]
    assert tracker.run_ids == {"swanlab": "run7"}
    open_tracker(options, None, is_main=True, resumed=tracker.run_ids, done=3).close()
    assert fake.calls[5] == ("init", "project", {"id": "run7", "resume": "allow", "workspace": "us"})


def test_accelerates_names_of_trackers_are_ours():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(ACCELERATE_TRACKERS) | {"tensorboard", "wandb"} == set(LOGGER_TYPE_TO_CLASS)


def test_all_means_all_that_are_installed(monkeypatch):
    monkeypatch.setattr(schema.importlib.util, "find_spec", lambda name: object() if name == "mlflow_skinny" else None)
    assert LoggingOptions(log_with="all").trackers == ("tensorboard", "wandb", "mlflow")
    assert not schema.installed("wandb") and not schema.installed("aim")


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(caplog, monkeypatch):
    class Broken:
        run_id = ""

        def scalars(self, step, values):
            raise ConnectionError("gone")

    monkeypatch.setattr(log, "propagate", True)
    kept = []
    tracker = Tracker({"broken": Broken(), "good": type("Good", (), {"run_id": "", "scalars": lambda self, step, values: kept.append(step),
                                                                    "close": lambda self: kept.append("closed")})()})
    for step in (1, 2):
        tracker.write(step, {"loss/step": 1.0})
    tracker.close()
    assert kept == [1, 2, "closed"]
    told = {id(record): record.message for record in caplog.records}  # a test before this one may have left a second listener
    assert list(told.values()) == ["broken gets no more curves, training goes on: ConnectionError: gone"]


def test_a_tracker_that_cannot_be_started_is_told_without_the_key(monkeypatch):
    fake = FakeWandb()
    fake.login = lambda key: (_ for _ in ()).throw(RuntimeError(f"bad key {key}"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"wandb cannot be started: RuntimeError: bad key \[secret\]"):
        open_tracker(LoggingOptions(log_with="wandb", wandb_api_key="key-1"), None, is_main=True)


def test_public_settings_hold_no_key_and_no_path(tmp_path):
    argv = ["--pretrained_model_name_or_path", "owner/model", "--dataset_config", str(tmp_path / "d.toml"), "--output_dir", "out",
            "--wandb_api_key", "key-1", "--log_with", "wandb", "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99",
            "--huggingface_repo_id", "me/x", "--huggingface_token", "hf_secret", "--lr_scheduler", "cosine"]
    (tmp_path / "d.toml").write_text("")
    config = parse_all(argv)
    values = public_settings(config)
    assert values["lr_scheduler"] == "cosine" and values["optimizer_args"] == "weight_decay=0.1 betas=0.9,0.99" and values["seed"] == 42
    assert not {"wandb_api_key", "huggingface_token", "output_dir", "dataset_config", "pretrained_model_name_or_path"} & set(values)
    assert not any(word in str(values) for word in ("key-1", "hf_secret", str(tmp_path)))
    assert set(config.secrets()) >= {"key-1", "hf_secret"} and "hf_secret" not in repr(config)


def test_wrong_arguments_of_tensorboard_are_the_users_mistake(tmp_path):
    options = LoggingOptions(logging_dir=tmp_path, log_tracker_config=config_file(tmp_path, "[tensorboard]\nmax_queu = 5\n"))
    with pytest.raises(UserError, match="max_queu"):
        open_tracker(options, None, is_main=True)


def test_other_ranks_and_runs_without_trackers_write_nothing(tmp_path):
    for options, main in ((LoggingOptions(logging_dir=tmp_path / "logs"), False), (LoggingOptions(), True)):
        tracker = open_tracker(options, None, is_main=main)
        tracker.write(1, {"loss/step": 0.5})
        tracker.close()
    assert not (tmp_path / "logs").exists()
