"""The direction of imports (DESIGN.md section 4) and where a model may be named."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "library"
# Layers from the bottom up. A module may import its own layer and those below it.
LAYERS = [
    ["errors", "out_of_memory", "atomic", "file_lock", "toml_lines", "config"],
    ["checkpoint", "log", "dist"],
    ["data", "memory", "optim", "objectives"],
    ["prompts", "contact_sheet", "plots", "interrupt", "architectures", "methods", "preview", "saving", "background",
     "writing", "state_saving", "resume", "resume_rules", "ema", "report", "nan_policy",
     "state_writing"],
    ["step", "step_flops"],
    ["trackers", "upload", "state_upload", "measures", "run_metadata", "encode", "loop", "validation", "build", "states", "outputs",
     "previewing", "ending", "planning", "inputs", "run"],
    ["app"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODEL_NAMES = re.compile(r"\b(sdxl|sd3|flux|lumina)\w*", re.IGNORECASE)
DIALECT_WORDS = {"flux_shift"}  # a value of --timestep_sampling that people type


def modules():
    return sorted(path for path in LIBRARY.rglob("*.py"))


def package(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("library."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("library."))


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines under ``if TYPE_CHECKING:`` bind nothing at run time."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for line in range(node.lineno, node.end_lineno + 1)
    }


def test_every_module_has_a_layer():
    assert {package(path) for path in modules()} - {"__init__"} <= set(RANK)


def test_imports_point_downwards():
    upward = []
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = type_checking_lines(tree)
        for node in ast.walk(tree):
            if getattr(node, "lineno", 0) in skipped or not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            for name in imported(ast.Module([node], [])):
                target = name.split(".")[1]
                if package(path) != "__init__" and RANK[target] > RANK[package(path)]:
                    upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_checkpoint_data_memory_optim_objectives_stand_alone():
    for name in ("checkpoint", "data", "memory", "optim", "objectives"):
        for path in (LIBRARY / name).rglob("*.py"):
            targets = {module.split(".")[1] for module in imported(ast.parse(path.read_text(encoding="utf-8")))}
            assert not targets & {"architectures", "methods", "run", "loop", "step", "app"}, path


def test_models_are_named_in_their_own_folders_only():
    named = []
    for path in modules():
        relative = path.relative_to(LIBRARY).as_posix()
        if relative.startswith("architectures/") or re.fullmatch(r"checkpoint/\w+_keys\.py", relative):
            continue
        for number, line in enumerate(code_lines(path), 1):
            words = {word for word in (match.group(0) for match in MODEL_NAMES.finditer(line)) if word not in DIALECT_WORDS}
            if words:
                named.append(f"{relative}:{number} {sorted(words)}")
    assert not named


def code_lines(path: Path) -> list[str]:
    """The source with comments and docstrings blanked out, so that prose may cite a paper's title."""
    source = path.read_text(encoding="utf-8")
    lines = [line.split("#", 1)[0] for line in source.splitlines()]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            for number in range(first.lineno - 1, first.end_lineno):
                lines[number] = ""
    return lines


def test_files_functions_and_lines_stay_small():
    too_long = []
    for path in modules():
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > 400:
            too_long.append(f"{path.relative_to(ROOT)}: {source.count(chr(10))} lines")
        too_long += [f"{path.relative_to(ROOT)}:{number}: {len(line)} letters"
                     for number, line in enumerate(source.splitlines(), 1) if len(line) > 130]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 80:
                too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not too_long


def test_entry_scripts_are_thin():
    for path in ROOT.glob("*_train*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 40, path
