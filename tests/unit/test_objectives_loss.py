import pytest
import torch

from library.objectives.loss import mean, per_sample


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
