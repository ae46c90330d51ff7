"""The key maps: exact both ways, equal to diffusers' and transformers' own conversions, and to the files people have."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (convert_flux_transformer_checkpoint_to_diffusers, convert_ldm_unet_checkpoint,
                                                 convert_ldm_vae_checkpoint, convert_open_clip_checkpoint,
                                                 convert_sd3_transformer_checkpoint_to_diffusers)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from library.checkpoint.autoencoder_keys import AUTOENCODER, AUTOENCODER_QUANT
from library.checkpoint.clip_keys import CLIP, CLIP_FLAT, CLIP_PROJECTED, OPEN_CLIP
from library.checkpoint.export import carry, export_module
from library.checkpoint.flux_keys import TRANSFORMER
from library.checkpoint.header import TensorInfo
from library.checkpoint.keymap import KeyMap, _module_patterns, _regex, best_fit, identity, module_shapes
from library.checkpoint.reader import Source, build_on_meta, load_module, match_names, open_source
from library.checkpoint.sd3_keys import ENCODER_PREFIXES, MMDIT_PREFIX, mmdit
from library.checkpoint.sdxl_keys import CLIP_G_PREFIX, CLIP_L_PREFIX, UNET, UNET_PREFIX, VAE_PREFIX, unet
from library.checkpoint.t5_keys import T5
from library.checkpoint.writer import write_safetensors

LAYOUTS = Path(__file__).parent.parent / "data" / "layouts"
T5_SIZES = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
CLIP_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
              "bos_token_id": 0, "eos_token_id": 1}
CLIP_FULL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_FULL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
TINY_FLUX = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4,
             "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)}
CLIP_G_FULL = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
               "projection_dim": 1280}
# Parts of a published file that is one file: name here -> (file, prefix).
SDXL = "sdxl_base_1.0"
PARTS = {"sdxl-unet": (SDXL, UNET_PREFIX), "sdxl-clip_l": (SDXL, CLIP_L_PREFIX), "sdxl-clip_g": (SDXL, CLIP_G_PREFIX),
         "sdxl-vae": (SDXL, VAE_PREFIX)}
SD3_FILES = ("sd3_medium", "sd3.5_medium", "sd3.5_large")
WHOLE = "sd3_medium_incl_clips_t5xxl"
PARTS |= {f"{name}-mmdit": (name, MMDIT_PREFIX) for name in SD3_FILES}
PARTS |= {"sd3-vae": ("sd3_medium", VAE_PREFIX), **{f"sd3-{name}": (WHOLE, prefix) for name, prefix in ENCODER_PREFIXES.items()}}


def autoencoder(channels=(128, 256, 512, 512), layers=2, groups=32, quant=False):
    depth = len(channels)
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth,
                         block_out_channels=channels, layers_per_block=layers, latent_channels=4 if quant else 16,
                         norm_num_groups=groups, use_quant_conv=quant, use_post_quant_conv=quant)


def clip_g(**sizes):
    return CLIPTextModelWithProjection(CLIPTextConfig(**(sizes or CLIP_SIZES | {"projection_dim": 24})))


def unet_model(channels=(320, 640, 1280), layers=2, depths=(1, 2, 10), heads=(5, 10, 20), context=2048, labels=2816, groups=32):
    """SDXL's U-Net: no attention in the finest level."""
    coarser = len(channels) - 1
    return UNet2DConditionModel(
        block_out_channels=channels, layers_per_block=layers, transformer_layers_per_block=depths, attention_head_dim=heads,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * coarser, norm_num_groups=groups,
        up_block_types=("CrossAttnUpBlock2D",) * coarser + ("UpBlock2D",), cross_attention_dim=context,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=labels)


def t5(**sizes):
    return T5EncoderModel(T5Config(**(sizes or T5_SIZES), feed_forward_proj="gated-gelu"))


