"""Calling SD3's transformer: time, places on the table of positions, rescaled positions, frozen blocks."""

import math

import pytest
import torch

from library.architectures.sd3_call import frozen_blocks, install_positions, predict
from library.architectures.sd3_models import load_transformer
from library.architectures.sd3_parts import describe
from library.architectures.sd3_positions import BASE_TOKENS, Positions, read_spacing, table
from library.architectures.sd3_text import CORNERS
from library.checkpoint.reader import open_source
from library.errors import UserError
from tests.tiny_sd3 import POSITIONS, SPACING, VARIANTS, make_sd3_files

F32 = torch.float32


@pytest.fixture(scope="module", params=VARIANTS)
def denoiser(request, tmp_path_factory):
    module = load_transformer(describe(open_source(make_sd3_files(tmp_path_factory.mktemp("sd3"), request.param).checkpoint)), F32)
    install_positions(module, scaled=False)
    return module


class Patches:
    """What ``Positions`` reads of a ``PatchEmbed``."""

    def __init__(self, size, spacing, width):
        self.pos_embed_max_size, self.patch_size, self.pos_embed = size, 2, table(size, spacing, width)


def call(denoiser, text=None, shape=(16, 8, 12), level=(0.3, 0.7)):
    x_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return predict(denoiser, x_t, torch.tensor(level), text or {}, 4)


def test_equals_the_module_called_by_hand(denoiser):
    x_t = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    config = denoiser.config
    with torch.no_grad():
        theirs = denoiser(hidden_states=x_t, encoder_hidden_states=torch.zeros(2, 81, config.joint_attention_dim),
                          pooled_projections=torch.zeros(2, config.pooled_projection_dim), timestep=torch.tensor([300.0, 700.0]),
                          return_dict=False)[0]
    torch.testing.assert_close(call(denoiser), theirs, atol=2e-6, rtol=1e-5)


def test_rows_without_corners_are_those_of_diffusers(denoiser):
    patch = denoiser.pos_embed
    theirs = type(patch).cropped_pos_embed(patch, 8, 12)
    assert torch.equal(patch.cropped_pos_embed(8, 12), theirs)


def test_the_middle_written_as_a_corner_changes_nothing_and_another_corner_does(denoiser):
    middle = call(denoiser, {CORNERS: torch.full((2, 2), -1.0)})
    assert torch.equal(middle, call(denoiser))
    moved = call(denoiser, {CORNERS: torch.tensor([[-1.0, -1.0], [0.0, 0.999]])})
    assert torch.equal(moved[0], middle[0]) and not torch.allclose(moved[1], middle[1], atol=1e-4)
    assert denoiser.pos_embed.positions.corners is None


def test_corners_are_the_ends_of_the_table():
    positions = Positions(Patches(12, SPACING, 64), scaled=False)
    cells = table(12, SPACING, 64).view(12, 12, 64)
    positions.corners = torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, -1.0]])
    rows = positions.rows(8, 12).view(3, 4, 6, 64)  # 4 x 6 tokens: 9 x 7 places
    assert torch.equal(rows[0], cells[:4, :6]) and torch.equal(rows[1], cells[8:, 6:]) and torch.equal(rows[2], cells[4:8, 3:9])


def test_a_picture_larger_than_the_table(denoiser):
    with pytest.raises(UserError, match=r"pictures of 400 x 64 pixels are larger than .* which ends at 384 x 384; .*scaled_pos_embed"):
        call(denoiser, shape=(16, 8, 2 * (POSITIONS + 1)))


# --- rescaled positions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spacing", [1 / 3, 1 / 6, 1.0])
def test_spacing_is_read_off_the_table(spacing, dtype):
    assert read_spacing(table(48, spacing, 64).to(dtype), 48) == pytest.approx(spacing, rel=1e-3)


def test_the_table_is_that_of_diffusers():
    from diffusers.models.embeddings import PatchEmbed

    theirs = PatchEmbed(height=128, width=128, patch_size=2, in_channels=16, embed_dim=64, pos_embed_max_size=192).pos_embed
    torch.testing.assert_close(table(192, 64 / 192, 64), theirs, atol=2e-5, rtol=0)


def test_a_table_of_something_else_is_refused():
    patches = Patches(8, SPACING, 64)
    patches.pos_embed = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="--enable_scaled_pos_embed: .* cannot be rescaled"):
        Positions(patches, scaled=True)


def test_at_the_size_of_the_training_nothing_is_rescaled():
    patches = Patches(96, SPACING, 64)
    side = 2 * BASE_TOKENS
    plain, scaled = Positions(patches, scaled=False), Positions(patches, scaled=True)
    torch.testing.assert_close(scaled.rows(side, side), plain.rows(side, side), atol=2e-5, rtol=0)


@pytest.mark.parametrize("h, w", [(16, 16), (32, 18), (200, 200)])
def test_every_size_covers_what_the_base_size_covers(h, w):
    """The extent, by rows and columns, of equally large pictures is the same however many tokens they have; also beyond the table."""
    positions = Positions(Patches(96, SPACING, 64), scaled=True)
    rows = positions.rows(2 * h, 2 * w).view(h, w, 64)
    angle = torch.atan2(rows[0, :, 0], rows[0, :, 16]).double()  # the fastest pair of the columns' half
    turned = (torch.remainder(angle.diff() + math.pi, 2 * math.pi) - math.pi).sum().item()
    assert turned == pytest.approx(SPACING * BASE_TOKENS / math.sqrt(h * w) * (w - 1), rel=1e-4)
    middle = SPACING * (96 - 1) / 2
    first = middle - turned / 2
    assert math.remainder(angle[0].item() - first, 2 * math.pi) == pytest.approx(0, abs=1e-4)


def test_rescaled_positions_take_corners_too():
    positions = Positions(Patches(96, SPACING, 64), scaled=True)
    positions.corners = torch.tensor([[0.0, 0.0], [-1.0, -1.0]])
    rows = positions.rows(16, 16).view(2, 8, 8, 64)
    assert torch.allclose(rows[0, 0, 0], table(2, SPACING, 64)[0, 0], atol=1e-5)  # the first cell of the table
    positions.corners = None
    torch.testing.assert_close(rows[1], positions.rows(16, 16).view(8, 8, 64))


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_frozen_blocks_are_the_last_ones(denoiser):
    blocks = list(denoiser.transformer_blocks)
    assert frozen_blocks(denoiser, 2) == blocks[-2:] and frozen_blocks(denoiser, 0) == [] and frozen_blocks(denoiser, 3) == blocks
