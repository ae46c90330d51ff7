"""The files SD3 and SD3.5 are made of: which file is what, and where people keep them. Reads headers only.

``open_parts`` is the door: it finds the transformer, the autoencoder, the text encoders and their tokenizers, or says in one go
everything that is missing or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.architectures.encoder_files import (ENCODERS_REPO, T5_FILES, T5_ON_HUB, clip_projection_width, clip_width,
                                                 is_autoencoder, is_t5)
from library.architectures.opening import FLAG, CheckpointSpec, absent, open_checkpoint, repository
from library.architectures.sd3_options import NO_ENCODER
from library.architectures.tokenizers import (CLIP_TOKENIZER_FILES, T5_TOKENIZER_FILES, TokenizerPlace, TokenizerSpec,
                                              find_tokenizer)
from library.checkpoint import known_keys
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub, HubFile
from library.checkpoint.locate import Found, PartSpec, fetch, find, search_folders
from library.checkpoint.sd3_keys import ENCODER_PREFIXES, VAE_PREFIX
from library.checkpoint.source import Source
from library.errors import UserError, raise_all

Tensors = Mapping[str, TensorInfo]
Given = Mapping[str, Path | str | None]
REPOS = {"sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
         "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium", "sd3.5-large": "stabilityai/stable-diffusion-3.5-large"}
TITLES = {"sd3-medium": "SD3-medium", "sd3.5-medium": "SD3.5-medium",
          "sd3.5-large": "SD3.5-large (or large-turbo: the file is the same)"}
LATENT_CHANNELS = 16
CHECKPOINT = CheckpointSpec("SD3 or SD3.5", "transformer", (
    "sd3.5_large.safetensors", "sd3.5_medium.safetensors", "sd3_medium.safetensors", "sd3_medium_incl_clips.safetensors",
    "transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors.index.json"))
_CLIP_L = ("clip_l.safetensors", "text_encoders/clip_l.safetensors", "text_encoder/model.safetensors",
           "text_encoder/model.fp16.safetensors")
_CLIP_G = ("clip_g.safetensors", "text_encoders/clip_g.safetensors", "text_encoder_2/model.safetensors",
           "text_encoder_2/model.fp16.safetensors")
_T5 = (*T5_FILES, *(f"text_encoders/{name}" for name in T5_FILES[:1] + T5_FILES[4:6]),
       "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.safetensors")
_VAE = ("sd3_vae.safetensors", "sd3_vae_fp16.safetensors", "vae.safetensors", "vae/diffusion_pytorch_model.safetensors")
_DIFFUSERS = ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3-medium-diffusers")
TOKENIZERS = {
    "clip_l": TokenizerSpec("clip", "CLIP-L tokenizer", "--clip_l_tokenizer", CLIP_TOKENIZER_FILES,
                            ("tokenizer", "clip_l_tokenizer", "clip_tokenizer"),
                            (("openai/clip-vit-large-patch14", ""), *((repo, "tokenizer") for repo in _DIFFUSERS))),
    "clip_g": TokenizerSpec("clip", "CLIP-G tokenizer", "--clip_g_tokenizer", CLIP_TOKENIZER_FILES,
                            ("tokenizer_2", "clip_g_tokenizer"), tuple((repo, "tokenizer_2") for repo in _DIFFUSERS)),
    "t5xxl": TokenizerSpec("t5", "T5 tokenizer", "--t5xxl_tokenizer", T5_TOKENIZER_FILES,
                           ("tokenizer_3", "t5xxl_tokenizer", "t5_tokenizer"),
                           (*((repo, "tokenizer_3") for repo in _DIFFUSERS), ("google/t5-v1_1-xxl", ""))),
}


@dataclass(frozen=True)
class Sd3File:
    """The transformer's tensors (prefix stripped) and what the header says about them.

    ``layout`` "mmdit" (single file) or "diffusers"; ``prefix`` stood before the names in ``whole``, the source as opened.
    ``dual``: the blocks with a second attention. Widths: of the model, of its heads, of the text tokens and of the pooled text
    it takes. ``positions``: cells of a side of its table.
    """

    source: Source
    variant: str
    layout: str
    prefix: str
    whole: Source
    depth: int
    width: int
    head_width: int
    qk_norm: bool
    dual: tuple[int, ...]
    text_width: int
    pooled_width: int
    positions: int


@dataclass(frozen=True)
class Sd3Parts:
    """Everything found, nothing loaded. ``encoders`` and ``tokenizers`` (folders) by name, of those that there are; ``origins``
    tells for each part where it came from."""

    transformer: Sd3File
    vae: Source
    encoders: Mapping[str, Source]
    tokenizers: Mapping[str, Path]
    origins: Mapping[str, str]

    def summary(self) -> str:
        """For the log: the variant, and a line per part that says where it was found."""
        layout = {"mmdit": "single-file", "diffusers": "diffusers"}[self.transformer.layout]
        kind = f"{TITLES[self.transformer.variant]}, {layout} layout: {self.transformer.whole.path}"
        missing = [f"  {name}: none, zeros in its place" for name in ENCODER_PREFIXES if name not in self.encoders]
        return "\n".join([kind, *(f"  {name}: {origin}" for name, origin in self.origins.items()), *missing])


def open_parts(pretrained: str | Path, given: Given, tokenizers: Given | None = None, hub: Hub | None = None) -> Sd3Parts:
    """Find every part. Raises one UserError (``UserErrors``) with all that is missing or wrong, before any download of encoders.

    ``given``: what the user named, by part (``clip_l``, ``clip_g``, ``t5xxl``, ``vae``); ``none`` for an encoder left out.
    ``tokenizers``: the same by encoder. Empty strings count as not given. ``hub`` is replaced in tests.
    """
    hub, tokenizers, repo = hub or Hub(), tokenizers or {}, repository(pretrained)
    paths = {name: path for name, path in given.items() if path != NO_ENCODER}
    try:
        transformer = describe(open_checkpoint(CHECKPOINT, pretrained, hub))
    except UserError as error:
        raise_all([error, *absent(paths)])  # what the other parts must look like is not known; whether they exist is
        raise AssertionError from error
    specs = [spec for spec in part_specs(transformer, paths, repo) if given.get(spec.name) != NO_ENCODER]
    found, errors = find(transformer.whole, specs, known_keys.recognise, hub)
    names = [spec.name for spec in specs if spec.name in ENCODER_PREFIXES]
    places, missing = find_tokenizers(names, search_folders(transformer.whole.path)[0], found, tokenizers, repo, hub)
    raise_all(errors + missing)
    located = fetch(found, specs, known_keys.recognise, hub)
    encoders = {name: located[name].source for name in names}
    _check_widths(transformer, encoders)
    folders = {name: place.fetch(hub) for name, place in places.items()}
    origins = {name: part.origin for name, part in located.items()}
    origins |= {f"tokenizer of {name}": place.origin for name, place in places.items()}
    return Sd3Parts(transformer, located["vae"].source, encoders, folders, origins)


def open_tokenizers(pretrained: str | Path, given: Given, tokenizers: Given | None = None,
                    hub: Hub | None = None) -> dict[str, Path]:
    """Encoder -> folder of its tokenizer, as ``open_parts`` finds them, whatever else is missing. Of the hub nothing but
    tokenizers is downloaded."""
    hub, repo = hub or Hub(), repository(pretrained)
    names = [name for name in ENCODER_PREFIXES if given.get(name) != NO_ENCODER]
    found: Mapping[str, Found | HubFile] = {}
    beside: list[Path] = []
    try:
        transformer = describe(open_checkpoint(CHECKPOINT, pretrained, Hub(hub.cache, offline=True)))
    except UserError:
        if repo is None:
            raise
    else:
        beside = search_folders(transformer.whole.path)[0]
        specs = [spec for spec in part_specs(transformer, given, repo) if spec.name in names]
        found, _ = find(transformer.whole, specs, known_keys.recognise, Hub(hub.cache, offline=True))
    places, errors = find_tokenizers(names, beside, found, tokenizers or {}, repo, hub)
    raise_all(errors)
    return {name: place.fetch(hub) for name, place in places.items()}


def find_tokenizers(names: Sequence[str], beside: Sequence[Path], found: Mapping[str, Found | HubFile], wanted: Given,
                    repo: str | None, hub: Hub) -> tuple[dict[str, TokenizerPlace], list[UserError]]:
    """Beside each encoder, where that was ``found``, and in the folders ``beside`` the transformer. Both CLIPs have the same
    vocabulary, so the files of one do for the other."""
    places: dict[str, TokenizerPlace] = {}
    errors: dict[str, UserError] = {}
    for name in names:
        encoder = found.get(name)
        own = search_folders(encoder.source.path)[0] if isinstance(encoder, Found) else []
        given = wanted.get(name)
        try:
            places[name] = find_tokenizer(TOKENIZERS[name], str(given) if given else None, [*own, *beside], repo, hub)
        except UserError as error:
            errors[name] = error
    for name, other in (("clip_l", "clip_g"), ("clip_g", "clip_l")):
        if name in errors and other in places and not wanted.get(name):
            places[name] = TokenizerPlace("the same files as the other CLIP's", places[other].folder, places[other].files)
            del errors[name]
    return places, list(errors.values())


def describe(source: Source) -> Sd3File:
    """What the header says. UserError for anything but a trainable SD3 transformer, saying what it is instead."""
    tensors = source.tensors
    title = known_keys.recognise(tensors)
    if (quantised := known_keys.quantisation(tensors)):
        raise UserError(f"{source.path} is quantised ({quantised}), which cannot be fine-tuned", place=FLAG,
                        remedy="give the bf16, fp16, fp32 or fp8 file of the model")
    if not title.startswith("an SD3 / SD3.5"):
        raise UserError(f"{source.path} is not an SD3 or SD3.5 checkpoint: it looks like {title}", place=FLAG,
                        remedy=known_keys.other_script(title, "give an SD3-medium, SD3.5-medium or SD3.5-large checkpoint"))
    prefix = known_keys.transformer_prefix(tensors)
    view = source.view(prefix) if prefix else source
    layout = "mmdit" if any(name.startswith("joint_blocks.") for name in view.tensors) else "diffusers"
    return _facts(source, view, layout, prefix)


def _facts(source: Source, view: Source, layout: str, prefix: str) -> Sd3File:
    names = view.tensors
    keys = {"mmdit": ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed",
                      "final_layer.linear.weight"),
            "diffusers": ("pos_embed.proj.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight",
                          "pos_embed.pos_embed", "proj_out.weight")}[layout]
    missing = [key for key in keys if key not in names]
    if missing:
        raise UserError(f"{source.path} looks like SD3 but lacks {', '.join(missing)}", place=FLAG,
                        remedy="download the file again, or give a complete checkpoint")
    patch, text, pooled, table, out = (names[key].shape for key in keys)
    if patch[1] != LATENT_CHANNELS or out[0] != LATENT_CHANNELS * patch[2] * patch[3]:
        raise UserError(f"{source.path} takes {patch[1]} latent channels and predicts {out[0]} numbers per image token; with SD3 "
                        f"that is {LATENT_CHANNELS} and 64: it is a variant with inputs that no dataset here provides",
                        place=FLAG, remedy="give an SD3 or SD3.5 checkpoint of the plain kind")
    block, second, norm = {"mmdit": (r"joint_blocks\.(\d+)\.", "x_block.attn2.", "x_block.attn.ln_q.weight"),
                           "diffusers": (r"transformer_blocks\.(\d+)\.", "attn2.", "attn.norm_q.weight")}[layout]
    found = [(int(match[1]), name) for name in names if (match := re.match(block, name))]
    dual = tuple(sorted({index for index, name in found if f".{second}" in name}))
    norms = [names[name].shape[0] for _, name in found if name.endswith(f".{norm}")]
    variant = "sd3.5-medium" if dual else "sd3.5-large" if norms else "sd3-medium"
    head = norms[0] if norms else 64
    if patch[0] % head:
        raise UserError(f"{source.path}: width {patch[0]} does not divide into heads of {head}", place=FLAG,
                        remedy="this is no SD3 transformer; give another checkpoint")
    return Sd3File(view, variant, layout, prefix, source, 1 + max(index for index, _ in found), patch[0], head, bool(norms), dual,
                   text[1], pooled[1], round(table[1] ** 0.5))


def part_specs(transformer: Sd3File, given: Given, repo: str | None = None) -> tuple[PartSpec, ...]:
    """What to look for beside ``transformer``: encoders must have the widths it takes. ``repo``: the repository it came from."""
    repos = tuple(dict.fromkeys(filter(None, (repo, REPOS[transformer.variant], *_DIFFUSERS))))
    pooled = transformer.pooled_width

    def in_repos(*names: str) -> tuple[tuple[str, str], ...]:
        return tuple((repository, name) for repository in repos for name in names)

    def encoder(name: str, title: str, files: tuple[str, ...], hub: tuple[tuple[str, str], ...], signature) -> PartSpec:
        inside = (ENCODER_PREFIXES[name], ENCODER_PREFIXES[name].removesuffix("transformer."))
        return PartSpec(name, title, f"--{name}", given.get(name), inside, files, ("clip", "text_encoders"), hub, signature)

    # The pooled vectors stand side by side, and CLIP-G's is the wider one.
    return (
        PartSpec("vae", "SD3 autoencoder", "--vae", given.get("vae"), (VAE_PREFIX, "vae."), _VAE, ("vae",),
                 in_repos("vae/diffusion_pytorch_model.safetensors"),
                 lambda tensors: is_autoencoder(tensors, LATENT_CHANNELS, quant=False)),
        encoder("clip_l", "CLIP-L text encoder", _CLIP_L,
                ((ENCODERS_REPO, "clip_l.safetensors"),
                 *in_repos("text_encoders/clip_l.safetensors", "text_encoder/model.safetensors")),
                lambda tensors: 0 < 2 * clip_width(tensors) < pooled),
        encoder("clip_g", "CLIP-G text encoder", _CLIP_G,
                in_repos("text_encoders/clip_g.safetensors", "text_encoder_2/model.safetensors"),
                lambda tensors: pooled <= 2 * clip_projection_width(tensors) < 2 * pooled),
        encoder("t5xxl", f"T5-XXL text encoder (width {transformer.text_width})", _T5,
                (*((ENCODERS_REPO, name) for name in T5_ON_HUB), *in_repos("text_encoder_3/model.safetensors.index.json")),
                lambda tensors: is_t5(tensors, transformer.text_width)),
    )


def _check_widths(transformer: Sd3File, encoders: Mapping[str, Source]) -> None:
    if not {"clip_l", "clip_g"} <= set(encoders):
        return
    first, second = clip_width(encoders["clip_l"].tensors), clip_projection_width(encoders["clip_g"].tensors)
    if first + second != transformer.pooled_width:
        raise UserError(f"CLIP-L gives {first} numbers and CLIP-G {second}, but {transformer.whole.path} takes "
                        f"{transformer.pooled_width}", remedy="give the encoders of this model with --clip_l and --clip_g")
