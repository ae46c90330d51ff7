"""A process that has imported what the scripts import and forks for each run: importing takes longer than most runs here.

Run as a program it is that process: a line of JSON in, {script, arguments, cwd, env, stdout, stderr}, a line out: the exit status.
Each run has a process, an environment and standard streams of its own, as when the script is started; only the imports are
shared. Where processes cannot be forked (Windows) tests start the script itself.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
AVAILABLE = hasattr(os, "fork")
_MODULES = ("library.run", "library.build", "library.loop", "library.outputs", "library.states", "library.planning", "library.encode",
            "library.architectures.clip_states", "library.architectures.flux_models", "library.architectures.flux_text",
            "library.architectures.sdxl_models", "library.architectures.sd3_models", "library.architectures.lumina_models",
            "library.architectures.vae", "library.architectures.t5", "library.architectures.gemma", "bitsandbytes", "matplotlib.pyplot",
            "huggingface_hub.hf_api", "PIL.PngImagePlugin", "PIL.JpegImagePlugin")
_NAMES = {"diffusers": ("AutoencoderKL", "FluxTransformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel",
                        "SD3Transformer2DModel", "UNet2DConditionModel"),
          "transformers": ("CLIPTextModelWithProjection", "CLIPTokenizerFast", "Gemma2Model", "GemmaModel", "GemmaTokenizerFast",
                           "T5EncoderModel", "T5TokenizerFast")}


def run(script: Path, arguments: list[str], cwd: Path, env: dict[str, str], stdout: Path, stderr: Path) -> int:
    """The exit status of ``script`` run with ``arguments``; minus the number of the signal that ended it."""
    server = _server(os.getpid())
    asked = {"script": str(script), "arguments": arguments, "cwd": str(cwd), "env": env, "stdout": str(stdout), "stderr": str(stderr)}
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process that runs scripts has ended with {server.wait()}"
    return int(answer)


@cache
def _server(_owner: int) -> subprocess.Popen:
    """It ends when its standard input is closed, which the end of this process does. Of this process alone, not of forks."""
    from tests.cli.conftest import environment

    return subprocess.Popen([sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
                            encoding="utf-8", env=environment(PYTHONPATH=str(ROOT), PYTHONIOENCODING="utf-8"))


def _child(asked: dict) -> NoReturn:
    """Become the run: it ends as the script ends, with its traceback if there is one."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for target, path in ((1, asked["stdout"]), (2, asked["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = [asked["script"], *asked["arguments"]]
    sys.path[0] = str(Path(asked["script"]).parent)
    status = 0
    try:
        runpy.run_path(asked["script"], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking all modules apart would take longer than the run


def _serve() -> None:
    for module in _MODULES:
        importlib.import_module(module)
    for package, names in _NAMES.items():
        for name in names:
            getattr(importlib.import_module(package), name)
    gc.collect()
    gc.freeze()  # or a collection in a child would copy all of this
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            _child(asked)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
