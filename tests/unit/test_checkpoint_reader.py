"""Weights into modules: strict, tied, buffers kept, formats as asked."""

import gc
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.checkpoint.clip_keys import CLIP
from library.checkpoint.keymap import Drop, Fuse, KeyMap, Rename, SwapHalves, module_shapes
from library.checkpoint.reader import build_on_meta, load_module, open_source, parameters_on_meta
from library.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class Block(nn.Module):
    """Everything a module may hold: fused halves, tied weights, buffers in and out of files."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 2)
        self.mod = nn.Linear(3, 6, bias=False)
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("frequencies", 1.0 / torch.arange(1, 5), persistent=False)


MAP = KeyMap((Fuse("qk.{leaf}", ("q.{leaf}", "k.{leaf}")), SwapHalves("mod.weight", "mod.weight"), Rename("{rest}", "{rest}"),
              Drop("extra.{rest}")))


def bound():
    return MAP.bind(module_shapes(Block()))


def weights(**changes):
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in bound().original_shapes().items()}
    tensors["count"] = torch.tensor([3, 4])
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


def saved(tmp_path, **changes):
    save_file(weights(**changes), str(tmp_path / "x.safetensors"))
    return open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_load(dtype, device, tmp_path):
    source, done = saved(tmp_path), []
    module = load_module(build_on_meta(Block), source, bound(), dtype=dtype, device=device, place="block",
                         on_progress=lambda *counts: done.append(counts))
    file = {name: tensor.to(device) for name, tensor in weights().items()}
    cast = dtype or torch.float32
    assert torch.equal(module.q.weight, file["qk.weight"][:4].to(cast))
    assert torch.equal(module.k.bias, file["qk.bias"][4:].to(cast))
    assert torch.equal(module.mod.weight, torch.cat([file["mod.weight"][3:], file["mod.weight"][:3]]).to(cast))
    assert module.head.weight is module.embed.weight and torch.equal(module.embed.weight, file["embed.weight"].to(cast))
    assert torch.equal(module.count, file["count"]) and module.count.dtype == torch.int64  # integers are never cast
    assert torch.equal(module.mean, file["mean"].to(cast))
    # no file holds these: computed by the constructor, in its own precision, on the right device
    assert torch.equal(module.frequencies.cpu(), 1.0 / torch.arange(1, 5)) and module.frequencies.dtype == torch.float32
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {device}
    assert not module.frozen.requires_grad and module.q.weight.requires_grad and module.q.weight.is_leaf
    assert done[-1] == (source.nbytes, source.nbytes)


def test_build_on_meta():
    module = build_on_meta(lambda: nn.Sequential(*(nn.Linear(1 << 13, 1 << 13) for _ in range(64))))  # 16 GiB
    assert all(parameter.is_meta and parameter.requires_grad for parameter in module.parameters())
    assert not nn.Linear(2, 2).weight.is_meta  # and leaves nothing behind
    with pytest.raises(ZeroDivisionError):
        build_on_meta(lambda: 1 / 0)
    assert not nn.Linear(2, 2).weight.is_meta


def test_clip_positions_survive(tmp_path):
    """transformers keeps the count 0..76 in a buffer that files lack: garbage there would scramble every prompt."""
    config = CLIPTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                            bos_token_id=0, eos_token_id=1)
    shapes = CLIP.bind(module_shapes(CLIPTextModel(config)))
    # some files hold the count, some the projection: neither is an error
    extras = {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.ones(32, 32)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.original_shapes().items()}
    save_file(tensors | extras, str(tmp_path / "x.safetensors"))
    module = load_module(build_on_meta(lambda: CLIPTextModel(config)), open_source(tmp_path / "x.safetensors"), shapes,
                         dtype=torch.bfloat16, place="clip_l")
    positions = [buffer for name, buffer in module.named_buffers() if name.endswith("position_ids")]
    assert len(positions) == 1 and positions[0].tolist() == [list(range(77))]


def test_meta_device_modules_load_when_every_buffer_is_in_the_file(tmp_path):
    with torch.device("meta"):
        module = nn.BatchNorm1d(4)
    save_file({name: tensor + 2 for name, tensor in nn.BatchNorm1d(4).state_dict().items()}, str(tmp_path / "x.safetensors"))
    load_module(module, open_source(tmp_path / "x.safetensors"), None, dtype=None, place="norm")
    assert module.running_var.tolist() == [3.0] * 4 and module.num_batches_tracked.item() == 2


def test_meta_device_modules_with_computed_buffers_are_refused(tmp_path):
    with torch.device("meta"):
        module = Block()
    with pytest.raises(AssertionError, match="frequencies.*build_on_meta"):
        load_module(module, saved(tmp_path), bound(), dtype=None, place="block")


def test_own_names_need_no_map(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    save_file(module.state_dict(), str(tmp_path / "x.safetensors"))
    with parameters_on_meta():
        again = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    load_module(again, open_source(tmp_path / "x.safetensors"), None, dtype=None, place="layers")
    assert all(torch.equal(first, second) for first, second in zip(module.parameters(), again.parameters()))
    assert not again.training


def test_counts_stored_as_floats_become_counts(tmp_path):
    source = saved(tmp_path, count=torch.tensor([3.0, 4.0]).half())
    module = load_module(build_on_meta(Block), source, bound(), dtype=torch.bfloat16, place="block")
    assert module.count.tolist() == [3, 4] and module.count.dtype == torch.int64


def test_known_extras_are_left_out(tmp_path):
    load_module(build_on_meta(Block), saved(tmp_path, **{"extra.thing": torch.ones(1)}), bound(), dtype=None, place="block")


MISFITS = {
    "missing": ({"qk.weight": None, "embed.weight": None}, ["2 tensors are missing", "'qk.weight'"]),
    "unknown": ({"other.name": torch.ones(1)}, ["1 name is unknown", "'other.name'"]),
    "misspelt": ({"embed.weight": None, "embed.wieght": torch.ones(5, 3)},
                 ["missing, first 'embed.weight' (did you mean 'embed.wieght'?)",
                  "'embed.wieght' (did you mean 'embed.weight'?)"]),
    "shape": ({"embed.weight": torch.ones(6, 3)}, ["1 tensor has another shape", "[6, 3] in the file, [5, 3] in the model"]),
    "transposed": ({"mod.weight": torch.ones(3, 6)}, ["[3, 6] in the file, [6, 3] in the model"]),
    "all at once": ({"qk.bias": None, "zzz": torch.ones(1), "mean": torch.ones(2)}, ["missing", "unknown", "another shape"]),
    "quantised": ({"mod.weight": torch.ones(6, 3, dtype=torch.uint8)}, ["U8", "quantised"]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_one_line(name, tmp_path):
    changes, words = MISFITS[name]
    with pytest.raises(UserError) as caught:
        load_module(build_on_meta(Block), saved(tmp_path, **changes), bound(), dtype=None, place="block")
    line = str(caught.value)
    assert all(word in line for word in words) and "\n" not in line, line
    assert "block" in line and str(tmp_path / "x.safetensors") in line


def test_scaled_fp8_into_a_module(tmp_path):
    weight = torch.randn(4, 3).to(torch.float8_e4m3fn)
    save_file({"0.weight": weight, "0.bias": torch.ones(4), "0.scale_weight": torch.tensor(0.125)},
              str(tmp_path / "x.safetensors"))
    module = load_module(build_on_meta(lambda: nn.Sequential(nn.Linear(3, 4))), open_source(tmp_path / "x.safetensors"), None,
                         dtype=torch.float32, place="layers")
    assert torch.equal(module[0].weight, weight.float() * 0.125)


def test_loading_makes_no_bytes_objects(tmp_path):
    """Data go from the file into the tensors themselves. (torch's own memory is out of sight here: benchmarks/ measure it.)"""
    save_file({f"{index}.weight": torch.ones(256, 256) for index in range(8)}, str(tmp_path / "x.safetensors"))
    module = build_on_meta(lambda: nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))))
    gc.collect()
    tracemalloc.start()
    load_module(module, open_source(tmp_path / "x.safetensors"), None, dtype=torch.float32, place="layers")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 256 * 256 * 4  # less than one of the eight
