"""Key map of Gemma and Gemma 2 as text encoders: the names in files and in transformers' ``GemmaModel`` and ``Gemma2Model``.

Source of the names: transformers (`modeling_gemma.py`, `modeling_gemma2.py`). Files of the whole language model call the tower
``model.``; pipelines of diffusers save the tower alone, without it.
"""

from library.checkpoint.keymap import Drop, KeyMap, Rename

# The output table is the input's again; the tokenizer as a tensor and a temperature are additions of ComfyUI.
_EXTRAS = (Drop("lm_head.weight"), Drop("model.lm_head.weight"), Drop("spiece_model"), Drop("logit_scale"))

GEMMA = KeyMap((Rename("model.{rest}", "{rest}"), *_EXTRAS))
GEMMA_FLAT = KeyMap((Rename("{rest}", "{rest}"), *_EXTRAS))

ENCODER_PREFIX = "text_encoders.gemma2_2b."  # in ComfyUI's all-in-one files
