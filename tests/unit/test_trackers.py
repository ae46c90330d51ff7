import pytest
from PIL import Image

from library.config.schema import LoggingOptions
from library.errors import UserError
from library.trackers import open_tracker, tracker_arguments


def config_file(folder, text):
    path = folder / "trackers.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_arguments_stand_in_tables_of_known_trackers(tmp_path):
    assert tracker_arguments(None) == {}
    assert tracker_arguments(config_file(tmp_path, "[tensorboard]\nmax_queue = 5\n")) == {"tensorboard": {"max_queue": 5}}
    for text in ("[tensorbord]\nmax_queue = 5\n", "tensorboard = 5\n"):
        with pytest.raises(UserError, match="is not a table of a tracker"):
            tracker_arguments(config_file(tmp_path, text))


def test_tensorboard_gets_curves_pictures_and_settings(tmp_path):
    tracker = open_tracker(LoggingOptions(logging_dir=tmp_path / "logs", log_prefix="a-"), "seed = 1", is_main=True)
    tracker.write(1, {"loss": 0.5, "learning_rate": 1e-4})
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    tracker.picture(1, tmp_path / "sheet.png")
    tracker.close()
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.startswith("a-") and list((run / "finetuning").glob("events.out.tfevents.*"))


def test_wrong_arguments_of_tensorboard_are_the_users_mistake(tmp_path):
    options = LoggingOptions(logging_dir=tmp_path, log_tracker_config=config_file(tmp_path, "[tensorboard]\nmax_queu = 5\n"))
    with pytest.raises(UserError, match="max_queu"):
        open_tracker(options, None, is_main=True)


def test_other_ranks_and_runs_without_trackers_write_nothing(tmp_path):
    for options, main in ((LoggingOptions(logging_dir=tmp_path / "logs"), False), (LoggingOptions(), True)):
        tracker = open_tracker(options, None, is_main=main)
        tracker.write(1, {"loss": 0.5})
        tracker.close()
    assert not (tmp_path / "logs").exists()
