"""One choice of attention for every model: the same numbers whichever kernel computes them, and no masks where nothing is hidden.

flash-attn itself needs a CUDA device; a stand-in with its two functions, computed by torch, takes its place.
"""

import copy
import logging
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers import (FluxTransformer2DModel, Lumina2Transformer2DModel, LuminaNextDiT2DModel, SD3Transformer2DModel,
                       UNet2DConditionModel)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from library.architectures import attention
from library.architectures.attention import FlashKernel, Router, TorchFlashKernel, TorchKernel, key_mask, route
from library.architectures.lumina_models import tie_queries
from library.memory.recompute import Recompute

CALLS: list[str] = []


def dense(query, key, value, softmax_scale=None):
    """(B, L, H, D) each, as flash_attn_func."""
    CALLS.append("dense")
    states = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), scale=softmax_scale)
    return states.transpose(1, 2)


def varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, softmax_scale=None):
    """(all tokens, H, D) each, as flash_attn_varlen_func."""
    CALLS.append("varlen")
    assert starts_q.dtype == starts_k.dtype == torch.int32 and starts_k[-1] == len(key) and starts_q[-1] == len(query)
    assert longest_q == int(starts_q.diff().max()) and longest_k == int(starts_k.diff().max())
    bounds = zip(starts_q.tolist(), starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:], strict=False)
    parts = [dense(query[None, a:b], key[None, c:d], value[None, c:d], softmax_scale)[0] for a, b, c, d in bounds]
    return torch.cat(parts)


def stand_in():
    return FlashKernel(dense, varlen, takes=lambda tensor: True)


KERNELS = {"torch": TorchKernel, "torch-flash": TorchFlashKernel, "flash-attn": stand_in}


@pytest.fixture(autouse=True)
def fresh_calls():
    CALLS.clear()


def flux():
    module = FluxTransformer2DModel(in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
                                    joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4))
    mask = torch.ones(2, 3 + 4, dtype=torch.bool)
    mask[1, 1:3] = False
    inputs = {"hidden_states": torch.randn(2, 4, 8), "encoder_hidden_states": torch.randn(2, 3, 12), "timestep": torch.rand(2),
              "pooled_projections": torch.randn(2, 10), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3),
              "joint_attention_kwargs": {"attention_mask": mask}}
    return module, inputs, "varlen"


def sdxl():
    module = UNet2DConditionModel(block_out_channels=(4, 8), layers_per_block=1, attention_head_dim=2, norm_num_groups=2,
                                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=6,
                                  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    return module, {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5]),
                    "encoder_hidden_states": torch.randn(2, 5, 6)}, "dense"


def sd3():
    module = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
                                   num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=6,
                                   pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8)
    return module, {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 6),
                    "pooled_projections": torch.randn(2, 10), "timestep": torch.rand(2)}, "dense"


def text(width):
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    return torch.randn(2, 5, width), mask


def lumina_2():
    module = Lumina2Transformer2DModel(hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
                                       axes_dim_rope=(4, 4, 4), cap_feat_dim=20, in_channels=4)
    states, mask = text(20)
    return module, {"hidden_states": torch.randn(2, 4, 8, 4), "timestep": torch.rand(2), "encoder_hidden_states": states,
                    "encoder_attention_mask": mask}, "varlen"


def lumina_next():
    module = tie_queries(LuminaNextDiT2DModel(hidden_size=24, num_layers=2, num_attention_heads=2, num_kv_heads=1,
                                              cross_attention_dim=20))
    torch.nn.init.zeros_(module.pad_token)
    for layer in module.layers:
        torch.nn.init.ones_(layer.gate)
    states, mask = text(20)
    return module, {"hidden_states": torch.randn(2, 4, 8, 4), "timestep": torch.rand(2), "encoder_hidden_states": states,
                    "encoder_mask": mask, "cross_attention_kwargs": {},
                    "image_rotary_emb": get_2d_rotary_pos_embed_lumina(12, 4, 2)}, "varlen"


def run(module, inputs):
    module.zero_grad()
    output = module(**inputs, return_dict=False)[0]
    output.square().mean().backward()
    return output.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model", [flux, sdxl, sd3, lumina_2, lumina_next], ids=lambda model: model.__name__)
def test_outputs_and_gradients_are_the_models_own(model, kernel, monkeypatch):
    torch.manual_seed(0)
    module, inputs, called = model()
    names = list(module.state_dict())
    expected, gradients = run(module, inputs)
    monkeypatch.setattr(attention, "flash_kernel", KERNELS[kernel])
    assert route(module, "torch" if kernel == "torch" else "flash") is module
    output, routed = run(module, inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert routed.keys() == gradients.keys() and list(module.state_dict()) == names
    for name, gradient in gradients.items():
        torch.testing.assert_close(routed[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9, msg=name)
    assert (called in CALLS) == (kernel == "flash-attn")
    Recompute([block for name in ("layers", "transformer_blocks") for block in getattr(module, name, [])])
    CALLS.clear()
    again, _ = run(module, inputs)
    torch.testing.assert_close(again, output)


def attended(batch=2, heads=3, queries=6, keys=5, width=8):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, heads, length, width, generator=generator) for length in (queries, keys, keys))


@pytest.mark.parametrize("kernel", KERNELS)
def test_hidden_keys_may_stand_anywhere(kernel):
    query, key, value = attended()
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    router = Router(KERNELS[kernel]())
    for shown in (mask[:, None, None], mask[:, None, None].expand(-1, 3, 6, -1)):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=0.3)
        with router:
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=0.3)
        torch.testing.assert_close(result, expected)
    assert len(router.kept) == 1 or router.kept[0].mask.stride() != router.kept[1].mask.stride()