def mmdit_model(depth=24, heads=24, dual=(), qk_norm=None, positions=192, text=4096, pooled=2048):
    """``SD3Transformer2DModel``; SD3-medium by default."""
    return SD3Transformer2DModel(
        num_layers=depth, num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads, qk_norm=qk_norm,
        joint_attention_dim=text, pooled_projection_dim=pooled, pos_embed_max_size=positions, dual_attention_layers=dual)


TINY = {
    "dev": (lambda: FluxTransformer2DModel(**TINY_FLUX, guidance_embeds=True), TRANSFORMER),
    "schnell": (lambda: FluxTransformer2DModel(**TINY_FLUX, guidance_embeds=False), TRANSFORMER),
    "autoencoder": (lambda: autoencoder((8, 16, 24), 1, 4), AUTOENCODER),
    "clip_l": (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_SIZES)), CLIP),
    "clip_l_flat": (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_SIZES)), CLIP_FLAT),
    "t5": (t5, T5),
    "unet": (lambda: unet_model((4, 8, 12), 2, (1, 1, 2), (1, 1, 2), 8, 20, 2), UNET),
    "unet-of-another-shape": (lambda: unet_model((4, 8), 1, (1, 3), (1, 2), 8, 20, 2), unet(levels=2, layers=1)),
    "autoencoder-4": (lambda: autoencoder((8, 16, 24), 1, 4, quant=True), AUTOENCODER_QUANT),
    "open_clip": (clip_g, OPEN_CLIP),
    "clip_projected": (clip_g, CLIP_PROJECTED),
    "mmdit": (lambda: mmdit_model(3, 1, positions=4, text=8, pooled=6), mmdit(3)),
    "mmdit-3.5-large": (lambda: mmdit_model(2, 1, (), "rms_norm", 4, 8, 6), mmdit(2)),
    "mmdit-3.5-medium": (lambda: mmdit_model(3, 1, (0, 1), "rms_norm", 4, 8, 6), mmdit(3)),
}
FULL = {
    "flux1-dev": (lambda: FluxTransformer2DModel(guidance_embeds=True), TRANSFORMER),
    "flux1-schnell": (lambda: FluxTransformer2DModel(guidance_embeds=False), TRANSFORMER),
    "ae": (autoencoder, AUTOENCODER),
    "clip_l": (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_FULL)), CLIP),
    "t5xxl": (lambda: t5(**T5_FULL), T5),
    "sdxl-unet": (unet_model, UNET),
    "sdxl-clip_l": (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_FULL)), CLIP),
    "sdxl-clip_g": (lambda: clip_g(**CLIP_G_FULL), OPEN_CLIP),
    "sdxl-vae": (lambda: autoencoder(quant=True), AUTOENCODER_QUANT),
    "sd3_medium-mmdit": (mmdit_model, mmdit(24)),
    "sd3.5_medium-mmdit": (lambda: mmdit_model(dual=tuple(range(13)), qk_norm="rms_norm", positions=384), mmdit(24)),
    "sd3.5_large-mmdit": (lambda: mmdit_model(38, 38, qk_norm="rms_norm"), mmdit(38)),
    "sd3-vae": (autoencoder, AUTOENCODER),
    "sd3-clip_l": (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_FULL)), CLIP),
    "sd3-clip_g": (lambda: clip_g(**CLIP_G_FULL), CLIP_PROJECTED),
    "sd3-t5xxl": (lambda: t5(**T5_FULL), T5),
}


@cache
def layout(name: str) -> dict[str, tuple[int, ...]]:
    if name in PARTS:
        file, prefix = PARTS[name]
        return {key.removeprefix(prefix): shape for key, shape in layout(file).items() if key.startswith(prefix)}
    return {key: tuple(shape) for key, shape in json.loads((LAYOUTS / f"{name}.json").read_text()).items()}


