"""The toy Lumina that the quickstart trains: structure and names of the published files, small and the same every time."""

import json
import re
from pathlib import Path

import pytest
import torch

from library.architectures.lumina import open_architecture
from library.architectures.lumina_options import LuminaOptions
from library.checkpoint.source import open_source
from library.config.flow_options import FlowOptions
from library.config.schema import ModelOptions
from tools import make_toy_lumina

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
CPU, F32 = torch.device("cpu"), torch.float32
NAMES = {"2.0": ("lumina_2_model_bf16.safetensors", "lumina_image_2.0"),
         "next": ("consolidated.00-of-01.safetensors", "lumina_next_sft")}


@pytest.fixture(scope="module", params=sorted(NAMES))
def toy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_lumina.make(folder, make_toy_lumina.SIZES["quickstart"], 0, request.param)
    return request.param, folder


def opened(toy):
    family, folder = toy
    model = ModelOptions(str(folder / NAMES[family][0]))
    return open_architecture(model, LuminaOptions(gemma2_max_token_length=24), FlowOptions())


def families(shapes) -> dict[str, int]:
    """Names without the numbers of layers -> dimensions of the tensor."""
    return {re.sub(r"\.\d+\.(?=attention|feed|ffn|adaLN)", ".N.", name): len(shape) for name, shape in shapes.items()}


def test_names_are_those_of_the_published_file_but_for_the_number_of_layers(toy):
    family, folder = toy
    file, layout = NAMES[family]
    tensors = open_source(folder / file).tensors
    published = json.loads((LAYOUTS / f"{layout}.json").read_text(encoding="utf-8"))
    assert families({name: one.shape for name, one in tensors.items()}) == families(published)
    assert {one.dtype for one in tensors.values()} == {"BF16"}


def test_the_set_is_complete_and_the_same_for_the_same_seed(toy, tmp_path):
    family, folder = toy
    arch = opened(toy)
    assert arch.files() == set(folder.glob("*.safetensors")) and arch.parts.tokenizer == folder / "tokenizer"
    make_toy_lumina.make(tmp_path, make_toy_lumina.SIZES["quickstart"], 0, family)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path.name


def test_it_begins_with_a_prediction_of_nothing_and_tells_captions_apart(toy):
    """Closed output: the first prediction is zero. Random, but different, states for every caption of the quickstart."""
    arch = opened(toy)
    denoiser = arch.load_denoiser(CPU, F32)
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted(make_toy_lumina.toy_parts.CAPTIONS.glob("*.txt"))]
    text = arch.encode_text(arch.load_text_encoders(arch.text_encoders, CPU, F32), captions)
    assert not text["gemma_mask"].all(dim=1).any()  # none is cut
    with torch.no_grad():
        output = arch.predict(denoiser, torch.randn(12, arch.latent.channels, 8, 8), torch.rand(12), text, None)
    assert not output.any()
    means = (text["gemma"] * text["gemma_mask"][..., None]).sum(dim=1) / text["gemma_mask"].sum(dim=1, keepdim=True)
    assert torch.cdist(means, means).add(torch.eye(12) * 9).min() > 0.3
