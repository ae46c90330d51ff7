"""Both CLIPs against the recorded text inputs of the transformer.

The records hold no captions; tokens of these two are known from the SDXL records (``test_golden_sdxl_text.py``), which were made
from the same pictures with the same tokenizer.
"""

import pytest
import torch

from library.architectures.sd3_text import Tokenizers, context, encode_text
from tests.golden import records, records_sd3
from tests.golden.compare import close
from tests.golden.records_sd3 import CLIP_TOKENS, POOLED, T5_TOKENS, TEXT
from tests.golden.test_golden_sdxl_text import CAPTIONS, KnownTokens

SAME = {(0, 0): (0, 0), (0, 1): (0, 1), (2, 0): (0, 0)}  # (step, row) here -> there


@pytest.mark.parametrize("name", records.names("sd3") + records.names("sd35"))
def test_states_and_pooled_vectors(name):
    record = records.read(name)
    modules = dict(zip(("clip_l", "clip_g"), records_sd3.tiny_encoders(), strict=True))
    for (step, row), known in SAME.items():
        recorded, caption = record.step(step), " ".join(map(str, CAPTIONS[known]))
        with torch.no_grad():
            encoded = encode_text(modules, Tokenizers(KnownTokens(), KnownTokens()), [caption], T5_TOKENS)
        states, pooled = context(encoded, 1, TEXT, POOLED, T5_TOKENS, torch.device("cpu"))
        close(states[0, :CLIP_TOKENS], recorded["in.context"][row, :CLIP_TOKENS], 1e-6)
        close(pooled[0], recorded["in.y"][row], 1e-6)
        assert states.shape[1] == CLIP_TOKENS + T5_TOKENS and not states[:, CLIP_TOKENS:].any()  # no T5: zeros