@cache
def full_size(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return module_shapes(FULL[name][0]())


def header_only(shapes: dict[str, tuple[int, ...]]) -> Source:
    """What ``open_source`` makes of a bf16 file with these tensors; its data are never read."""
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        tensors[name] = TensorInfo("BF16", shape, Path("full.safetensors"), start, end)
    return Source(Path("full.safetensors"), tensors, {}, {})


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def seeded(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", TINY)
def test_module_to_file_and_back_is_exact(name, tmp_path):
    """Module -> original names -> safetensors -> a module built on meta: every bit again, tied weights tied."""
    factory, keymap = TINY[name]
    torch.manual_seed(0)
    module = factory()
    bound = keymap.bind(module_shapes(module))
    export = export_module(module, bound)
    assert [entry.name for entry in export.entries] == list(bound.original_shapes())
    write_safetensors(tmp_path / "m.safetensors", export.entries, export.get)
    again = load_module(build_on_meta(factory), open_source(tmp_path / "m.safetensors"), bound, dtype=None, place=name)
    first, second = module.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", TINY)
def test_file_to_module_and_back_is_exact(name):
    factory, keymap = TINY[name]
    bound = keymap.bind(module_shapes(factory()))
    original = seeded(bound.original_shapes())
    state = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    assert shapes_of(state) == bound.module_shapes()
    assert all(torch.equal(bound.to_original(key, state.__getitem__), tensor) for key, tensor in original.items())
    assert sum(tensor.numel() for tensor in state.values()) == sum(tensor.numel() for tensor in original.values())


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
def test_transformer_equals_diffusers_converter(name):
    """All full-size names with real numbers: the converter cuts rows only, so width 1 in place of 3072 changes nothing for it."""
    narrow = {key: (shape[0], *(1 for _ in shape[1:])) for key, shape in full_size(name).items()}
    bound = TRANSFORMER.bind(narrow)
    original = seeded(bound.original_shapes())
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
def test_transformer_shapes_equal_diffusers_converter(name):
    """The published file's names and true shapes, on meta, through the converter: what our map expects of the module."""
    original = {key: torch.empty(shape, device="meta") for key, shape in layout(name).items()}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    bound = TRANSFORMER.bind(full_size(name))
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    assert shapes_of(mine) == shapes_of(theirs)


def test_last_modulation_is_swapped():
    """(shift, scale) in the file, (scale, shift) in diffusers: by hand, as a wrong order would train and look plausible."""
    bound = TRANSFORMER.bind({"norm_out.linear.bias": (4,)})
    [(key, tensor)] = bound.to_module("final_layer.adaLN_modulation.1.bias", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert key == "norm_out.linear.bias" and tensor.tolist() == [3.0, 4.0, 1.0, 2.0]


def test_unet_equals_diffusers_converter():
    """All full-size names with real numbers; the converter never looks inside a tensor, so every side is cut to one."""
    narrow = {key: tuple(1 for _ in shape) for key, shape in full_size("sdxl-unet").items()}
    bound = UNET.bind(narrow)
    original = seeded(bound.original_shapes())
    assert set(original) == set(layout("sdxl-unet"))
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    with torch.device("meta"):
        config = dict(unet_model().config)
    theirs = convert_ldm_unet_checkpoint({UNET_PREFIX + key: tensor for key, tensor in original.items()}, config)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", SD3_FILES)
def test_mmdit_equals_diffusers_converter(name):
    """All full-size names with real numbers; the converter cuts rows only, which are scaled down: only their halves matter."""
    width = full_size(f"{name}-mmdit")["context_embedder.weight"][0]
    narrow = {key: tuple(side // (width // 2) if side >= width else 1 for side in shape[:1]) + tuple(1 for _ in shape[1:])
              for key, shape in full_size(f"{name}-mmdit").items()}
    depth = 38 if "large" in name else 24
    bound = mmdit(depth).bind(narrow)
    original = seeded(bound.original_shapes())
    assert set(original) == set(layout(f"{name}-mmdit"))
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    theirs = convert_sd3_transformer_checkpoint_to_diffusers({MMDIT_PREFIX + key: tensor for key, tensor in original.items()})
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", SD3_FILES)
def test_mmdit_shapes_equal_diffusers_converter(name):
    """The published file's names and true shapes, on meta, through the converter."""
    original = {key: torch.empty(shape, device="meta") for key, shape in layout(f"{name}-mmdit").items()}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    _, keymap = FULL[f"{name}-mmdit"]
    bound = keymap.bind(full_size(f"{name}-mmdit"))
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    assert shapes_of(mine) == shapes_of(theirs) == full_size(f"{name}-mmdit")


def test_open_clip_equals_diffusers_converter():
    """The packed attention is cut and the projection transposed, as diffusers and the reference encoder do."""
    # the converter takes the projection's rows for the model's width, which they are in the real file
    module = clip_g(**CLIP_SIZES | {"projection_dim": CLIP_SIZES["hidden_size"]})
    bound = OPEN_CLIP.bind(module_shapes(module))
    original = seeded(bound.original_shapes())
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    prefixed = {CLIP_G_PREFIX + key: tensor for key, tensor in original.items()}
    theirs = convert_open_clip_checkpoint(module, prefixed, CLIP_G_PREFIX)
    theirs.pop("text_model.embeddings.position_ids", None)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert not torch.equal(mine["text_projection.weight"], original["text_projection"])


def test_transposed_projection_from_a_file_is_used_as_x_times_p(tmp_path):
    """The file's matrix P, (width, projection): what the loaded module computes is x @ P, and it is written back as P."""
    bound = OPEN_CLIP.bind(module_shapes(clip_g()))
    original = seeded(bound.original_shapes())
    export = export_module(original, None)
    write_safetensors(tmp_path / "g.safetensors", export.entries, export.get)
    module = load_module(build_on_meta(clip_g), open_source(tmp_path / "g.safetensors"), bound, dtype=None, place="clip_g")
    vector = torch.randn(3, CLIP_SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    assert module.text_projection.weight.is_contiguous()
    torch.testing.assert_close(module.text_projection(vector), vector @ original["text_projection"])
    again = export_module(module, bound)
    assert torch.equal(again.get("text_projection"), original["text_projection"])


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("quant", [False, True])
def test_autoencoder_equals_diffusers_converter(prefix, quant):
    module = autoencoder((8, 16, 24, 24), 2, 4, quant)
    bound = (AUTOENCODER_QUANT if quant else AUTOENCODER).bind(module_shapes(module))
    original = seeded(bound.original_shapes())
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    theirs = convert_ldm_vae_checkpoint({prefix + key: tensor for key, tensor in original.items()}, dict(module.config))
    assert mine.keys() == theirs.keys() == module.state_dict().keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_full_autoencoder_equals_diffusers_converter():
    with torch.device("meta"):
        module = autoencoder()
        theirs = convert_ldm_vae_checkpoint({key: torch.empty(shape) for key, shape in layout("ae").items()}, dict(module.config))
    bound = AUTOENCODER.bind(module_shapes(module))
    mine = dict(pair for key, shape in layout("ae").items() for pair in bound.to_module(key, torch.empty(shape, device="meta")))
    assert shapes_of(mine) == shapes_of(theirs)


@pytest.mark.parametrize("name", ["clip_l", "t5"])
def test_text_encoders_equal_transformers_own_loading(name, tmp_path):
    """transformers reads the same file names by its own renaming: the same weights and the same output."""
    factory, keymap = TINY[name]
    bound = keymap.bind(module_shapes(factory()))
    original = seeded(bound.original_shapes())
    path = tmp_path / "model.safetensors"
    export = export_module(original, None)
    write_safetensors(path, export.entries, export.get, {"format": "pt"})
    factory().config.save_pretrained(tmp_path)
    theirs = type(factory()).from_pretrained(tmp_path, local_files_only=True).eval()
    mine = load_module(build_on_meta(factory), open_source(path), bound, dtype=torch.float32, place=name).eval()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in mine.state_dict().items())
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(mine(ids).last_hidden_state, theirs(ids).last_hidden_state)


def test_clip_of_either_transformers_generation():
    """The same file, whether the installed transformers keeps `text_model.` in the module or not."""
    flat = full_size("clip_l")
    prefixed = {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in flat.items()}
    bare = {key.removeprefix("text_model."): shape for key, shape in flat.items()}
    for shapes in (prefixed, bare):
        assert CLIP.bind(shapes).original_shapes() == layout("clip_l")
        assert set(CLIP_FLAT.bind(shapes).original_shapes()) == set(bare)
        bounds = [CLIP.bind(shapes), CLIP_FLAT.bind(shapes)]
        assert best_fit(layout("clip_l"), bounds) is bounds[0]
        assert best_fit(bare, bounds) is bounds[1]


@pytest.mark.parametrize("name", FULL)
def test_published_file_is_read_and_written_back_exactly(name):
    bound = FULL[name][1].bind(full_size(name))
    source = header_only(layout(name))
    assert_fits_and_returns(source, bound, "")


def assert_fits_and_returns(source: Source, bound, prefix: str):
    inner = source.view(prefix)
    assert set(match_names(inner, bound, "part").values()) == set(bound.bindings)
    module = {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in bound.module_shapes().items()}
    export = export_module(module, bound, prefix=prefix, also=source.layout_order, order=source.layout_order)
    kept = [(prefix + name, inner.tensors[name].shape) for name in inner.layout_order if not bound.is_dropped(name)]
    assert [(entry.name, entry.shape) for entry in export.entries] == kept
    assert all(tuple(export.get(entry.name).shape) == entry.shape for entry in export.entries)
    return export


def test_all_in_one_is_read_and_written_back_exactly():
    """1,442 tensors of four models; the three that no module has are carried over from the source."""
    source = header_only(layout("flux1-dev_all_in_one"))
    parts = {"model.diffusion_model.": "flux1-dev", "vae.": "ae", "text_encoders.clip_l.transformer.": "clip_l",
             "text_encoders.t5xxl.transformer.": "t5xxl"}
    whole = None
    for prefix, name in parts.items():
        export = assert_fits_and_returns(source, FULL[name][1].bind(full_size(name)), prefix)
        whole = export if whole is None else whole + export
    names = {entry.name for entry in whole.entries}
    rest = [name for name in source.layout_order if name not in names]
    assert sorted(rest) == ["text_encoders.clip_l.logit_scale", "text_encoders.clip_l.transformer.text_projection.weight",
                            "text_encoders.t5xxl.logit_scale"]
    whole = (whole + carry(source, rest)).in_order(source.layout_order)
    assert {entry.name: entry.shape for entry in whole.entries} == layout("flux1-dev_all_in_one")
    assert [entry.name for entry in whole.entries] == list(source.layout_order)


def test_single_file_of_four_models_is_read_and_written_back_exactly():
    """2,515 tensors; two belong to no module (a count of positions and a temperature) and are carried over."""
    source = header_only(layout(SDXL))
    whole = None
    for name, prefix in ((name, prefix) for name, (file, prefix) in PARTS.items() if file == SDXL):
        export = assert_fits_and_returns(source, FULL[name][1].bind(full_size(name)), prefix)
        whole = export if whole is None else whole + export
    names = {entry.name for entry in whole.entries}
    rest = [name for name in source.layout_order if name not in names]
    assert rest == [f"{CLIP_L_PREFIX}text_model.embeddings.position_ids", f"{CLIP_G_PREFIX}logit_scale"]
    whole = (whole + carry(source, rest)).in_order(source.layout_order)
    assert {entry.name: entry.shape for entry in whole.entries} == layout(SDXL)
    assert [entry.name for entry in whole.entries] == list(source.layout_order)


@pytest.mark.parametrize("file", [*SD3_FILES, "sd3_medium_incl_clips", WHOLE])
def test_sd3_files_are_read_and_written_back_exactly(file):
    """Transformer, autoencoder and what text encoders the file has: every tensor belongs to a module."""
    source = header_only(layout(file))
    transformer = file if file in SD3_FILES else "sd3_medium"
    parts = {MMDIT_PREFIX: f"{transformer}-mmdit", VAE_PREFIX: "sd3-vae",
             **{prefix: f"sd3-{name}" for name, prefix in ENCODER_PREFIXES.items()}}
    found = {prefix: name for prefix, name in parts.items() if any(key.startswith(prefix) for key in source.tensors)}
    assert len(found) == {"sd3_medium_incl_clips": 4, WHOLE: 5}.get(file, 2)
    exports = [assert_fits_and_returns(source, FULL[name][1].bind(full_size(name)), prefix) for prefix, name in found.items()]
    whole = exports[0]
    for export in exports[1:]:
        whole += export
    assert [entry.name for entry in whole.in_order(source.layout_order).entries] == list(source.layout_order)


def test_t5_takes_either_name_of_its_embedding(tmp_path):
    bound = T5.bind(module_shapes(t5()))
    original = seeded(bound.original_shapes())
    copy = {"encoder.embed_tokens.weight": original["shared.weight"]}
    without = {key: tensor for key, tensor in original.items() if key != "shared.weight"}
    loaded = []
    for number, tensors in enumerate((original, original | copy, without | copy)):
        export = export_module(tensors, None)
        write_safetensors(tmp_path / f"{number}.safetensors", export.entries, export.get)
        source = open_source(tmp_path / f"{number}.safetensors")
        loaded.append(load_module(build_on_meta(t5), source, bound, dtype=None, place="t5"))
    for module in loaded:
        assert module.shared.weight is module.encoder.embed_tokens.weight  # still tied, one copy in memory
        assert torch.equal(module.shared.weight, original["shared.weight"])


def test_best_fit_tells_bfl_from_diffusers_names():
    shapes = full_size("flux1-dev")
    bounds = [TRANSFORMER.bind(shapes), identity(shapes)]
    assert best_fit(layout("flux1-dev"), bounds) is bounds[0]
    assert best_fit(shapes, bounds) is bounds[1]


def test_a_module_with_an_unknown_tensor_is_our_mistake():
    with pytest.raises(AssertionError, match="no rule for the module's 'x_embedder_2.weight'"):
        TRANSFORMER.bind({"x_embedder_2.weight": (2, 2)})
    with pytest.raises(AssertionError, match="lacks"):
        TRANSFORMER.bind({"transformer_blocks.0.attn.to_q.weight": (2, 2)})


def test_every_name_has_one_rule():
    """In tables for several structures no rule hides another: each tensor of the module matches exactly one."""
    for keymap, name in ((UNET, "sdxl-unet"), (AUTOENCODER_QUANT, "sdxl-vae"), (OPEN_CLIP, "sdxl-clip_g")):
        patterns = [_regex(pattern) for rule in keymap.rules for pattern in _module_patterns(rule)]
        for key in full_size(name):
            assert sum(pattern.fullmatch(key) is not None for pattern in patterns) == 1, key


def test_every_rule_is_needed():
    """Without any one of them the full-size module is not covered: no rule is dead, none shadows another."""
    for keymap, name in ((TRANSFORMER, "flux1-dev"), (AUTOENCODER, "ae")):
        shapes = full_size(name)
        for index, rule in enumerate(keymap.rules):
            others = KeyMap(keymap.rules[:index] + keymap.rules[index + 1:])
            with pytest.raises(AssertionError):
                others.bind(shapes)
