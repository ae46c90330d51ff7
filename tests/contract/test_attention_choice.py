"""``--attn_mode`` reaches every attention of every model, whatever diffusers' own switch would have done."""

import pytest
import torch

from library.architectures.attention import FlashKernel, TorchFlashKernel
from tests.contract.test_oracle import CPU, F32, GEOMETRY, opened


@pytest.mark.parametrize("flag", [("--use_flash_attn",), ("--attn_mode", "flash")], ids=lambda flag: flag[0].strip("-"))
def test_every_attention_is_routed_and_predicts_the_same(case, checkpoint, flag):
    arch, _ = opened(case, checkpoint)
    chosen, _ = opened(case, checkpoint, *flag)
    plain, routed = arch.load_denoiser(CPU, F32), chosen.load_denoiser(CPU, F32)
    kernels = [part.forward.router.kernel for part in routed.modules() if hasattr(part, "processor")]
    assert kernels and all(isinstance(kernel, (FlashKernel, TorchFlashKernel)) for kernel in kernels)
    text = arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), ["a red cat and a dog", "a"])
    x_t = torch.randn(2, arch.latent.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (arch.predict(module, x_t, case.level.expand(2), text, GEOMETRY) for module in (plain, routed))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * one.abs().max().item())
