"""What a run has left on disk, and what can be done with it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from library.checkpoint.state_find import found_states
from library.config.save_formats import SUFFIXES, is_pipeline, size_of
from library.resume_rules import follows_length

FILES = 12  # listed, the newest first
AVERAGED = "-ema"  # after the output name, in the names of averaged weights


@dataclass(frozen=True)
class Result:
    """A checkpoint or a state. ``when``: seconds since the epoch; ``what``: after which step or epoch, or "the end"."""

    name: str
    is_state: bool
    is_folder: bool
    what: str
    size: int
    when: float


def find_results(folder: Path, name: str) -> list[Result]:
    """Checkpoints, averaged ones included, and states of the run of this name, newest first."""
    endings = "|".join(re.escape(suffix) for suffix in set(SUFFIXES.values()))
    pattern = re.compile(rf"{re.escape(name)}(?P<average>{AVERAGED})?(?:-step(?P<step>\d{{8,}})|-(?P<epoch>\d{{6,}}))?"
                         rf"(?P<ending>{endings})")
    states, found = {path.name for path in found_states(folder, name) if path.parent == folder}, []
    try:
        entries = list(folder.iterdir())
    except OSError:
        return []
    for path in entries:
        state = path.name in states
        match = pattern.fullmatch(path.name.removesuffix("-state") if state else path.name)
        if match is None or not (state or (is_pipeline(path) if path.is_dir() else bool(match["ending"]))):
            continue
        try:
            epoch = f"epoch {int(match['epoch'])}" if match["epoch"] else "the end"
            what = f"step {int(match['step']):,}" if match["step"] else epoch
            what += ", averaged" if match["average"] else ""
            found.append(Result(path.name, state, path.is_dir(), what, size_of(path), path.stat().st_mtime))
        except OSError:
            continue  # removed in this moment
    return sorted(found, key=lambda result: (-result.when, result.name))


@dataclass(frozen=True)
class GoingOn:
    """How the run goes on. ``hub``: the repository that has its states too, or ""; ``longer``: flags for more steps;
    ``jumps``: the learning rate follows the length of the run, so that a longer one is another course."""

    hub: str = ""
    longer: str = "--max_train_steps N"
    jumps: bool = False


def going_on(settings: Iterable[tuple[str, str, str, bool]]) -> GoingOn:
    """As the settings have it: (section, flag, value as TOML, changed)."""
    values = tomllib.loads("\n".join(f"{flag} = {value}" for _, flag, value, _ in settings))
    jumps = follows_length(values)
    longer = "--max_train_epochs N" if values.get("max_train_epochs") else "--max_train_steps N"
    return GoingOn(values.get("huggingface_repo_id", "") if values.get("save_state_to_huggingface") else "",
                   longer + jumps * " --resume_anyway", jumps)


def next_steps(name: str, program: str, finished: bool, results: Sequence[Result], go: GoingOn = GoingOn()) -> Iterable[str]:
    """A list of things to do, with the files they are done with."""
    models, states = ([each for each in results if each.is_state == kind] for kind in (False, True))
    yield '<ul class="steps">'
    if models:
        newest = next((each for each in models if f"{AVERAGED}" not in each.name.removeprefix(name)), models[0])
        kind = ("is a diffusers folder: give its path to <code>from_pretrained</code>" if newest.is_folder else
                "has the layout of the file that training began with: put it where that one lies (the folder for models of "
                "ComfyUI, Forge or SwarmUI), and choose it there in its place")
        yield (f'<li><b>Look at what it learned.</b> <span class="name">{escape(newest.name)}</span> ({escape(newest.what)}) '
               f"{kind}.{_files(models)}</li>")
    else:
        yield ("<li><b>No model has been saved yet.</b> It is written at the end; --save_every_n_steps and --save_every_n_epochs "
               "write some on the way.</li>")
    command = f'accelerate launch {escape(program)} --config_file "<span class="here">{escape(name)}_config.toml</span>"'
    if states:
        longer = f" {go.longer}" if finished else ""
        why = "Train longer." if finished else "Go on after an interruption."
        how = ("at the learning rate of a longer run, which is another one from the next step on" if finished and go.jumps else
               "exactly as if there had been no stop")
        yield (f"<li><b>{why}</b> From {escape(states[0].name)} ({escape(states[0].what)}), {how}:"
               f"<pre>{command} --resume latest{longer}</pre>{_files(states)}{_from_hub(command, longer, go.hub)}</li>")
    else:
        yield ("<li><b>No state to resume from.</b> A run that is stopped with Ctrl-C leaves one; --save_state or "
               "--save_state_every_n_steps write some on the way.</li>")
    yield ("<li><b>Do it again, or with one thing changed.</b> Flags on the command line win over the file:"
           f"<pre>{command}</pre></li></ul>")


def _from_hub(command: str, longer: str, hub: str) -> str:
    return (f"On another machine, from the newest state in {escape(hub)} on the hub, with the same data and models:"
            f"<pre>{command} --resume latest --resume_from_huggingface{longer}</pre>") if hub else ""


def _files(results: Sequence[Result]) -> str:
    if len(results) < 2:
        return ""
    rows = "".join(f'<tr><td>{escape(each.name)}</td><td>{escape(each.what)}</td><td class="number">{bytes_text(each.size)}</td>'
                   "</tr>" for each in results[:FILES])
    more = f"<p class=\"soft small\">and {len(results) - FILES} older ones</p>" if len(results) > FILES else ""
    return f'<details><summary>all {len(results)}</summary><table class="files"><tbody>{rows}</tbody></table>{more}</details>'


def bytes_text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
