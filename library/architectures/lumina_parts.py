"""The files that Lumina-Image 2.0 and Lumina-Next are made of: which file is what, and where people keep them. Headers only.

``open_parts`` is the door: it finds the transformer, the text encoder, the autoencoder and the tokenizer, or says in one go
everything that is missing or wrong. The two families are told apart by the transformer's tensors, and so is what they need:

                     text encoder               autoencoder
    Lumina-Image 2.0 Gemma-2-2B (width 2304)    FLUX.1's, 16 channels
    Lumina-Next      Gemma-2B (width 2048)      SDXL's, 4 channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.architectures import flux_parts, sdxl_parts
from library.architectures.encoder_files import is_autoencoder
from library.architectures.opening import FLAG, CheckpointSpec, absent, open_checkpoint, repository
from library.architectures.tokenizers import GEMMA_TOKENIZER_FILES, TokenizerPlace, TokenizerSpec, find_tokenizer
from library.checkpoint import known_keys
from library.checkpoint.gemma_keys import ENCODER_PREFIX
from library.checkpoint.header import TensorInfo
from library.checkpoint.hub import Hub
from library.checkpoint.locate import Found, PartSpec, fetch, find, search_folders
from library.checkpoint.source import Source
from library.errors import UserError, raise_all

Tensors = Mapping[str, TensorInfo]
IMAGE_2, NEXT = "Lumina-Image 2.0", "Lumina-Next"
IMAGE_2_REPO, NEXT_REPO = "Alpha-VLLM/Lumina-Image-2.0", "Alpha-VLLM/Lumina-Next-SFT-diffusers"
REPACKAGED = "Comfy-Org/Lumina_Image_2.0_Repackaged"
CHANNELS = {IMAGE_2: 16, NEXT: 4}
PATCH = 2
_ENCODER_IN_FOLDER = ("text_encoder/model.safetensors.index.json", "text_encoder/model.safetensors")
_COMPONENT = ("transformer/diffusion_pytorch_model.safetensors.index.json", "transformer/diffusion_pytorch_model.safetensors")
CHECKPOINT = CheckpointSpec("Lumina-Image 2.0 or Lumina-Next", "transformer", (
    *_COMPONENT, "split_files/diffusion_models/lumina_2_model_bf16.safetensors", "all_in_one/lumina_2.safetensors",
    "consolidated.00-of-01.safetensors", "consolidated_ema.00-of-01.safetensors"))
ENCODER_FILES = {
    IMAGE_2: ("gemma_2_2b_fp16.safetensors", "gemma_2_2b.safetensors", "gemma_2_2b_bf16.safetensors", "gemma2_2b.safetensors",
              "gemma2_2b_fp16.safetensors", "gemma2_2b_bf16.safetensors", "gemma2.safetensors",
              "gemma-2-2b/model.safetensors.index.json", *_ENCODER_IN_FOLDER),
    NEXT: ("gemma_2b.safetensors", "gemma-2b.safetensors", "gemma_2b_bf16.safetensors", "gemma_2b_fp16.safetensors",
           "gemma.safetensors", "gemma-2b/model.safetensors.index.json", *_ENCODER_IN_FOLDER),
}
ENCODERS_ON_HUB = {
    IMAGE_2: ((IMAGE_2_REPO, _ENCODER_IN_FOLDER[0]), (REPACKAGED, "split_files/text_encoders/gemma_2_2b_fp16.safetensors"),
              ("google/gemma-2-2b", "model.safetensors.index.json")),
    NEXT: ((NEXT_REPO, _ENCODER_IN_FOLDER[0]), ("google/gemma-2b", "model.safetensors.index.json")),
}
AUTOENCODERS_ON_HUB = {
    IMAGE_2: ((REPACKAGED, "split_files/vae/ae.safetensors"), (IMAGE_2_REPO, "vae/diffusion_pytorch_model.safetensors")),
    NEXT: ((NEXT_REPO, "vae/diffusion_pytorch_model.safetensors"),
           (sdxl_parts.BASE_REPO, "vae/diffusion_pytorch_model.safetensors")),
}
# Both encoders have the same vocabulary.
TOKENIZER = TokenizerSpec("gemma", "Gemma tokenizer", "--gemma2_tokenizer", GEMMA_TOKENIZER_FILES,
                          ("tokenizer", "gemma2_tokenizer", "gemma_tokenizer", "gemma-2-2b", "gemma-2b"),
                          ((IMAGE_2_REPO, "tokenizer"), (NEXT_REPO, "tokenizer"), ("google/gemma-2-2b", "")))


@dataclass(frozen=True)
class LuminaFile:
    """The transformer's tensors (prefix stripped) and what the header says about them.

    ``family`` IMAGE_2 or NEXT; ``layout`` "original" or "diffusers"; ``prefix`` stood before the names in ``whole``, the source
    as opened. Widths: of the transformer, of one head, of all key heads together, of the feed-forward, and of the text it takes.
    """

    source: Source
    family: str
    layout: str
    prefix: str
    whole: Source
    width: int
    head_dim: int
    key_width: int
    inner: int
    text_width: int


@dataclass(frozen=True)
class LuminaParts:
    """Everything found, nothing loaded. ``origins`` tells for each part where it came from."""

    transformer: LuminaFile
    gemma: Source
    ae: Source
    tokenizer: Path
    origins: Mapping[str, str]

    def summary(self) -> str:
        """For the log: the family, and a line per part that says where it was found."""
        kind = f"{self.transformer.family}, {self.transformer.layout} layout: {self.transformer.whole.path}"
        return "\n".join([kind, *(f"  {name}: {origin}" for name, origin in self.origins.items())])


def open_parts(pretrained: str | Path, *, gemma2: Path | str | None = None, ae: Path | str | None = None,
               ae_flag: str = "--ae", gemma2_tokenizer: str | None = None, hub: Hub | None = None) -> LuminaParts:
    """Find every part. Raises one UserError (``UserErrors``) with all that is missing or wrong, before any large download.

    ``ae_flag``: by which name the autoencoder was given. Empty strings count as not given. ``hub`` is replaced in tests.
    """
    hub = hub or Hub()
    try:
        transformer = describe(open_checkpoint(CHECKPOINT, pretrained, hub))
    except UserError as error:
        # what the other parts must look like is not known; whether they exist is
        raise_all([error, *absent({"gemma2": gemma2, ae_flag.removeprefix("--"): ae})])
        raise AssertionError from error
    repo = repository(pretrained)
    specs = part_specs(transformer, gemma2, ae, ae_flag, repo)
    found, errors = find(transformer.whole, specs, looks_like, hub)
    place = None
    try:
        place = _find_tokenizer(transformer, found.get("gemma"), gemma2_tokenizer, repo, hub)
    except UserError as error:
        errors.append(error)
    raise_all(errors)
    assert place is not None
    located = fetch(found, specs, looks_like, hub)
    origins = {name: part.origin for name, part in located.items()} | {"tokenizer": place.origin}
    return LuminaParts(transformer, located["gemma"].source, located["ae"].source, place.fetch(hub), origins)


def open_tokenizer(pretrained: str | Path, *, gemma2: Path | str | None = None, gemma2_tokenizer: str | None = None,
                   hub: Hub | None = None) -> Path:
    """The tokenizer's folder, as ``open_parts`` finds it, whatever else is missing. Nothing else is downloaded."""
    hub, repo = hub or Hub(), repository(pretrained)
    try:
        transformer = describe(open_checkpoint(CHECKPOINT, pretrained, Hub(hub.cache, offline=True)))
    except UserError:
        if repo is None:
            raise
        return find_tokenizer(TOKENIZER, gemma2_tokenizer, [], repo, hub).fetch(hub)
    encoder = [spec for spec in part_specs(transformer, gemma2, None, "--ae", repo) if spec.name == "gemma"]
    found, _ = find(transformer.whole, encoder, looks_like, hub)
    return _find_tokenizer(transformer, found.get("gemma"), gemma2_tokenizer, repo, hub).fetch(hub)


