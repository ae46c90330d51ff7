"""The dataset path through the whole script: every source, masks, held-out pictures, cached variants, caches that outlive a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import run_all
from tests.cli.runs import column, running
from tests.contract.conftest import dataset_file, losses, make_pictures

SHORT = ("--t5xxl_max_token_length", "16")
DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


def worked(*runs) -> None:
    for done in runs:
        assert done.status == 0 and "Traceback" not in done.text, done.text


@pytest.fixture
def flags(files, tmp_path):
    """``flags(name, ...)``: a command line that works, without a dataset, into an output folder of that name."""
    def make(name: str, *more: object) -> list[str]:
        return ["--pretrained_model_name_or_path", str(files.checkpoint), "--output_dir", str(tmp_path / name), "--max_train_steps", "3",
                "--learning_rate", "1e-3", *SHORT, *map(str, more)]
    return make


def test_four_ways_to_name_the_same_pictures(flags, tmp_path):
    """A TOML file, the same as JSON, a folder of N_class folders and a metadata file train the same pictures with the same words."""
    pictures = make_pictures(tmp_path / "tree" / "2_a box", 3)
    toml = dataset_file(tmp_path / "data.toml", pictures, batch_size=2, num_repeats=2)
    subset = {"image_dir": str(pictures), "num_repeats": 2}
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [{"resolution": 64, "batch_size": 2, "subsets": [subset]}]}))
    records = {path.stem: {"caption": path.with_suffix(".txt").read_text()} for path in sorted(pictures.glob("*.png"))}
    (tmp_path / "meta.json").write_text(json.dumps(records))
    plain = ("--resolution", "64", "--train_batch_size", "2")
    runs = run_all(flags("toml", "--dataset_config", toml), flags("json", "--dataset_config", tmp_path / "data.json"),
                   flags("tree", "--train_data_dir", tmp_path / "tree", *plain),
                   flags("meta", "--in_json", tmp_path / "meta.json", "--train_data_dir", pictures, "--dataset_repeats", "2", *plain))
    worked(*runs)
    first = losses(tmp_path / "toml")
    assert len(first) == 3 and all(losses(tmp_path / name) == first for name in ("json", "tree", "meta"))


def test_what_is_cached_is_what_would_be_encoded(flags, tmp_path):
    """Flips, shuffled tags, dropped captions, masks and weights: the caches change no number, online with workers neither."""
    pictures = make_pictures(tmp_path / "pictures", 4)
    for index, path in enumerate(sorted(pictures.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"box {index}, red, blue, green", encoding="utf-8")
        with Image.open(path) as picture:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(path)
    data = dataset_file(tmp_path / "data.toml", pictures, batch_size=2, flip_aug=True, caption_dropout_rate=0.3, alpha_mask=True,
                        caption_prefix="'photo of'", loss_weight=0.5)
    common = ("--dataset_config", data, "--max_train_steps", "6")
    worked(*run_all(
        flags("online", *common, "--max_data_loader_n_workers", "0"), flags("workers", *common, "--max_data_loader_n_workers", "2"),
        flags("memory", *common, "--cache_latents", "--cache_text_encoder_outputs"), flags("disk", *common, *DISK),
        flags("again", *common, *DISK)))
    online, memory = losses(tmp_path / "online"), losses(tmp_path / "memory")
    assert len(set(online)) == 6 and losses(tmp_path / "workers") == online
    for name in ("disk", "again"):
        assert losses(tmp_path / name) == memory, name
    # The caches are filled in other batches than are trained, and matrix products of another size round otherwise.
    assert memory == pytest.approx(online, rel=1e-5)


def test_held_out_pictures_are_measured_and_not_trained(flags, tmp_path):
    data = dataset_file(tmp_path / "data.toml", make_pictures(tmp_path / "pictures", 5), batch_size=2)
    common = ("--dataset_config", data, "--validation_split", "0.4", "--cache_latents", "--cache_text_encoder_outputs")
    first, again, often = runs = run_all(flags("first", *common, "--max_train_epochs", "3"), flags("again", *common, "--max_train_epochs", "3"),
                                         flags("often", *common, "--max_train_steps", "4", "--validate_every_n_steps", "1"))
    worked(*runs)
    measured = column(tmp_path / "first", "validation_loss")
    assert len(measured) == 3 and measured == column(tmp_path / "again", "validation_loss")
    assert len(column(tmp_path / "often", "validation_loss")) == 4
    assert "held-out" in first.text and "an epoch is 2 steps" in first.text and "of 3 pictures" in first.text
    assert "an epoch is 2 steps" in first.text and "2 pictures held out for validation" in first.text  # what the data page says


def test_held_out_pictures_of_several_datasets_and_of_averaged_weights(flags, tmp_path):
    """Training that goes far too fast: the loss on the held-out pictures turns, which is told in words."""
    subset = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '{}'\n"
    folders = [make_pictures(tmp_path / name, 4) for name in ("one", "two")]
    (tmp_path / "data.toml").write_text("".join(subset.format(64, folder.as_posix()) for folder in folders))
    (done,) = run_all(flags("out", "--dataset_config", tmp_path / "data.toml", "--validation_split", "0.5", "--cache_latents",
                            "--validate_every_n_steps", "1", "--ema_decay", "0.5", "--cache_text_encoder_outputs", "--max_train_steps", "8",
                            "--learning_rate", "0.05"))
    worked(done)
    whole, one, two = (column(tmp_path / "out", f"validation_loss{part}") for part in ("", "/dataset 1", "/dataset 2"))
    assert len(whole) == 8 and whole == pytest.approx([(first + second) / 2 for first, second in zip(one, two, strict=True)], rel=1e-5)
    assert len(column(tmp_path / "out", "validation_loss_ema/dataset 2")) == 8
    assert "the loss on the held-out pictures was lowest after step" in done.text


def test_variants_of_a_caption_are_cached(flags, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 2)
    for path in pictures.glob("*.txt"):
        path.write_text("one, two, three, four", encoding="utf-8")
    data = dataset_file(tmp_path / "data.toml", pictures, shuffle_caption=True)
    common = ("--dataset_config", data, "--cache_latents", "--cache_text_encoder_outputs")
    refused, cached = run_all(flags("refused", *common), flags("cached", *common, "--text_cache_variants", "4"))
    assert refused.status == 2 and "--text_cache_variants" in refused.errors[0] and "Traceback" not in refused.text
    worked(cached)


def test_long_captions_are_told_once_whether_cached_or_not(flags, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 3)
    for index, caption in enumerate(("the cat", "the cat and the blue dog " * 18 + "end", "a red cat")):
        (pictures / f"picture{index}.txt").write_text(caption, encoding="utf-8")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the red box " * 30 + "--w 64 --h 64 --s 1\na box --w 64 --h 64 --s 1 --l 2 --n " + "the blue dog " * 90 + "\n",
                       encoding="utf-8")
    data = dataset_file(tmp_path / "data.toml", pictures)
    common = ("--dataset_config", data, "--max_train_steps", "1")
    first, online = run_all(flags("first", *common, *DISK, "--sample_prompts", prompts, "--sample_every_n_steps", "5"),
                            flags("online", *common))
    cached, = run_all(flags("cached", *common, *DISK))
    worked(first, online, cached)
    assert "cached text outputs: all 3 are there already" in cached.text
    for done in (first, online, cached):
        assert done.text.count("1 caption is longer than the 16 tokens that T5 reads") == 1, done.text
        assert done.text.count("picture1.png: ") == 1 and done.text.count("an epoch is") == 1
    assert first.text.count("2 preview prompts are longer than the 16 tokens that T5 reads") == 1
    assert first.text.count("2 preview prompts are longer than the 77 tokens that CLIP reads (such as ") == 1
    assert "prompts.txt:2, negative prompt: " in first.text  # the longest one
    assert "preview prompt is" not in cached.text


def test_only_what_changed_is_encoded_again(flags, tmp_path):
    """One edited picture, one edited caption, one new picture, one deleted: each costs one encoding, the rest none."""
    pictures = make_pictures(tmp_path / "pictures", 4)
    data = dataset_file(tmp_path / "data.toml", pictures, batch_size=1)
    common = ("--dataset_config", data, *DISK)
    worked(*run_all(flags("first", *common)))
    Image.new("RGB", (96, 96), "olive").save(pictures / "picture1.png")
    (pictures / "picture2.txt").write_text("an edited caption", encoding="utf-8")
    Image.new("RGB", (96, 96), "teal").save(pictures / "new.png")
    (pictures / "new.txt").write_text("picture number 0 of a blue box", encoding="utf-8")  # words that are known already
    (pictures / "picture3.png").unlink()
    second, third = run_all(flags("second", *common), flags("third", *common))
    worked(second, third)
    assert "latents 2/2" in second.text and "text outputs 1/1" in second.text, second.text
    assert "encoded" not in third.text
    assert all(f"cached {what}: all 4 are there already" in third.text for what in ("latents", "text outputs"))
    assert losses(tmp_path / "second") == losses(tmp_path / "third")


def test_a_folder_that_cannot_be_written_is_told_with_the_flag_to_use(flags, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 2)
    (pictures / ".kiln_cache").write_text("a file where the folder should be")
    data = dataset_file(tmp_path / "data.toml", pictures)
    refused, = run_all(flags("out", "--dataset_config", data, *DISK))
    assert refused.status == 2 and "--cache_dir" in refused.errors[0] and "Traceback" not in refused.text, refused.text


def test_two_runs_at_once_share_one_cache(flags, tmp_path):
    import sys

    pictures = make_pictures(tmp_path / "pictures", 6)
    data = dataset_file(tmp_path / "data.toml", pictures, batch_size=1)
    commands = [[sys.executable, "flux_train.py", *flags(name, "--dataset_config", data, *DISK)] for name in ("a", "b")]
    with running(commands[0], tmp_path / "a.txt") as one, running(commands[1], tmp_path / "b.txt") as two:
        assert one.end() == 0 and two.end() == 0, one.text + two.text
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_damaged_shard_costs_its_pictures_a_new_encoding(flags, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 3)
    data = dataset_file(tmp_path / "data.toml", pictures, batch_size=1)
    common = ("--dataset_config", data, *DISK)
    worked(*run_all(flags("first", *common)))
    for shard in (pictures / ".kiln_cache").glob("latents-*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    second, = run_all(flags("second", *common))
    worked(second)
    assert "latents 3/3" in second.text and losses(tmp_path / "second") == losses(tmp_path / "first"), second.text


def test_caches_filled_ahead_of_time_are_used(flags, files, tmp_path):
    import subprocess
    import sys

    from tests.cli.conftest import ROOT, environment

    pictures = make_pictures(tmp_path / "pictures", 3)
    data = dataset_file(tmp_path / "data.toml", pictures, batch_size=1)
    arguments = flags("out", "--dataset_config", data, *DISK)
    done = subprocess.run([sys.executable, "tools/cache.py", "fill", "flux_train.py", *arguments], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "latents 3/3" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
    used, online = run_all(flags("used", "--dataset_config", data, *DISK), flags("online", "--dataset_config", data))
    worked(used, online)
    assert "encoded latents" not in used.text and losses(tmp_path / "used") == losses(tmp_path / "online")
    shutil.rmtree(pictures / ".kiln_cache")
    assert Path(data).exists()
