"""The files FLUX.1 is made of: which file is what, and where people keep them. Reads headers only.

``open_parts`` is the door: it finds the transformer, the autoencoder, both text encoders and both tokenizers, or says in
one go everything that is missing or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.architectures import encoder_files
from library.architectures.encoder_files import ENCODERS_REPO, clip_width, is_autoencoder, is_t5
from library.architectures.opening import FLAG, CheckpointSpec, absent, open_checkpoint, repository
from library.architectures.tokenizers import (CLIP_TOKENIZER_FILES, T5_TOKENIZER_FILES, TokenizerPlace, TokenizerSpec,
                                              find_tokenizer)
from library.checkpoint import known_keys
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub, HubFile
from library.checkpoint.locate import Found, PartSpec, fetch, find, search_folders
from library.checkpoint.source import Source
from library.errors import UserError, raise_all

Tensors = Mapping[str, TensorInfo]
DEV_REPO, SCHNELL_REPO = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
AE_ELSEWHERE = ("Comfy-Org/Lumina_Image_2.0_Repackaged", "split_files/vae/ae.safetensors")  # the same autoencoder, not gated
LATENT_CHANNELS = 16
TOKEN_WIDTH = 64  # 16 latent channels of a 2x2 patch
CHECKPOINT = CheckpointSpec("FLUX.1", "transformer", (
    "flux1-dev.safetensors", "flux1-schnell.safetensors", "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model.safetensors"))
AE_FILES = ("ae.safetensors", "ae.sft", "flux_ae.safetensors", "flux-ae.safetensors", "flux_vae.safetensors", "vae.safetensors",
            "FLUX1/ae.safetensors", "vae/diffusion_pytorch_model.safetensors", "vae/ae.safetensors")
CLIP_FILES = ("clip_l.safetensors", "clip-l.safetensors", "text_encoder/model.safetensors", "text_encoder/clip_l.safetensors")
T5_FILES = (*encoder_files.T5_FILES, "text_encoder_2/model.safetensors.index.json", "text_encoder_2/model.safetensors")
TOKENIZERS = {
    "clip_l_tokenizer": TokenizerSpec(
        "clip", "CLIP-L tokenizer", "--clip_l_tokenizer", CLIP_TOKENIZER_FILES,
        ("tokenizer", "clip_l_tokenizer", "clip_tokenizer"),
        (("openai/clip-vit-large-patch14", ""), ("black-forest-labs/FLUX.1-dev", "tokenizer"),
         ("black-forest-labs/FLUX.1-schnell", "tokenizer"))),
    "t5xxl_tokenizer": TokenizerSpec(
        "t5", "T5 tokenizer", "--t5xxl_tokenizer", T5_TOKENIZER_FILES,
        ("tokenizer_2", "t5xxl_tokenizer", "t5_tokenizer"),
        (("black-forest-labs/FLUX.1-dev", "tokenizer_2"), ("black-forest-labs/FLUX.1-schnell", "tokenizer_2"),
         ("google/t5-v1_1-xxl", ""))),  # the hub's v1.1 repositories have spiece.model only
}


@dataclass(frozen=True)
class FluxFile:
    """The transformer's tensors (prefix stripped) and what the header says about them.

    ``layout`` "bfl" (fused, single file) or "diffusers"; ``prefix`` goes before every key when the model is saved (always
    in BFL names); ``extras`` are the other tensors of ``whole``, the source as opened. Widths: of the transformer, of the
    text tokens and of the pooled text it takes.
    """

    source: Source
    variant: str
    layout: str
    prefix: str
    whole: Source
    extras: tuple[str, ...]
    width: int
    head_dim: int
    text_width: int
    pooled_width: int


@dataclass(frozen=True)
class FluxParts:
    """Everything found, nothing loaded. ``origins`` tells for each part where it came from."""

    transformer: FluxFile
    ae: Source
    clip_l: Source
    t5xxl: Source
    clip_l_tokenizer: Path
    t5xxl_tokenizer: Path
    origins: Mapping[str, str]

    def summary(self) -> str:
        """For the log: the variant, and a line per part that says where it was found."""
        layout = {"bfl": "original", "diffusers": "diffusers"}[self.transformer.layout]
        kind = f"FLUX.1-{self.transformer.variant}, {layout} layout: {self.transformer.whole.path}"
        return "\n".join([kind, *(f"  {name}: {origin}" for name, origin in self.origins.items())])


def open_parts(pretrained: str | Path, *, ae: Path | str | None = None, clip_l: Path | str | None = None,
               t5xxl: Path | str | None = None, clip_l_tokenizer: str | None = None, t5xxl_tokenizer: str | None = None,
               hub: Hub | None = None) -> FluxParts:
    """Find every part. Raises one UserError (``UserErrors``) with all that is missing or wrong, before any download of encoders.

    Empty strings count as not given. ``hub`` is replaced in tests.
    """
    hub = hub or Hub()
    given = {"ae": ae, "clip_l": clip_l, "t5xxl": t5xxl}
    try:
        transformer = describe(open_checkpoint(CHECKPOINT, pretrained, hub))
    except UserError as error:
        raise_all([error, *absent(given)])  # what the other parts must look like is not known; whether they exist is
        raise AssertionError from error
    specs = part_specs(transformer, given, repo=repository(pretrained))
    found, errors = find(transformer.whole, specs, known_keys.recognise, hub)
    wanted = {"clip_l_tokenizer": clip_l_tokenizer, "t5xxl_tokenizer": t5xxl_tokenizer}
    beside = search_folders(transformer.whole.path)[0]
    tokenizers, missing = _find_tokenizers(beside, found, wanted, repository(pretrained), hub)
    errors += missing
    raise_all(errors)
    located = fetch(found, specs, known_keys.recognise, hub)
    folders = {kind: place.fetch(hub) for kind, place in tokenizers.items()}
    origins = {name: part.origin for name, part in located.items()} | {kind: place.origin for kind, place in tokenizers.items()}
    return FluxParts(transformer, located["ae"].source, located["clip_l"].source, located["t5xxl"].source,
                     folders["clip_l_tokenizer"], folders["t5xxl_tokenizer"], origins)


def open_tokenizers(pretrained: str | Path, *, clip_l: Path | str | None = None, t5xxl: Path | str | None = None,
                    clip_l_tokenizer: str | None = None, t5xxl_tokenizer: str | None = None,
                    hub: Hub | None = None) -> tuple[str, Path, Path]:
    """(variant, folder of CLIP-L's tokenizer, folder of T5's), as ``open_parts`` finds them, whatever else is missing. Of the hub
    nothing but tokenizers is downloaded."""
    hub, repo = hub or Hub(), repository(pretrained)
    found: Mapping[str, Found | HubFile] = {}
    try:
        transformer = describe(open_checkpoint(CHECKPOINT, pretrained, Hub(hub.cache, offline=True)))
    except UserError:
        if repo is None:
            raise
        variant, beside = ("schnell" if "schnell" in repo.lower() else "dev"), []  # still on the hub: so it is called
    else:
        variant, beside = transformer.variant, search_folders(transformer.whole.path)[0]
        specs = part_specs(transformer, {"clip_l": clip_l, "t5xxl": t5xxl}, repo=repo)
        found, _ = find(transformer.whole, [spec for spec in specs if spec.name != "ae"], known_keys.recognise, hub)
    wanted = {"clip_l_tokenizer": clip_l_tokenizer, "t5xxl_tokenizer": t5xxl_tokenizer}
    places, errors = _find_tokenizers(beside, found, wanted, repo, hub)
    raise_all(errors)
    return variant, places["clip_l_tokenizer"].fetch(hub), places["t5xxl_tokenizer"].fetch(hub)


def _find_tokenizers(beside: Sequence[Path], found: Mapping[str, Found | HubFile], wanted: Mapping[str, str | None],
                     repo: str | None, hub: Hub) -> tuple[dict[str, TokenizerPlace], list[UserError]]:
    """Beside the encoder of each, where that was ``found``, and in the folders ``beside`` the transformer."""
    places: dict[str, TokenizerPlace] = {}
    errors: list[UserError] = []
    for kind, given in wanted.items():
        encoder = found.get(kind.removesuffix("_tokenizer"))
        own = search_folders(encoder.source.path)[0] if isinstance(encoder, Found) else []
        try:
            places[kind] = find_tokenizer(TOKENIZERS[kind], given, [*own, *beside], repo, hub)
        except UserError as error:
            errors.append(error)
    return places, errors


def describe(source: Source) -> FluxFile:
    """What the header says. UserError for anything but a trainable FLUX.1 transformer, saying what it is instead."""
    tensors = source.tensors
    title = known_keys.recognise(tensors)
    if (quantised := known_keys.quantisation(tensors)):
        raise UserError(f"{source.path} is quantised ({quantised}), which cannot be fine-tuned", place=FLAG,
                        remedy="give the bf16, fp16, fp32 or fp8 file of the model")
    if not title.startswith("a FLUX.1 transformer"):
        raise UserError(f"{source.path} is not a FLUX.1 checkpoint: it looks like {title}", place=FLAG,
                        remedy=known_keys.other_script(title, "give a FLUX.1-dev or FLUX.1-schnell checkpoint"))
    prefix = known_keys.transformer_prefix(tensors)
    view = source.view(prefix) if prefix else source
    names = view.tensors
    layout = "bfl" if "img_in.weight" in names else "diffusers"
    embed, text, pooled, out, scale, guidance = _key_facts(layout)
    missing = [key for key in (embed, text, pooled, out, scale) if key not in names]
    if missing:
        raise UserError(f"{source.path} looks like a FLUX.1 transformer but lacks {', '.join(missing)}", place=FLAG,
                        remedy="download the file again, or give a complete checkpoint")
    if names[embed].shape[1] != names[out].shape[0]:
        raise UserError(f"{source.path} takes {names[embed].shape[1]} inputs per image token but predicts {names[out].shape[0]}: "
                        "it looks like a Fill, Canny, Depth or other control variant of FLUX.1, whose extra inputs no dataset "
                        "here provides", place=FLAG, remedy="give a FLUX.1-dev or FLUX.1-schnell checkpoint")
    if names[out].shape[0] != TOKEN_WIDTH:
        raise UserError(f"{source.path} predicts {names[out].shape[0]} numbers per image token where FLUX.1 has {TOKEN_WIDTH}",
                        place=FLAG, remedy="give a FLUX.1-dev or FLUX.1-schnell checkpoint")
    return FluxFile(source=view, variant="dev" if guidance in names else "schnell", layout=layout,
                    prefix=prefix if layout == "bfl" else "", whole=source,
                    extras=tuple(name for name in tensors if layout == "bfl" and not name.startswith(prefix)),
                    width=names[embed].shape[0], head_dim=names[scale].shape[0], text_width=names[text].shape[1],
                    pooled_width=names[pooled].shape[1])


def part_specs(transformer: FluxFile, given: Mapping[str, Path | str | None], repo: str | None = None) -> tuple[PartSpec, ...]:
    """What to look for beside ``transformer``: encoders must have the widths it takes. ``repo``: the repository it came from."""
    official = (DEV_REPO, SCHNELL_REPO) if transformer.variant == "dev" else (SCHNELL_REPO, DEV_REPO)
    repos = tuple(dict.fromkeys(((repo,) if repo else ()) + official))

    def in_repos(*names: str) -> tuple[tuple[str, str], ...]:
        return tuple((repository, name) for repository in repos for name in names)

    return (
        PartSpec("ae", "FLUX.1 autoencoder", "--ae", given.get("ae"), ("vae.", "first_stage_model."), AE_FILES, ("vae",),
                 (*in_repos("ae.safetensors", "vae/diffusion_pytorch_model.safetensors"), AE_ELSEWHERE),
                 lambda tensors: is_autoencoder(tensors, LATENT_CHANNELS, quant=False)),
        PartSpec("clip_l", f"CLIP-L text encoder (width {transformer.pooled_width})", "--clip_l", given.get("clip_l"),
                 ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."), CLIP_FILES, ("clip", "text_encoders"),
                 ((ENCODERS_REPO, "clip_l.safetensors"), *in_repos("text_encoder/model.safetensors")),
                 lambda tensors: clip_width(tensors) == transformer.pooled_width),
        PartSpec("t5xxl", f"T5-XXL text encoder (width {transformer.text_width})", "--t5xxl", given.get("t5xxl"),
                 ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."), T5_FILES, ("clip", "text_encoders"),
                 (*((ENCODERS_REPO, name) for name in encoder_files.T5_ON_HUB),
                  *in_repos("text_encoder_2/model.safetensors.index.json")),
                 lambda tensors: is_t5(tensors, transformer.text_width)),
    )


def _key_facts(layout: str) -> tuple[str, str, str, str, str, str]:
    """Keys of: image input, text input, pooled input, output, query norm, guidance embedding."""
    if layout == "bfl":
        return ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight",
                "double_blocks.0.img_attn.norm.query_norm.scale", "guidance_in.in_layer.weight")
    return ("x_embedder.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight", "proj_out.weight",
            "transformer_blocks.0.attn.norm_q.weight", "time_text_embed.guidance_embedder.linear_1.weight")
