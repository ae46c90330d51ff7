"""Load and save a checkpoint of about 2 GB in FLUX.1's single-file layout: time and peak memory against safetensors' own calls.

    python benchmarks/checkpoint_io.py [--folder DIR] [--repeats 3]

Every measurement is a fresh process. "plain" loads with safetensors' load_file and splits fused tensors, or collects a
state dict in the file's layout and calls save_file: what a script without streaming does. Peak is resident memory above
what the process used before, as a multiple of the bytes of the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import in_process, machine, peak_resident_bytes, resident_bytes, table  # noqa: E402

SIZE = dict(num_layers=3, num_single_layers=7, num_attention_heads=12, attention_head_dim=128, joint_attention_dim=4096,
            pooled_projection_dim=768, guidance_embeds=True)


def transformer(device: str):
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device(device):
        return FluxTransformer2DModel(**SIZE)


def child(action: str, path: str) -> dict[str, float]:
    import torch
    from diffusers import FluxTransformer2DModel  # noqa: F401  (imported before anything is measured)
    from safetensors.torch import load_file, save_file

    from library.architectures.flux_models import load_transformer
    from library.architectures.flux_parts import describe
    from library.checkpoint.export import export_module
    from library.checkpoint.flux_keys import TRANSFORMER
    from library.checkpoint.keymap import module_shapes
    from library.checkpoint.metadata import HASH_KEY
    from library.checkpoint.reader import open_source
    from library.checkpoint.writer import write_safetensors

    file = Path(path)
    if action == "make":
        module = transformer("cpu")
        entries = export_module(module, TRANSFORMER.bind(module_shapes(module)), dtype=torch.float32)
        return {"bytes": write_safetensors(file, entries.entries, entries.get)}
    if action.startswith("save"):
        module = load_transformer(describe(open_source(file)), torch.float32, "cpu")
        bound = TRANSFORMER.bind(module_shapes(module))
        target = file.with_name("saved.safetensors")
    before, started = resident_bytes(), time.perf_counter()
    if action == "load ours":
        module = load_transformer(describe(open_source(file)), torch.float32, "cpu")
    elif action == "load plain":
        module = transformer("cpu")
        bound = TRANSFORMER.bind(module_shapes(module))
        module.load_state_dict(dict(pair for name, tensor in load_file(file).items() for pair in bound.to_module(name, tensor)))
    elif action == "save ours":
        entries = export_module(module, bound, dtype=torch.float32)
        write_safetensors(target, entries.entries, entries.get, {}, add_hash_key=HASH_KEY)  # as every save of a run
    elif action == "save plain":
        state = module.state_dict()
        save_file({name: bound.to_original(name, state.__getitem__) for name in bound.original_shapes()}, target)
    return {"seconds": time.perf_counter() - started, "peak": peak_resident_bytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "flux.safetensors"
        size = in_process(Path(__file__), "make", str(path))["bytes"]
        rows = []
        for verb in ("load", "save"):
            best = {}
            for who in ("plain", "ours"):
                runs = [in_process(Path(__file__), f"{verb} {who}", str(path)) for _ in range(arguments.repeats)]
                best[who] = (min(run["seconds"] for run in runs), max(run["peak"] for run in runs) / size)
                rows.append((f"{verb}, {who}", best[who][0], best[who][0] / best["plain"][0], best[who][1]))
    print(machine())
    table(f"Checkpoint of {size / 1e9:.2f} GB float32, best of {arguments.repeats}",
          ("what", "seconds", "time / plain", "peak / weights"), rows)


if __name__ == "__main__":
    main()
