"""Look after caches of encoded pictures and captions.

    python tools/cache.py info DIR               what is in the caches in and below DIR
    python tools/cache.py verify [--repair] DIR  read everything and compare checksums
    python tools/cache.py compact DIR            merge small files, leave out what is repeated or damaged
    python tools/cache.py fill SCRIPT FLAGS      encode ahead of time what the training with these flags will need
    python tools/cache.py import [--ignore_dates] SCRIPT FLAGS
                                                 take over the .npz latents that another trainer left beside the pictures

SCRIPT and FLAGS are those of the training: ``python tools/cache.py fill flux_train.py --config_file run.toml``. ``fill`` may
be started with ``accelerate launch`` to use several devices. Exit status: 0 fine, 1 faults were found, 2 a mistake to mend.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.errors import UserError, nearest  # noqa: E402

if TYPE_CHECKING:
    import torch

    from library.architectures.base import Architecture
    from library.config.parse import Config, Entry
    from library.data.items import Items

SHOWN = 3


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C; what was finished is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, words in (("info", _info, "what is in the caches in and below DIR"),
                             ("verify", _verify, "read everything and compare checksums"),
                             ("compact", _compact, "merge small files, leave out what is repeated or damaged")):
        command = commands.add_parser(name, help=words)
        command.add_argument("folder", type=Path, metavar="DIR")
        command.set_defaults(run=run)
        if name == "verify":
            command.add_argument("--repair", action="store_true", help="note what is damaged: it will be encoded anew")
    for name, run, words in (("fill", _fill, "encode ahead of time what a training will need"),
                             ("import", _import, "take over .npz latents that lie beside the pictures")):
        command = commands.add_parser(name, help=words)
        if name == "import":
            command.add_argument("--ignore_dates", action="store_true", help="also files that are older than their picture")
        command.add_argument("script", metavar="SCRIPT", help="the training script, for example flux_train.py")
        command.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAGS", help="the flags of the training")
        command.set_defaults(run=run)
    return parser


def _caches(folder: Path) -> list[Path]:
    from library.data.maintenance import caches_under

    found = caches_under(folder) if folder.is_dir() else []
    if not found:
        raise UserError("there is no cache in this folder or below it", place=str(folder),
                        remedy="name a --cache_dir, or a folder of pictures with a .kiln_cache")
    return found


def _info(arguments: argparse.Namespace) -> int:
    from library.data.maintenance import overview

    problems: list[str] = []
    for folder in _caches(arguments.folder):
        print(folder)
        for part in overview(folder, problems.append):
            print(f"  {part.kind}: {part.records} records in {part.shards} files, {_size(part.bytes)}"
                  + (f", {part.repeated} repeated" if part.repeated else "") + (f", {part.bad} damaged" if part.bad else ""))
            for layout, count in part.layouts[:SHOWN]:
                tensors = ", ".join(f"{one.name} {one.dtype} {'x'.join(map(str, one.shape)) or 'number'}" for one in layout)
                print(f"    {count} of {tensors}")
            if len(part.layouts) > SHOWN:
                print(f"    and {len(part.layouts) - SHOWN} other shapes")
    for line in problems:
        print(line)
    return 1 if problems else 0


def _verify(arguments: argparse.Namespace) -> int:
    from library.data.maintenance import verify

    faults = sum(verify(folder, arguments.repair, print) for folder in _caches(arguments.folder))
    remedy = "" if arguments.repair or not faults else "; --repair has them encoded anew by the next run"
    print(f"{faults or 'no'} faults found{remedy}")
    return 1 if faults else 0


def _compact(arguments: argparse.Namespace) -> int:
    from library.data.maintenance import compact

    for folder in _caches(arguments.folder):
        before, after = compact(folder, print)
        print(f"{folder}: {_size(before)} -> {_size(after)}")
    return 0


def _fill(arguments: argparse.Namespace) -> int:
    entry, config = _configured(arguments.script, arguments.flags)
    if not (config.caching.latents_cached or config.caching.text_cached) or not config.caching.on_disk:
        raise UserError("nothing would be kept", remedy="add --cache_latents_to_disk, --cache_text_encoder_outputs_to_disk or "
                        "both, as the training will have them")
    from library.run import fill_caches

    fill_caches(entry, config)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    entry, config = _configured(arguments.script, arguments.flags)
    layout = getattr(config.architecture, "npz", None)
    if layout is None:
        raise UserError(f"{arguments.script} knows no such files of other trainers")
    if not config.caching.cache_latents_to_disk:
        raise UserError("nothing would be kept", remedy="add --cache_latents_to_disk, as the training will have it")
    from library.encode import encoding_dtype
    from library.inputs import begin_log, open_inputs
    from library.run import join

    begin_log(config)
    data, arch = open_inputs(entry, config)
    runtime = join(config, data)
    for what, items in (("training", data.selection.train), ("validation", data.selection.validation)):
        if len(items):
            _import_items(what, items, config, arch, layout, encoding_dtype(runtime), arguments.ignore_dates)
    runtime.close()
    return 0


def _import_items(what: str, items: Items, config: Config, arch: Architecture, layout: object, dtype: torch.dtype,
                  ignore_dates: bool) -> None:
    from library.data.keys import cache_folders
    from library.data.npz_import import import_latents
    from library.data.store import Store

    distinct, folders = cache_folders(items, config.caching.cache_dir)
    done = import_latents(items, Store(distinct, "latents"), folders, arch.vae_identity(dtype), layout,
                          arch.latent.channels, arch.latent.factor, ignore_dates)
    print(f"{what} pictures: {done.records} latents imported, {done.known} pictures cached already, "
          f"{done.without} without a file, {len(done.unfit)} files not used")
    for reason, count in Counter(reason for _, reason in done.unfit).most_common():
        example = next(path for path, words in done.unfit if words == reason)
        print(f"  {count} x {example.name}: {reason}" if count > 1 else f"  {example}: {reason}")


def _configured(script: str, flags: Sequence[str]) -> tuple[Entry, Config]:
    from library.config.check import check
    from library.config.parse import parse

    scripts = {path.name for path in ROOT.glob("*_train*.py")}
    name = Path(script).name if Path(script).suffix else f"{script}.py"
    if name not in scripts:
        raise UserError(f"unknown training script {script!r}",
                        remedy=nearest(name, scripts) or f"known: {', '.join(sorted(scripts))}")
    entry = importlib.import_module(name.removesuffix(".py")).ENTRY
    config = parse(entry, [flag for number, flag in enumerate(flags) if number or flag != "--"])
    check(config)
    return entry, config


def _size(count: int) -> str:
    amount, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.4g} {units[0]}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    sys.exit(main(sys.argv[1:]))
