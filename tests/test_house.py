"""The rules of the house, each kept by something that fails."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastseq"
# About 500 is when to split a file; this is when the suite says so.
MAX_LINES = 600

# Whoever stands lower may be imported from above, never the other way; units in one row do not
# import each other. "fastseq" is the package's own __init__.
TIERS = [
    {"_files"},
    {"version", "reference", "kernels"},
    {"_native", "testing", "testing_attention", "testing_decoder"},
    {"ops"},
    {"backends"},
    {"functional"},
    {"nn"},
    {"explanation"},
    {"models"},
    {"replace"},
    {"decoding"},
    {"training"},
    {"fastseq"},
    {"demo", "doctor"},
    {"cli"},
]
HEIGHT = {unit: height for height, units in enumerate(TIERS) for unit in units}
# Units that know less than their height would allow.
ONLY = {"reference": set(), "kernels": {"_files"}, "testing": {"reference"}}
ONLY["testing_attention"] = set()
ONLY["testing_decoder"] = {"reference"}


def python_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def unit_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[0] if parts[1:] == ("__init__",) else parts[1]


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The dotted module an import-from names, relative imports resolved."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imported_units(path: Path, source: str) -> set[str]:
    units = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            modules = [module]
            if module == "fastseq":
                modules = [f"fastseq.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (module.split(".") for module in modules):
            if parts[0] == "fastseq":
                units.add(parts[1] if len(parts) > 1 and parts[1] in HEIGHT else "fastseq")
            elif parts[0] == "kernels":
                units.add("kernels")
    return units - {unit_of(path)}


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    unit = unit_of(path)
    assert unit in HEIGHT, f"{unit} has no place in TIERS"
    imported = imported_units(path, path.read_text())
    upwards = {other for other in imported if HEIGHT[other] >= HEIGHT[unit]}
    assert not upwards, f"{unit} imports {upwards}, which stand no lower"
    assert imported <= ONLY.get(unit, imported), f"{unit} may import only {ONLY[unit]}"


def test_the_import_rule_sees_every_form_of_import():
    source = (
        "from fastseq import nn, use_backend\nimport fastseq.cli\nfrom ..functional import lstm\n"
    )
    found = imported_units(PACKAGE / "ops" / "planted.py", source)
    assert found == {"nn", "fastseq", "cli", "functional"}


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_works_without_native_library_and_triton():
    """Everything imports and an LSTM trains where nothing could be built."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__main__"
    ]
    done = run_python(
        f"""
        import importlib, sys
        sys.modules["triton"] = None
        for name in {modules}:
            importlib.import_module(name)
        import torch
        from fastseq import _native, explain, nn
        assert not _native.loaded() and "FASTSEQ_NATIVE" in _native.why_not_loaded()
        module, x = nn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
        y, (h, c) = module(x)
        y.sum().backward()
        twin = torch.nn.LSTM(3, 4, 2)
        twin.load_state_dict(module.state_dict())
        assert torch.equal(y, twin(x)[0])
        said = explain(module, x)
        assert said.backend == "torch" and "FASTSEQ_NATIVE" in str(said), str(said)
        """,
        FASTSEQ_NATIVE="0",
    )
    assert done.returncode == 0, done.stderr


def test_importing_fastseq_is_light():
    """What only the command line needs is not imported by the library."""
    done = run_python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import fastseq
        from fastseq import nn
        heavy = {"matplotlib", "rich", "typer", "sacrebleu", "tqdm", "triton", "torch._dynamo"}
        assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
        """
    )
    assert done.returncode == 0, done.stderr


def cpp_files() -> list[Path]:
    kinds = {".h", ".inl", ".cpp", ".cu", ".cuh"}
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds)


def test_torch_headers_stay_in_one_folder():
    includes = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11)/')
    offenders = [
        str(path.relative_to(ROOT))
        for path in cpp_files()
        if ROOT / "csrc" / "ops" not in path.parents and includes.search(path.read_text())
    ]
    assert cpp_files() and not offenders


def test_no_flag_ties_the_build_to_this_machine_or_bends_floats():
    source = (ROOT / "setup.py").read_text()
    code = "\n".join(line.partition("#")[0] for line in source.splitlines())
    for flag in ("-march=native", "-mtune=native", "-ffast-math", "-Ofast", "-ffinite-math-only"):
        assert flag not in code


def isa_objects() -> list[Path]:
    """One an instruction set of each kernel file: csrc/cpu/<op>/<op>.cpp."""
    return sorted((ROOT / "build" / "native").rglob("cpu/*/*.*.o"))


@pytest.mark.skipif(not isa_objects(), reason="no object files of a native build")
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
@pytest.mark.parametrize("path", isa_objects(), ids=lambda p: p.name)
def test_instruction_set_files_share_no_code(path):
    """A weak function from an AVX-512 file could be the copy the linker keeps for all of them."""
    listed = subprocess.run(
        ["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    # DW.ref. is exception-handling data, equal in every file.
    weak = [s for s in symbols if s[1] in "WVuwv" and not s[2].startswith("DW.ref.")]
    exported = [s[2] for s in symbols if s[1] in "TDBR"]
    assert symbols and not weak
    isa = path.suffixes[0].removeprefix(".")
    assert exported and all(s.startswith(f"fastseq::{isa}::") for s in exported), exported


def public_modules() -> list[str]:
    return [
        "fastseq",
        "fastseq.functional",
        "fastseq.reference.rnn",
        "fastseq.reference.scores",
        "fastseq.testing",
        "fastseq.testing_attention",
        "fastseq.testing_decoder",
    ]


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__ and module.__all__
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("name", ["fastseq.functional", "fastseq.reference.rnn"])
def test_functions_on_tensors_state_shapes(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        function = getattr(module, public)
        doc = inspect.getdoc(function) or ""
        if "Args:" not in doc:
            assert "arguments as :func:" in doc, f"{name}.{public}"
            continue
        assert re.search(r"\[[A-Z*\d]+(, *[A-Z*\d]+)+\]", doc), f"{name}.{public} states no shape"
        for argument in inspect.signature(function).parameters:
            assert re.search(rf"\b{argument}\b", doc), f"{name}.{public}: {argument} unexplained"


@pytest.mark.parametrize("folder", ["fastseq", "kernels", "csrc", "benchmarks", "tests"])
def test_files_stay_small(folder):
    kinds = {".py", ".h", ".inl", ".cpp", ".cu", ".cuh"}
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in kinds:
            lines = len(path.read_text().splitlines())
            assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines"
