import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from library.errors import UserError
from library.optim import table
from library.optim.groups import Group
from library.optim.records import COUNTER, NOTHING, RECORDS
from library.optim.state import Shared
from library.optim.states import state_bytes
from tests.unit.optim_helpers import ARGS, missing, param, rate


def groups(*shapes: tuple[int, ...], learning_rate: float = 1e-2) -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return [Group(f"group{index}", ((f"weight{index}", weight),), learning_rate * (index + 1))
            for index, weight in enumerate(weights)]


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Adafactor", "NAdam", "AdEMAMix8bit", "Muon"])
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper])
def test_optimizers_are_built_and_descend(name, spelling):
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


@pytest.mark.parametrize("record", [param(record) for record in RECORDS if record.per_parameter])
def test_stepping_some_parameters_at_a_time_equals_one_step(record):
    """And for the others it does not: what a record declares is neither too much nor too little."""
    assert stepped_apart(record, put_back=record.keeps == COUNTER)


@pytest.mark.parametrize("record", [param(record) for record in RECORDS if record.keeps != NOTHING])
def test_optimizers_with_shared_numbers_need_them(record):
    assert not stepped_apart(record, put_back=False)


def stepped_apart(record, put_back: bool) -> bool:
    """Whether several calls, each for some parameters, give the weights and the shared numbers of one call."""
    shapes, args = [(64, 80), (8,), (4, 3, 3, 3)], ARGS.get(record.name, [])
    joint, apart = ([replace(part, learning_rate=rate(record)) for part in groups(*shapes)] for _ in range(2))
    one, several = (table.build(record.name, args, parts, rate(record)) for parts in (joint, apart))
    shared, expected = (Shared(optimizer, [part.name for part in apart]) for optimizer in (several, one))
    for step in range(7):
        for part in joint:
            part.params[0][1].grad = part.params[0][1].detach() * 0.1 * (step + 1)
        gradients = [part.params[0][1].grad.clone() for part in joint]
        one.step()
        before = shared.copy()
        for part, gradient in zip(apart, gradients, strict=True):
            if put_back:
                shared.put_back(before)
            part.params[0][1].grad = gradient
            several.step()
            part.params[0][1].grad = None
    return shared.copy() == expected.copy() and all(torch.equal(a.params[0][1], b.params[0][1]) for a, b in zip(joint, apart))


COSTLY = {"beta1": "beta1=0.9", "amsgrad": "amsgrad=True", "momentum": "momentum=0.9", "centered": "centered=True"}


@pytest.mark.parametrize("record, args", [
    pytest.param(record, args, marks=param(record).marks, id=f"{record.name} {' '.join(args)}")
    for record in RECORDS for args in ([], *([COSTLY[key]] for key in record.bytes_if))])
def test_declared_abilities_are_the_real_ones(record, args):
    """State bytes within 3 % for weights of a network's size, modes, and whether several learning rates can be given."""
    shapes = [(256, 128), (128, 64, 3, 3), (64, 32, 1, 1)]
    parts = [replace(part, learning_rate=rate(record)) for part in groups(*shapes)]
    optimizer = table.build(record.name, args, parts, rate(record))
    for part in parts:
        part.params[0][1].grad = torch.ones_like(part.params[0][1])
    optimizer.step()
    real = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items()
               if isinstance(value, torch.Tensor) and not key.startswith("qmap"))  # a table of bitsandbytes, shared by all
    assert sum(map(state_bytes(record.name, args), shapes)) == pytest.approx(real, rel=0.03, abs=32)
    assert record.modes == table.has_modes(optimizer) == all(hasattr(optimizer, name) for name in ("train", "eval"))


def test_names_are_unique_and_aliases_found():
    names = [name.lower() for record in RECORDS for name in (record.name, *record.aliases)]
    assert len(set(names)) == len(names)
    assert table.find("prodigy+schedulefree").name == "ProdigyPlusScheduleFree"
    assert table.find("torch.optim.AdamW").fused and table.find("DAdaptAdamPreprint").name == "DAdaptation"


def test_every_name_of_the_dialect_is_known():
    """census, section 5"""
    for name in """AdamW AdamW8bit SGDNesterov8bit Lion8bit PagedAdamW8bit PagedLion8bit PagedAdamW PagedAdamW32bit AdEMAMix8bit
                PagedAdEMAMix8bit Lion SGDNesterov DAdaptation DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptAdanIP DAdaptLion
                DAdaptSGD Prodigy Adafactor RAdamScheduleFree AdamWScheduleFree SGDScheduleFree Muon CAME AdEMAMix""".split():
        assert table.find(name.upper()).name == name


