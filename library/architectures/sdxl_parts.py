"""The files SDXL is made of: which file is what, and where people keep them. Reads headers only.

``open_parts`` is the door: it finds the U-Net, both text encoders, the autoencoder and both tokenizers, or says in one go
everything that is missing or wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from library.architectures.encoder_files import clip_projection_width, clip_width, is_autoencoder
from library.architectures.opening import FLAG, CheckpointSpec, absent, open_checkpoint, repository
from library.architectures.tokenizers import CLIP_TOKENIZER_FILES, TokenizerPlace, TokenizerSpec, find_tokenizer
from library.checkpoint import known_keys
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub
from library.checkpoint.locate import PartSpec, fetch, find, search_folders
from library.checkpoint.sdxl_keys import CLIP_G_PREFIX, CLIP_L_PREFIX, V_PREDICTION, VAE_PREFIX, ZERO_TERMINAL_SNR
from library.checkpoint.source import Source
from library.errors import UserError, raise_all

Tensors = Mapping[str, TensorInfo]
BASE_REPO = "stabilityai/stable-diffusion-xl-base-1.0"
LATENT_CHANNELS = 4
SIZE_WIDTH = 6 * 256  # of the six sizes, as sinusoids, in the vector that the U-Net takes beside the text


def _component(folder: str, name: str) -> tuple[str, ...]:
    """The files of one component of a diffusers pipeline: in full precision, in the half-precision variant, pickled."""
    pickled = {"model": "pytorch_model"}.get(name, name)
    return f"{folder}/{name}.safetensors", f"{folder}/{name}.fp16.safetensors", f"{folder}/{pickled}.bin"


CHECKPOINT = CheckpointSpec("SDXL", "unet", (*_component("unet", "diffusion_pytorch_model"), "sd_xl_base_1.0.safetensors",
                                             "sd_xl_base_1.0_0.9vae.safetensors"))
CLIP_L_FILES, CLIP_G_FILES = _component("text_encoder", "model"), _component("text_encoder_2", "model")
VAE_FILES = (*_component("vae", "diffusion_pytorch_model"), "sdxl_vae.safetensors", "sdxl-vae.safetensors",
             "sdxl_vae_fp16_fix.safetensors")
VAE_REPOSITORY = CheckpointSpec("SDXL's autoencoder", "vae", (
    "sdxl_vae.safetensors", "diffusion_pytorch_model.safetensors", *_component("vae", "diffusion_pytorch_model")))
TOKENIZER_FLAG = "--tokenizer_cache_dir"
# The second encoder's tokenizer has the same vocabulary as the first one's, so one set of files is enough.
TOKENIZER = TokenizerSpec("clip", "CLIP tokenizer", TOKENIZER_FLAG, CLIP_TOKENIZER_FILES,
                          ("tokenizer", "openai_clip-vit-large-patch14", "clip_l_tokenizer", "clip_tokenizer"),
                          (("openai/clip-vit-large-patch14", ""), (BASE_REPO, "tokenizer")))
TOKENIZER_2 = TokenizerSpec("clip", "second CLIP tokenizer", TOKENIZER_FLAG, CLIP_TOKENIZER_FILES,
                            ("tokenizer_2", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "clip_g_tokenizer"), ())


@dataclass(frozen=True)
class SdxlFile:
    """The U-Net's tensors (prefix stripped) and what the header says about them.

    ``layout`` "ldm" (single file) or "diffusers"; ``prefix`` stood before the names in ``whole``, the source as opened.
    ``predicts_velocity`` and ``zero_terminal_snr``: how the checkpoint says it was trained. Widths: of the text
    tokens and of the pooled text it takes.
    """

    source: Source
    layout: str
    prefix: str
    whole: Source
    predicts_velocity: bool
    zero_terminal_snr: bool
    text_width: int
    pooled_width: int


@dataclass(frozen=True)
class SdxlParts:
    """Everything found, nothing loaded. ``origins`` tells for each part where it came from."""

    unet: SdxlFile
    clip_l: Source
    clip_g: Source
    vae: Source
    tokenizer: Path
    tokenizer_2: Path
    origins: Mapping[str, str]

    def summary(self) -> str:
        """For the log: the kind of model, and a line per part that says where it was found."""
        layout = {"ldm": "single-file", "diffusers": "diffusers"}[self.unet.layout]
        notes = [note for note, holds in (("predicts velocity", self.unet.predicts_velocity),
                                          ("zero terminal SNR", self.unet.zero_terminal_snr)) if holds]
        kind = f"SDXL, {', '.join([f'{layout} layout', *notes])}: {self.unet.whole.path}"
        return "\n".join([kind, *(f"  {name}: {origin}" for name, origin in self.origins.items())])


def open_parts(pretrained: str | Path, *, vae: str | Path | None = None, tokenizer_cache_dir: Path | str | None = None,
               hub: Hub | None = None) -> SdxlParts:
    """Find every part. Raises one UserError (``UserErrors``) with all that is missing or wrong, before any large download.

    ``vae``: a file, folder or hub repository in place of the checkpoint's own autoencoder. ``tokenizer_cache_dir``: a folder
    with tokenizers as the dialect names them. Empty strings count as not given. ``hub`` is replaced in tests.
    """
    hub = hub or Hub()
    vae_repository = repository(vae) if vae else None
    try:
        unet = describe(open_checkpoint(CHECKPOINT, pretrained, hub))
    except UserError as error:
        raise_all([error, *absent({"vae": None if vae_repository else vae})])
        raise AssertionError from error
    if vae_repository:
        vae = open_checkpoint(VAE_REPOSITORY, vae, hub).path
    repo = repository(pretrained)
    specs = part_specs(unet, vae, repo)
    found, errors = find(unet.whole, specs, known_keys.recognise, hub)
    beside = [*([Path(tokenizer_cache_dir)] if tokenizer_cache_dir else []), *search_folders(unet.whole.path)[0]]
    places: dict[str, TokenizerPlace] = {}
    try:
        places = _tokenizers(beside, repo, hub)
    except UserError as error:
        errors.append(error)
    raise_all(errors)
    located = fetch(found, specs, known_keys.recognise, hub)
    folders = {kind: place.fetch(hub) for kind, place in places.items()}
    origins = {name: part.origin for name, part in located.items()} | {kind: place.origin for kind, place in places.items()}
    return SdxlParts(unet, located["clip_l"].source, located["clip_g"].source, located["vae"].source, folders["tokenizer"],
                     folders["tokenizer_2"], origins)


def open_tokenizer(pretrained: str | Path, tokenizer_cache_dir: Path | str | None = None, hub: Hub | None = None) -> Path:
    """The folder of the first tokenizer, as ``open_parts`` finds it, whatever else is missing. Nothing else is downloaded."""
    hub, repo = hub or Hub(), repository(pretrained)
    beside = [Path(tokenizer_cache_dir)] if tokenizer_cache_dir else []
    try:
        beside += search_folders(open_checkpoint(CHECKPOINT, pretrained, Hub(hub.cache, offline=True)).path)[0]
    except UserError:
        if repo is None:
            raise
    return find_tokenizer(TOKENIZER, None, beside, repo, hub).fetch(hub)


def describe(source: Source) -> SdxlFile:
    """What the header says. UserError for anything but a trainable SDXL U-Net, saying what it is instead."""
    tensors = source.tensors
    _refuse_other_models(source)
    prefix = known_keys.transformer_prefix(tensors)
    view = source.view(prefix) if prefix else source
    names = view.tensors
    layout = "ldm" if "input_blocks.0.0.weight" in names else "diffusers"
    first, labels, text = _key_facts(layout, names)
    missing = [key for key in (first, labels, text) if key not in names]
    if missing:
        raise UserError(f"{source.path} looks like SDXL but lacks {', '.join(missing)}", place=FLAG,
                        remedy="download the file again, or give a complete checkpoint")
    channels = names[first].shape[1]
    if channels != LATENT_CHANNELS:
        kind = "an inpainting model" if channels == 9 else "a variant that is shown a second picture"
        raise UserError(f"{source.path} takes {channels} latent channels where SDXL takes {LATENT_CHANNELS}: it is {kind}, whose "
                        "extra inputs no dataset here provides", place=FLAG, remedy="give an SDXL checkpoint of the plain kind")
    pooled = names[labels].shape[1] - SIZE_WIDTH
    velocity, zero_snr = V_PREDICTION in tensors, ZERO_TERMINAL_SNR in tensors
    if layout == "diffusers":
        saved = _scheduler(source.path)
        velocity = velocity or saved.get("prediction_type") == "v_prediction"
        zero_snr = zero_snr or bool(saved.get("rescale_betas_zero_snr"))
    return SdxlFile(view, layout, prefix, source, velocity, zero_snr, names[text].shape[1], pooled)


def _refuse_other_models(source: Source) -> None:
    tensors, title = source.tensors, known_keys.recognise(source.tensors)
    if (quantised := known_keys.quantisation(tensors)):
        raise UserError(f"{source.path} is quantised ({quantised}), which cannot be fine-tuned", place=FLAG,
                        remedy="give the fp16, bf16 or fp32 file of the model")
    bare = known_keys.bare_transformer_names(tensors)
    if any(name.startswith("conditioner.embedders.0.model.") for name in tensors) or any(
            name.startswith(("input_blocks.9.0.op.", "down_blocks.3.")) for name in bare) and title.startswith("an SDXL"):
        title = "the SDXL refiner, which is another model with one text encoder"
    elif any(name.startswith(("edm_", "model_sampling.edm")) for name in tensors):
        title = "an SDXL checkpoint trained on the EDM noise schedule, which this objective has not"
    elif title.startswith(("an SDXL checkpoint", "an SDXL UNet")):
        return
    wanted = "give an SDXL checkpoint (base 1.0 or a model trained from it)"
    raise UserError(f"{source.path} is not an SDXL base checkpoint: it looks like {title}", place=FLAG,
                    remedy=wanted if title.startswith("an SDXL") else known_keys.other_script(title, wanted))


def _key_facts(layout: str, names: Tensors) -> tuple[str, str, str]:
    """Keys of: latent input, the vector of pooled text and sizes, a key projection of the text."""
    pattern = re.compile(r"(input_blocks\.\d+\.1|down_blocks\.\d+\.attentions\.\d+)\.transformer_blocks\.0\.attn2\.to_k\.weight")
    text = next((name for name in names if pattern.fullmatch(name)), "the attention to the text")
    if layout == "ldm":
        return "input_blocks.0.0.weight", "label_emb.0.0.weight", text
    return "conv_in.weight", "add_embedding.linear_1.weight", text


def _scheduler(path: Path) -> Mapping[str, object]:
    """``scheduler_config.json`` of the diffusers folder that ``path`` (the U-Net's file or folder) belongs to."""
    folder = path if path.is_dir() else path.parent
    file = folder.parent / "scheduler" / "scheduler_config.json"
    if folder.name != CHECKPOINT.component or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}", remedy="download it again, or remove it") from error
    return config if isinstance(config, dict) else {}


