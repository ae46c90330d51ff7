"""Tokenizers: where their files lie, how they are opened, and how a cache knows them again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from library.checkpoint.hub import Hub, HubFile
from library.checkpoint.locate import few
from library.errors import UserError

BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # read when they are there
CLIP_TOKENIZER_FILES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
T5_TOKENIZER_FILES = (("tokenizer.json",), ("spiece.model",))
GEMMA_TOKENIZER_FILES = (("tokenizer.json",),)  # made from tokenizer.model alone it would not begin texts with <bos>


@dataclass(frozen=True)
class TokenizerSpec:
    """``kind``: "clip", "t5" or "gemma". ``file_sets``: any complete one is enough. ``folders``: usual names beside a checkpoint.
    ``hub``: (repository, folder)."""

    kind: str
    title: str
    flag: str
    file_sets: tuple[tuple[str, ...], ...]
    folders: tuple[str, ...]
    hub: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TokenizerPlace:
    """A folder with the files, or files the hub would hand out."""

    origin: str
    folder: Path | None = None
    files: tuple[HubFile, ...] = ()

    def fetch(self, hub: Hub) -> Path:
        """The folder, after downloading what is still on the hub."""
        return self.folder or [hub.download(file) for file in self.files][0].parent


def find_tokenizer(spec: TokenizerSpec, given: str | Path | None, beside: Sequence[Path], repo: str | None,
                   hub: Hub) -> TokenizerPlace:
    """Flag (folder, one of its files, or hub repository), then the folders ``beside``, then the hub cache, then the hub.

    ``repo`` is the repository the checkpoint came from, asked first. UserError lists where it was looked for.
    """
    if given:
        return _given(spec, str(given), hub)
    folders = list(dict.fromkeys(folder / name for folder in beside for name in spec.folders))
    folders += [folder for folder in dict.fromkeys(beside) if folder.name in spec.folders]
    for folder in folders:
        if _complete(spec, folder):
            return TokenizerPlace(f"beside the checkpoint: {folder}", folder)
    places = (((repo, spec.folders[0]),) if repo else ()) + spec.hub
    place = _on_hub(spec, places, hub)
    if isinstance(place, TokenizerPlace):
        return place
    searched, repos = ", ".join(map(str, dict.fromkeys(beside))), ", ".join(dict.fromkeys(where[0] for where in places))
    raise UserError(
        f"the {spec.title} was not found: not given with {spec.flag}, no {wanted_files(spec)} in a folder called "
        f"{few(spec.folders)} in {searched}, not in the hub cache ({repos}), and {place}",
        remedy=f"give its folder with {spec.flag}")


def _given(spec: TokenizerSpec, given: str, hub: Hub) -> TokenizerPlace:
    path = Path(given)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        for folder in (path, *(path / name for name in spec.folders)):
            if _complete(spec, folder):
                return TokenizerPlace(spec.flag, folder)
        raise UserError(f"{given} holds no {wanted_files(spec)}", place=spec.flag,
                        remedy=f"give a folder that holds the {spec.title}")
    parts = given.split("/")
    if len(parts) not in (2, 3) or not all(parts) or path.is_absolute():
        raise UserError(f"{given} does not exist", place=spec.flag,
                        remedy=f"give a folder with {wanted_files(spec)}, or a hub repository")
    repo, folder = "/".join(parts[:2]), "/".join(parts[2:])
    places = ((repo, folder),) if folder else ((repo, ""), *((repo, name) for name in spec.folders[:1]))
    place = _on_hub(spec, places, hub)
    if isinstance(place, TokenizerPlace):
        return place
    raise UserError(f"{given} is neither a folder here nor in the hub cache, and {place}", place=spec.flag,
                    remedy=f"give a folder with {wanted_files(spec)}, or a hub repository that holds them")


def _on_hub(spec: TokenizerSpec, places: Sequence[tuple[str, str]], hub: Hub) -> TokenizerPlace | str:
    """From the hub cache, else files on offer, else the reasons in words."""
    def inside(folder: str, name: str) -> str:
        return str(PurePosixPath(folder) / name)

    for repo, folder in places:
        for files in spec.file_sets:
            paths = [hub.cached(repo, inside(folder, name)) for name in files]
            if all(paths) and len({path.parent for path in paths}) == 1:
                return TokenizerPlace(f"the hub cache: {repo}/{folder}".rstrip("/"), paths[0].parent)
    reasons = []
    for repo, folder in places:
        for files in spec.file_sets:
            offers = [hub.offer(repo, inside(folder, name)) for name in files]
            if all(isinstance(offer, HubFile) for offer in offers):
                also = [hub.offer(repo, inside(folder, name)) for name in BESIDE]
                return TokenizerPlace(f"the hub: {repo}/{folder}".rstrip("/"),
                                      files=(*offers, *(offer for offer in also if isinstance(offer, HubFile))))
            reasons += [offer for offer in offers if not isinstance(offer, HubFile)]
            if hub.why_not():
                return hub.why_not()
    return ", ".join(dict.fromkeys(reasons))


def _complete(spec: TokenizerSpec, folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in files) for files in spec.file_sets)


def wanted_files(spec: TokenizerSpec) -> str:
    """The files that make such a tokenizer, in words."""
    return " or ".join(" with ".join(files) for files in spec.file_sets)


def load_tokenizer(spec: TokenizerSpec, folder: Path) -> Any:
    """``CLIPTokenizer``, ``T5Tokenizer`` or ``GemmaTokenizer``, by the spec's kind, from a folder with its files; never asks the
    hub.

    The concrete classes are used because AutoTokenizer needs a config and finds no padding token in a bare tokenizer.json.
    UserError when the files cannot be read.
    """
    from transformers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer

    try:
        if spec.kind == "gemma":
            tokenizer = GemmaTokenizer.from_pretrained(str(folder), local_files_only=True)
            tokenizer.padding_side = "right"  # the class pads on the left, and its files cannot tell it otherwise
            return tokenizer
        if spec.kind == "clip":
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        # Sentinel tokens are part of the published vocabulary; adding 100 more would overrun the embedding table.
        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True, extra_ids=0)
    except Exception as error:  # transformers and tokenizers raise plain Exception for malformed files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the {spec.title} in {folder} cannot be read: {reason}", place=spec.flag,
                        remedy=f"give a folder with an intact {wanted_files(spec)}") from error


def padded(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Any, Any]:
    """Token numbers and mask (1: a token), both (B, length) int64 on the CPU. Longer captions keep their end token."""
    encoded = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_attention_mask=True,
                        return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def tokenizer_identity(folder: Path) -> str:
    """Hex digest of the tokenizer's files, independent of where they lie; part of every text cache key."""
    digest = hashlib.sha256()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", *BESIDE):
        if (path := Path(folder) / name).is_file():
            digest.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def refuse_unknown_tokens(highest: int, vocabulary: int, title: str, flag: str) -> None:
    """UserError when the encoder has no row for a token: its tokenizer belongs to another encoder."""
    if highest >= vocabulary:
        raise UserError(f"the {title} tokenizer gives token {highest}, but the encoder knows only {vocabulary} tokens",
                        remedy=f"give the tokenizer that belongs to the encoder with {flag}")
