"""Mistakes people make, from the command line: one line that names the remedy, exit status 2, no trace, nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import ROOT, environment, run_script, with_flag
from tests.contract.conftest import dataset_file


class Bench:
    """What a mistake is made in: a working command line and the folder for this test."""

    def __init__(self, base, files, pictures, folder: Path):
        self.base, self.files, self.folder = base, files, folder
        self.pictures = Path(shutil.copytree(pictures, folder / "pictures"))
        self.dataset = dataset_file(folder / "data.toml", self.pictures)
        self.flags = with_flag(base, "dataset_config", self.dataset)

    def flag(self, name: str, value: object) -> None:
        self.flags = with_flag(self.flags, name, value)

    def without(self, name: str) -> None:
        index = self.flags.index(f"--{name}")
        del self.flags[index:index + 2]

    def toml(self, text: str) -> None:
        self.dataset.write_text(text.replace("PICTURES", self.pictures.as_posix()), encoding="utf-8")

    def checkpoint(self, data: bytes) -> None:
        path = self.folder / "model.safetensors"
        path.write_bytes(data)
        self.flag("pretrained_model_name_or_path", path)

    def tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.folder / "model.safetensors")
        self.flag("pretrained_model_name_or_path", self.folder / "model.safetensors")

    def config_file(self, text: str) -> None:
        path = self.folder / "run.toml"
        path.write_text(text, encoding="utf-8")
        self.flag("config_file", path)


GOOD = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = 'PICTURES'\n"

# name: (what goes wrong, words the error must contain)
MISTAKES = {
    "checkpoint missing": (lambda b: b.flag("pretrained_model_name_or_path", b.files.checkpoint.with_name("flux1-dve.safetensors")),
                           ["flux1-dve.safetensors", "flux1-dev.safetensors"]),
    "checkpoint truncated": (lambda b: b.checkpoint(b.files.checkpoint.read_bytes()[:-1000]), ["model.safetensors", "again"]),
    "checkpoint empty": (lambda b: b.checkpoint(b""), ["model.safetensors", "empty"]),
    "checkpoint is a web page": (lambda b: b.checkpoint(b"<!DOCTYPE html><html><body>Sign in</body></html>" * 20), ["model.safetensors", "web page"]),
    "checkpoint is a git-lfs pointer": (lambda b: b.checkpoint(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), ["lfs"]),
    "checkpoint is of another architecture": (lambda b: b.tensors({
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3), "model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 4),
        "conditioner.embedders.1.model.ln_final.weight": torch.zeros(4)}), ["SDXL"]),
    "checkpoint is a LoRA": (lambda b: b.tensors({
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8), "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight":
        torch.zeros(8, 4), "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(4.0)}), ["LoRA"]),
    "checkpoint lacks a tensor": (lambda b: (b.tensors({name: tensor for name, tensor in load_file(b.files.checkpoint).items()
                                                        if name != "double_blocks.0.img_attn.proj.weight"}), _give_parts(b)),
                                  ["double_blocks.0.img_attn.proj.weight"]),
    "checkpoint has a tensor too many": (lambda b: (b.tensors({**load_file(b.files.checkpoint), "double_blocks.0.img_attn.prjo.weight": torch.zeros(2)}),
                                                    _give_parts(b)), ["double_blocks.0.img_attn.prjo.weight"]),
    "autoencoder given is a text encoder": (lambda b: b.flag("ae", b.files.clip_l), ["--ae", "CLIP"]),
    "other parts nowhere": (lambda b: b.checkpoint(b.files.checkpoint.read_bytes()),
                            ["--ae", "--clip_l", "--t5xxl", "--clip_l_tokenizer", "--t5xxl_tokenizer", "ae.safetensors", "hub"]),
    "unknown flag": (lambda b: b.flags.append("--max_train_step=5"), ["--max_train_step", "max_train_steps"]),
    "flag of LoRA": (lambda b: b.flag("network_dim", 16), ["--network_dim", "_train_network.py"]),
    "flag not built yet": (lambda b: b.flags.append("--torch_compile"), ["--torch_compile", "not built yet"]),
    "more blocks than there are": (lambda b: b.flag("blocks_to_swap", 18), ["--blocks_to_swap", "18", "at most 4"]),
    "number expected": (lambda b: b.flag("learning_rate", "fast"), ["--learning_rate", "fast"]),
    "value of a choice": (lambda b: b.flag("lr_scheduler", "cosin"), ["--lr_scheduler", "cosine"]),
    "value missing": (lambda b: b.flags.append("--optimizer_type"), ["--optimizer_type"]),
    "optimizer unknown": (lambda b: b.flag("optimizer_type", "AdamX"), ["AdamX", "AdamW"]),
    "optimizer argument unknown": (lambda b: b.flag("optimizer_args", "wieght_decay=0.1"), ["wieght_decay", "weight_decay"]),
    "settings contradict": (lambda b: b.flags.extend(["--full_bf16"]), ["--full_bf16", "bf16"]),
    "configuration file missing": (lambda b: b.flag("config_file", b.folder / "nothing.toml"), ["nothing.toml"]),
    "configuration key unknown": (lambda b: b.config_file("seed = 1\n[training]\nlerning_rate = 1e-4\n"), ["run.toml:3", "learning_rate"]),
    "configuration type wrong": (lambda b: b.config_file('max_grad_norm = "strong"\n'), ["run.toml:1", "max_grad_norm"]),
    "configuration not TOML": (lambda b: b.config_file("seed = = 1\n"), ["run.toml:1"]),
    "dataset file missing": (lambda b: b.flag("dataset_config", b.folder / "dta.toml"), ["dta.toml", "data.toml"]),
    "dataset key unknown": (lambda b: b.toml(GOOD + "num_repeat = 2\n"), ["data.toml:6", "num_repeats"]),
    "dataset type wrong": (lambda b: b.toml(GOOD.replace("batch_size = 2", 'batch_size = "two"')), ["data.toml:3", "batch_size"]),
    "resolution not divisible": (lambda b: b.toml(GOOD.replace("= 64", "= 70")), ["70", "16"]),
    "picture folder missing": (lambda b: b.toml(GOOD.replace("PICTURES", "PICTURES-old")), ["pictures-old"]),
    "picture folder empty": (lambda b: [path.unlink() for path in b.pictures.iterdir()], ["pictures"]),
    "picture unreadable": (lambda b: (b.pictures / "picture1.png").write_bytes(b"not a picture at all"), ["picture1.png"]),
    "picture of zero bytes": (lambda b: (b.pictures / "picture1.png").write_bytes(b""), ["picture1.png", "empty"]),
    "picture cut off": (lambda b: (b.pictures / "picture1.png").write_bytes((b.pictures / "picture1.png").read_bytes()[:-60]), ["picture1.png"]),
    "caption in another encoding": (lambda b: (b.pictures / "picture1.txt").write_bytes("caf\u00e9".encode("latin-1")), ["picture1.txt", "UTF-8"]),
    "caption missing": (lambda b: (b.pictures / "picture1.txt").unlink(), ["picture1.png", "class_tokens"]),
    "output folder is a file": (lambda b: b.flag("output_dir", b.dataset), ["--output_dir", "data.toml"]),
    "prompts without a file": (lambda b: b.flag("sample_every_n_steps", 1), ["--sample_prompts"]),
    "prompt file with an unknown option": (lambda b: ((b.folder / "p.txt").write_text("a box --x 5\n", encoding="utf-8"), b.flags.extend(
        ["--sample_prompts", str(b.folder / "p.txt"), "--sample_at_first"])), ["p.txt:1"]),
    "several at once": (lambda b: (b.flag("learning_rate", "fast"), b.flag("max_train_steps", 0), b.flags.append("--typo")),
                        ["--learning_rate", "--max_train_steps", "--typo"]),
}


SEVERAL = ("several at once", "other parts nowhere")


def _give_parts(bench: Bench) -> None:
    for name in ("ae", "clip_l", "t5xxl", "clip_l_tokenizer", "t5xxl_tokenizer"):
        bench.flag(name, getattr(bench.files, name))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_with_a_remedy(name, base, files, pictures, tmp_path):
    spoil, words = MISTAKES[name]
    bench = Bench(base, files, pictures, tmp_path)
    spoil(bench)
    before = _snapshot(tmp_path)
    done = run_script(*bench.flags)
    assert done.status == 2, done.text
    assert "Traceback" not in done.text
    assert done.errors and all(word in "\n".join(done.errors) for word in words), done.stderr
    if name not in SEVERAL:
        assert len(done.errors) == 1, done.stderr
    assert all(len(line) < 900 for line in done.errors)
    after = _snapshot(tmp_path)
    assert {path: size for path, size in after.items() if path in before} == before
    assert not [path for path in after if path.suffix in (".safetensors", ".tmp") and path not in before]


def _snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_output_folder_not_writable(base, tmp_path):
    locked = tmp_path / "locked"
    with _read_only(locked):
        done = run_script(*with_flag(base, "output_dir", locked / "out"))
    assert done.status == 2 and len(done.errors) == 1 and "locked" in done.errors[0] and "Traceback" not in done.text, done.text


@contextmanager
def _read_only(folder: Path):
    """A folder that even root cannot write to (a read-only file system), or for others one without the right to."""
    folder.mkdir(mode=0o500)
    if sys.platform == "win32":
        pytest.skip("Windows knows no such mode bits")
    if os.geteuid() == 0:
        with _mounted(folder, "ro"):
            yield
    else:
        yield


@contextmanager
def _mounted(folder: Path, options: str):
    """A file system in memory at ``folder``, for root on Linux."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this machine does not let its tests mount file systems")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_command_of_the_issue_trains(base, tmp_path):
    done = run_script(*base, "--save_model_as", "safetensors", "--optimizer_type", "AdamW8bit", "--blocks_to_swap", "4",
                      "--blockwise_fused_optimizers")
    assert done.status == 0 and "4 of 4 blocks wait in CPU memory" in done.text, done.text


def test_a_dataset_mistake_is_told_before_torch_is_imported(base, tmp_path):
    """The refusal must come in a second, not after ten of imports."""
    (tmp_path / "data.toml").write_text("[[datasets]]\nresolutoin = 64\n", encoding="utf-8")
    code = ("import sys, flux_train; from library.app import main\nstatus = main(flux_train.ENTRY, sys.argv[1:])\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)\nprint(status, sorted(heavy))")
    done = subprocess.run([sys.executable, "-c", code, *with_flag(base, "dataset_config", tmp_path / "data.toml")], cwd=ROOT,
                          env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr


def test_full_disk_is_one_line_and_leaves_nothing(base, tmp_path):
    """A file system of 300 kB cannot hold the checkpoint of this model."""
    small = tmp_path / "small"
    small.mkdir()
    with _mounted(small, "size=300k"):
        done = run_script(*with_flag(base, "output_dir", small / "out"))
        assert done.status == 2 and len(done.errors) == 1 and "space" in done.errors[0] and "Traceback" not in done.text, done.text
        assert not list(small.rglob("*.safetensors")) and not list(small.rglob("*.tmp"))