class Halving(torch.optim.Optimizer):
    """A class that nobody listed: counts its calls, and asserts that all gradients are there."""

    def __init__(self, params, lr, share: float = 0.5, **others):
        super().__init__(params, {"lr": lr, "share": share, "others": others})
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = torch.ones_like(parameter)
                parameter.data.mul_(group["share"])


def test_any_dotted_path_is_taken_with_care():
    record = table.find(f"{__name__}.Halving")
    assert not record.per_parameter and not record.own_rate
    table.check(record.name, ["share=0.25", "anything=1"])
    parts = groups((4, 4))
    optimizer = table.build(record.name, ["share=0.25"], parts, 1e-2)
    assert type(optimizer) is Halving and not table.has_modes(optimizer) and optimizer.param_groups[0]["share"] == 0.25
    assert [state_bytes(record.name, ())(shape) for shape in ((10, 10), (5,))] == [400, 20]


@pytest.mark.parametrize("path, said", [
    ("no_such_package.Thing", "needs the package no_such_package, which is not installed; install it, or check the spelling"),
    ("torch.optim.AdamX", "torch.optim.AdamX cannot be imported"),
    ("torch.nn.Linear", "refuses its arguments"),
    ("torch.optim.LBFGS", "refuses its arguments (): LBFGS.step() missing"),
    ("collections.OrderedDict", "cannot be called with arguments"),
    ("builtins.dict", "cannot be called with arguments"),
])
def test_what_is_no_optimizer_is_told(path, said):
    with pytest.raises(UserError) as caught:
        table.check(path, [])
    assert said in str(caught.value)


@pytest.mark.parametrize("record", [param(record) for record in RECORDS if record.own_rate])
def test_a_rate_that_would_stop_it_is_refused(record):
    with pytest.raises(UserError, match=f"--learning_rate: 2e-06 would stop {record.name}.*use --learning_rate 1"):
        table.check(record.name, [], learning_rate=2e-6)
    table.check(record.name, [], learning_rate=1.0)


@pytest.mark.parametrize("record", [param(record) for record in RECORDS if record.one_rate])
def test_different_learning_rates_are_refused_where_there_is_one_step_size(record):
    with pytest.raises(UserError, match="one step size for all groups.*group0 0.01, group1 0.02"):
        table.build(record.name, [], groups((4, 4), (4, 4)), 1.0)


def test_remarks_name_what_might_surprise():
    assert table.remarks("AdamW", "cosine", 1.0) == table.remarks("AdamWScheduleFree", "constant", 1.0) == ()
    assert "averages its weights" in table.remarks("AdamWScheduleFree", "cosine", 1.0)[0]
    assert len(table.remarks("ProdigyPlusScheduleFree", "linear", 1.0)) == 2
    assert "plain momentum" in table.remarks("sgdnesterov8bit", "constant", 1.0)[0]


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
    ("AdamX", [], "did you mean 'adamax'"),
    ("frobnicate", [], "known are AdamW, AdamW8bit, Adafactor"),
    ("Prodogy", [], "did you mean 'prodigy'"),
    ("AdamW", ["weight_decay"], "key=value"),
    ("AdamW", ["=3"], "key=value"),
    ("AdamW", ["weight_decay=much"], "not a Python value"),
    ("AdamW", ["weight_dacay=0.1"], "did you mean 'weight_decay'"),
    ("AdamW", ["lr=1"], "use --learning_rate"),
    ("AdamW", ["eps=1e-8", "eps=1e-7"], "given twice"),
    ("AdamW", ["betas=2"], "betas is 2 numbers"),
    ("AdamW", ["betas=0.9,1.5"], "refuses its arguments"),
    ("Adafactor", ["eps=1"], "eps is 2 numbers"),
    ("Adafactor", ["relative_step=True"], "--lr_scheduler"),
    ("AdamW8bit", ["is_paged=True"], "PagedAdamW8bit"),
    ("AdamW", ["params=[]"], "it is filled in"),
    ("AdamW", ["betas=0.9"], "betas is 2 numbers; write for example betas=0.9,0.999"),
    ("AdamW", ["weight_decay='0.1'"], "weight_decay is a number"),
    ("AdamW", ["amsgrad=1"], "amsgrad is True or False"),
    ("AdamW", ["eps=True"], "eps is a number"),
    ("Muon", ["ns_steps=2.5"], "ns_steps is a whole number"),
    ("Muon", ["adjust_lr_fn=wrong"], "refuses its arguments (adjust_lr_fn=wrong)"),
    ("Muon", ["adamw_betas=0.9,1.5"], "refuses its arguments"),
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


@pytest.mark.parametrize("record", [record for record in RECORDS if missing(record)], ids=lambda record: record.name)
def test_what_is_really_missing_is_told(record):
    with pytest.raises(UserError, match=f"not installed; run: pip install {record.package}"):
        table.check(record.name, [])
