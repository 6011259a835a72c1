"""Builds the native library with ninja; everything else about the package is in pyproject.toml.

The library uses torch's stable ABI and no Python API: one file serves every Python, and every torch
from TORCH_TARGET on. Beside it lies a small module that makes calls from eager Python cheaper, for
the one torch and Python that are built for and named after both; others do without. Without a
compiler or torch headers the package installs all the same, and runs on plain PyTorch. With CUDA's
compiler, nvcc, it holds the GPU's kernels too, for those architectures that it knows; that takes
neither a GPU nor a CUDA build of torch. Environment: CXX, CXXFLAGS, NVCC, CUDA_HOME; FASTSEQ_CUDA=0
leaves out what is for a GPU; FASTSEQ_WERROR=0 lets nvcc warn; FASTSEQ_ISAS="scalar avx512" builds
for these only; FASTSEQ_REQUIRE_NATIVE=1 makes a failed build an error.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libfastseq.so"
TORCH_TARGET = (2, 10)

# No -march=native and no -ffast-math: an instruction set is chosen at run time, and NaN, infinity
# and the order of sums mean what they say. An FMA stands where the source says fma, and nowhere
# else: which of two products the compiler contracts may differ between copies of one expression.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"
).split()

# Instruction sets, narrowest first: the kernel files csrc/cpu/<op>/<op>.cpp are compiled with each.
# -mtune changes the order of instructions, not which there are: tiles gain a twentieth. With -O2
# the kernels for processors that have none of the others take two thirds of the room.
ISA_FLAGS = {
    "scalar": ["-O2"],
    "avx2": "-mavx2 -mfma -mtune=haswell".split(),
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mtune=skylake-avx512".split(),
}

# Machine code for Ampere, Hopper and Blackwell, and PTX for what comes later. (One PTX for three of
# them halves the time that nvcc takes, and no kernel uses what only a later one has.) The same rule
# on FMAs, and the exact functions of CUDA's maths library. The driver unpacks what is compressed.
NVCCFLAGS = (
    "-std=c++17 -O3 -fmad=false -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall "
    "-Xfatbin -compress-all"
)
GPU_CODE = {
    "sm_80": "-gencode arch=compute_80,code=sm_80",
    "sm_100": "-gencode arch=compute_80,code=sm_100",
    "PTX": "-gencode arch=compute_80,code=compute_80",
    "sm_90a": "-gencode arch=compute_90a,code=sm_90a",
}
# Of CUDA, what the kernels ask for.
GPU_TRIAL = """
#include <cuda_bf16.h>
#include <cuda_runtime.h>
__global__ void f(__nv_bfloat16* p) { *p = __float2bfloat16(1); }
void g(__nv_bfloat16* p) { f<<<1, 1>>>(p); }
"""


def find_torch() -> Path | None:
    """Torch's folder in the environment built for, also from inside an isolated build."""
    for scheme in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    try:
        import torch

        return Path(torch.__file__).parent
    except ImportError:
        return None


def find_cxx() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""


def eager_name() -> str | None:
    """Of the module for this torch and this Python; fastseq/_native.py looks for that name."""
    torch, abi = find_torch(), sysconfig.get_config_var("SOABI")
    if torch is None or not abi:
        return None
    text = (torch / "version.py").read_text()
    found = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    return found and f"_eager-torch{found[1]}-{abi}.so"


def compiles(cxx: str, flags: list[str]) -> bool:
    command = [cxx, *CXXFLAGS, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"int x;", capture_output=True).returncode == 0