def part_specs(unet: SdxlFile, vae: str | Path | None, repo: str | None = None) -> tuple[PartSpec, ...]:
    """What to look for beside ``unet``: encoders must have the widths it takes. ``repo``: the repository it came from."""
    def in_repos(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        return tuple((repository, name) for repository in dict.fromkeys(filter(None, (repo, BASE_REPO))) for name in names)

    return (
        PartSpec("clip_l", "CLIP-L text encoder", "", None, (CLIP_L_PREFIX,), CLIP_L_FILES, (), in_repos(CLIP_L_FILES),
                 lambda tensors: clip_width(tensors) in range(1, unet.text_width) and not clip_projection_width(tensors)),
        PartSpec("clip_g", f"CLIP-G text encoder (projection to {unet.pooled_width})", "", None, (CLIP_G_PREFIX,), CLIP_G_FILES,
                 (), in_repos(CLIP_G_FILES), lambda tensors: clip_projection_width(tensors) == unet.pooled_width),
        PartSpec("vae", "SDXL autoencoder", "--vae", vae, (VAE_PREFIX, "vae."), VAE_FILES, ("vae",),
                 in_repos(_component("vae", "diffusion_pytorch_model")),
                 lambda tensors: is_autoencoder(tensors, LATENT_CHANNELS, quant=True)),
    )


def _tokenizers(beside: list[Path], repo: str | None, hub: Hub) -> dict[str, TokenizerPlace]:
    first = find_tokenizer(TOKENIZER, None, beside, repo, hub)
    try:
        second = find_tokenizer(TOKENIZER_2, None, beside, repo, hub)
    except UserError:
        second = replace(first, origin="the same files")
    return {"tokenizer": first, "tokenizer_2": second}
