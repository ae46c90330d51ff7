"""Small tokenizers in the files of the real ones, for toy checkpoints and tests: they know every byte and some words.

As a rule a known word becomes one token, as with the published tokenizers, and anything else is spelled out.
Both functions return how many rows the encoder's embedding needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

WORDS = ("a", "photo", "of", "picture", "the", "cat", "dog", "red", "blue", "green", "and", "with", "in", "on", "girl",
         "rocket", "coffee")
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(folder: Path, words: Iterable[str] = WORDS) -> int:
    """``vocab.json`` and ``merges.txt`` of a byte-level BPE; begin and end are the two last tokens, as in CLIP's own."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    merges: dict[str, None] = {}  # in order, each once
    for word in dict.fromkeys(words):
        letters = [*word[:-1], word[-1] + "</w>"]
        while len(letters) > 1:
            merges[f"{letters[0]} {letters[1]}"] = None
            letters[:2] = [letters[0] + letters[1]]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8", newline="\n")
    return len(numbered)


def write_t5_tokenizer(folder: Path, words: Iterable[str] = WORDS) -> int:
    """``tokenizer.json`` of a Unigram vocabulary: printable ASCII and the words; the size is rounded up to 8 as in T5's own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -4.0) for word in dict.fromkeys(words)] + [(chr(code), -6.0) for code in range(33, 127)]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)])
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                             special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return -(-len(pieces) // 8) * 8


def write_gemma_tokenizer(folder: Path, words: Iterable[str] = WORDS) -> int:
    """``tokenizer.json`` of a byte-pair vocabulary with bytes to fall back to, texts beginning with ``<bos>``, as Gemma's.

    It also knows the marker by which Lumina-Image 2.0 parts an instruction from a caption.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(code) for code in range(33, 127))]
    merges: dict[tuple[str, str], None] = {}
    for word in dict.fromkeys(words):
        letters = ["▁", *word]
        while len(letters) > 1:
            merges[letters[0], letters[1]] = None
            letters[:2] = [letters[0] + letters[1]]
    tokens += ["".join(pair) for pair in merges]
    numbered = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(BPE(numbered, list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B",
                                                             special_tokens=[("<bos>", numbered["<bos>"])])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return -(-len(numbered) // 8) * 8
