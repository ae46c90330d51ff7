"""The checkpoint layouts and number formats that people have: each trains, and is saved in the layout it came in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import run_all, with_flag
from tests.cli.runs import checkpoints, header
from tests.contract.conftest import losses
from tests.tiny import TinyFlux, make_flux_files

F8 = torch.float8_e4m3fn
DENOISER = "model.diffusion_model."


def pipeline_folder(folder: Path, files: TinyFlux) -> Path:
    """The same models as diffusers and transformers save them, the transformer in shards."""
    from library.architectures.clip import load_clip
    from library.architectures.flux_models import load_transformer, load_vae
    from library.architectures.flux_parts import open_parts
    from library.architectures.t5 import load_t5

    parts = open_parts(files.checkpoint)
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    load_transformer(parts.transformer, torch.float32).save_pretrained(folder / "transformer", max_shard_size="600KB")
    load_vae(parts.ae, torch.float32).save_pretrained(folder / "vae")
    load_clip(parts.clip_l, torch.float32).save_pretrained(folder / "text_encoder")
    load_t5(parts.t5xxl, torch.float32).save_pretrained(folder / "text_encoder_2")
    shutil.copytree(files.clip_l_tokenizer, folder / "tokenizer")
    shutil.copytree(files.t5xxl_tokenizer, folder / "tokenizer_2")
    return folder


def prefixed(path: Path, files: TinyFlux, parts: dict[str, Path]) -> Path:
    """``parts`` (prefix of the keys: file) in one file at ``path``; what is not among them stands beside it."""
    inside = [part.name for part in parts.values()]
    shutil.copytree(files.folder, path.parent, ignore=lambda _folder, names: [name for name in names if name in inside])
    save_file({prefix + name: tensor for prefix, part in parts.items() for name, tensor in load_file(part).items()
               if name != "encoder.embed_tokens.weight"}, path)
    return path


def sharded(folder: Path, files: TinyFlux) -> Path:
    """The single file cut in two under an index, the other parts beside it."""
    shutil.copytree(files.folder, folder)
    (folder / files.checkpoint.name).unlink()
    tensors = load_file(files.checkpoint)
    names = sorted(tensors)
    halves = {f"flux1-dev-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for shard, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, some in halves.items() for name in some}}
    (folder / "flux1-dev.safetensors.index.json").write_text(json.dumps(index))
    return folder / "flux1-dev.safetensors.index.json"


@pytest.fixture(scope="module")
def inputs(files, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "plain": files.checkpoint,
        "prefix": prefixed(folder / "prefix" / "model.safetensors", files, {DENOISER: files.checkpoint}),
        "all-in-one": prefixed(folder / "all" / "model.safetensors", files, {
            DENOISER: files.checkpoint, "vae.": files.ae, "text_encoders.clip_l.transformer.": files.clip_l,
            "text_encoders.t5xxl.transformer.": files.t5xxl}),
        "diffusers": pipeline_folder(folder / "diffusers", files),
        "index": sharded(folder / "index", files),
        "fp8": make_flux_files(folder / "fp8", dtype=F8, encoder_dtype=torch.float16).checkpoint,
        "fp16": make_flux_files(folder / "fp16", dtype=torch.float16).checkpoint,
        "bf16": make_flux_files(folder / "bf16", dtype=torch.bfloat16).checkpoint,
        "schnell": make_flux_files(folder / "schnell", variant="schnell").checkpoint,
    }


def test_every_kind_of_checkpoint_trains_and_keeps_its_layout(inputs, base, tmp_path):
    base = [*with_flag(base, "learning_rate", "1e-3"), "--t5xxl_max_token_length", "16"]
    flag = "pretrained_model_name_or_path"
    runs = run_all(*([*with_flag(base, flag, path), "--output_name", name] for name, path in inputs.items()))
    for name, done in zip(inputs, runs, strict=True):
        assert done.status == 0 and "Traceback" not in done.text, f"{name}: {done.text}"
        assert ("FLUX.1-schnell" if name == "schnell" else "FLUX.1-dev") in done.stderr
    out = tmp_path / "out"
    assert checkpoints(out) == sorted(f"{name}.safetensors" for name in inputs)
    course = {name: losses(out, name) for name in inputs}
    for name in ("prefix", "all-in-one", "diffusers", "index"):  # the same weights under other names
        assert course[name] == pytest.approx(course["plain"], rel=1e-5), name
    for name, tolerance in (("fp16", 1e-2), ("bf16", 3e-2), ("fp8", 0.2)):  # the same weights, rounded
        assert course[name] == pytest.approx(course["plain"], rel=tolerance) and course[name] != course["plain"], name
    wanted = header(inputs["plain"])[0]
    for name, path in inputs.items():
        shapes, dtypes, metadata = header(out / f"{name}.safetensors")
        original = wanted if path.suffix != ".safetensors" else header(path)[0]
        assert shapes == original, name
        assert metadata["modelspec.architecture"] == f"flux-1-{'schnell' if name == 'schnell' else 'dev'}"
        assert dtypes == {"F32"}, name
    before, after = load_file(inputs["all-in-one"]), load_file(out / "all-in-one.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(DENOISER)}  # the other parts are carried over
