"""Install the wheel in a clean environment, where no compiler is found, and run its kernels.

``python -m tests.try_wheel dist/*.whl --torch 2.10.0 2.14.1`` fetches these versions of torch,
gigabytes each; ``--python`` takes an environment that has one already.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Run from the root of the file system: nothing is to be imported from a source tree.
PROGRAM = """
import os, shutil, sys
import torch
import fastseq
from fastseq import _native, nn, use_backend
from fastseq.testing import assert_close_to_reference

assert fastseq.__file__.startswith(sys.prefix), fastseq.__file__
assert not any(map(shutil.which, ("cc", "gcc", "g++", "clang", "nvcc")))
torch.manual_seed(0)
for kind in ("LSTM", "GRU", "RNN"):
    theirs = getattr(torch.nn, kind)(24, 40, 2, bidirectional=True)
    ours = getattr(nn, kind)(24, 40, 2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x, cotangent = torch.randn(9, 5, 24), torch.randn(9, 5, 80)
    results = []
    for module, dtype in ((theirs, torch.float64), (theirs, torch.float32), (ours, torch.float32)):
        module = module.to(dtype).requires_grad_(True)
        leaf = x.detach().to(dtype).requires_grad_()
        with use_backend("cpu" if module is ours else "auto"):
            y = module(leaf)[0]
            results.append([y, *torch.autograd.grad(
                y, [leaf, *module.parameters()], cotangent.to(dtype))])
    for truth, baseline, actual in zip(*results, strict=True):
        assert_close_to_reference(actual, truth, baseline, what=kind)
print(f"wheel works with torch {torch.__version__}: {_native.isa()} kernels, "
      f"python {sys.version.split()[0]}")
"""


def clean_environment(folder: Path, borrow: Path | None = None) -> Path:
    """Make a virtual environment and return its python.

    Args:
        folder: where.
        borrow: a folder of packages it may import, torch among them. What is installed there in
            editable form is not seen: that hangs on files which only that folder's own
            environment reads.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    if borrow:
        home = asked(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
        (home / "borrowed.pth").write_text(f"{borrow}\n")
    return python


def home_of_torch(python: Path) -> Path:
    """The folder an environment has torch in."""
    return asked(python, "import torch; print(torch.__file__)").parents[1]


def asked(python: Path, program: str) -> Path:
    """The path that a program prints."""
    return Path(subprocess.check_output([python, "-c", program], text=True).strip())


def install(python: Path, *what: str) -> None:
    """Install into the environment of ``python``, with this one's pip."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", *what], check=True)


def try_wheel(wheel: Path, python: Path) -> str:
    """Install a wheel, alone, and run :data:`PROGRAM`; returns what that says.

    Raises:
        RuntimeError: it failed; the text is its standard error.
    """
    install(python, "--no-deps", "--force-reinstall", str(wheel))
    # No search path: no compiler. Threads and instruction set are chosen as on a fresh machine.
    kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run(
        [python, "-c", PROGRAM], cwd="/", env={"PATH": "", **kept}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{wheel.name} with {python}: {done.stderr}")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="*", default=[], help="versions to install it beside")
    parser.add_argument("--python", nargs="*", default=[], help="of environments that have torch")
    arguments = parser.parse_args()
    for version in arguments.torch:
        with tempfile.TemporaryDirectory() as folder:
            python = clean_environment(Path(folder))
            install(python, f"torch=={version}", "numpy")
            print(try_wheel(arguments.wheel, python), flush=True)
    for python in arguments.python:
        with tempfile.TemporaryDirectory() as folder:
            mine = clean_environment(Path(folder), borrow=home_of_torch(Path(python)))
            print(try_wheel(arguments.wheel, mine), flush=True)


if __name__ == "__main__":
    main()
