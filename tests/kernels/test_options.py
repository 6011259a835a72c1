"""How kernels are compiled: by backend and precision switch; and what is said without triton."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import types

import pytest
import torch
from fastseq.kernels import attention, float32_matmul_precision
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseq import backends, kernels
from fastseq.ops import attention as operators
from fastseq.ops import attention_plain

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import fastseq.kernels
from fastseq import functional
from fastseq.kernels import attention
tensors = torch.randn(2, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 5)
functional.additive_attention(*tensors, torch.randn(4))
functional.dot_attention(*tensors)
assert fastseq.kernels.why_not_available() == "triton is not installed"
assert attention.obstacle(*tensors) == "triton is not installed"
try:
    attention.kernel("additive_fwd")
except RuntimeError as error:
    assert "additive_fwd needs triton; it is not installed" in str(error)
else:
    raise AssertionError("no error")
"""


def test_without_triton_everything_imports_and_says_so():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def gpu(monkeypatch):
    """One that torch sees, and what Triton's driver does when it is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    driver = importlib.import_module("triton.runtime").driver
    kernels.why_not_available.cache_clear()
    yield lambda build: monkeypatch.setattr(type(driver), "active", property(build))
    kernels.why_not_available.cache_clear()


def fails(error):
    def build(self):
        raise error

    return build


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        AssertionError("libcuda.so cannot found!\nand more"),
        FileNotFoundError("No such file or directory: 'nothing'"),
    ],
)
def test_where_triton_can_build_no_launcher_there_is_a_reason_and_plain_attention(gpu, error):
    gpu(fails(error))
    reason = kernels.why_not_available()
    assert reason.startswith(
        f"Triton cannot build what launches its kernels: {type(error).__name__}"
    )
    tensors = torch.randn(2, 1, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    assert attention.obstacle(*tensors) == reason
    # As the operators of a GPU are registered: no error, and the same numbers.
    more = torch.randn(4), None, None, None, 1.0
    for name, given in (("additive_fwd", more), ("dot_fwd", more[2:])):
        found = operators._gpu(name)(*tensors, *given)
        assert all(map(torch.equal, found, getattr(attention_plain, name)(*tensors, *given)))
    # Looked for once.
    gpu(fails(KeyError()))
    assert kernels.why_not_available() == reason


def test_launchers_of_older_tritons_want_a_compiler_each(gpu, monkeypatch):
    class Utils:
        """Of cuda_utils, found in Triton's cache."""

    gpu(lambda self: types.SimpleNamespace(utils=Utils()))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert kernels.why_not_available() is None
    monkeypatch.setattr(sys.modules[__name__], "make_launcher", None, raising=False)
    kernels.why_not_available.cache_clear()
    assert "no C compiler" in kernels.why_not_available()
    monkeypatch.setenv("CC", "tcc")
    kernels.why_not_available.cache_clear()
    assert kernels.why_not_available() is None


@pytest.fixture(autouse=True)
def switches():
    """Of float32 products, the old one and the new ones: as torch sets them out."""
    yield
    torch.set_float32_matmul_precision("highest")
    for new in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        new.fp32_precision = "none"


CUDA, ONEDNN = (f"torch.backends.{name}.matmul.fp32_precision = " for name in ("cuda", "mkldnn"))


@pytest.mark.parametrize(
    "setting,expected",
    [
        ("pass", "highest"),
        *((f"torch.set_float32_matmul_precision('{old}')", old) for old in ("high", "medium")),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "high"),
        (f"{CUDA}'tf32'", "high"),
        (f"{CUDA}'tf32'; {ONEDNN}'bf16'", "medium"),
        (f"{CUDA}'tf32'; torch.set_float32_matmul_precision('highest')", "highest"),
        (f"torch.set_float32_matmul_precision('medium'); {CUDA}'ieee'", "highest"),
        (f"{ONEDNN}'bf16'", "highest"),
    ],
)
def test_either_of_torch_s_switches_is_understood(setting, expected):
    exec(setting)
    assert float32_matmul_precision() == expected
    # Where torch's own question of the old switch raises, no kernel may.
    if importlib.util.find_spec("triton"):
        from fastseq.kernels import _lang, _launch

        assert _lang.PRECISION["cuda"][expected] and _lang.which_tanh()
        one = torch.ones(1)
        found = _launch.run_planned("switches", lambda inputs: lambda *told: told, (one, one))
        assert found[0] == (one, one)
        assert expected in {key[1] for key in _launch._plans if key[0] == "switches"}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (10, 3)])