@pytest.mark.parametrize("more", [
    {"is_causal": True}, {"attn_mask": torch.zeros(2, 1, 6, 5)}, {"attn_mask": torch.ones(6, 5, dtype=torch.bool).tril()},
    {"attn_mask": torch.ones(2, 3, 6, 5, dtype=torch.bool).tril()}])
def test_what_is_more_than_hiding_keys_is_left_to_torch(more):
    query, key, value = attended()
    expected = F.scaled_dot_product_attention(query, key, value, **more)
    with Router(stand_in()):
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, **more), expected)
    assert not CALLS


def test_only_attention_is_answered_differently_and_only_while_it_is_active():
    query, key, value = attended()
    with Router(stand_in()):
        assert torch.equal(torch.relu(query), F.relu(query)) and not CALLS
        F.scaled_dot_product_attention(query, key, value)
        assert CALLS == ["dense"]
    F.scaled_dot_product_attention(query, key, value)
    assert CALLS == ["dense"]


class Seen(TorchKernel):
    """Notes whether keys were hidden."""

    def __init__(self):
        self.hidden = []

    def __call__(self, call):
        self.hidden.append(call.keys is not None)
        return super().__call__(call)


def test_a_mask_that_hides_nothing_is_left_out(monkeypatch):
    """Both models hand such masks on: of pictures always, of texts when all of a batch are equally long."""
    for model in (lumina_2, lumina_next):
        module, inputs, _ = model()
        kernel = Seen()
        monkeypatch.setattr(attention, "TorchKernel", lambda chosen=kernel: chosen)
        route(module, "torch")
        module(**inputs)
        assert any(kernel.hidden)
        kernel.hidden.clear()
        module(**{name: torch.ones_like(value) if name.endswith("mask") else value for name, value in inputs.items()})
        assert kernel.hidden and not any(kernel.hidden)


def test_a_mask_is_looked_at_once(monkeypatch):
    """Looking makes the processor wait for the device. Another mask at the same place, or a changed one, is looked at again."""
    looks = []
    original = attention.Keys.counts.func
    counted = attention.cached_property(lambda self: looks.append(1) or original(self))
    counted.__set_name__(attention.Keys, "counts")
    monkeypatch.setattr(attention.Keys, "counts", counted)
    router, (query, key, value) = Router(TorchKernel()), attended()
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    with router:
        for _ in range(3):
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask.view(2, 1, 1, -1))
        assert len(looks) == 1
        mask[0, 0] = False
        changed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.view(2, 1, 1, -1))
    assert len(looks) == 2
    assert torch.equal(changed, F.scaled_dot_product_attention(query, key, value, attn_mask=mask.view(2, 1, 1, -1)))


def test_masks_of_keys_are_known_by_shape_or_by_stride():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert key_mask(mask[:, None, None], 2).shape == (2, 5)
    assert key_mask(mask[:, None, None].expand(2, 3, 6, 5), 2).shape == (2, 5)
    assert key_mask(torch.ones(2, 1, 6, 5, dtype=torch.bool), 2) is None  # its rows may differ
    assert key_mask(mask[:1, None, None], 2) is None and key_mask(mask[:, None, None].float(), 2) is None


def test_a_copy_of_a_routed_module_runs_on_its_own_weights():
    """As averages of weights are kept."""
    module, inputs, _ = lumina_2()
    route(module, "torch")
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(**inputs).sample.abs().max() == 0 and module(**inputs).sample.abs().max() > 0


def test_the_package_is_used_where_it_is_installed(monkeypatch, caplog):
    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func, package.__version__ = dense, varlen, "9.9"
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with caplog.at_level(logging.INFO):
        kernel = attention.flash_kernel()
    assert isinstance(kernel, FlashKernel) and kernel.varlen is varlen and "flash-attn 9.9" in caplog.text
    query, key, value = attended()
    with Router(kernel):  # float32 on a CPU: nothing for it
        F.scaled_dot_product_attention(query, key, value)
    assert not CALLS


@pytest.mark.parametrize("broken, words", [(None, "is not installed"), (types.ModuleType("flash_attn"), "cannot be used")])
def test_torch_takes_its_place_with_a_line_in_the_log(monkeypatch, caplog, broken, words):
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    with caplog.at_level(logging.INFO):
        assert isinstance(attention.flash_kernel(), TorchFlashKernel)
    assert [words in record.message for record in caplog.records] == [True]


def test_autocast_reaches_the_package():
    seen = []
    kernel = FlashKernel(lambda query, key, value, softmax_scale: seen.append({query.dtype, key.dtype, value.dtype}) or query,
                         varlen, takes=lambda tensor: tensor.dtype == torch.bfloat16)
    query, key, value = attended(queries=5)
    with torch.autocast("cpu", dtype=torch.bfloat16), Router(kernel):
        F.scaled_dot_product_attention(query, key, value.bfloat16())
    assert seen == [{torch.bfloat16}]


def test_routing_again_replaces_the_first_choice():
    module, inputs, _ = lumina_2()
    expected = module(**inputs).sample
    route(route(module, "flash"), "torch")
    assert all(isinstance(part.forward.router.kernel, TorchKernel) for part in module.modules() if hasattr(part, "processor"))
    torch.testing.assert_close(module(**inputs).sample, expected)
    assert math.isfinite(expected.sum().item())
