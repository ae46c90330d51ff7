"""SDXL's key maps: the single file of Stability AI and the modules of diffusers and transformers.

Sources of the names: Stability-AI/generative-models (`modules/diffusionmodules/openaimodel.py`, `sd_xl_base.yaml`) for the file;
diffusers (`unet_2d_condition.py`, `unet_2d_blocks.py`) for the U-Net. The file numbers its blocks straight through, one number
for a residual block with the attention behind it, and one for a downsampler; diffusers nests them in levels.
"""

from library.checkpoint.keymap import KeyMap, Rename, Rule

# Where the parts stand in the single file.
UNET_PREFIX = "model.diffusion_model."
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
CLIP_G_PREFIX = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."
# Empty tensors by which programs mark a checkpoint that predicts velocity, and one trained down to pure noise.
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"

_ENDS: tuple[Rule, ...] = (
    Rename("time_embed.0.{leaf}", "time_embedding.linear_1.{leaf}"),
    Rename("time_embed.2.{leaf}", "time_embedding.linear_2.{leaf}"),
    Rename("label_emb.0.0.{leaf}", "add_embedding.linear_1.{leaf}"),
    Rename("label_emb.0.2.{leaf}", "add_embedding.linear_2.{leaf}"),
    Rename("input_blocks.0.0.{leaf}", "conv_in.{leaf}"),
    Rename("out.0.{leaf}", "conv_norm_out.{leaf}"),
    Rename("out.2.{leaf}", "conv_out.{leaf}"),
)


def _residual(original: str, module: str) -> tuple[Rule, ...]:
    pairs = (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
             ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"))
    return tuple(Rename(f"{original}.{file}.{{leaf}}", f"{module}.{name}.{{leaf}}") for file, name in pairs)


def _attention(original: str, module: str) -> tuple[Rule, ...]:
    return (Rename(f"{original}.{{rest}}", f"{module}.{{rest}}"),)  # the same names inside


def _down(levels: int, layers: int) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            rules += _residual(f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}")
            rules += _attention(f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}")
        rules.append(Rename(f"input_blocks.{first + layers}.0.op.{{leaf}}", f"down_blocks.{level}.downsamplers.0.conv.{{leaf}}"))
    return tuple(rules)


def _up(levels: int, layers: int) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for level in range(levels):  # from the coarsest; each has one residual block more than on the way down
        first = level * (layers + 1)
        for layer in range(layers + 1):
            rules += _residual(f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}")
            rules += _attention(f"output_blocks.{first + layer}.1", f"up_blocks.{level}.attentions.{layer}")
        rules.append(Rename(f"output_blocks.{first + layers}.2.conv.{{leaf}}", f"up_blocks.{level}.upsamplers.0.conv.{{leaf}}"))
    return tuple(rules)


def unet(levels: int, layers: int) -> KeyMap:
    """The table of a U-Net with so many levels and residual blocks per level. Widths and depths of attention are free."""
    return KeyMap((
        *_ENDS,
        *_down(levels, layers),
        *_residual("middle_block.0", "mid_block.resnets.0"),
        *_attention("middle_block.1", "mid_block.attentions.0"),
        *_residual("middle_block.2", "mid_block.resnets.1"),
        *_up(levels, layers),
    ))


UNET = unet(levels=3, layers=2)
