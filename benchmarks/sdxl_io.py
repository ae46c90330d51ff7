"""Write a full-size SDXL and read it back as a run does: time and peak memory, as a multiple of the bytes of the weights.

    python benchmarks/sdxl_io.py [--folder DIR] [--kinds safetensors ckpt diffusers_safetensors]

The checkpoint is made first: U-Net, both text encoders and autoencoder of the published size, bf16, random numbers, about 7 GB
beside as much for each copy (one at a time). Every measurement is a fresh process that goes the way of the command line:
`open_architecture` finds and checks the parts, the modules are loaded, `export` writes the whole model. Then the copy is opened
again and every tensor compared with the first file. Peak is resident memory above what the process used before the action;
"load + save" is what a whole run needs for that, without training between.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import ROOT, in_process, machine, peak_resident_bytes, resident_bytes, table  # noqa: E402

LAYOUT = ROOT / "tests/data/layouts/sdxl_base_1.0.json"
POOL = 1 << 26  # numbers; the largest tensor has 63 million
AIM = 1.1  # peak / weights held


def make(path: Path) -> dict[str, float]:
    """The published file's names and shapes with random bf16 numbers, and tokenizers beside it."""
    import torch

    from library.checkpoint.export import Entry
    from library.checkpoint.writer import write_safetensors
    from tools.toy_tokenizers import write_clip_tokenizer

    shapes = {name: tuple(shape) for name, shape in json.loads(LAYOUT.read_text()).items()}
    counted = {name: torch.arange(math.prod(shape)).view(shape) for name, shape in shapes.items() if name.endswith("position_ids")}
    entries = [Entry(name, shape, "I64" if name in counted else "BF16") for name, shape in shapes.items()]
    # one large draw, read from another place for each tensor: making 3.5 billion numbers would take longer than all the rest
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)

    def tensor(name: str):
        if name in counted:
            return counted[name]
        number = math.prod(shapes[name])
        start = zlib.crc32(name.encode()) % (len(pool) - number)
        return pool[start:start + number].view(shapes[name])

    for name in ("tokenizer", "tokenizer_2"):
        write_clip_tokenizer(path.parent / name)
    return {"bytes": write_safetensors(path, entries, tensor)}


def open_model(path: Path):
    """The adapter, as a run opens it."""
    from library.architectures.sdxl import open_architecture
    from library.architectures.sdxl_options import SdxlOptions
    from library.config.ddpm_options import DdpmOptions
    from library.config.schema import ModelOptions

    folder = path if path.is_dir() else path.parent  # where the tokenizers are
    return open_architecture(ModelOptions(pretrained_model_name_or_path=str(path)),
                             SdxlOptions(train_text_encoder=True, tokenizer_cache_dir=folder), DdpmOptions())


def load(path: Path):
    """The adapter and the modules that train, made ready as a run makes them."""
    import torch

    from library.architectures.base import DENOISER

    arch, cpu = open_model(path), torch.device("cpu")
    denoiser = arch.load_denoiser(cpu, torch.bfloat16)
    encoders = arch.load_text_encoders(arch.text_encoders, cpu, torch.bfloat16)
    arch.groups(denoiser, encoders, 1e-5)
    return arch, {DENOISER: denoiser, **encoders.modules}


def different_tensors(first: Path, second: Path) -> int:
    """Of the modules of both, one module at a time."""
    import torch

    cpu, count = torch.device("cpu"), 0
    mine, theirs = open_model(first), open_model(second)
    for name in ("", *mine.text_encoders):
        pair = [arch.load_text_encoders([name], cpu, torch.bfloat16).modules[name] if name else
                arch.load_denoiser(cpu, torch.bfloat16) for arch in (mine, theirs)]
        states = [module.state_dict() for module in pair]
        assert set(states[0]) == set(states[1])
        count += sum(not torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    return count


def child(action: str, first: str, second: str) -> dict[str, float]:
    import torch

    from library.checkpoint.source import open_source

    if action == "make":
        return make(Path(first))
    if action == "compare":
        mine, theirs = (open_source(path) for path in (first, second))
        assert set(mine.tensors) == set(theirs.tensors), set(mine.tensors) ^ set(theirs.tensors)
        return {"different": sum(not torch.equal(mine.read(name), theirs.read(name)) for name in mine.tensors)}
    if action == "compare modules":
        return {"different": different_tensors(Path(first), Path(second))}
    # imported before anything is measured
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: F401

    import library.architectures.sdxl  # noqa: F401

    before, started = resident_bytes(), time.perf_counter()
    arch, modules = load(Path(first))
    loaded, load_peak = time.perf_counter() - started, peak_resident_bytes() - before
    held = sum(tensor.numel() * tensor.element_size() for module in modules.values() for tensor in module.state_dict().values())
    if action == "load":
        return {"seconds": loaded, "peak": load_peak, "held": held}
    started = time.perf_counter()
    arch.export(modules, Path(second), torch.bfloat16, {"modelspec.title": "benchmark"}, action)
    return {"seconds": time.perf_counter() - started, "peak": peak_resident_bytes() - before, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["safetensors", "ckpt", "diffusers_safetensors"])
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    from library.config.save_formats import SUFFIXES, size_of

    script, rows = Path(__file__), []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        first = Path(folder) / "sd_xl_base_1.0.safetensors"
        size = in_process(script, "make", str(first), "")["bytes"]
        run = in_process(script, "load", str(first), "")
        rows.append(("load U-Net and both encoders", run["held"] / 1e9, run["seconds"], run["peak"] / run["held"], "-"))
        for kind in arguments.kinds:
            second = Path(folder) / f"copy{SUFFIXES[kind]}"
            run = in_process(script, kind, str(first), str(second))
            action = "compare modules" if second.is_dir() else "compare"
            different = in_process(script, action, str(first), str(second))["different"]
            rows.append((f"load + save as {kind}", size_of(second) / 1e9, run["seconds"], run["peak"] / run["held"],
                         f"{different} tensors differ"))
            shutil.rmtree(second) if second.is_dir() else second.unlink()
    print(machine())
    table(f"SDXL of {size / 1e9:.2f} GB bf16, one run each; aim: a peak of {AIM}", ("what", "GB", "seconds", "peak / weights held",
                                                                                "read back"), rows)


if __name__ == "__main__":
    main()
