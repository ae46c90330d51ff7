"""Both text encoders against the recorded text inputs of the U-Net.

The record holds no captions; their tokens were found by trying every token at every position, which is possible because
attention is causal: only one of 1,026 gives the recorded state. Hidden states agree to the last bits. The pooled vector of the
record is known to be wrong (its program uses the projection without transposing it): ours times the right matrix is compared
with the wrong one undone.
"""

import pytest
import torch

from library.architectures.sdxl_text import Tokenizers, encode_text, side_by_side
from tests.golden import records, records_sdxl
from tests.golden.compare import close

CAPTIONS = {  # (step, row) -> tokens between begin and end
    (0, 0): (76, 535, 532, 82, 622, 956, 816, 531, 539, 522, 64, 512, 538, 555, 82, 605, 324, 267, 65, 664, 324, 537, 927, 757),
    (0, 1): (320, 66, 705, 539, 622, 69, 623, 324, 525, 320, 86, 574, 561, 333, 83, 863, 267, 588, 78, 525, 267, 580, 335,
             922, 342),
    (2, 0): (833, 725, 537, 573, 802, 816, 531, 539, 320, 786, 593, 320, 1004, 517, 320, 525, 320, 924, 628, 323),
    (2, 1): (320, 532, 66, 643, 339, 522, 672, 519, 525, 902, 572, 569, 634, 79, 680, 536, 930, 267, 65, 553, 630, 554, 583, 590),
}


class KnownTokens:
    """A tokenizer whose captions are numbers already."""

    bos_token_id, eos_token_id = records_sdxl.BOS, records_sdxl.EOS

    def __call__(self, text, **_):
        return {"input_ids": [int(number) for number in text.split()]}


@pytest.mark.parametrize("step, row", CAPTIONS)
def test_hidden_states_and_pooled(step, row):
    record = records.read("sdxl_default")
    recorded = record.step(step)
    clip_l, clip_g = records_sdxl.tiny_encoders()
    tokenizers = Tokenizers(KnownTokens(), KnownTokens())
    caption = " ".join(str(token) for token in CAPTIONS[step, row])
    with torch.no_grad():
        encoded = encode_text({"clip_l": clip_l, "clip_g": clip_g}, tokenizers, [caption], chunks=1, weighted=False)
    close(side_by_side(encoded)[0], recorded["in.context"][row], 1e-6)
    matrix = clip_g.text_projection.weight.double()  # (P, width); ours is state @ matrix^T, the record's state @ matrix
    state = torch.linalg.solve(matrix, encoded["pooled"][0].double())
    close(state @ matrix, recorded["in.y"][row, :32], 1e-4)
    assert (encoded["pooled"][0] - recorded["in.y"][row, :32]).abs().max() > 1