def find_nvcc() -> str | None:
    """NVCC of the environment; else of CUDA_HOME, of PATH, or where CUDA installs itself."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else []
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return os.environ.get("NVCC") or shutil.which("nvcc", path=os.pathsep.join(folders))


def nvcc_flags() -> str:
    lax = os.environ.get("FASTSEQ_WERROR") == "0"
    return NVCCFLAGS.replace("-Werror all-warnings ", "") if lax else NVCCFLAGS


def gpu_obstacles(nvcc: str, cxx: str, folder: Path) -> dict[str, str]:
    """What of GPU_CODE this nvcc does not compile, and why. Tried once: ``folder`` keeps it."""

    def obstacle(*code: str) -> str:
        command = [nvcc, "-ccbin", cxx, *" ".join((nvcc_flags(), *code)).split()]
        command += ["-c", str(folder / "trial.cu"), "-o", str(folder / "trial.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said.sort(key=lambda line: not re.search("fatal|error", line))
        return "" if done.returncode == 0 else (*said, "it failed")[0]

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trial.cu").write_text(GPU_TRIAL)
    kept = folder / "nvcc.json"
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        tried = [nvcc, cxx, version, nvcc_flags(), GPU_TRIAL, GPU_CODE]
        known = json.loads(kept.read_text()) if kept.exists() else {}
        if known.get("tried") != tried:
            found = {}
            if obstacle(*GPU_CODE.values()):
                found = {name: said for name, code in GPU_CODE.items() if (said := obstacle(code))}
            known = {"tried": tried, "obstacles": found}
            kept.write_text(json.dumps(known))
    except OSError as error:
        return dict.fromkeys(GPU_CODE, str(error))
    return known["obstacles"]


def replace(made: Path, output: Path) -> None:
    """Put a file where a running process may have another of that name open."""
    replacement = output.with_name(output.name + ".new")
    shutil.copy2(made, replacement)
    os.replace(replacement, output)


class NinjaBuild(build_ext):
    """Writes build.ninja, runs it, and says what was built and what was left out."""

    def get_ext_filename(self, fullname):
        name = LIBRARY if fullname.endswith("_native_library") else eager_name() or "_eager-.so"
        return os.path.join(*fullname.split(".")[:-1], name)

    def build_extension(self, ext):
        if ext.name.endswith("_eager"):
            obstacle = self.add_eager(ext)
            said = f"left out the module for eager calls: {obstacle}; small layers start later"
            print(f"fastseq: {said if obstacle else f'built {eager_name()} for eager calls'}")
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        cxx, torch = find_cxx(), find_torch()
        nvcc = None if os.environ.get("FASTSEQ_CUDA") == "0" else find_nvcc()
        isas, gpus, left_out = [], [], []
        if not cxx or not compiles(cxx, []):
            left_out.append(f"native library: no C++17 compiler found ({cxx or 'set CXX'})")
        elif torch is None:
            left_out.append("native library: no torch >= 2.10 in the environment built for")
        else:
            isas = self.usable_isas(cxx, left_out)
            gpus = self.usable_gpus(nvcc, cxx, left_out)
            self.run_ninja(cxx, nvcc if gpus else None, gpus, torch, isas, output)
        if not isas and os.environ.get("FASTSEQ_REQUIRE_NATIVE") == "1":
            raise RuntimeError("fastseq: " + "; ".join(left_out))
        print(f"fastseq: built CPU kernels for: {' '.join(isas) or 'nothing'} (compiler: {cxx})")
        if gpus:
            print(f"fastseq: built GPU kernels for: {' '.join(gpus)} (compiler: {nvcc})")
        for line in left_out:
            print(f"fastseq: left out {line}")

    @staticmethod
    def usable_isas(cxx: str, left_out: list[str]) -> list[str]:
        usable = []
        wanted = os.environ.get("FASTSEQ_ISAS", "").split() or list(ISA_FLAGS)
        for isa, flags in ISA_FLAGS.items():
            if isa not in wanted:
                left_out.append(f"{isa}: not among FASTSEQ_ISAS")
            elif flags and platform.machine().lower() not in ("x86_64", "amd64"):
                left_out.append(f"{isa}: not an x86-64 machine")
            elif not compiles(cxx, flags):
                left_out.append(f"{isa}: the compiler does not know {' '.join(flags)}")
            else:
                usable.append(isa)
        return usable

    @staticmethod
    def usable_gpus(nvcc: str | None, cxx: str, left_out: list[str]) -> list[str]:
        """The names of GPU_CODE to build for."""
        if not nvcc:
            left_out.append("CUDA C++ kernels: no nvcc, or FASTSEQ_CUDA=0; GPUs run PyTorch's own")
            return []
        obstacles = gpu_obstacles(nvcc, cxx, ROOT / "build" / "native")
        usable = [name for name in GPU_CODE if name not in obstacles]
        if not usable:
            why = next(iter(obstacles.values()))
            left_out.append(f"CUDA C++ kernels: {nvcc} does not compile: {why}")
        elif obstacles:
            why = "; ".join(f"{name} ({said})" for name, said in obstacles.items())
            left_out.append(f"CUDA C++ kernels for what {nvcc} does not compile for: {why}")
        return usable

    def run_ninja(
        self,
        cxx: str,
        nvcc: str | None,
        gpus: list[str],
        torch: Path,
        isas: list[str],
        output: Path,
    ) -> None:
        import ninja
        from ninja import ninja_syntax

        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        extra = os.environ.get("CXXFLAGS", "").split()
        have = [f"-DFASTSEQ_HAVE_{isa.upper()}" for isa in isas]
        if nvcc:
            have.append("-DFASTSEQ_HAVE_CUDA")
        version_hex = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
        torch_flags = [f"-DTORCH_TARGET_VERSION={version_hex}", f"-isystem {torch}/include"]
        sources = {
            **{path: [] for path in (ROOT / "csrc/cpu").glob("*.cpp")},
            **{path: [] for path in (ROOT / "csrc/cpu/support").glob("*.cpp")},
            **{path: [] for path in (ROOT / "csrc").glob("*.cpp")},
            **{path: torch_flags for path in (ROOT / "csrc/ops").glob("*.cpp")},
        }
        if nvcc:
            sources |= {path: [] for path in (ROOT / "csrc/cuda").rglob("*.cpp")}
        objects = {
            str(source.relative_to(ROOT / "csrc").with_suffix(".o")): (source, flags)
            for source, flags in sources.items()
        }
        for source in (ROOT / "csrc/cpu").glob("*/*.cpp"):
            if source.stem != source.parent.name:
                continue
            for isa in isas:
                name = source.relative_to(ROOT / "csrc").with_suffix(f".{isa}.o")
                objects[str(name)] = (source, [*ISA_FLAGS[isa], f"-DFASTSEQ_ISA={isa}"])
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=200)
            writer.rule("compile", f"{cxx} -MD -MF $out.d $flags -c $in -o $out", depfile="$out.d")
            writer.rule("link", f"{cxx} -shared -o $out $in $libs")
            for name, (source, flags) in sorted(objects.items()):
                all_flags = " ".join([*CXXFLAGS, *have, *flags, *extra])
                writer.build(name, "compile", str(source), variables={"flags": all_flags})
            made, linker = sorted(objects), "link"
            if nvcc:
                # nvcc links: it knows where the CUDA runtime, which goes into the library, lies.
                linker = "link_cuda"
                nvccflags = " ".join((nvcc_flags(), *(GPU_CODE[name] for name in gpus)))
                native = next((name for name in gpus if name != "PTX"), "sm_80")
                writer.rule(
                    "compile_cuda",
                    f"{nvcc} -ccbin {cxx} -MD -MF $out.d {nvccflags} -c $in -o $out",
                    depfile="$out.d",
                )
                writer.rule(
                    linker,
                    f"{nvcc} -ccbin {cxx} -shared -arch={native} -cudart static "
                    "-Xlinker --exclude-libs,ALL "
                    "-o $out $in $libs",
                )
                for source in sorted((ROOT / "csrc/cuda").rglob("*.cu")):
                    made.append(str(source.relative_to(ROOT / "csrc").with_suffix(".cu.o")))
                    writer.build(made[-1], "compile_cuda", str(source))
            libs = f"-L{torch}/lib -ltorch -ltorch_cpu -lc10 -lpthread"
            writer.build(LIBRARY, linker, made, variables={"libs": libs})
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", str(folder)], check=True)
        replace(folder / LIBRARY, output)

    def add_eager(self, ext: Extension) -> str | None:
        """Compile csrc/ops/eager against this torch and this Python; why not, where it can't."""
        import ninja
        from ninja import ninja_syntax

        cxx, torch, python = find_cxx(), find_torch(), Path(sysconfig.get_path("include"))
        folder = ROOT / "build" / "native" / "eager"
        name = eager_name()
        if not (folder.parent / LIBRARY).exists() or name is None:
            return "there is no native library to go with it"
        if not (python / "Python.h").exists():
            return f"no Python.h in {python}"
        folder.mkdir(parents=True, exist_ok=True)
        # C++20, for torch's own headers; their warnings are torch's too.
        include = [torch / "include", torch / "include/torch/csrc/api/include", python]
        flags = [*CXXFLAGS, "-std=c++20", *(f"-isystem {path}" for path in include)]
        libs = f"-L.. -l:{LIBRARY} -L{torch}/lib -ltorch_python -ltorch_cpu -lc10"
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=200)
            writer.rule("compile", f"{cxx} -MD -MF $out.d $flags -c $in -o $out", depfile="$out.d")
            writer.rule("link", f"{cxx} -shared -o $out $in {libs} -Wl,-rpath,'$$ORIGIN'")
            made = []
            for source in sorted((ROOT / "csrc/ops/eager").glob("*.cpp")):
                made.append(f"{source.stem}.o")
                writer.build(made[-1], "compile", str(source), variables={"flags": " ".join(flags)})
            writer.build(name, "link", made)
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout)
            return f"it does not compile with the torch in {torch}"
        replace(folder / name, Path(self.get_ext_fullpath(ext.name)).resolve())
        return None


class StableWheel(bdist_wheel):
    """Tagged for the platform alone: the library has no Python ABI."""

    def get_tag(self):
        platform = super().get_tag()[2]
        native = b"".join(p.read_bytes() for p in Path(self.bdist_dir, "fastseq").glob("*.so"))
        if platform.startswith("linux_") and native:
            # The oldest glibc that has every symbol version the libraries name (PEP 600).
            versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", native)
            major, minor = max((int(major), int(minor)) for major, minor in versions)
            platform = platform.replace("linux", f"manylinux_{major}_{minor}", 1)
        return "py3", "none", platform


setup(
    # (The second needs the first, and may be left out.)
    ext_modules=[
        Extension("fastseq._native_library", sources=[]),
        Extension("fastseq._eager", sources=[], optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": StableWheel},
    packages=[
        *find_packages(include=["fastseq", "fastseq.*"]),
        *(f"fastseq.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"fastseq.kernels": "kernels"},
)
