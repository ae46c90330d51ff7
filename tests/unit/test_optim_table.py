import subprocess
import sys

import pytest
import torch

from library.errors import UserError
from library.optim import table
from library.optim.groups import Group


def groups(*shapes: tuple[int, ...], learning_rate: float = 1e-2) -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return [Group(f"group{index}", ((f"weight{index}", weight),), learning_rate * (index + 1))
            for index, weight in enumerate(weights)]


@pytest.mark.parametrize("name", [record.name for record in table.RECORDS])
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper])
def test_every_optimizer_is_built_and_descends(name, spelling):
    parts = groups((64, 80), (8,))
    optimizer = table.build(spelling(name), ["weight_decay=0.02"], parts, 1e-2)
    assert type(optimizer).__name__ == name
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-2]
    assert all(group["weight_decay"] == 0.02 for group in optimizer.param_groups)
    before = [part.params[0][1].square().mean().item() for part in parts]
    for _ in range(3):
        for part in parts:
            part.params[0][1].grad = part.params[0][1].detach().clone()
        optimizer.step()
    assert all(part.params[0][1].square().mean().item() < value for part, value in zip(parts, before))


def test_the_empty_name_is_adamw():
    assert table.find("").name == "AdamW"


@pytest.mark.parametrize("record", table.RECORDS, ids=lambda record: record.name)
def test_stepping_some_parameters_at_a_time_equals_one_step(record):
    joint, apart = groups((64, 80), (8,), (4, 3)), groups((64, 80), (8,), (4, 3))
    one, several = table.build(record.name, [], joint, 1e-2), table.build(record.name, [], apart, 1e-2)
    for step in range(3):
        for part in joint:
            part.params[0][1].grad = torch.full_like(part.params[0][1], 0.1 * (step + 1))
        one.step()
        for part in apart:
            part.params[0][1].grad = torch.full_like(part.params[0][1], 0.1 * (step + 1))
            several.step()
            part.params[0][1].grad = None
    assert all(torch.equal(a.params[0][1], b.params[0][1]) for a, b in zip(joint, apart))


def test_adafactor_keeps_to_the_given_learning_rate():
    settings = table.build("Adafactor", [], groups((4, 4)), 1e-2).param_groups[0]
    assert settings["scale_parameter"] is settings["relative_step"] is settings["warmup_init"] is False
    assert table.build("Adafactor", ["scale_parameter=True"], groups((4, 4)), 1e-2).param_groups[0]["scale_parameter"] is True
    table.check("Adafactor", ["relative_step=False", "scale_parameter=False", "warmup_init=False"])  # what people write


def test_adamw_makes_no_copies_of_all_parameters():
    assert table.build("AdamW", [], groups((4, 4)), 1e-2).param_groups[0]["fused"] is True
    assert not table.build("AdamW", ["foreach=True"], groups((4, 4)), 1e-2).param_groups[0]["fused"]
    assert not table.build("AdamW", ["fused=False"], groups((4, 4)), 1e-2).param_groups[0]["fused"]


def test_values_are_python_literals():
    settings = table.build("AdamW", ["betas=0.9, 0.95", "eps=1e-6", "amsgrad=True"], groups((2,)), 1e-2).param_groups[0]
    assert (settings["betas"], settings["eps"], settings["amsgrad"]) == ((0.9, 0.95), 1e-6, True)


@pytest.mark.parametrize("name, args, said", [
    ("AdamX", [], "did you mean 'adamw'"),
    ("frobnicate", [], "known are AdamW, AdamW8bit, Adafactor"),
    ("Prodigy", [], "not built yet"),
    ("pagedadamw8bit", [], "not built yet"),
    ("AdamW", ["weight_decay"], "key=value"),
    ("AdamW", ["=3"], "key=value"),
    ("AdamW", ["weight_decay=much"], "not a Python value"),
    ("AdamW", ["weight_dacay=0.1"], "did you mean 'weight_decay'"),
    ("AdamW", ["lr=1"], "use --learning_rate"),
    ("AdamW", ["eps=1e-8", "eps=1e-7"], "given twice"),
    ("AdamW", ["betas=2"], "refuses its arguments"),
    ("AdamW", ["betas=0.9,1.5"], "refuses its arguments"),
    ("Adafactor", ["eps=1"], "refuses its arguments"),
    ("Adafactor", ["relative_step=True"], "--lr_scheduler"),
    ("AdamW8bit", ["is_paged=True"], "not built yet"),
    ("AdamW8bit", ["amsgrad=True"], "refuses its arguments"),
])
def test_mistakes_are_told_in_one_line_before_the_run(name, args, said):
    with pytest.raises(UserError) as caught:
        table.check(name, args)
    assert said in str(caught.value) and "--optimizer_" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(UserError, match="not installed.*pip install bitsandbytes"):
        table.check("AdamW8bit", [])


def test_importing_the_table_loads_no_torch():
    code = "import sys, library.optim.table, library.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
