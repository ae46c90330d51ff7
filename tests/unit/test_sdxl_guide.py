"""docs/sdxl.md says what is so: its flags, its names and every number that can be counted are compared with the code."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from library.architectures.sdxl_call import block_groups
from library.architectures.sdxl_models import build_unet
from library.architectures.sdxl_options import SAMPLERS, TOKEN_LENGTHS
from library.architectures.sdxl_parts import describe
from library.checkpoint.header import TensorInfo
from library.checkpoint.keymap import module_shapes
from library.checkpoint.reader import build_on_meta
from library.checkpoint.sdxl_keys import CLIP_G_PREFIX, CLIP_L_PREFIX, UNET, UNET_PREFIX
from library.checkpoint.source import Source
from library.config.dialect import INERT
from library.config.parse import parse
from library.config.save_formats import SUFFIXES
from library.optim import table
from library.optim.groups import Group
from library.optim.rounding import CHUNK_BYTES
from sdxl_train import ENTRY

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/sdxl.md").read_text(encoding="utf-8")
LAYOUT = json.loads((ROOT / "tests/data/layouts/sdxl_base_1.0.json").read_text(encoding="utf-8"))
FROZEN = (8, 9, 11)  # the blocks of the table's last row


def section(title: str) -> str:
    return re.split(r"^## ", GUIDE.split(f"\n## {title}\n", 1)[1], flags=re.M)[0]


def rows(title: str, columns: int) -> list[list[str]]:
    """The cells below the heads of a section's tables with so many columns."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in section(title).splitlines() if line.startswith("|")]
    kept = [row for row in found if len(row) == columns and set(row) != {"---"}]
    return kept[1:]


@pytest.fixture(scope="module")
def unet():
    path = Path("sd_xl_base_1.0.safetensors")
    tensors = {name: TensorInfo("F16", tuple(shape), path, 0, 0) for name, shape in LAYOUT.items()}
    return build_on_meta(lambda: build_unet(describe(Source(path, tensors, {}, {}))))


def test_every_flag_is_one():
    named = set(re.findall(r"--([a-z][a-z0-9_]+)", GUIDE))
    assert named - {"w", "h", "s", "d", "l", "n"} <= set(ENTRY.settings()) | set(ENTRY.dialect())
    assert set(re.findall(r"`--([a-z])`", section("Previews"))) == {"w", "h", "s", "d", "l", "n"}


def test_flags_that_change_nothing_name_what_happens_anyway(unet):
    for name in ("xformers", "sdpa", "mem_eff_attn"):
        assert f"--{name}" in section("Precision") and ENTRY.dialect()[name].status == INERT
    assert {type(processor).__name__ for processor in unet.attn_processors.values()} == {"AttnProcessor2_0"}  # calls sdpa


