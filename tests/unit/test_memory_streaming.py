import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from library.errors import UserError
from library.memory.boundaries import Boundaries
from library.memory.recompute import Recompute
from library.memory.streaming import Streaming
from library.memory.transport import CpuTransport
from library.optim.groups import Group
from library.optim.schedule import Schedule
from library.optim.updater import NonFinite, StepAfterBackward
from tests.unit.memory_helpers import LateTransport, Model, Run, Setting, assert_same

TRANSPORTS = pytest.mark.parametrize("transport", [CpuTransport, LateTransport], ids=["immediate", "late"])
STEPS = 3


def resident(**changes) -> Run:
    return Run(Setting(**changes))


def check(setting: Setting, **same) -> Run:
    """Three steps equal to the resident run with the plain updater: losses, weights and optimizer state, bit for bit."""
    plain, ours = resident(**same), Run(setting)
    assert ours.train(0, STEPS) == plain.train(0, STEPS)
    assert_same(ours.weights(), plain.weights())
    assert_same(ours.updater.state_dict(), plain.updater.state_dict())
    return ours


@TRANSPORTS
@pytest.mark.parametrize("unit", ["parameter", "block"])
@pytest.mark.parametrize("streamed", [1, 3, 5])
def test_equal_to_the_resident_run(streamed, unit, transport):
    check(Setting(streamed=streamed, unit=unit, transport=transport))


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Adafactor"])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("unit", ["parameter", "block"])
@pytest.mark.parametrize("stream_states", [False, True])
@TRANSPORTS
def test_equal_with_every_optimizer_accumulation_and_streamed_states(optimizer, micro, unit, stream_states, transport):
    same = dict(blocks=4, optimizer=optimizer, micro=micro)
    check(Setting(streamed=4, look_ahead=1, unit=unit, stream_states=stream_states, transport=transport, **same), **same)


