import io

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from library.errors import UserError
from library.memory.boundaries import Boundaries
from library.memory.in_backward import StepInBackward, average_over_ranks
from library.memory.transport import CpuTransport
from library.optim import table
from library.optim.fitting import streams_states
from library.optim.groups import Group
from library.optim.schedule import Schedule
from library.optim.updater import NonFinite, total_norm
from tests.unit.memory_helpers import TOTAL, LateTransport, Model, Run, Setting, assert_same
from tests.unit.optim_helpers import param

EVERY_WAY = ("AdamW", "AdamW8bit", "Adafactor", "AdamWScheduleFree")  # the others in one way each
OTHERS = [param(record) for record in table.RECORDS if record.per_parameter and record.name not in EVERY_WAY
          and (record.name != "PagedAdEMAMix8bit" or torch.cuda.is_available())]  # whose pages need a graphics card
SUMMING = [param(record) for record in table.RECORDS if not record.per_parameter]
UNITS = pytest.mark.parametrize("unit", ["parameter", "block"])
STREAMED = dict(streamed=5, look_ahead=1, stream_states=True)


@UNITS
@pytest.mark.parametrize("optimizer", EVERY_WAY)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_to_the_plain_updater(unit, optimizer, micro, dtype):
    equal_to_the_plain_updater(unit, optimizer, micro, dtype)


@pytest.mark.parametrize("record", OTHERS)
def test_equal_to_the_plain_updater_with_any_optimizer(record):
    equal_to_the_plain_updater("parameter", record.name, 1, torch.float32)


def equal_to_the_plain_updater(unit, optimizer, micro, dtype):
    same = dict(optimizer=optimizer, micro=micro, dtype=dtype)
    plain, ours = Run(Setting(**same)), Run(Setting(unit=unit, **same))
    assert ours.train(0, 3) == plain.train(0, 3)
    assert_same(ours.weights(), plain.weights())
    assert_same(ours.updater.state_dict(), plain.updater.state_dict())
    ours_info, plain_info = ours.step(3)[1], plain.step(3)[1]
    assert ours_info.grad_norm == pytest.approx(plain_info.grad_norm, rel=1e-5)
    assert ours_info.learning_rate == plain_info.learning_rate and not ours_info.skipped


@UNITS
def test_gradients_are_given_up_on_the_way(unit):
    """At most one unit's gradients exist at a time, beside those outside of the blocks."""
    run = Run(Setting(blocks=6, unit=unit))
    most = []

    def look(parameter):
        most.append({name.split(".")[1] for name, p in run.model.blocks.named_parameters("blocks") if p.grad is not None})

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    run.train(0, 2)
    assert max(map(len, most)) <= (0 if unit == "parameter" else 1)


def test_each_unit_is_stepped_exactly_once_per_step():
    for unit in ("parameter", "block"):
        run = Run(Setting(unit=unit, micro=3, **STREAMED))
        run.train(0, 4)
        state = run.updater.state_dict()
        without = {name for name, values in state.items() if not values}
        assert without == {name for name in state if "unused" in name or "idle" in name}
        assert all(float(values["step"]) == 4 for values in state.values() if values)


@UNITS
def test_a_second_backward_pass_in_the_last_micro_batch_is_caught(unit):
    run = Run(Setting(unit=unit))
    run.updater.begin_microbatch(0, TOTAL, True)
    run.loss(0).backward()
    with pytest.raises(AssertionError, match="twice in step 0"):
        run.loss(1).backward()


