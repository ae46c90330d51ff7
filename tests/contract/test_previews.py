"""A preview is the same picture whether it is drawn alone or with others."""

import numpy
import pytest
import torch

from library.prompts import Prompt
from tests.contract.test_oracle import CPU, F32, opened

MOST = 1  # of 255, in any pixel: float32 products of another batch size are summed in another order, and then rounded to bytes
TEXTS = ("a red box", "a photo of a box beside a much longer list of other things, one of them blue")


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_company_does_not_change_a_picture(case, checkpoint, cfg):
    masked = cfg > 1 and "apply_t5_attn_mask" in case.entry.settings()
    arch, _ = opened(case, checkpoint, *(["--apply_t5_attn_mask"] if masked else []))
    denoiser, vae = arch.load_denoiser(CPU, F32), arch.load_vae(CPU, F32)
    encoders = arch.load_text_encoders(arch.text_encoders, CPU, F32)
    text = {words: arch.encode_text(encoders, [words]) for words in (*TEXTS, "", "blurry and many other faults")}
    sampler = "euler_a" if case.name == "sdxl" else ""  # one that draws noise on its way
    prompts = [Prompt(words, negative, width=64, height=96, seed=seed, steps=3, cfg=cfg, sampler=sampler)
               for seed, (words, negative) in enumerate(zip(TEXTS, ("", "blurry and many other faults"), strict=True), start=7)]

    def drawn(some):
        positive, negative = ({name: torch.cat([text[getattr(prompt, kind)][name] for prompt in some]) for name in text[""]}
                              for kind in ("text", "negative"))
        return [numpy.asarray(picture, dtype=int) for picture in arch.sample(denoiser, vae, some, positive, negative, F32)]

    with torch.no_grad():
        together, alone = drawn(prompts), [drawn([prompt])[0] for prompt in prompts]
    assert abs(together[0] - together[1]).max() > 3 * MOST  # they are different pictures
    for one, other in zip(together, alone, strict=True):
        assert abs(one - other).max() <= MOST
