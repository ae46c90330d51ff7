import pytest
import torch

from library.objectives.loss import huber_width, mean, per_sample


def tensors(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 4, 5, 6, generator=generator).to(dtype) for _ in range(2))


def test_mean_squared_error_of_each_sample():
    prediction, target = tensors()
    expected = [(p - t).pow(2).mean().item() for p, t in zip(prediction, target)]
    assert per_sample(prediction, target).tolist() == pytest.approx(expected)


def test_half_inputs_are_reduced_in_float32():
    prediction, target = tensors(torch.bfloat16)
    loss = per_sample(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(per_sample(prediction.float(), target.float()).tolist(), rel=1e-6)


def test_mask_multiplies_without_renormalising():
    prediction, target = tensors()
    mask = torch.zeros(3, 1, 5, 6)
    mask[0], mask[1, :, :, :3] = 1.0, 0.5
    masked, plain = per_sample(prediction, target, mask), per_sample(prediction, target)
    assert masked[0] == plain[0] and masked[2] == 0
    left = (prediction[1] - target[1])[:, :, :3].pow(2).mean()
    assert masked[1].item() == pytest.approx(0.5 * 0.5 * left.item())  # half weight on half of the cells


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [3, 1]])
def test_micro_batches_add_up_to_the_mean_of_the_step(sizes):
    losses, weight = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1.0, 0.5, 1.0, 2.0])
    parts = [mean(part, samples=4) for part in (losses * weight).split(sizes)]
    assert sum(parts).item() == pytest.approx((1 + 1 + 4 + 16) / 4)


@pytest.mark.parametrize("kind, near, far", [
    ("huber", lambda d, c: d**2, lambda d, c: 2 * c * d), ("smooth_l1", lambda d, c: d**2 / c, lambda d, c: 2 * d)])
def test_rounded_losses_are_squared_near_zero_and_absolute_far_from_it(kind, near, far):
    width = torch.tensor([0.1, 1.0])
    for error, limit, tolerance in ((1e-3, near, 1e-2), (1e3, far, 1e-2)):
        loss = per_sample(torch.full((2, 1, 2, 2), error), torch.zeros(2, 1, 2, 2), kind=kind, width=width)
        assert loss.tolist() == pytest.approx([limit(error, c) for c in width.tolist()], rel=tolerance)


@pytest.mark.parametrize("kind", ["l1", "huber", "smooth_l1"])
def test_no_error_gives_no_loss_and_a_finite_gradient(kind):
    prediction = torch.zeros(2, 1, 2, 2, requires_grad=True)
    loss = per_sample(prediction, torch.zeros(2, 1, 2, 2), kind=kind, width=torch.tensor([0.1, 1.0]))
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and prediction.grad.abs().max() == 0


def test_huber_width_schedules():
    level = torch.tensor([0.0, 0.5, 1.0])
    assert huber_width("constant", 0.1, 2.0, level).tolist() == pytest.approx([0.2] * 3)
    assert huber_width("exponential", 0.1, 2.0, level).tolist() == pytest.approx([2.0, 2 * 0.1**0.5, 0.2])
    signal = torch.tensor([1.0, 0.5, 0.0])  # sigma 0, 1 and infinite
    assert huber_width("snr", 0.1, 2.0, level, signal).tolist() == pytest.approx([1.0, 0.9 / 4 + 0.1, 0.1])
