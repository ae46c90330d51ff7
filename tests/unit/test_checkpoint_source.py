"""Names and bytes: one file or many, every number format, views, identity, scaled fp8."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoint import source as source_module
from library.checkpoint.source import open_source, staging_buffer
from library.errors import UserError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def values(dtype, shape=(7, 5)):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 8).abs().to(dtype)


def same(first, second) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(
        first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))


def shards(folder, extra=None, index=True):
    """Three tensors in two shards, as transformers writes them."""
    parts = [{"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.arange(4.0)}]
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for name, tensors in zip(names, parts):
        save_file(tensors, str(folder / name))
    if index:
        table = {key: name for name, tensors in zip(names, parts) for key in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table | (extra or {})}))
    return names


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_every_format_is_read_bit_for_bit(dtype, tmp_path):
    tensors = {"x": values(dtype), "scalar": values(dtype, ()), "none": values(dtype, (0, 3))}
    save_file(tensors, str(tmp_path / "x.safetensors"))
    source = open_source(tmp_path / "x.safetensors")
    assert all(same(source.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_equal_torch_in_any_chunk(dtype, out, tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "STAGING_BYTES", 24)  # many chunks, the last one short
    save_file({"x": values(dtype)}, str(tmp_path / "x.safetensors"))
    assert same(open_source(tmp_path / "x.safetensors").read("x", out), values(dtype).to(out))


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_integers_are_not_cast(dtype, tmp_path):
    save_file({"x": values(dtype)}, str(tmp_path / "x.safetensors"))
    assert same(open_source(tmp_path / "x.safetensors").read("x", torch.bfloat16), values(dtype))


def test_a_run_of_elements(tmp_path):
    save_file({"x": torch.arange(20.0)}, str(tmp_path / "x.safetensors"))
    out = torch.empty(4, dtype=torch.float64)
    open_source(tmp_path / "x.safetensors").read_into("x", out, start=5, staging=staging_buffer()[:8])
    assert out.tolist() == [5.0, 6.0, 7.0, 8.0]


def test_views_strip_the_prefix(tmp_path):
    tensors = {"vae.a": torch.ones(2), "vae.b.c": torch.zeros(1), "other": torch.ones(1)}
    save_file(tensors, str(tmp_path / "x.safetensors"), {"k": "v"})
    view = open_source(tmp_path / "x.safetensors").view("vae.")
    assert set(view.tensors) == {"a", "b.c"} and "a" in view and "other" not in view
    assert view.read("b.c").tolist() == [0.0] and view.metadata == {"k": "v"} and view.nbytes == 12
    assert not open_source(tmp_path / "x.safetensors").view("clip.").tensors


@pytest.mark.parametrize("index", [True, False])
def test_shards_by_folder(index, tmp_path):
    shards(tmp_path, index=index)
    source = open_source(tmp_path)
    assert set(source.tensors) == {"a", "b", "c"} and len(source.files) == 2
    assert source.read("c").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_shards_by_index(tmp_path):
    shards(tmp_path)
    assert set(open_source(tmp_path / "model.safetensors.index.json").tensors) == {"a", "b", "c"}


def test_plain_name_wins_over_variants(tmp_path):
    save_file({"x": torch.ones(1)}, str(tmp_path / "diffusion_pytorch_model.safetensors"))
    save_file({"x": torch.zeros(1)}, str(tmp_path / "diffusion_pytorch_model.fp16.safetensors"))
    assert open_source(tmp_path).read("x").tolist() == [1.0]


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_that_are_no_set_of_weights(tmp_path):
    assert "no .safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "only pytorch_model.bin" in refusal(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, str(tmp_path / f"{name}.safetensors"))
    assert "several safetensors files: a.safetensors, b.safetensors" in refusal(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    assert "give one of its parts: vae" in refusal(tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model_index.json").write_text("{}")
    assert "without the folders of its models; download the whole of it" in refusal(tmp_path / "alone")


def test_incomplete_shards(tmp_path):
    names = shards(tmp_path, index=False)
    assert "one shard of 2" in refusal(tmp_path / names[0])
    (tmp_path / names[0]).unlink()
    assert "shards [1] of 2 are missing" in refusal(tmp_path)


def test_index_mistakes(tmp_path):
    names = shards(tmp_path, extra={"d": "model-00001-of-00002.safetensors"})
    assert "1 tensors of the index are not in their shards, first 'd'" in refusal(tmp_path)
    shards(tmp_path, extra={"d": "../elsewhere.safetensors"})
    assert "../elsewhere.safetensors" in refusal(tmp_path)
    shards(tmp_path)
    (tmp_path / names[1]).unlink()
    assert names[1] in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[]", '{"weight_map": 3}', '{"weight_map": {}}'):
        index.write_text(text)
        assert str(index) in refusal(index)
    assert "not found" in refusal(tmp_path / "other.index.json")


def test_the_same_tensor_in_two_shards(tmp_path):
    for number in (1, 2):
        save_file({"a": torch.ones(1)}, str(tmp_path / f"model-{number:05d}-of-00002.safetensors"))
    assert "'a' is in two shards" in refusal(tmp_path)


def test_identity_is_of_the_content(tmp_path):
    tensors = {"p.big": torch.randn(5000), "p.small": torch.ones(3)}
    save_file(tensors, str(tmp_path / "1.safetensors"), {"title": "one"})
    save_file(dict(reversed(tensors.items())), str(tmp_path / "2.safetensors"))
    save_file({name.removeprefix("p."): tensor for name, tensor in tensors.items()}, str(tmp_path / "bare.safetensors"))
    first = open_source(tmp_path / "1.safetensors")
    assert first.identity() == first.identity() == open_source(tmp_path / "2.safetensors").identity()
    assert first.view("p.").identity() == open_source(tmp_path / "bare.safetensors").identity() != first.identity()
    for number, change in enumerate((("p.small", tensors["p.small"] * 2), ("p.big", tensors["p.big"] * 1.001),
                                     ("p.big", tensors["p.big"].reshape(50, 100)),
                                     ("p.big", tensors["p.big"].view(torch.int32)))):
        save_file(tensors | dict([change]), str(tmp_path / f"c{number}.safetensors"))
        assert open_source(tmp_path / f"c{number}.safetensors").identity() != first.identity()


def scaled(path, prefix="", scale_name="scale_weight", scale=0.5):
    weight = values(torch.float8_e4m3fn)
    save_file({f"{prefix}l.weight": weight, f"{prefix}l.{scale_name}": torch.as_tensor(scale), f"{prefix}l.bias": torch.ones(7),
               f"{prefix}scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, str(path))
    return weight


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_multiplied_and_its_helpers_hidden(prefix, scale_name, tmp_path):
    weight = scaled(tmp_path / "x.safetensors", prefix, scale_name)
    source = open_source(tmp_path / "x.safetensors").view(prefix)
    assert set(source.tensors) == {"l.weight", "l.bias"}
    assert same(source.read("l.weight", torch.bfloat16), (weight.float() * 0.5).bfloat16())
    assert same(source.read("l.weight"), source.read("l.weight", torch.bfloat16))
    assert same(source.read("l.weight", torch.float32), weight.float() * 0.5)
    assert source.read("l.bias").tolist() == [1.0] * 7


def test_scale_is_part_of_the_identity(tmp_path):
    for number, scale in enumerate((0.5, 0.25)):
        scaled(tmp_path / f"{number}.safetensors", scale=scale)
    assert open_source(tmp_path / "0.safetensors").identity() != open_source(tmp_path / "1.safetensors").identity()


def test_tables_of_scales_are_refused(tmp_path):
    scaled(tmp_path / "x.safetensors", scale=[0.5, 0.25])
    with pytest.raises(UserError, match="table of scales"):
        open_source(tmp_path / "x.safetensors").read("l.weight")


def test_marked_but_plain_fp8(tmp_path):
    save_file({"w": values(torch.float8_e4m3fn), "scaled_fp8": torch.empty(0)}, str(tmp_path / "x.safetensors"))
    assert set(open_source(tmp_path / "x.safetensors").tensors) == {"w"}


def test_a_file_replaced_during_the_run_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, str(path))
    source = open_source(path)
    save_file({"x": torch.ones(4)}, str(tmp_path / "new.safetensors"))
    os.utime(tmp_path / "new.safetensors", ns=(1, 1))
    os.replace(tmp_path / "new.safetensors", path)
    for use in (lambda: source.read("x"), source.identity):
        with pytest.raises(UserError, match="changed or removed"):
            use()
    path.unlink()
    with pytest.raises(UserError, match="changed or removed"):
        source.read("x")