@pytest.mark.parametrize("page", ["docs/sdxl.md", "README.md"])
def test_its_command_is_valid(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    command = shlex.split(next(block for block in blocks if "sdxl_train.py" in block).replace("\\\n", " "))
    command = command[command.index("accelerate"):]
    monkeypatch.chdir(tmp_path)
    for name in ("dataset_config.toml", "prompts.txt"):
        (tmp_path / name).touch()
    config = parse(ENTRY, command[command.index("sdxl_train.py") + 1:], env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert not config.notes and config.architecture.train_text_encoder


def test_defaults():
    assert [row[2] for row in rows("What trains, and how fast", 3)] == [
        f"{ENTRY.settings()['learning_rate'].default:g}".replace("e-0", "e-"), "`--learning_rate`", "`--learning_rate`",
        "all at `--learning_rate`"]


def test_formats_samplers_and_lengths():
    assert [row[0].strip("`") for row in rows("What is saved", 2)][1:] == [name for name in (
        "safetensors", "ckpt", "diffusers_safetensors", "diffusers")]
    assert set(SUFFIXES) == {row[0].strip("`") for row in rows("What is saved", 2)} - {"(not given)"}
    samplers = re.search(r"`--sample_sampler` takes the dialect's names \((.*?)\)", section("Previews"), flags=re.S)[1]
    assert set(re.findall(r"`(.*?)`", samplers)) <= set(SAMPLERS)
    assert [str(length) in section("Text") for length in TOKEN_LENGTHS] == [True] * 3


def numbered(cell: str) -> list[str]:
    return [part.strip() for part in cell.split(",")]


def test_the_23_blocks(unet):
    """Numbers, names in the file and number of weights, for the published shapes."""
    bound = UNET.bind(module_shapes(unet))
    original = {segment.module_key: name for name, binding in bound.bindings.items() for segment in binding.segments}
    groups, seen = block_groups(unet), []
    for numbers, names, _, weights in rows("What trains, and how fast", 4):
        indices, counts = [int(number) for number in numbered(numbers)], numbered(weights)
        places = re.findall(r"`(.*?)`", names)
        stem = places[0].rsplit(".", 1)[0]
        places = [stem + place if place.startswith(".") else place for place in places]
        counts = [counts[0].removesuffix(" each")] * len(indices) if len(counts) == 1 else counts
        for at, index in enumerate(indices):
            expected = [places[at]] if len(indices) > 1 else places
            assert {name for name, _ in groups[index]} == {
                key for key, name in original.items() if any(name.startswith(place + ".") for place in expected)}
            millions = sum(parameter.numel() for _, parameter in groups[index]) / 1e6
            assert counts[at] == ("under 1" if millions < 0.5 else str(round(millions))), index
        seen += indices
    assert seen == list(range(23))


def state_bytes(name: str, shape: tuple[int, ...]) -> int:
    """What an optimizer really keeps for a float32 stand-in of this shape; scalars aside."""
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = table.build(name, [], [Group("all", (("weight", parameter),), 1e-3)], 1e-3)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept if value.data_ptr() not in _shared(optimizer))


def _shared(optimizer) -> set[int]:
    """Tables that all parameters have together, as the code books of 8-bit states."""
    return {value.data_ptr() for value in getattr(optimizer, "name2qmap", {}).values()}


def adafactor_bytes(shape: tuple[int, ...]) -> int:
    """Rows and columns; convolutions are matrices (outputs, all others)."""
    shape = (shape[0], math.prod(shape[1:])) if len(shape) == 4 else shape
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:]) if len(shape) > 1 else math.prod(shape))


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (256, 256), (64, 128, 1, 1)])
def test_what_the_optimizers_keep(shape):
    """The arithmetic of the memory table is that of the optimizers themselves."""
    weights = math.prod(shape)
    assert state_bytes("AdamW", shape) == 8 * weights
    assert state_bytes("AdamW8bit", shape) == 2 * weights + 2 * 4 * weights // 256  # and a scale for each 256
    assert state_bytes("Adafactor", shape) == adafactor_bytes(shape)


def test_the_memory_table(unet):
    groups = block_groups(unet)
    frozen = {name for index in FROZEN for name, _ in groups[index]}
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    encoders = [tuple(shape) for name, shape in LAYOUT.items() if name.startswith((CLIP_L_PREFIX, CLIP_G_PREFIX))]
    trained = {"U-Net": list(shapes.values()), "U-Net and both encoders": [*shapes.values(), *encoders],
               "U-Net without blocks 8, 9 and 11": [shape for name, shape in shapes.items() if name not in frozen]}
    for what, *cells in rows("Memory", 7):
        count = sum(map(math.prod, trained[what]))
        held = count if "encoders" in what else sum(map(math.prod, shapes.values()))
        eight, factored = 2 * count * (1 + 4 / 256), sum(map(adafactor_bytes, trained[what]))
        values = [2 * held, 2 * count, 8 * count, eight, factored]
        assert cells == [*(f"{value / 1e9:.1f} GB" for value in values),
                         f"{(2 * held + 2 * count + eight) / 1e9:.1f} / {(2 * held + 2 * count + factored) / 1e9:.1f} GB"]
    billions = [sum(math.prod(shape) for name, shape in LAYOUT.items() if name.startswith(prefix)) / 1e9
                for prefix in (UNET_PREFIX, CLIP_L_PREFIX, CLIP_G_PREFIX)]
    assert "U-Net {:.3f} billion, CLIP-L {:.3f}, CLIP-G {:.3f}".format(*billions) in section("Memory")
    assert f"up to {2 * CHUNK_BYTES / 1e9:.1f} GB" in section("Memory")