def _find_tokenizer(transformer: LuminaFile, encoder: object, given: str | None, repo: str | None, hub: Hub) -> TokenizerPlace:
    """Beside the encoder, where that was found on this machine, and beside the transformer."""
    own = search_folders(encoder.source.path)[0] if isinstance(encoder, Found) else []
    own += [folder.parent for folder in own if folder.name == "text_encoder"]  # of a diffusers pipeline
    return find_tokenizer(TOKENIZER, given, [*own, *search_folders(transformer.whole.path)[0]], repo, hub)


def describe(source: Source) -> LuminaFile:
    """What the header says. UserError for anything but a trainable transformer of one of the two families."""
    tensors, title = source.tensors, known_keys.recognise(source.tensors)
    if (quantised := known_keys.quantisation(tensors)):
        raise UserError(f"{source.path} is quantised ({quantised}), which cannot be fine-tuned", place=FLAG,
                        remedy="give the bf16, fp16 or fp32 file of the model")
    wanted = f"give a checkpoint of {IMAGE_2} or {NEXT}"
    family = next((name for name in (IMAGE_2, NEXT) if title.startswith(f"a {name} transformer")), None)
    if family is None:
        raise UserError(f"{source.path} is not a Lumina checkpoint: it looks like {title}", place=FLAG,
                        remedy=known_keys.other_script(title, wanted))
    prefix = known_keys.transformer_prefix(tensors)
    view = source.view(prefix) if prefix else source
    names = view.tensors
    layout = "original" if "final_layer.linear.weight" in names else "diffusers"
    keys = _KEYS[family, layout]
    missing = [key for key in vars(keys).values() if key not in names]
    if missing:
        raise UserError(f"{source.path} looks like {family} but lacks {', '.join(missing)}", place=FLAG,
                        remedy="download the file again, or give a complete checkpoint")
    width, tokens = names[keys.embed].shape
    channels = tokens // PATCH**2
    if channels != CHANNELS[family]:
        raise UserError(f"{source.path} takes {channels} latent channels where {family} takes {CHANNELS[family]}: it is a "
                        "variant whose extra inputs no dataset here provides", place=FLAG, remedy=wanted)
    size = names[keys.head].shape[0]
    head_dim = size if family == IMAGE_2 else width // size  # the norm of one head, or one number per head
    # in the original file of 2.0 queries, keys and values are one matrix
    key_width = names[keys.key].shape[0]
    key_width = (key_width - width) // 2 if (family, layout) == (IMAGE_2, "original") else key_width
    if head_dim == 0 or width % head_dim or key_width % head_dim:
        raise UserError(f"{source.path}: widths {width} and {key_width} do not divide into heads of {head_dim}", place=FLAG,
                        remedy=wanted)
    return LuminaFile(view, family, layout, prefix, source, width, head_dim, key_width, names[keys.inner].shape[0],
                      names[keys.text].shape[0])