@UNITS
@pytest.mark.parametrize("options", [{}, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", EVERY_WAY)
def test_a_run_goes_on_with_another_unit(unit, options, dtype, optimizer):
    goes_on_with_another_unit(unit, options, dtype, optimizer)


@pytest.mark.parametrize("record", OTHERS)
def test_a_run_goes_on_with_another_unit_and_any_optimizer(record):
    goes_on_with_another_unit("block", STREAMED, torch.bfloat16, record.name)


def goes_on_with_another_unit(unit, options, dtype, optimizer):
    streamed = {**STREAMED, "stream_states": streams_states(table.find(optimizer))}
    options = {**options, **(streamed if options else {})}
    same = dict(dtype=dtype, optimizer=optimizer)
    whole, first = Run(Setting(**same)), Run(Setting(unit=unit, **same, **options))
    whole.train(0, 6)
    first.train(0, 3)
    buffer = io.BytesIO()
    torch.save((first.weights(), first.updater.state_dict()), buffer)
    others = [Setting(**same), Setting(unit="block", **same, **streamed), Setting(unit="parameter", **same)]
    for setting in others:
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        resumed = Run(setting)
        resumed.train(7, 8)  # whatever was there before
        if resumed.streaming:
            with resumed.streaming.host_weights():
                resumed.model.load_state_dict(weights)
        else:
            resumed.model.load_state_dict(weights)
        resumed.updater.load_state_dict(state)
        resumed.train(3, 6)
        assert_same(resumed.weights(), whole.weights())
        assert_same(resumed.updater.state_dict(), whole.updater.state_dict())


@UNITS
@pytest.mark.parametrize("options", [{}, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_no_weight(unit, options, bad):
    run = Run(Setting(unit=unit, **options))
    run.train(0, 2)
    before = run.weights()
    hook = run.model.blocks[2].rise.weight.register_hook(lambda gradient: gradient * bad)
    with pytest.raises(NonFinite, match=r"step 3: .*in blocks.2.rise.weight\).*later in the model have had this step"):
        run.step(2)
    hook.remove()
    after = run.weights()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not any(value.isnan().any() for value in after.values())
    assert not [name for name in moved if name.startswith(("blocks.0", "blocks.1", "first", "time", "blocks.2.rise.weight"))]
    assert any(name.startswith("blocks.3") for name in moved)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run.train(3, 4)


def test_without_the_guard_the_error_comes_all_the_same():
    run = Run(Setting(unit="block"))
    run.updater._guard = False
    run.model.blocks[2].rise.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFinite, match="gradient norm is nan"):
        run.step(0)


def refuse(name="AdamW", **options):
    model = Model(2)
    groups = [Group("all", tuple(model.named_parameters()), 1e-3)]
    optimizer = table.build(name, [], groups, 1e-3)
    return StepInBackward(optimizer, groups, Schedule("constant"), "block", Boundaries(list(model.blocks)), **options)


def test_refused():
    with pytest.raises(UserError, match=r"--max_grad_norm: .*\(1\) is not known.*set --max_grad_norm 0"):
        refuse(max_grad_norm=1.0)
    with pytest.raises(UserError, match="--stream_optimizer_states.*--blocks_to_swap"):
        refuse(stream_states=True)
    with pytest.raises(UserError, match="use bf16"):
        refuse().after_backward(0, 1, True, torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("record", SUMMING)
def test_optimizers_that_sum_over_all_gradients_are_refused(record):
    with pytest.raises(UserError, match="--optimizer_type: .*sums over all gradients.*leave --fused_backward_pass"):
        refuse(record.name)


def test_a_forgotten_begin_is_caught():
    run = Run(Setting(unit="block"))
    with pytest.raises(AssertionError, match="begin_microbatch"):
        run.loss(0).backward()


@pytest.mark.parametrize("transport", [CpuTransport, LateTransport])
def test_accumulation_broken_off_begins_anew(transport):
    """An exception in the second of three micro-batches: the step is done again from its first one."""
    plain, ours = Run(Setting(micro=3)), Run(Setting(unit="block", micro=3, transport=transport, **STREAMED))
    plain.train(0, 1)
    ours.train(0, 1)
    ours.updater.begin_microbatch(1, TOTAL, False)
    ours.loss(1, 0).backward()
    ours.updater.after_backward(1, TOTAL, False)
    ours.updater.begin_microbatch(1, TOTAL, False)
    hook = ours.model.blocks[1].rise.weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.loss(1, 1).backward()
    hook.remove()
    assert ours.train(1, 3) == plain.train(1, 3)
    assert_same(ours.weights(), plain.weights())


def rank_trains(rank: int, path: str, unit: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    run = Run(Setting(unit=unit, micro=2, **STREAMED))
    run.updater._average = average_over_ranks
    loss = run.loss
    run.loss = lambda step, micro: loss(step, 2 * micro + rank)  # each rank has micro-batches of its own
    norms = [run.step(step)[1].grad_norm for step in range(3)]
    results[rank] = (run.weights(), norms)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@UNITS
def test_two_processes_are_one_with_the_micro_batches_of_both(unit, tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.start_processes(rank_trains, (str(tmp_path / "meet"), unit, results), nprocs=2,
                                              start_method="spawn")
        (first, norms), (second, other_norms) = results[0], results[1]
        assert_same(first, second)
    assert norms == other_norms
    single = Run(Setting(micro=4))
    expected = [single.step(step)[1].grad_norm for step in range(3)]
    assert norms == pytest.approx(expected, rel=1e-4)
    for name, value in single.weights().items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=2e-5)


def test_the_norm_is_that_of_all_gradients():
    run = Run(Setting(unit="block", **STREAMED))
    plain = Run(Setting())
    plain.loss(0).backward()
    norm = total_norm([p.grad for p in plain.model.parameters() if p.grad is not None]).item()
    assert run.step(0)[1].grad_norm == pytest.approx(norm, rel=1e-6)


def test_an_updater_is_replaced_by_another():
    plain, ours = Run(Setting(micro=2)), Run(Setting(unit="parameter", micro=2, **STREAMED))
    plain.train(0, 4)
    ours.train(0, 2)
    old, ours.updater = ours.updater, None
    old.detach()
    with pytest.raises(AssertionError, match="nothing steps them"):
        ours.loss(2)
    ours.updater = StepInBackward(old._optimizer, old._groups, old._schedule, "block", ours.boundaries, ours.streaming)
    ours.train(2, 4)
    assert_same(ours.weights(), plain.weights())
    assert_same(ours.updater.state_dict(), plain.updater.state_dict())
    assert len(ours.streaming.step_rings) == 1


def both(losses_of_micro, steps=3, **options):
    """Equal to the plain updater when the loss of a micro-batch is ``losses_of_micro(run, step, micro)``, of three."""
    plain, ours = Run(Setting()), Run(Setting(**options))
    for run in (plain, ours):
        for step in range(steps):
            for micro in range(3):
                run.updater.begin_microbatch(step, TOTAL, micro == 2)
                losses_of_micro(run, step, micro).backward()
                run.updater.after_backward(step, TOTAL, micro == 2)
    assert_same(ours.weights(), plain.weights())
    assert_same(ours.updater.state_dict(), plain.updater.state_dict())


@UNITS
@pytest.mark.parametrize("options", [{}, STREAMED, STREAMED | dict(poison=True)], ids=["resident", "streamed", "poisoned"])
def test_two_forward_passes_in_one_backward_pass(unit, options):
    """As for a loss on two versions of a picture: every block is entered twice, and its gradients come the second time."""
    both(lambda run, step, micro: run.loss(step, micro) + run.loss(step, 50 + micro), unit=unit, **options)


@UNITS
@pytest.mark.parametrize("options", [{}, STREAMED, STREAMED | dict(poison=True)], ids=["resident", "streamed", "poisoned"])
@pytest.mark.parametrize("absent", [{2}, {0}, {0, 1}, {1}], ids=str)
@pytest.mark.parametrize("what", ["block", "parameter"])
def test_what_some_micro_batches_do_not_use(unit, options, absent, what):
    """Its gradients are those of the others, also when it is the last micro-batch that does without."""
    def loss(run, step, micro):
        block = run.model.blocks[2]
        if micro not in absent:
            return run.loss(step, micro)
        if what == "parameter":
            block.tail.requires_grad_(False)
            result = run.loss(step, micro)
            block.tail.requires_grad_(True)
            return result

        class Skip(torch.nn.Module):
            def forward(self, x, *, shift):
                return x, x * 0

        run.model.blocks[2] = Skip()
        result = run.loss(step, micro)
        run.model.blocks[2] = block
        return result

    both(loss, unit=unit, **options)
