"""The settings themselves, the pages generated from them, and how light all of it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from flux_train import ENTRY
from library.config.data_options import INTERPOLATIONS, CachingOptions, DatasetOptions
from library.config.flow_options import FlowOptions
from library.config.memory_options import MemoryOptions
from library.config.schema import LoggingOptions, PrecisionOptions, SavingOptions
from library.config.values import (read_bytes, read_class_name, read_range, read_size, read_suffixes, read_warmup, show,
                                   to_bytes, toml_text)
from tools import migrating_page, options_page

ROOT = Path(__file__).parents[2]


def test_every_setting_is_well_formed():
    for name, setting in ENTRY.settings().items():
        assert setting.kind in (str, int, float, bool, Path, tuple), name
        assert setting.meta["help"] and not setting.meta["help"].endswith("."), name
        assert setting.optional == (setting.default is None), f"{name}: None is for what is optional"
        assert isinstance(setting.default, (setting.kind, type(None), int)), name
        if setting.meta["choices"] and setting.default is not None:
            assert setting.default in setting.meta["choices"], name
        if setting.meta["off"] and setting.kind in (int, float) and not setting.optional:
            low = setting.meta["minimum"]
            assert low is None or float(setting.meta["off"]) >= low, f"{name}: its off value is refused"


def test_derived_values():
    assert CachingOptions(cache_latents_to_disk=True).latents_cached and not CachingOptions().text_cached
    assert DatasetOptions().workers(latents_cached=True) == 0
    assert DatasetOptions(max_data_loader_n_workers=1).workers(latents_cached=False) == 1
    assert [CachingOptions(**one).check for one in ({}, {"cache_check": "full"}, {"skip_cache_check": True},
                                                    {"skip_latents_validity_check": True})] == ["fast", "full", "none", "none"]
    text = {"cache_text_encoder_outputs": True}
    assert [CachingOptions(**one).variants for one in ({}, text, {**text, "text_cache_variants": 4},
                                                       {"text_cache_variants": 4})] == [None, 1, 4, None]
    assert CachingOptions(cache_text_encoder_outputs_to_disk=True).on_disk and not CachingOptions(cache_latents=True).on_disk
    assert LoggingOptions().trackers == () and LoggingOptions(logging_dir=Path("x")).trackers == ("tensorboard",)
    assert LoggingOptions(log_with="all").trackers == ("tensorboard", "wandb")
    assert [SavingOptions(save_precision=one).stored_dtype("bf16") for one in (None, "float", "fp16")] == ["bf16", "fp32", "fp16"]
    assert FlowOptions().timestep_sampling == "shift"


@pytest.mark.parametrize("options, follow, expected", [
    ({}, True, "fp32"), ({"mixed_precision": "bf16"}, True, "bf16"), ({"mixed_precision": "bf16"}, False, "fp32"),
    ({"mixed_precision": "fp16"}, True, "fp32"), ({"mixed_precision": "bf16", "full_bf16": True}, False, "bf16"),
    ({"mixed_precision": "bf16", "weights_dtype": "fp32"}, True, "fp32"),
    ({"mixed_precision": "bf16", "weights_dtype": "bf16"}, False, "bf16"),
])
def test_dtype_of_the_weights(options, follow, expected):
    assert PrecisionOptions(**options).kept_weights(follow) == expected


@pytest.mark.parametrize("given, expected", [
    ("100", 100), (100, 100), (0, 0), ("0.1", 0.1), (0.05, 0.05), ("5%", 0.05), ("0%", 0), ("200.0", 200)])
def test_warmup(given, expected):
    assert read_warmup(given) == expected and type(read_warmup(given)) is type(expected)


@pytest.mark.parametrize("given", ["", "x", "-1", -1, True, "100%", 1.5, "nan", "inf", [1], "%"])
def test_not_a_warmup(given):
    with pytest.raises(ValueError):
        read_warmup(given)


def test_sizes():
    assert [read_size(one) for one in (512, "512", "768, 512", [768, 512])] == ["512", "512", "768,512", "768,512"]
    for wrong in (0, -1, "", "a", "1,2,3", [1, 2.5], True, [True, 1], 1.5):
        with pytest.raises(ValueError):
            read_size(wrong)


def test_ranges():
    assert [read_range(one) for one in ("2,4", "2.0, 4.5", [1, 3], "0.5,0.5")] == ["2,4", "2,4.5", "1,3", "0.5,0.5"]
    for wrong in ("4,2", "0,1", "-1,2", "2", "1,2,3", "a,b", [1], [True, 2], 3, "nan,2", "1,inf", ["1", None]):
        with pytest.raises(ValueError):
            read_range(wrong)


def test_amounts_of_memory():
    assert [read_bytes(one) for one in ("12GB", " 11.50 gib", "800mb", "2.TB")] == ["12GB", "11.5GiB", "800MB", "2TB"]
    assert [to_bytes(one) for one in ("12GB", "11.5GiB", "800MB")] == [12 * 10**9, 23 * 2**29, 8 * 10**8]
    assert MemoryOptions(vram_budget="12GB").vram_budget_bytes == 12 * 10**9 and MemoryOptions().vram_budget_bytes is None
    for wrong in ("12", 12, "GB", "-1GB", "0GB", "12 G B", "1,5GB", True, "12GBs"):
        with pytest.raises(ValueError):
            read_bytes(wrong)


def test_suffixes():
    assert [read_suffixes(one) for one in (".txt", ".txt, .caption", [".json", "_tags.txt"])] == [".txt", ".txt,.caption",
                                                                                                  ".json,_tags.txt"]
    for wrong in ("txt", ".", "txt.", "", ".txt,", ".txt,.txt", "/a.txt", "*.txt", [".txt", 3], 3):
        with pytest.raises(ValueError):
            read_suffixes(wrong)
    with pytest.raises(ValueError) as caught:
        read_suffixes("txt")
    assert caught.value.args[1] == "write .txt"


def test_class_names():
    assert read_class_name("my_data.sets.Birds") == "my_data.sets.Birds"
    for wrong in ("Birds", "a..B", "a.b-c", "a/b.py", 3, "", "a.b.C()"):
        with pytest.raises(ValueError):
            read_class_name(wrong)


def test_names_of_interpolations_are_those_that_images_know():
    from library.data import augment
    assert INTERPOLATIONS == augment.INTERPOLATIONS


def test_values_in_words():
    assert [show(one) for one in (None, True, False, 2e-6, 1.0, 3.1582, (), ("a", "b"), "")] == [
        "none", "on", "off", "2e-6", "1", "3.1582", "none", "a b", "empty"]
    assert [toml_text(one) for one in (True, 1e-5, 3, ("a",), Path("x"), 'a"\\\n\x7f')] == [
        "true", "1e-05", "3", '["a"]', '"x"', '"a\\"\\\\\\n\\u007f"']


def test_no_heavy_import():
    """--help has to answer in half a second: none of the packages that take longer may be imported for it."""
    code = ("import sys, flux_train, library.config.parse, library.config.check, library.architectures.flux_options\n"
            "print(*sorted({name.split('.')[0] for name in sys.modules}))")
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "library" in loaded
    assert not set(loaded) & {"torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors", "PIL"}


def test_help_survives_a_closed_pipe():
    code = ("import os, sys, flux_train\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
            "from library.config.parse import parse\nparse(flux_train.ENTRY, ['--help'], {})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_options_page_is_current():
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.page(), "run: python tools/options_page.py"


def test_migrating_page_is_current():
    assert migrating_page.PAGE.read_text(encoding="utf-8") == migrating_page.page(), "run: python tools/migrating_page.py"


def test_every_deviation_from_the_dialect_has_a_reason():
    names = set((ROOT / "tests" / "data" / "dialect_flags.txt").read_text().split())
    new, deviating, ours = set(migrating_page.NEW), set(), set()
    for entry in options_page.entries():
        settings, theirs = set(entry.settings()), set(migrating_page.peer_defaults(entry))
        assert theirs | (new & settings) == settings and not theirs & new, entry.program
        assert theirs <= names
        deviating |= set(migrating_page.deviations(entry))
        ours |= settings
    assert deviating == set(migrating_page.REASONS)
    assert new <= ours and new - names == new - {"no_metadata"}


def test_there_is_a_page_for_every_script():
    assert {f"{name}.py" for name in options_page.SCRIPTS} == {path.name for path in ROOT.glob("*_train*.py")}


@pytest.mark.parametrize("entry", options_page.entries(), ids=lambda entry: entry.program)
def test_list_of_flags_is_frozen(entry):
    """Commands that people have written down must go on working: a flag may be added here, none may vanish unnoticed."""
    frozen = (ROOT / "tests" / "data" / entry.program.replace(".py", "_flags.txt")).read_text().split()
    assert frozen == sorted(entry.settings())
