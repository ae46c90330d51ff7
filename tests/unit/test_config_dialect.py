"""The dialect: every flag of it is answered, in one of four ways."""

from pathlib import Path

import pytest

import flux_train
import lumina_train
import sd3_train
import sdxl_train
from library.config.dialect import DIALECT, ELSEWHERE, INERT, LATER
from library.config.parse import parse
from library.errors import UserError

ENTRY, ENTRIES = flux_train.ENTRY, (flux_train.ENTRY, sdxl_train.ENTRY, sd3_train.ENTRY, lumina_train.ENTRY)
NAMES = (Path(__file__).parents[1] / "data" / "dialect_flags.txt").read_text().split()
REQUIRED = ["--pretrained_model_name_or_path", ".", "--dataset_config", __file__, "--output_dir", "out"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.program)
def test_every_flag_of_the_dialect_is_known(entry):
    """The list: names of all flags of the dialect's fine-tuning and LoRA scripts (census, sections 1.1 to 1.12)."""
    assert len(NAMES) > 240
    assert set(NAMES) - set(entry.settings()) - set(entry.dialect()) == set()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.program)
def test_records_are_flags_of_the_dialect(entry):
    assert set(DIALECT) | {record.name for record in entry.architecture_options.dialect} <= set(NAMES)
    assert not set(entry.dialect()) & set(entry.settings())


@pytest.mark.parametrize("record", ENTRY.dialect().values(), ids=lambda record: record.name)
def test_record_is_answered(record):
    text = "1.5" if 1.5 not in record.neutral else "2.5"
    argv = [f"--{record.name}", *([] if record.takes == "switch" else [text])]
    if record.status == INERT:
        (note,) = parse(ENTRY, [*REQUIRED, *argv], {}).notes
        assert note == f"--{record.name} is accepted without effect: {record.reason}"
    else:
        with pytest.raises(UserError) as caught:
            parse(ENTRY, [*REQUIRED, *argv], {})
        assert caught.value.problems == (f"--{record.name}: {record.reason}; {record.remedy}",)
        assert record.remedy and record.status in (LATER, ELSEWHERE)


def test_values_that_ask_for_nothing_pass_in_silence(tmp_path):
    """Written by graphical front ends into every file."""
    file = tmp_path / "gui.toml"
    file.write_text("\n".join([
        'loss_type = "l2"', 'huber_schedule = "snr"', "huber_c = 0.1", "clip_skip = 1", "caption_dropout_rate = 0.0",
        "noise_offset = 0", "keep_tokens = 0", "lr_scheduler_num_cycles = 1", "lr_scheduler_power = 1", "prior_loss_weight = 1.0",
        "max_token_length = 75", "shuffle_caption = false", "blocks_to_swap = 0", 'dynamo_backend = "no"', 'resume = ""',
        "ip_noise_gamma = 0", "fused_optimizer_groups = 0", "xformers = false", "network_args = []"]))
    assert parse(ENTRY, [*REQUIRED, "--config_file", str(file), "--flip_aug=false", "--loss_type=l2"], {}).notes == ()


def test_other_values_of_the_same_flags_do_not():
    with pytest.raises(UserError) as caught:
        parse(ENTRY, [*REQUIRED, "--torch_compile", "--fused_optimizer_groups", "2", "--network_dim", "0",
                      "--network_args", "a=1", "b=2"], {})
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "--torch_compile", "--fused_optimizer_groups", "--network_dim", "--network_args"]


def test_inert_flag_from_the_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text("sdpa = true\nmin_snr_gamma = 5\n")
    notes = parse(ENTRY, [*REQUIRED, "--config_file", str(file)], {}).notes
    assert [note.split(" is accepted")[0] for note in notes] == [f"{file}:1: sdpa", f"{file}:2: min_snr_gamma"]