def test_an_old_gpu_runs_plain_pytorch_and_says_so(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "why_not_available", lambda: None)
    attention._too_old.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, keys = (torch.empty(2, n, 4, device="cuda") for n in (1, 3))
        said = backends.attention_explanation("additive_attention", query, keys, keys)
        obstacle = attention.obstacle(query, keys, keys)
    attention._too_old.cache_clear()
    if capability < (8, 0):
        assert said.backend == "torch" and said.reason == obstacle
        assert "capability 8.0" in obstacle and obstacle.endswith("has 7.5")
    else:
        assert obstacle is None and said.backend == "triton"


@pytest.fixture
def lang():
    pytest.importorskip("triton", reason="triton is not installed")
    from fastseq.kernels import _lang

    return _lang


@pytest.mark.parametrize(
    "backend,chip,switch,precision,tanh",
    [
        ("cuda", 90, "highest", "ieee", "rcp"),
        ("cuda", 90, "high", "tf32x3", "rcp"),
        ("cuda", 90, "medium", "tf32", "fast"),
        ("hip", "gfx942", "highest", "ieee", "exact"),
        ("hip", "gfx942", "high", "bf16x3", "exact"),
        ("hip", "gfx942", "medium", "tf32", "exact"),
        ("hip", "gfx90a", "highest", "ieee", "exact"),
        ("hip", "gfx90a", "medium", "bf16x3", "exact"),
        ("hip", "gfx1100", "medium", "bf16x3", "exact"),
        ("", "", "medium", "ieee", "exact"),
    ],
)
def test_the_user_s_switch_and_the_chip_choose(
    lang, monkeypatch, backend, chip, switch, precision, tanh
):
    target = types.SimpleNamespace(backend=backend, arch=chip)
    asked = types.SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(lang, "driver", types.SimpleNamespace(active=asked))
    monkeypatch.setattr(lang, "BACKEND", backend)
    torch.set_float32_matmul_precision(switch)
    assert lang.precision() == precision and lang.which_tanh() == tanh
    options = lang.compiler_options({"num_warps": 4, "maxnreg": 96})
    assert ("maxnreg" in options) == (backend == "cuda")
    assert options.get("enable_fp_fusion", False) == bool(backend)


def test_a_chip_of_amd_s_without_tf32_is_not_asked_for_it(lang, monkeypatch):
    """Asked for it, the compiler refuses."""
    from fastseq.kernels import aot
    from triton.backends.compiler import GPUTarget

    monkeypatch.setitem(aot.TARGETS, "gfx90a", GPUTarget("hip", "gfx90a", 64))
    torch.set_float32_matmul_precision("medium")
    tensors = [torch.zeros(1, n, 48) for n in (2, 300, 300)]

    def compiled():
        with aot.asked_for("gfx90a") as asked:
            attention.kernel("dot_fwd")(*tensors, None, None, 1.0)
        (variant,) = (one for one in asked if one.stage == "dot_fwd")
        return variant.compiled()

    assert compiled().asm["amdgcn"]
    monkeypatch.setitem(lang.PRECISION, "gfx90a", lang.PRECISION["gfx942"])
    with pytest.raises(RuntimeError, match="tf32"):
        compiled()


@pytest.mark.parametrize(
    "stage,option,exact,fast,instruction",
    [
        ("dot_fwd", "PRECISION", "ieee", "tf32", "tf32"),
        ("additive_bwd", "TANH", "rcp", "fast", "tanh.approx"),
    ],
)
def test_less_exact_instructions_only_where_asked_for(
    lang, stage, option, exact, fast, instruction
):
    from fastseq.kernels import aot

    found = [v for v in aot.variants("sm_90") if v.stage == stage and " fp32 " in str(v)]
    for chosen in (exact, fast):
        variant = next(v for v in found if v.named[option] == chosen)
        ptx = variant.compiled().asm["ptx"]
        assert (instruction in ptx) == (chosen == fast), variant
        if chosen == "rcp":
            # Two special functions for each tanh: README.md counts on it.
            assert ptx.count("rcp.approx.ftz.f32") == ptx.count("ex2.approx") > 0
            assert not re.search(r"\bdiv\.(full|rn|approx)", ptx)


@pytest.mark.parametrize("stage", ["additive_fwd", "additive_bwd", "dot_fwd", "scores_bwd"])
@pytest.mark.parametrize("Q", [1, 40])
def test_tiles_depend_on_neither_batch_nor_source(lang, stage, Q):
    from fastseq.kernels.attention.launch import options

    found = [options(stage, torch.empty(B, Q, 64), fits=True) for B in (1, 7, 64)]
    assert found[0] == found[1] == found[2]
    assert list(inspect.signature(options).parameters) == ["stage", "query", "fits"]