@pytest.mark.parametrize("unit", ["parameter", "block"])
@pytest.mark.parametrize("stream_states", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
@TRANSPORTS
def test_bfloat16_weights_are_rounded_alike(unit, stream_states, micro, transport):
    same = dict(blocks=4, dtype=torch.bfloat16, micro=micro)
    check(Setting(streamed=3, unit=unit, stream_states=stream_states, transport=transport, **same), **same)


@pytest.mark.parametrize("unit", ["parameter", "block"])
def test_equal_under_autocast(unit):
    same = dict(blocks=4, autocast=True)
    check(Setting(streamed=4, look_ahead=1, unit=unit, poison=True, **same), **same)


@settings(max_examples=25)
@given(data=st.data())
def test_any_number_of_blocks_look_ahead_and_mode(data):
    blocks = data.draw(st.integers(1, 7), "blocks")
    micro = data.draw(st.integers(1, 2), "micro")
    same = dict(blocks=blocks, micro=micro)
    transport = data.draw(st.sampled_from([CpuTransport, LateTransport]), "transport")
    check(Setting(streamed=data.draw(st.integers(1, blocks), "streamed"), look_ahead=data.draw(st.integers(0, 8), "look_ahead"),
                  unit=data.draw(st.sampled_from(["parameter", "block"]), "unit"), transport=transport,
                  stream_states=data.draw(st.booleans(), "states"),
                  poison=transport is CpuTransport and data.draw(st.booleans(), "poison"), **same), **same)


@pytest.mark.parametrize("unit", ["parameter", "block"])
@pytest.mark.parametrize("look_ahead", [0, 1, 2])
@pytest.mark.parametrize("micro", [1, 2])
def test_evicted_blocks_are_nan_and_nobody_notices(unit, look_ahead, micro):
    same = dict(blocks=5, micro=micro)
    run = check(Setting(streamed=5, look_ahead=look_ahead, unit=unit, poison=True, stream_states=True, **same), **same)
    run.train(STEPS, STEPS + 1)
    nan = [all(p.isnan().all() for p in block.parameters()) for block in run.model.blocks]
    assert nan == [number > look_ahead for number in range(5)]


def test_the_poison_works():
    """Touching a block before its time gives NaN: the test above would fail for a ring that is late."""
    run = Run(Setting(blocks=4, streamed=4, look_ahead=0, unit="block", poison=True))
    run.train(0, 1)
    run.boundaries.detach()
    assert run.loss(1).isnan()


def test_the_late_transport_works():
    """It shows a wait that is missing, on each side."""
    for forgotten in ("compute waits for copies in", "copies in wait for copies out"):
        run = Run(Setting(blocks=5, streamed=5, look_ahead=1, unit="block", transport=LateTransport))
        transport = run.transport
        if forgotten.startswith("compute"):
            transport.wait = lambda event: None
        else:
            copy = transport.copy
            transport.copy = lambda target, source, lane, after, done: copy(target, source, lane, None, done)
        try:
            losses = run.train(0, STEPS)
        except NonFinite:
            continue
        assert losses != resident(blocks=5).train(0, STEPS), forgotten


def test_every_parameter_moves_though_one_of_each_unit_gets_no_gradient():
    for unit in ("parameter", "block"):
        run = Run(Setting(streamed=3, unit=unit, micro=2))
        before = run.weights()
        run.train(0, 1)
        still = {name for name, value in run.weights().items() if torch.equal(value, before[name])}
        assert still == {name for name in before if "unused" in name or "idle" in name or name.endswith(".scale")}


def test_forward_passes_alone_leave_everything_in_order():
    plain, ours = resident(), Run(Setting(streamed=5, look_ahead=1, unit="block", poison=True, stream_states=True))
    for step in range(STEPS):
        with torch.no_grad():
            assert [ours.loss(90 + n).item() for n in range(3)] == [plain.loss(90 + n).item() for n in range(3)]
        with torch.inference_mode():
            assert ours.loss(93).item() == plain.loss(93).item()
        ours.updater.begin_microbatch(step, 10, True)
        ours.loss(91)  # with a graph, and no backward pass
        assert ours.step(step)[0] == plain.step(step)[0]
    assert_same(ours.weights(), plain.weights())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("unit", ["parameter", "block"])
def test_an_exception_leaves_everything_in_order(where, unit):
    """The step is repeated. In the forward pass that changes nothing; in the backward pass some units were stepped twice."""
    plain, ours = resident(), Run(Setting(streamed=5, look_ahead=1, unit=unit, poison=True, stream_states=True))
    plain.train(0, 1)
    ours.train(0, 1)

    def fail(*ignored):
        raise KeyboardInterrupt

    block = ours.model.blocks[2]
    hook = block.fall.register_forward_pre_hook(fail) if where == "forward" else \
        block.rise.weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        ours.step(1)
    hook.remove()
    weights, before = ours.weights(), plain.weights()
    moved = {name.split(".")[1] for name in weights if name.startswith("blocks") and not torch.equal(weights[name], before[name])}
    assert moved == (set() if where == "forward" else ({"3", "4"} if unit == "block" else {"2", "3", "4"}))
    with ours.streaming.host_weights():
        ours.model.load_state_dict(before)
    ours.updater.load_state_dict(plain.updater.state_dict())
    assert ours.train(1, 4) == plain.train(1, 4)
    assert_same(ours.weights(), plain.weights())


def test_weights_are_read_and_written_on_the_host_only():
    run = Run(Setting(streamed=5, look_ahead=1, unit="block"))
    run.train(0, 1)
    with pytest.raises(AssertionError, match="outside of host_weights"):
        run.model.state_dict()
    assert run.model.state_dict(keep_vars=True).keys() == run.weights().keys()
    other = resident()
    other.train(0, 2)
    with run.streaming.host_weights():
        run.model.load_state_dict(other.model.state_dict())
        state = run.model.state_dict()
    sizes = {value.untyped_storage().nbytes() - value.nbytes for name, value in state.items() if name.startswith("blocks")}
    assert sizes == {0}  # or they would be saved together
    assert run.loss(5).item() == other.loss(5).item()


def test_detach_gives_a_plain_model_back():
    plain, ours = resident(), Run(Setting(streamed=3, look_ahead=1, unit="block", poison=True, stream_states=True))
    plain.train(0, 2)
    ours.train(0, 2)
    ours.updater.detach()
    ours.streaming.detach()
    ours.boundaries.detach()
    ours.recompute.detach()
    assert_same(ours.model.state_dict(), plain.model.state_dict())
    block = ours.model.blocks[2]
    assert not (block._forward_pre_hooks or block._backward_pre_hooks or block._state_dict_pre_hooks or "forward" in vars(block))
    ours.updater = StepAfterBackward(ours.updater._optimizer, ours.updater._groups, ours.updater._schedule, 0.0)
    ours.streaming = None
    assert ours.train(2, 4) == plain.train(2, 4)
    assert_same(ours.updater.state_dict(), plain.updater.state_dict())


def test_frozen_blocks_stream_in_only_beside_trained_parameters_that_stay():
    """As a LoRA does: with the plain updater, which may clip."""
    def build(streamed):
        model = Model(4)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("tail" in name or "last" in name)
        blocks = list(model.blocks)
        recompute, boundaries = Recompute(blocks), Boundaries(blocks)
        streaming = Streaming(boundaries, range(4), recompute.blocks, LateTransport(), 1, lambda p: p.requires_grad) \
            if streamed else None
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-2)
        return model, streaming, StepAfterBackward(optimizer, [Group("g", tuple(named), 1e-2)], Schedule("constant"), 0.1)

    results = []
    for streamed in (False, True):
        model, streaming, updater = build(streamed)
        losses = []
        for step in range(3):
            output, side = model(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(step)))
            (output.square().mean() + side).backward()
            losses.append((output.square().mean() + side).item())
            updater.after_backward(step, 10, True)
        results.append((losses, [p.detach().clone() for p in model.parameters() if p.requires_grad]))
    assert results[0][0] == results[1][0] and all(map(torch.equal, results[0][1], results[1][1]))
    assert streaming.weights.bytes_out == 0 < streaming.weights.bytes_in


def test_refused():
    blocks = list(Model(3).blocks)
    with pytest.raises(UserError, match="2 of 2 streamed blocks keep their activations.*--gradient_checkpointing"):
        Streaming(Boundaries(blocks), [0, 2], [], CpuTransport())
    recomputed = Recompute(blocks).blocks
    with pytest.raises(UserError, match="no block is to be streamed"):
        Streaming(Boundaries(blocks), [], recomputed, CpuTransport())
    blocks[0].tail = blocks[1].tail
    with pytest.raises(AssertionError, match="share a tensor"):
        Streaming(Boundaries(blocks), [0, 1], recomputed, CpuTransport())
    norm = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(AssertionError, match="not copied out"):
        Streaming(Boundaries([norm]), [0], [norm], CpuTransport())


def test_training_without_an_updater_that_steps_streamed_weights_is_caught():
    run = Run(Setting(streamed=2, unit=None))
    with pytest.raises(AssertionError, match="nothing steps them"):
        run.loss(0)
    with torch.no_grad():
        run.loss(0)
