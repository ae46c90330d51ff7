"""Key map of T5's encoder: the names in files and in transformers' ``T5EncoderModel``.

Source of the names: transformers (`modeling_t5.py`).
"""

from library.checkpoint.keymap import Drop, KeyMap, Rename

# t5xxl files hold the tied embedding under either name or, commonly, under both. Some are the whole encoder-decoder.
T5 = KeyMap((
    Rename("shared.weight", "shared.weight", also=("encoder.embed_tokens.weight",)),
    Rename("encoder.{rest}", "encoder.{rest}"),
    Drop("decoder.{rest}"), Drop("lm_head.weight"), Drop("logit_scale"), Drop("spiece_model"),
))
