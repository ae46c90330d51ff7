"""What runs leave behind: metadata, curves, files written beside the training, full disks, uploads; and nothing that is nobody's
business. Runs happen in this process; those that are stopped or must not see this process's hub are started as users start them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import library.outputs
from flux_train import ENTRY
from sdxl_train import ENTRY as SDXL
from library.app import main
from library.checkpoint.verify import verify
from library.interrupt import STOPPED_STATUS
from library.log import log
from library.run_metadata import TABLE
from tests.cli.conftest import ROOT, run_script, with_flag
from tests.cli.runs import SCRIPT, checkpoints, column, header, rows, running
from tests.contract.conftest import dataset_file, losses, make_pictures

from tests.hub_stub import GOOD_TOKEN, HubStub, serving
from tests.tiny_sdxl import make_sdxl_files

SHORT = ["--t5xxl_max_token_length", "16"]


def train(*flags: object) -> int:
    return main(ENTRY, [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What a run says, as text: give ``--console_log_file`` and call."""
    path = tmp_path / "told.log"
    yield lambda: path.read_text(encoding="utf-8")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


# --- metadata -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def described(files, tmp_path_factory) -> tuple[Path, dict[str, str], dict[str, str]]:
    """A run with much to tell: two subsets, one of regularisation, buckets, a held-out part. Metadata of a file on the way, and of
    the last one."""
    folder = tmp_path_factory.mktemp("described")
    make_pictures(folder / "cats", 5)
    for index in range(2):
        (folder / "cats" / f"picture{index}.txt").write_text("Cat, red box", encoding="utf-8")
    make_pictures(folder / "wide", 2, (160, 80))
    make_pictures(folder / "others", 3)
    (folder / "data.toml").write_text(f"""
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
validation_split = 0.2
[[datasets.subsets]]
image_dir = '{(folder / 'cats').as_posix()}'
num_repeats = 3
flip_aug = true
keep_tokens = 1
[[datasets.subsets]]
image_dir = '{(folder / 'wide').as_posix()}'
flip_aug = true
[[datasets.subsets]]
image_dir = '{(folder / 'others').as_posix()}'
is_reg = true
flip_aug = true
""", encoding="utf-8")
    before = time.time()
    assert train("--pretrained_model_name_or_path", files.checkpoint, "--ae", files.ae, "--dataset_config", folder / "data.toml",
                 "--output_dir", folder / "out", "--output_name", "mine", "--max_train_epochs", 2, "--cache_latents",
                 "--cache_text_encoder_outputs", "--learning_rate", "1e-4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "10%",
                 "--gradient_accumulation_steps", 2, "--gradient_checkpointing", "--seed", 7, "--mixed_precision", "bf16",
                 "--weights_dtype", "fp32", "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99", "--max_grad_norm", 0.5,
                 "--loss_type", "huber", "--huber_c", 0.2, "--min_timestep", 100, "--save_every_n_steps", 3,
                 "--metadata_author", "me", "--metadata_tags", "cats", "--metadata_title", "Cats", *SHORT) == 0
    steps = len(rows(folder / "out", "mine"))
    last = header(folder / "out" / "mine.safetensors")[2]
    assert int(last["ss_steps"]) == steps and before <= float(last["ss_training_started_at"])
    return folder, header(folder / "out" / "mine-step00000003.safetensors")[2], last


