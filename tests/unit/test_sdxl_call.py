"""How SDXL's U-Net is called; its blocks in the order they run, and in the 23 groups of --block_lr."""

import re

import pytest
import torch

from library.architectures.sdxl_call import BLOCK_GROUPS, block_groups, blocks, predict
from library.architectures.sdxl_models import load_unet
from library.architectures.sdxl_parts import describe
from library.checkpoint.export import export_module
from library.checkpoint.keymap import module_shapes
from library.checkpoint.sdxl_keys import UNET, UNET_PREFIX
from library.checkpoint.source import open_source
from library.memory.recompute import Recompute
from tests.tiny_sdxl import make_sdxl_files

GEOMETRY = torch.tensor([[600, 800, 3, 5, 64, 96], [64, 96, 0, 0, 64, 96]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_sdxl_files(tmp_path_factory.mktemp("sdxl")).checkpoint


@pytest.fixture
def unet(checkpoint):
    return load_unet(describe(open_source(checkpoint)), torch.float32)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = {"clip_l": torch.randn(2, 77, 64, generator=generator), "clip_g": torch.randn(2, 77, 64, generator=generator),
            "pooled": torch.randn(2, 64, generator=generator)}
    return torch.randn(2, 4, 8, 12, generator=generator), torch.tensor([7, 980]), text


def test_each_input_counts(unet):
    x_t, level, text = inputs()
    output = predict(unet, x_t, level, text, GEOMETRY)
    assert output.shape == x_t.shape and output.dtype == torch.float32
    changed = [
        predict(unet, x_t, level + 1, text, GEOMETRY),
        predict(unet, x_t, level, text | {"clip_g": text["clip_g"] + 0.1}, GEOMETRY),
        predict(unet, x_t, level, text | {"pooled": text["pooled"] + 0.1}, GEOMETRY),
        *(predict(unet, x_t, level, text, GEOMETRY + 200 * torch.eye(6, dtype=torch.int64)[column]) for column in range(6)),
    ]
    assert not any(torch.allclose(other, output, atol=1e-5) for other in changed)


def test_sizes_reach_the_model_in_float32(unet):
    """In bfloat16 a height of 1,025 pixels would be one of 1,024."""
    seen = []
    unet.add_time_proj.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    x_t, level, text = inputs()
    predict(unet.to(torch.bfloat16), x_t, level, text, GEOMETRY + 1025)
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == (GEOMETRY + 1025).flatten().tolist()


def test_a_batch_is_its_samples(unet):
    x_t, level, text = inputs()
    together = predict(unet, x_t, level, text, GEOMETRY)
    for row in range(2):
        one = slice(row, row + 1)
        alone = predict(unet, x_t[one], level[one], {name: value[one] for name, value in text.items()}, GEOMETRY[one])
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-4)


def test_blocks_are_listed_in_the_order_they_run(unet):
    listed, ran = blocks(unet), []
    for block in listed:
        block.register_forward_hook(lambda module, _args, _output: ran.append(module))
    x_t, level, text = inputs()
    predict(unet, x_t, level, text, GEOMETRY)
    assert [id(block) for block in ran] == [id(block) for block in listed]
    kinds = {type(module) for module in listed}
    assert {id(module) for module in unet.modules() if type(module) in kinds} == {id(module) for module in listed}


def test_recompute_changes_no_gradient(unet):
    unet.requires_grad_(True)
    x_t, level, text = inputs()

    def gradients():
        unet.zero_grad()
        predict(unet, x_t, level, text, GEOMETRY).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    plain = gradients()
    Recompute(blocks(unet))
    again = gradients()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


# --- the 23 groups ----------------------------------------------------------------------------------------------------

# What the dialect says each number is, in the names of the original file
GROUPS = {0: r"(time_embed|label_emb)\.", **{1 + index: rf"input_blocks\.{index}\." for index in range(9)},
          **{10 + index: rf"middle_block\.{index}\." for index in range(3)},
          **{13 + index: rf"output_blocks\.{index}\." for index in range(9)}, 22: r"out\."}


def test_groups_hold_the_blocks_of_the_original_file(unet, checkpoint):
    source = open_source(checkpoint).view(UNET_PREFIX)
    groups = block_groups(unet)
    assert len(groups) == BLOCK_GROUPS == len(GROUPS)
    names = [name for group in groups for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in unet.named_parameters())  # each once
    for index, group in enumerate(groups):
        originals = [name for name in source.tensors if re.match(GROUPS[index], name)]
        assert len(group) == len(originals) > 0
        assert sum(parameter.numel() for _, parameter in group) == sum(source.tensors[name].numel for name in originals)


@pytest.fixture(scope="module")
def trained(checkpoint):
    """The U-Net after a backward pass over all of it, and the map to the names of its file."""
    unet = load_unet(describe(open_source(checkpoint)), torch.float32).requires_grad_(True)
    x_t, level, text = inputs()
    predict(unet, x_t, level, text, GEOMETRY).square().mean().backward()
    return unet, UNET.bind(module_shapes(unet))


@pytest.mark.parametrize("index", range(23))
def test_each_learning_rate_moves_exactly_its_parameters(trained, checkpoint, index):
    """A step with that learning rate alone: the saved file differs in that group's names and nowhere else."""
    unet, bound = trained
    group = [parameter for _, parameter in block_groups(unet)[index]]
    before = [parameter.detach().clone() for parameter in group]
    # the decay moves those whose gradient is zero, as biases before a norm of single channels have it in a model this small
    torch.optim.SGD(group, lr=0.1, weight_decay=0.1).step()
    saved = export_module(unet, bound)
    source = open_source(checkpoint).view(UNET_PREFIX)
    moved = {entry.name for entry in saved.entries if not torch.equal(saved.get(entry.name), source.read(entry.name))}
    for parameter, value in zip(group, before, strict=True):
        parameter.data.copy_(value)
    assert moved == {name for name in source.tensors if re.match(GROUPS[index], name)}


def test_a_frozen_group_gets_no_gradient(unet):
    groups = block_groups(unet.requires_grad_(True))
    frozen = {name: parameter.requires_grad_(False) for index in (0, 5, 11, 22) for name, parameter in groups[index]}
    x_t, level, text = inputs()
    predict(unet, x_t, level, text, GEOMETRY).square().mean().backward()
    assert {name for name, parameter in unet.named_parameters() if parameter.grad is None} == set(frozen)
