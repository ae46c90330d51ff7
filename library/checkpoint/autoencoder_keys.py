"""Key maps of the autoencoder that latent diffusion models share: original names, and diffusers' ``AutoencoderKL``.

Sources of the names: CompVis/latent-diffusion (`modules/diffusionmodules/model.py`, `models/autoencoder.py`), kept by all later
releases, for the files; diffusers (`autoencoder_kl.py`, `attention_processor.py`) for the modules.
"""

from library.checkpoint.keymap import Drop, KeyMap, Pointwise, Rename, Rule


def _resnet(original: str, module: str) -> tuple[Rule, ...]:
    # norms and convolutions are numbered the same on both sides
    return (Rename(f"{original}.norm{{n}}.{{leaf}}", f"{module}.norm{{n}}.{{leaf}}"),
            Rename(f"{original}.conv{{n}}.{{leaf}}", f"{module}.conv{{n}}.{{leaf}}"))


def _attention(original: str, module: str) -> tuple[Rule, ...]:
    pairs = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
    return (Rename(f"{original}.norm.{{leaf}}", f"{module}.group_norm.{{leaf}}"),
            *(Pointwise(f"{original}.{file}.weight", f"{module}.{name}.weight") for file, name in pairs),
            *(Rename(f"{original}.{file}.bias", f"{module}.{name}.bias") for file, name in pairs))


def _half(side: str) -> tuple[Rule, ...]:
    """The rules that the autoencoder's encoder and decoder share."""
    return (*_resnet(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
            *_attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"),
            *_resnet(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
            Rename(f"{side}.norm_out.{{leaf}}", f"{side}.conv_norm_out.{{leaf}}"),
            Rename(f"{side}.conv_in.{{leaf}}", f"{side}.conv_in.{{leaf}}"),
            Rename(f"{side}.conv_out.{{leaf}}", f"{side}.conv_out.{{leaf}}"))


# The file counts the decoder's levels from the finest, diffusers from the coarsest.
_LEVELS_AND_ENDS: tuple[Rule, ...] = (
    *_resnet("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
    Rename("encoder.down.{i}.block.{j}.nin_shortcut.{leaf}", "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.{leaf}"),
    Rename("encoder.down.{i}.downsample.conv.{leaf}", "encoder.down_blocks.{i}.downsamplers.0.conv.{leaf}"),
    *_resnet("decoder.up.{~i}.block.{j}", "decoder.up_blocks.{i}.resnets.{j}"),
    Rename("decoder.up.{~i}.block.{j}.nin_shortcut.{leaf}", "decoder.up_blocks.{i}.resnets.{j}.conv_shortcut.{leaf}"),
    Rename("decoder.up.{~i}.upsample.conv.{leaf}", "decoder.up_blocks.{i}.upsamplers.0.conv.{leaf}"),
    *_half("encoder"),
    *_half("decoder"),
)

# ae.safetensors and its relatives with 16 latent channels.
AUTOENCODER = KeyMap(_LEVELS_AND_ENDS)

# The autoencoders with 4 latent channels have a 1x1 convolution on either side of the latents. Some files of theirs also hold
# the discriminator of their own training.
AUTOENCODER_QUANT = KeyMap((
    *_LEVELS_AND_ENDS,
    Rename("quant_conv.{leaf}", "quant_conv.{leaf}"),
    Rename("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
    Drop("loss.{rest}"),
))

# diffusers folders saved before version 0.17 name the projections of the one attention by words.
AUTOENCODER_OLD = KeyMap((
    *(Rename(f"{{side}}.mid_block.attentions.0.{old}.{{leaf}}", f"{{side}}.mid_block.attentions.0.{new}.{{leaf}}")
      for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))),
    Rename("{rest}", "{rest}"),
))