def test_metadata_run_and_length(described):
    folder, early, last = described
    steps = len(rows(folder / "out", "mine"))
    assert {name: last[name] for name in ("ss_output_name", "ss_seed", "ss_max_train_steps", "ss_num_epochs", "ss_epoch",
                                          "ss_gradient_accumulation_steps", "ss_gradient_checkpointing")} == {
        "ss_output_name": "mine", "ss_seed": "7", "ss_max_train_steps": str(steps), "ss_num_epochs": "2", "ss_epoch": "2",
        "ss_gradient_accumulation_steps": "2", "ss_gradient_checkpointing": "True"}
    assert early["ss_steps"] == "3" and early["ss_epoch"] == str(int(column(folder / "out", "epoch", "mine")[2]))
    assert early["ss_session_id"] == last["ss_session_id"] and early["ss_training_started_at"] == last["ss_training_started_at"]
    started, saved, finished = (float(one) for one in (last["ss_training_started_at"], early["ss_training_finished_at"],
                                                       last["ss_training_finished_at"]))
    assert started < saved < finished <= time.time()
    pictures = json.loads(last["ss_bucket_info"])["buckets"].values()
    assert int(last["ss_num_batches_per_epoch"]) == sum(-(-bucket["count"] // 2) for bucket in pictures)


def test_metadata_optimizer_and_precision(described):
    _, _, last = described
    assert {name: last[name] for name in ("ss_optimizer", "ss_learning_rate", "ss_unet_lr", "ss_lr_scheduler", "ss_max_grad_norm",
                                          "ss_mixed_precision", "ss_full_bf16", "ss_full_fp16", "ss_weights_dtype")} == {
        "ss_optimizer": "AdamW(weight_decay=0.1,betas=0.9,0.99)", "ss_learning_rate": "0.0001", "ss_unet_lr": "0.0001",
        "ss_lr_scheduler": "cosine", "ss_max_grad_norm": "0.5", "ss_mixed_precision": "bf16", "ss_full_bf16": "False",
        "ss_full_fp16": "False", "ss_weights_dtype": "fp32"}
    assert int(last["ss_lr_warmup_steps"]) == round(0.1 * int(last["ss_max_train_steps"])) and "ss_text_encoder_lr" not in last


def test_metadata_data(described):
    _, _, last = described
    held_out = int(last["ss_num_validation_images"])
    folders = json.loads(last["ss_dataset_dirs"])
    assert held_out == 2 and folders == {"cats": {"n_repeats": 3, "img_count": 4}, "wide": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(last["ss_reg_dataset_dirs"]) == {"others": {"n_repeats": 1, "img_count": 3}}
    assert last["ss_num_train_images"] == "13" == last["ss_num_reg_images"]  # 4 x 3 + 1, and as many of regularisation
    tags = json.loads(last["ss_tag_frequency"])
    assert set(tags) == {"cats", "wide", "others"} and sum(tags["wide"].values()) == 1 and tags["cats"].get("cat", 0) in (1, 2)
    (dataset,) = json.loads(last["ss_datasets"])
    assert dataset["resolution"] == [64, 64] and dataset["batch_size_per_device"] == 2 and dataset["num_train_images"] == 13
    assert [(one["image_dir"], one["num_repeats"], one["is_reg"], one["keep_tokens"]) for one in dataset["subsets"]] == [
        ("cats", 3, False, 1), ("wide", 1, False, 0), ("others", 1, True, 0)]
    buckets = json.loads(last["ss_bucket_info"])
    assert sum(bucket["count"] for bucket in buckets["buckets"].values()) == 26 and buckets["mean_img_ar_error"] >= 0
    assert {tuple(bucket["resolution"]) for bucket in buckets["buckets"].values()} >= {(64, 64)}
    assert {name: last[name] for name in ("ss_batch_size_per_device", "ss_total_batch_size", "ss_resolution", "ss_enable_bucket",
                                          "ss_min_bucket_reso", "ss_max_bucket_reso", "ss_flip_aug", "ss_shuffle_caption")} == {
        "ss_batch_size_per_device": "2", "ss_total_batch_size": "4", "ss_resolution": "(64, 64)", "ss_enable_bucket": "True",
        "ss_min_bucket_reso": "32", "ss_max_bucket_reso": "128", "ss_flip_aug": "True", "ss_shuffle_caption": "False"}
    assert "ss_keep_tokens" not in last  # the subsets differ


def test_metadata_loss_caches_and_model(described, files):
    folder, _, last = described
    assert {name: last[name] for name in ("ss_loss_type", "ss_huber_c", "ss_huber_schedule", "ss_timestep_sampling",
                                          "ss_discrete_flow_shift", "ss_guidance_scale", "ss_min_timestep", "ss_prior_loss_weight",
                                          "ss_cache_latents", "ss_cache_text_encoder_outputs")} == {
        "ss_loss_type": "huber", "ss_huber_c": "0.2", "ss_huber_schedule": "exponential", "ss_timestep_sampling": "shift",
        "ss_discrete_flow_shift": "3.1582", "ss_guidance_scale": "1.0", "ss_min_timestep": "100", "ss_prior_loss_weight": "1.0",
        "ss_cache_latents": "True", "ss_cache_text_encoder_outputs": "True"}
    short = hashlib.sha256(files.checkpoint.read_bytes()[0x100000:0x110000]).hexdigest()[:8]
    assert last["ss_sd_model_hash"] == short and last["ss_sd_model_name"] == files.checkpoint.name
    assert last["ss_vae_name"] == files.ae.name and last["ss_base_model_version"] == "flux1"
    data = (folder / "out" / "mine.safetensors").read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little"):]).hexdigest()
    assert last["sshs_model_hash"] == digest and last["modelspec.hash_sha256"] == f"0x{digest}"


def test_metadata_of_the_standard(described):
    _, _, last = described
    assert {name.removeprefix("modelspec."): value for name, value in last.items() if name.startswith("modelspec.")}.items() >= {
        "sai_model_spec": "1.0.1", "architecture": "flux-1-dev", "title": "Cats", "author": "me", "tags": "cats",
        "resolution": "64x64", "timestep_range": "100,1000"}.items()


def test_every_record_of_the_table_is_met_or_has_nothing_to_say(described):
    _, _, last = described
    silent = {"ss_ema_decay", "ss_text_encoder_lr", "ss_keep_tokens", "ss_face_crop_aug_range", "ss_tag_frequency_left_out"}
    assert {one.name for one in TABLE} - set(last) == silent


# --- curves ---------------------------------------------------------------------------------------------------------------------

def test_tensorboard_has_every_curve_and_picture(base, tmp_path, pictures):
    data = dataset_file(tmp_path / "half.toml", pictures, batch_size=1, validation_split=0.5)
    (tmp_path / "prompts.txt").write_text("a box --w 32 --h 32 --s 1\na bag --w 32 --h 32 --s 1\n", encoding="utf-8")
    assert train(*with_flag(base, "dataset_config", data), *SHORT, "--logging_dir", tmp_path / "logs", "--log_prefix", "x-",
                 "--log_tracker_name", "project", "--log_config", "--sample_prompts", tmp_path / "prompts.txt",
                 "--sample_every_n_steps", 1, "--validate_every_n_steps", 1, "--lr_scheduler", "linear") == 0
    (run,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(run / "project"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss/step", "loss/average", "loss/validation", "loss/grad_norm", "lr/denoiser",
                                    "speed/seconds_per_step", "speed/images_per_second", "speed/data_wait_share", "memory/peak_bytes"}
    assert run.name.startswith("x-") and set(tags["images"]) == {"previews/00", "previews/01", "loss"}
    assert all([point.step for point in events.Scalars(name)] == [1, 2] for name in tags["scalars"])
    assert [image.step for image in events.Images("previews/01")] == [1, 2]
    out = tmp_path / "out"
    for curve, name in (("loss/step", "loss"), ("lr/denoiser", "lr/denoiser"), ("loss/validation", "validation_loss"),
                        ("speed/data_wait_share", "data_wait")):
        assert [point.value for point in events.Scalars(curve)] == pytest.approx(column(out, name), rel=1e-5), curve
    assert column(out, "learning_rate") == column(out, "lr/denoiser") == [1e-4, 5e-5]
    assert all(0 <= share < 1 for share in column(out, "data_wait")) and column(out, "mfu") == []


# --- files written beside the training --------------------------------------------------------------------------------------------

def tensors_and_facts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    changing = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date")
    return load_file(path), {name: value for name, value in header(path)[2].items() if name not in changing}


def test_files_written_beside_the_training_are_the_same(base, tmp_path):
    flags = [*with_flag(with_flag(base, "max_train_steps", 6), "learning_rate", "1e-3"), *SHORT, "--save_every_n_steps", 1,
             "--save_last_n_steps", 2, "--save_every_n_epochs", 1, "--save_last_n_epochs", 1]
    for name, more in (("out", []), ("beside", ["--async_save"])):
        assert train(*with_flag(flags, "output_dir", tmp_path / name), *more) == 0
    one, other = tmp_path / "out", tmp_path / "beside"
    assert checkpoints(one) == checkpoints(other) == ["last-000002.safetensors", *(f"last-step0000000{step}.safetensors"
                                                                                  for step in (4, 5, 6)), "last.safetensors"]
    assert losses(one) == losses(other)
    for name in checkpoints(one):
        (tensors, facts), (others, other_facts) = tensors_and_facts(one / name), tensors_and_facts(other / name)
        assert facts == other_facts and all(torch.equal(tensors[key], others[key]) for key in tensors | others), name
        # times in the metadata have more or fewer digits
        assert abs((one / name).stat().st_size - (other / name).stat().st_size) <= 64
        verify(other / name)


def files_of(path: Path) -> dict[str, Path]:
    return {str(one.relative_to(path)): one for one in path.rglob("*") if one.is_file()} if path.is_dir() else {path.name: path}


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers_safetensors", "diffusers"])
def test_encoders_and_folders_written_beside_the_training_are_the_same(sdxl, dataset, tmp_path, kind):
    """Three modules that train, and parts that come from the input; every format."""
    name = "last-step00000001" + {"safetensors": ".safetensors", "ckpt": ".ckpt"}.get(kind, "")
    for out, more in (("at_once", []), ("beside", ["--async_save"])):
        assert main(SDXL, ["--pretrained_model_name_or_path", str(sdxl.checkpoint), "--dataset_config", str(dataset), "--output_dir",
                           str(tmp_path / out), "--max_train_steps", "3", "--learning_rate", "1e-3", "--train_text_encoder",
                           "--learning_rate_te1", "1e-4", "--save_every_n_steps", "1", "--save_model_as", kind, *more]) == 0
    one, other = files_of(tmp_path / "at_once" / name), files_of(tmp_path / "beside" / name)
    assert set(one) == set(other) and len(one) == 1 or "model_index.json" in one
    for relative, path in one.items():
        if path.suffix == ".safetensors":
            (tensors, facts), (others, other_facts) = tensors_and_facts(path), tensors_and_facts(other[relative])
            facts.pop("ss_output_name", None), other_facts.pop("ss_output_name", None)
            assert facts == other_facts and tensors.keys() == others.keys()
            assert all(torch.equal(tensors[key], others[key]) for key in tensors), relative
            if kind == "safetensors":
                assert facts["ss_text_encoder_lr"] == "[0.0001, 0.001]" and facts["ss_base_model_version"] == "sdxl_base_v1-0"
        else:
            assert path.read_bytes() == other[relative].read_bytes(), relative
    verify(tmp_path / "beside" / name)


def test_a_copy_that_does_not_fit_the_memory_is_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("library.checkpoint.snapshot.available_memory", lambda: 1000)
    assert train(*base, *SHORT, "--save_every_n_steps", 1, "--async_save") == 2
    assert "--async_save: the copy of the weights takes" in capsys.readouterr().err and not checkpoints(tmp_path / "out")


class Disk:
    """The room on the disk as asked for; ``full()`` decides for each question."""

    def __init__(self, monkeypatch, full):
        self.asked = 0
        self.true, self.full = shutil.disk_usage, full
        monkeypatch.setattr(shutil, "disk_usage", self.usage)

    def usage(self, folder):
        self.asked += 1
        return namedtuple("usage", "total used free")(10, 10, 1) if self.full() else self.true(folder)


@pytest.mark.parametrize("more", [[], ["--async_save"]], ids=["at once", "beside"])
def test_a_full_disk_is_told_each_time_and_the_file_comes_later(base, tmp_path, monkeypatch, told, more):
    """Full from step 2 to step 5: the file of step 2 is tried again after 3, then 5, then 9 (where it is written)."""
    out = tmp_path / "out"
    Disk(monkeypatch, lambda: 2 <= len(rows(out)) <= 6)
    assert train(*with_flag(base, "max_train_steps", 14), *SHORT, "--save_every_n_steps", 2000, *more,
                 "--save_every_n_epochs", 1, "--save_last_n_epochs", 1, "--console_log_file", tmp_path / "told.log") == 0
    lines = [line for line in told().splitlines() if "NOT SAVED" in line]
    # epochs end at 2, 4, 6, ...: what is due then is tried then; what is owed in between
    assert [int(line.partition("at step ")[2].split(",")[0]) for line in lines] == [2, 3, 4, 6]
    assert all("training goes on, next try after step" in line and "free on its disk" in line for line in lines)
    names = checkpoints(out)
    assert names == ["last-000006.safetensors", "last.safetensors"], names
    assert len(rows(out)) == 14


def test_a_save_that_is_owed_is_named_by_its_step(base, tmp_path, monkeypatch, told):
    """Space returns between two regular saves."""
    out = tmp_path / "out"
    Disk(monkeypatch, lambda: 4 <= len(rows(out)) <= 6)
    assert train(*with_flag(base, "max_train_steps", 12), *SHORT, "--save_every_n_steps", 4, "--save_last_n_steps", 4,
                 "--console_log_file", tmp_path / "told.log") == 0
    assert [line.partition("next try after step ")[2].split(":")[0] for line in told().splitlines() if "NOT SAVED" in line] == ["5", "7"]
    assert checkpoints(out) == ["last-step00000008.safetensors", "last-step00000012.safetensors", "last.safetensors"]
    assert "saved" in told() and "last-step00000007.safetensors" in told()  # kept until step 12


@pytest.mark.parametrize("more", [[], ["--async_save"]], ids=["at once", "beside"])
def test_a_disk_that_fills_up_while_writing_costs_no_older_file(base, tmp_path, monkeypatch, told, more):
    out, real, failures = tmp_path / "out", os.fsync, iter(range(4))

    def fsync(handle):  # the first file is whole; then nothing is, for some calls
        if (out / "last-step00000001.safetensors").exists() and next(failures, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr("library.atomic.os.fsync", fsync)
    monkeypatch.setattr(library.outputs, "FINAL_PAUSE", 0.01)
    monkeypatch.setattr(library.outputs, "FINAL_TRIES", 3)
    assert train(*with_flag(base, "max_train_steps", 8), *SHORT, "--save_every_n_steps", 1, "--save_last_n_steps", 9, *more,
                 "--console_log_file", tmp_path / "told.log") == 0
    text = told()
    assert text.count("NOT SAVED") >= 2 and "no space left on the disk while writing" in text
    assert {"last-step00000001.safetensors", "last-step00000008.safetensors", "last.safetensors"} <= set(checkpoints(out))
    assert all(not path.name.endswith(".tmp") for path in out.rglob("*"))
    for name in checkpoints(out):
        verify(out / name)


def test_the_result_waits_for_room(base, tmp_path, monkeypatch, told):
    disk = Disk(monkeypatch, lambda: len(rows(tmp_path / "out")) >= 2 and disk.asked < 8)
    monkeypatch.setattr(library.outputs, "FINAL_PAUSE", 0.01)
    assert train(*base, *SHORT, "--console_log_file", tmp_path / "told.log") == 0
    assert told().count("THE RESULT IS NOT SAVED") >= 2 and checkpoints(tmp_path / "out") == ["last.safetensors"]


def test_a_result_for_which_no_room_comes_is_an_error(base, tmp_path, monkeypatch, told, capsys):
    Disk(monkeypatch, lambda: len(rows(tmp_path / "out")) >= 2)
    monkeypatch.setattr(library.outputs, "FINAL_PAUSE", 0.01)
    monkeypatch.setattr(library.outputs, "FINAL_TRIES", 3)
    assert train(*base, *SHORT, "--console_log_file", tmp_path / "told.log") == 2
    assert told().count("THE RESULT IS NOT SAVED") == 2 and "not enough space on the disk" in capsys.readouterr().err


def test_a_damaged_file_is_found_and_the_older_one_stays(base, tmp_path, monkeypatch, told):
    """A disk that loses the last byte of what it was given at step 2."""
    out, real = tmp_path / "out", os.replace

    def replace(source, target):
        if str(target).endswith("last-step00000002.safetensors"):
            with open(source, "r+b") as file:
                file.truncate(os.path.getsize(source) - 1)
        real(source, target)

    monkeypatch.setattr("library.atomic.os.replace", replace)
    assert train(*with_flag(base, "max_train_steps", 2), *SHORT, "--save_every_n_steps", 1, "--save_last_n_steps", 1,
                 "--console_log_file", tmp_path / "told.log") == 0
    assert checkpoints(out) == ["last-step00000001.safetensors", "last.safetensors"]
    assert "does not read back as it was written" in told() and "truncated" in told()
    assert not list(out.glob("*.damaged"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_files_are_written_beside_the_training(base, tmp_path, name):
    flags = [*with_flag(base, "max_train_steps", 1_000_000), *SHORT, "--save_every_n_steps", 1, "--save_last_n_steps", 3,
             "--async_save"]
    out = tmp_path / "out"
    with running([sys.executable, str(ROOT / SCRIPT), *map(str, flags)], tmp_path / "log") as run:
        run.until(lambda: len(rows(out)) >= 5)
        run.process.send_signal(getattr(signal, name))
        assert run.end() == STOPPED_STATUS, run.text
        text = run.text
    last = len(rows(out))
    assert checkpoints(out)[-1] == f"last-step{last:08d}.safetensors" and len(checkpoints(out)) == 4
    for saved in checkpoints(out):
        verify(out / saved)
    assert "Traceback" not in text and f"last-step{last:08d}" in text.partition("stopped by")[2]
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]


# --- uploads, and what must stay here ---------------------------------------------------------------------------------------------

def test_uploads_and_secrets(files, tmp_path):
    """A whole run in a home folder of its own, with every tracker and token, started with relative paths."""
    home = tmp_path / "home_of_somebody"
    make_pictures(home / "pictures", 2)
    dataset_file(home / "data.toml", Path("pictures"))
    shutil.copytree(files.folder, home / "models")
    (home / "prompts.txt").write_text("a box --w 32 --h 32 --s 1\n", encoding="utf-8")
    stub = HubStub()
    with serving(stub) as address:
        done = run_script("--pretrained_model_name_or_path", f"models/{files.checkpoint.name}", "--dataset_config", "data.toml",
                          "--output_dir", "out", "--max_train_steps", 4, "--cache_latents", "--cache_text_encoder_outputs", *SHORT,
                          "--save_every_n_steps", 2, "--async_save", "--async_upload", "--huggingface_repo_id", "me/my-model",
                          "--huggingface_path_in_repo", "runs", "--huggingface_token", GOOD_TOKEN, "--logging_dir", "logs",
                          "--log_config", "--sample_prompts", "prompts.txt", "--sample_every_n_steps", 4,
                          "--console_log_file", "told.log", cwd=home, HOME=str(home), HF_ENDPOINT=address, HF_HUB_OFFLINE="0",
                          WANDB_API_KEY="wandbSECRET0123", PYTHONDONTWRITEBYTECODE="1", fresh=True)
    assert done.status == 0 and "Traceback" not in done.text, done.text
    assert {path: hashlib.sha256(data).hexdigest() for (_, path), data in stub.files.items()} == {
        f"runs/{name}": hashlib.sha256((home / "out" / name).read_bytes()).hexdigest() for name in checkpoints(home / "out")}
    assert len(checkpoints(home / "out")) == 3 and stub.repos == {"me/my-model": True}
    written = [path for folder in ("out", "logs") for path in (home / folder).rglob("*") if path.is_file()] + [home / "told.log"]
    assert {path.suffix for path in written} >= {".toml", ".csv", ".png", ".safetensors", ".log"} and any("tfevents" in path.name for path in written)
    for path in written:
        data = path.read_bytes()
        for secret in (GOOD_TOKEN, "wandbSECRET0123", str(home), str(tmp_path), home.name):
            assert secret.encode() not in data, f"{secret} in {path}"
    for secret in (GOOD_TOKEN, str(home)):
        assert secret not in done.text.replace("--huggingface_token can be read", "")
    assert "uploaded last.safetensors to me/my-model/runs/last.safetensors" in (home / "told.log").read_text()


def test_absolute_paths_stay_out_of_what_is_passed_on(base, tmp_path):
    """The flags hold absolute paths here: files that people share must not."""
    assert train(*base, *SHORT, "--logging_dir", tmp_path / "logs", "--log_config") == 0
    shared = [*(tmp_path / "logs").rglob("*tfevents*"), tmp_path / "out" / "last.safetensors"]
    assert len(shared) == 2
    for path in shared:
        data = path.read_bytes()
        for word in (str(tmp_path), str(tmp_path.parent), str(Path.home()) + os.sep):
            assert word.encode() not in data, path
    assert b"learning_rate" in shared[0].read_bytes()


def test_a_wrong_token_ends_the_run_before_it_begins(base, tmp_path):
    with serving(HubStub()) as address:
        done = run_script(*base, *SHORT, "--huggingface_repo_id", "me/x", HF_TOKEN="hf_wrongTOKEN", HF_ENDPOINT=address, HF_HUB_OFFLINE="0", fresh=True)
    assert done.status == 2 and done.errors == [
        "error: --huggingface_token: the hub does not know this access token; set HF_TOKEN, run `hf auth login`, or give "
        "--huggingface_token; make one at huggingface.co/settings/tokens"], done.text
    assert "hf_wrongTOKEN" not in done.text and not (tmp_path / "out").exists()


def test_a_hub_that_fails_does_not_end_the_run(base, tmp_path):
    stub = HubStub()
    stub.broken = 400
    with serving(stub) as address:
        done = run_script(*base, *SHORT, "--huggingface_repo_id", "me/x", HF_TOKEN=GOOD_TOKEN, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", fresh=True)
    assert done.status == 0 and "NOT UPLOADED, training goes on: last.safetensors" in done.text and GOOD_TOKEN not in done.text
    assert checkpoints(tmp_path / "out") == ["last.safetensors"]
