"""SD3 written back: the layout of the input, encoders inside or beside, precision, folders that diffusers opens."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.architectures.base import DENOISER
from library.architectures.sd3 import open_architecture
from library.architectures.sd3_options import Sd3Options
from library.checkpoint.writer import file_bytes
from library.config.save_formats import size_of
from library.config.schema import ModelOptions
from library.config.weighted_flow_options import WeightedFlowOptions
from library.saving import Saver, endangered
from tests.tiny_sd3 import ENCODERS, VARIANTS, make_sd3_files

CPU, F32 = torch.device("cpu"), torch.float32


def opened(checkpoint, **options):
    return open_architecture(ModelOptions(str(checkpoint)), Sd3Options(**options), WeightedFlowOptions())


def changed(arch, *names):
    """The transformer and the encoders ``names``, each with every weight a little larger."""
    modules = {DENOISER: arch.load_denoiser(CPU, F32), **arch.load_text_encoders(names, CPU, F32).modules}
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.mul_(1.5)
    return modules


def header(path):
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("embedded", [(), ENCODERS])
def test_untouched_weights_come_back_bit_for_bit(tmp_path, variant, embedded):
    files = make_sd3_files(tmp_path, variant, embedded, dtype=torch.float16)
    arch = opened(files.checkpoint)
    modules = {DENOISER: arch.load_denoiser(CPU, F32)}
    arch.export(modules, tmp_path / "out.safetensors", torch.float16, {}, "safetensors")
    before, after = load_file(str(files.checkpoint)), load_file(str(tmp_path / "out.safetensors"))
    assert header(files.checkpoint) == header(tmp_path / "out.safetensors") and not differing(before, after)
    assert (tmp_path / "out.safetensors").stat().st_size == arch.saved_bytes(modules, torch.float16, "safetensors")
    assert len(list(tmp_path.glob("out*"))) == 1


def test_encoders_that_trained_inside_stay_inside(tmp_path):
    files = make_sd3_files(tmp_path, embedded=ENCODERS)
    arch = opened(files.checkpoint, train_text_encoder=True)
    arch.export(changed(arch, "clip_l", "clip_g"), tmp_path / "out.safetensors", F32, {}, "safetensors")
    before, after = load_file(str(files.checkpoint)), load_file(str(tmp_path / "out.safetensors"))
    assert before.keys() == after.keys() and len(list(tmp_path.glob("out*"))) == 1
    still = {name for name in before if name not in differing(before, after)}
    assert {name for name in before if name.startswith(("text_encoders.t5xxl", "first_stage_model"))} <= still
    moved = [name for name in before if name.startswith(("model.", "text_encoders.clip")) and not name.endswith("pos_embed")]
    assert not still & set(moved)


@pytest.mark.parametrize("dtype, kind", [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_encoders_that_trained_beside_are_written_beside_in_the_precision_of_the_rest(tmp_path, dtype, kind):
    files = make_sd3_files(tmp_path)
    arch = opened(files.checkpoint, train_text_encoder=True, train_t5xxl=True)
    modules = changed(arch, *ENCODERS)
    arch.export(modules, tmp_path / "out.safetensors", dtype, {"modelspec.title": "x"}, "safetensors")
    for name in ENCODERS:
        path = tmp_path / f"out_{name}.safetensors"
        assert set(header(path)) == set(header(files.encoders[name])) and {one for one, _ in header(path).values()} == {kind}
        before, after = load_file(str(files.encoders[name])), load_file(str(path))
        assert differing({key: value.to(dtype) for key, value in before.items()}, after) == set(before)
    assert set(header(tmp_path / "out.safetensors")) == set(header(files.checkpoint))
    sizes = sum(path.stat().st_size for path in tmp_path.glob("out*"))
    assert abs(sizes - arch.saved_bytes(modules, dtype, "safetensors")) < 1000  # but for the metadata
    again = opened(tmp_path / "out.safetensors", **{name: str(tmp_path / f"out_{name}.safetensors") for name in ENCODERS},
                   **{f"{name}_tokenizer": str(path) for name, path in files.tokenizers.items()})
    assert again.load_text_encoders(ENCODERS, CPU, F32)  # strictly


def test_save_clip_and_save_t5xxl_put_encoders_inside(tmp_path):
    files = make_sd3_files(tmp_path)
    whole = make_sd3_files(tmp_path / "whole", embedded=ENCODERS)
    arch = opened(files.checkpoint, save_clip=True, save_t5xxl=True, train_text_encoder=True)
    arch.export(changed(arch, "clip_l"), tmp_path / "out.safetensors", F32, {}, "safetensors")
    assert set(header(tmp_path / "out.safetensors")) == set(header(whole.checkpoint)) and len(list(tmp_path.glob("out*"))) == 1
    after = load_file(str(tmp_path / "out.safetensors"))
    for name in ENCODERS:
        own = {key: after[f"text_encoders.{name}.transformer.{key}"] for key in load_file(str(files.encoders[name]))}
        assert bool(differing(load_file(str(files.encoders[name])), own)) == (name == "clip_l")
    tokenizers = {f"{name}_tokenizer": str(path) for name, path in files.tokenizers.items()}
    assert all(opened(tmp_path / "out.safetensors", **tokenizers).parts.origins[name].startswith("inside ") for name in ENCODERS)
    only = opened(files.checkpoint, save_t5xxl=True)
    only.export({DENOISER: only.load_denoiser(CPU, F32)}, tmp_path / "t5.safetensors", F32, {}, "safetensors")
    inside = {name.split(".")[1] for name in header(tmp_path / "t5.safetensors") if name.startswith("text_encoders.")}
    assert inside == {"t5xxl"}


def test_a_bare_file_stays_bare_until_something_joins_it(tmp_path):
    files = make_sd3_files(tmp_path, prefix="", with_vae=False)
    vae = make_sd3_files(tmp_path / "vae").checkpoint
    arch = opened(files.checkpoint, vae=vae)
    arch.export({DENOISER: arch.load_denoiser(CPU, F32)}, tmp_path / "out.safetensors", F32, {}, "safetensors")
    assert header(tmp_path / "out.safetensors") == header(files.checkpoint)
    arch = opened(files.checkpoint, vae=vae, save_clip=True)
    arch.export({DENOISER: arch.load_denoiser(CPU, F32)}, tmp_path / "joined.safetensors", F32, {}, "safetensors")
    prefixes = {name.split(".")[0] for name in header(tmp_path / "joined.safetensors")}
    assert prefixes == {"model", "text_encoders"}
    tokenizers = {f"{name}_tokenizer": str(path) for name, path in files.tokenizers.items()}
    again = opened(tmp_path / "joined.safetensors", vae=vae, t5xxl=str(files.encoders["t5xxl"]), **tokenizers)
    assert again.load_denoiser(CPU, F32)


def test_what_did_not_train_is_never_widened(tmp_path):
    """fp16 parts of a float32 save stay fp16: wider they would only be larger. Narrower ones are cast."""
    files = make_sd3_files(tmp_path, embedded=("clip_l", "t5xxl"), encoder_dtype=torch.float16)
    arch = opened(files.checkpoint)
    modules = {DENOISER: arch.load_denoiser(CPU, F32)}
    arch.export(modules, tmp_path / "out.safetensors", F32, {}, "safetensors")
    found = {name: kind for name, (kind, _) in header(tmp_path / "out.safetensors").items()}
    assert {kind for name, kind in found.items() if name.startswith("text_encoders.")} == {"F16"}
    assert {kind for name, kind in found.items() if not name.startswith("text_encoders.")} == {"F32"}
    arch.export(modules, tmp_path / "half.safetensors", torch.bfloat16, {}, "safetensors")
    assert {kind for kind, _ in header(tmp_path / "half.safetensors").values()} == {"BF16"}


def test_a_part_that_was_named_replaces_the_embedded_one(tmp_path):
    files = make_sd3_files(tmp_path / "a", embedded=ENCODERS)
    others = make_sd3_files(tmp_path / "b", seed=5)
    arch = opened(files.checkpoint, vae=others.checkpoint, t5xxl=str(others.encoders["t5xxl"]))
    arch.export({DENOISER: arch.load_denoiser(CPU, F32)}, tmp_path / "out.safetensors", F32, {}, "safetensors")
    assert header(tmp_path / "out.safetensors") == header(files.checkpoint)
    before, after, given = (load_file(str(path)) for path in (files.checkpoint, tmp_path / "out.safetensors", others.checkpoint))
    assert {name.split(".")[1] for name in differing(before, after) if name.startswith("text")} == {"t5xxl"}
    assert all(torch.equal(after[name], given[name]) for name in given if name.startswith("first_stage_model."))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_are_opened_by_diffusers_and_here_and_give_the_same_numbers(tmp_path, variant):
    from diffusers import StableDiffusion3Pipeline

    files = make_sd3_files(tmp_path, variant)
    arch = opened(files.checkpoint, train_text_encoder=True)
    modules = changed(arch, "clip_l", "clip_g")
    arch.export(modules, tmp_path / "folder", F32, {"modelspec.title": "x"}, "diffusers_safetensors")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder")
    theirs = pipeline.transformer.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in modules[DENOISER].state_dict().items())
    again = opened(tmp_path / "folder")
    assert again.save_format == "diffusers_safetensors" and again.file.variant == variant
    with torch.no_grad():
        text = again.encode_text(again.load_text_encoders(ENCODERS, CPU, F32), ["a cat"])
        t5 = arch.load_text_encoders(("t5xxl",), CPU, F32)
        trained = arch.encode_text(t5.__class__({**modules, **t5.modules}, t5.tokenizers), ["a cat"])
    assert text.keys() == trained.keys() and all(torch.allclose(text[name], trained[name], atol=1e-6) for name in text)
    states, _, pooled, _ = pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=False, device="cpu",
                                                  max_sequence_length=64)
    torch.testing.assert_close(pooled[0, -128:], text["clip_g_pooled"][0], atol=2e-6, rtol=1e-5)
    assert abs(size_of(tmp_path / "folder") - arch.saved_bytes(modules, F32, "diffusers_safetensors")) < 300_000  # tokenizers


def test_a_folder_becomes_a_single_file_and_back(tmp_path):
    files = make_sd3_files(tmp_path)
    arch = opened(files.checkpoint)
    modules = {DENOISER: arch.load_denoiser(CPU, F32)}
    arch.export(modules, tmp_path / "folder", F32, {}, "diffusers_safetensors")
    folder = opened(tmp_path / "folder")
    folder.export({DENOISER: folder.load_denoiser(CPU, F32)}, tmp_path / "out.safetensors", F32, {}, "safetensors")
    before, after = load_file(str(files.checkpoint)), load_file(str(tmp_path / "out.safetensors"))
    assert before.keys() == after.keys() and not differing(before, after)


def test_retention_removes_the_encoders_with_their_model_and_inputs_are_protected(tmp_path):
    written = []

    def write(path, _facts, then, at_once=False):
        for name in (path, path.with_name(f"{path.stem}_clip_l.safetensors")):
            name.write_bytes(b"x")
            written.append(name.name)
        then()

    saver = Saver(tmp_path, "run", total_epochs=9, write=write, every_n_steps=1, last_n_steps=1)
    for step in (1, 2, 3):
        saver.after_step(step, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"run-step0000000{step}{part}.safetensors" for step in (2, 3) for part in ("", "_clip_l")]
    assert len(written) == 6
    inputs = [tmp_path / "run_clip_l.safetensors", tmp_path / "run-step00000002_t5xxl.safetensors", tmp_path / "run_other.safetensors"]
    assert endangered(tmp_path, "run", inputs) == sorted(inputs[:2])


def test_sizes_count_every_file(tmp_path):
    assert file_bytes([]) > 0
    files = make_sd3_files(tmp_path)
    arch = opened(files.checkpoint)
    modules = {DENOISER: arch.load_denoiser(CPU, F32)}
    both = opened(files.checkpoint, save_clip=True).saved_bytes(modules, F32, "safetensors")
    clips = sum(files.encoders[name].stat().st_size for name in ("clip_l", "clip_g"))
    assert both - arch.saved_bytes(modules, F32, "safetensors") == pytest.approx(clips, rel=0.02)
