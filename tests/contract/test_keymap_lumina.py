"""Lumina's and Gemma's key maps: exact both ways, equal to diffusers' converter, and to the files people have."""

import json
from functools import cache

import pytest
import torch
from diffusers import Lumina2Transformer2DModel, LuminaNextDiT2DModel
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

from library.architectures.lumina_models import image_2_config, layouts, next_config, tie_queries
from library.architectures.lumina_parts import IMAGE_2, NEXT, describe, gemma_generation, gemma_width
from library.checkpoint import lumina_keys, lumina_next_keys
from library.checkpoint.autoencoder_keys import AUTOENCODER
from library.checkpoint.export import carry, export_module
from library.checkpoint.gemma_keys import GEMMA, GEMMA_FLAT
from library.checkpoint.keymap import KeyMap, best_fit, identity, module_shapes
from library.checkpoint.reader import build_on_meta, load_module, match_names, open_source
from library.checkpoint.writer import write_safetensors
from tests.contract.test_keymap import LAYOUTS, assert_fits_and_returns, autoencoder, header_only, seeded, shapes_of

GEMMA_TINY = {"hidden_size": 16, "head_dim": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
              "intermediate_size": 24, "vocab_size": 40, "pad_token_id": 0}
TINY = {
    "2.0": (lambda: Lumina2Transformer2DModel(hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
                                              num_kv_heads=1, axes_dim_rope=(4, 4, 4), cap_feat_dim=20), lumina_keys.TRANSFORMER),
    "next": (lambda: tie_queries(LuminaNextDiT2DModel(hidden_size=24, num_layers=2, num_attention_heads=2, num_kv_heads=1,
                                                      cross_attention_dim=20)), lumina_next_keys.TRANSFORMER),
    "next in diffusers' names": (lambda: tie_queries(LuminaNextDiT2DModel(hidden_size=24, num_layers=2, num_attention_heads=2,
                                                                          num_kv_heads=2, cross_attention_dim=20)),
                                 lumina_next_keys.DIFFUSERS),
    "gemma": (lambda: GemmaModel(GemmaConfig(**GEMMA_TINY)), GEMMA),
    "gemma2": (lambda: Gemma2Model(Gemma2Config(**GEMMA_TINY)), GEMMA),
    "gemma2 alone": (lambda: Gemma2Model(Gemma2Config(**GEMMA_TINY)), GEMMA_FLAT),
}
FULL = {
    "lumina_image_2.0": (lambda: Lumina2Transformer2DModel(cap_feat_dim=2304), lumina_keys.TRANSFORMER),
    "lumina_next_sft": (lambda: tie_queries(LuminaNextDiT2DModel(num_layers=24, num_kv_heads=8)), lumina_next_keys.TRANSFORMER),
    "gemma_2_2b": (lambda: Gemma2Model(Gemma2Config()), GEMMA),
    "ae": (autoencoder, AUTOENCODER),
}


@cache
def layout(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((LAYOUTS / f"{name}.json").read_text()).items()}