@dataclass(frozen=True)
class _Keys:
    """Keys of: image input, text input (its norm), what tells the heads, key projection, first feed-forward matrix, output."""

    embed: str
    text: str
    head: str
    key: str
    inner: str
    out: str


_KEYS = {
    (IMAGE_2, "original"): _Keys("x_embedder.weight", "cap_embedder.0.weight", "layers.0.attention.q_norm.weight",
                                 "layers.0.attention.qkv.weight", "layers.0.feed_forward.w1.weight", "final_layer.linear.weight"),
    (IMAGE_2, "diffusers"): _Keys("x_embedder.weight", "time_caption_embed.caption_embedder.0.weight",
                                  "layers.0.attn.norm_q.weight", "layers.0.attn.to_k.weight",
                                  "layers.0.feed_forward.linear_1.weight", "norm_out.linear_2.weight"),
    (NEXT, "original"): _Keys("x_embedder.weight", "cap_embedder.0.weight", "layers.0.attention.gate",
                              "layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight", "final_layer.linear.weight"),
    (NEXT, "diffusers"): _Keys("patch_embedder.proj.weight", "time_caption_embed.caption_embedder.0.weight", "layers.0.gate",
                               "layers.0.attn1.to_k.weight", "layers.0.feed_forward.linear_1.weight", "norm_out.linear_2.weight"),
}


def part_specs(transformer: LuminaFile, gemma2: Path | str | None, ae: Path | str | None, ae_flag: str,
               repo: str | None = None) -> tuple[PartSpec, PartSpec]:
    """What to look for beside ``transformer``: the encoder must have the width it takes. ``repo``: where it came from."""
    family, width = transformer.family, transformer.text_width
    second = family == IMAGE_2

    def on_hub(places: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        return (*((repo, name) for name in names if repo), *places)

    autoencoder = PartSpec(
        "ae", "FLUX.1 autoencoder (16 channels)" if second else "SDXL autoencoder (4 channels)", ae_flag, ae,
        ("vae.", "first_stage_model."), flux_parts.AE_FILES if second else sdxl_parts.VAE_FILES, ("vae",),
        on_hub(AUTOENCODERS_ON_HUB[family], ("vae/diffusion_pytorch_model.safetensors",)),
        lambda tensors: is_autoencoder(tensors, CHANNELS[family], quant=not second))
    encoder = PartSpec(
        "gemma", f"{'Gemma-2-2B' if second else 'Gemma-2B'} text encoder (width {width})", "--gemma2", gemma2,
        (f"{ENCODER_PREFIX}transformer.", ENCODER_PREFIX), ENCODER_FILES[family], ("clip", "text_encoders"),
        on_hub(ENCODERS_ON_HUB[family], _ENCODER_IN_FOLDER),
        lambda tensors: gemma_generation(tensors) == (2 if second else 1) and gemma_width(tensors) == width)
    return encoder, autoencoder


def gemma_generation(tensors: Tensors) -> int:
    """1 for Gemma, 2 for Gemma 2, which has twice the norms; 0 for anything else (Gemma 3 also normalises queries)."""
    names = {name.removeprefix("model.") for name in tensors if name.removeprefix("model.").startswith("layers.0.")}
    if "layers.0.self_attn.q_proj.weight" not in names or "layers.0.self_attn.q_norm.weight" in names \
            or "layers.0.self_attn.q_proj.bias" in names:
        return 0
    return 2 if "layers.0.pre_feedforward_layernorm.weight" in names else 1


def gemma_width(tensors: Tensors) -> int:
    """Width of a language model's tokens; 0 without them."""
    return next((tensors[key].shape[1] for key in ("embed_tokens.weight", "model.embed_tokens.weight") if key in tensors), 0)


def looks_like(tensors: Tensors) -> str:
    """What ``known_keys`` says, and of language models the two facts that count here."""
    title = known_keys.recognise(tensors)
    if title != "a language model":
        return title
    return f"a language model of width {gemma_width(tensors)}" + (", Gemma 2" if gemma_generation(tensors) == 2 else "")