@cache
def full_size(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return module_shapes(FULL[name][0]())


@pytest.mark.parametrize("name", TINY)
def test_module_to_file_and_back_is_exact(name, tmp_path):
    """Module -> original names -> safetensors -> a module built on meta: every bit again, what is tied stays tied."""
    factory, keymap = TINY[name]
    torch.manual_seed(0)
    module = factory()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    bound = keymap.bind(module_shapes(module))
    export = export_module(module, bound)
    assert [entry.name for entry in export.entries] == list(bound.original_shapes())
    write_safetensors(tmp_path / "m.safetensors", export.entries, export.get)
    again = load_module(build_on_meta(factory), open_source(tmp_path / "m.safetensors"), bound, dtype=None, place=name)
    first, second = module.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    if hasattr(again, "patch_embedder"):
        assert all(layer.attn1.to_q.weight is layer.attn2.to_q.weight for layer in again.layers)
        assert all(layer.attn1.norm_q.bias is layer.attn2.norm_q.bias for layer in again.layers)


@pytest.mark.parametrize("name", TINY)
def test_file_to_module_and_back_is_exact(name):
    factory, keymap = TINY[name]
    bound = keymap.bind(module_shapes(factory()))
    original = seeded(bound.original_shapes())
    state = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    assert shapes_of(state) == bound.module_shapes()
    assert all(torch.equal(bound.to_original(key, state.__getitem__), tensor) for key, tensor in original.items())


def test_image_2_equals_diffusers_converter():
    """All full-size names with real numbers: the converter cuts rows only, so width 1 in place of 2304 changes nothing for it."""
    narrow = {key: (shape[0], *(1 for _ in shape[1:])) for key, shape in full_size("lumina_image_2.0").items()}
    bound = lumina_keys.TRANSFORMER.bind(narrow)
    original = seeded(bound.original_shapes())
    mine = dict(pair for key, tensor in original.items() for pair in bound.to_module(key, tensor))
    theirs = convert_lumina2_to_diffusers(dict(original) | {lumina_keys.UNUSED_NORM: torch.ones(1)})
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_image_2_shapes_equal_diffusers_converter():
    original = {key: torch.empty(shape, device="meta") for key, shape in layout("lumina_image_2.0").items()}
    theirs = convert_lumina2_to_diffusers(dict(original))
    assert shapes_of(theirs) == full_size("lumina_image_2.0")


@pytest.mark.parametrize("name", ["lumina_image_2.0", "lumina_next_sft", "gemma_2_2b"])
def test_published_file_is_read_and_written_back_exactly(name):
    """All but what no module has: an unused norm, a tokenizer. (Those are carried over, see below.)"""
    source = header_only(layout(name))
    bound = FULL[name][1].bind(full_size(name))
    assert_fits_and_returns(source, bound, "")
    dropped = [key for key in source.layout_order if bound.is_dropped(key)]
    assert dropped == {"lumina_image_2.0": ["norm_final.weight"], "gemma_2_2b": ["spiece_model"]}.get(name, [])


def test_all_in_one_is_read_and_written_back_exactly():
    """934 tensors of three models; the three that no module has are carried over from the source."""
    source = header_only(layout("lumina_2_all_in_one"))
    parts = {"model.diffusion_model.": "lumina_image_2.0", "vae.": "ae",
             "text_encoders.gemma2_2b.transformer.": "gemma_2_2b"}
    whole = None
    for prefix, name in parts.items():
        export = assert_fits_and_returns(source, FULL[name][1].bind(full_size(name)), prefix)
        whole = export if whole is None else whole + export
    names = {entry.name for entry in whole.entries}
    rest = [name for name in source.layout_order if name not in names]
    assert sorted(rest) == ["model.diffusion_model.norm_final.weight", "text_encoders.gemma2_2b.logit_scale",
                            "text_encoders.spiece_model"]
    whole = (whole + carry(source, rest)).in_order(source.layout_order)
    assert {entry.name: entry.shape for entry in whole.entries} == layout("lumina_2_all_in_one")
    assert [entry.name for entry in whole.entries] == list(source.layout_order)


@pytest.mark.parametrize("name, prefix, family", [
    ("lumina_image_2.0", "", IMAGE_2), ("lumina_2_all_in_one", "model.diffusion_model.", IMAGE_2), ("lumina_next_sft", "", NEXT)])
def test_published_file_is_recognised_and_its_module_described(name, prefix, family):
    """The settings read off the shapes build the module whose names and shapes the file has."""
    file = describe(header_only(layout(name)))
    assert (file.family, file.layout, file.prefix) == (family, "original", prefix)
    config = image_2_config(file) if family == IMAGE_2 else next_config(file)
    assert {key: config[key] for key in ("hidden_size", "num_attention_heads", "num_kv_heads", "multiple_of",
                                         "ffn_dim_multiplier")} == {
        "hidden_size": 2304, "num_attention_heads": 24 if family == IMAGE_2 else 32, "num_kv_heads": 8, "multiple_of": 256,
        "ffn_dim_multiplier": None}
    if family == IMAGE_2:
        assert config["axes_dim_rope"] == (32, 32, 32) and config["axes_lens"] == (300, 512, 512)
        assert config["num_layers"] == 26 and config["num_refiner_layers"] == 2 and file.text_width == 2304
    else:
        assert config["num_layers"] == 24 and config["learn_sigma"] and config["qk_norm"] and file.text_width == 2048
    with torch.device("meta"):
        module = Lumina2Transformer2DModel(**config) if family == IMAGE_2 else tie_queries(LuminaNextDiT2DModel(**config))
    bound = best_fit(file.source.tensors, [table.bind(module_shapes(module)) for table in layouts(file)])
    assert set(match_names(file.source, bound, "transformer").values()) == set(bound.bindings)


def test_parameters_are_counted_as_published():
    """lumina_next_sft's 1,627,386,400; 127,512,576 more where diffusers' module has the queries twice."""
    count = {name: sum(torch.Size(shape).numel() for shape in full_size(name).values())
             for name in ("lumina_image_2.0", "lumina_next_sft")}
    assert count == {"lumina_image_2.0": 2_609_769_152, "lumina_next_sft": 1_627_386_400}


def test_folders_hold_the_shared_queries_twice():
    shapes = full_size("lumina_next_sft")
    bound = lumina_next_keys.DIFFUSERS.bind(shapes)
    with torch.device("meta"):
        untied = module_shapes(LuminaNextDiT2DModel(num_layers=24, num_kv_heads=8))
    assert bound.original_shapes() | bound.optional_shapes() == untied
    assert best_fit(untied, [bound, identity(shapes)]) is bound


def test_encoders_and_autoencoders_are_told_apart():
    gemma = header_only(layout("gemma_2_2b")).tensors
    assert gemma_generation(gemma) == 2 and gemma_width(gemma) == 2304
    first = {name: info for name, info in gemma.items() if "feedforward_layernorm" not in name}
    assert gemma_generation(first) == 1
    third = gemma | {"model.layers.0.self_attn.q_norm.weight": gemma["model.norm.weight"]}
    assert gemma_generation(third) == 0 and gemma_generation(header_only(layout("ae")).tensors) == 0


@pytest.mark.parametrize("name, keymap", [("lumina_image_2.0", lumina_keys.TRANSFORMER),
                                          ("lumina_next_sft", lumina_next_keys.TRANSFORMER)])
def test_every_rule_is_needed(name, keymap):
    """Without any one of them the full-size module is not covered: no rule is dead, none shadows another."""
    for index in range(len(keymap.rules) - (keymap is lumina_keys.TRANSFORMER)):  # what is dropped covers nothing
        with pytest.raises(AssertionError):
            KeyMap(keymap.rules[:index] + keymap.rules[index + 1:]).bind(full_size(name))


def test_gemma_equals_transformers_own_loading(tmp_path):
    """The file of the whole language model, as the hub has it: the same states."""
    torch.manual_seed(0)
    for factory in (TINY["gemma"][0], TINY["gemma2"][0]):
        theirs = factory().eval()
        folder = tmp_path / type(theirs).__name__
        folder.mkdir()
        save_file({f"model.{name}": tensor.contiguous() for name, tensor in theirs.state_dict().items()},
                  str(folder / "m.safetensors"))
        bound = GEMMA.bind(module_shapes(theirs))
        mine = load_module(build_on_meta(factory), open_source(folder / "m.safetensors"), bound, dtype=None, place="gemma").eval()
        ids = torch.arange(12).reshape(2, 6)
        with torch.no_grad():
            assert torch.equal(mine(ids).last_hidden_state, theirs(ids).last_hidden_state)
