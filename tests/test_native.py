"""The compiled module: how it is found, accepted tensors, and refused ones."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import cpc_ext
from cpc_ext._native import native

CHECKOUT = Path(cpc_ext.__file__).parent
LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )


def copy_of_the_sources(folder: Path) -> Path:
    """A checkout: the Python files without a compiled module."""
    shutil.copytree(CHECKOUT, folder / "cpc_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return folder


# The import hook of an editable install names one folder for cpc_ext and hides any other checkout.
not_editable = pytest.mark.skipif(
    any("ScikitBuild" in type(finder).__name__ for finder in sys.meta_path), reason="editable install"
)


@not_editable
def test_a_checkout_uses_the_installed_module(tmp_path):
    folder = copy_of_the_sources(tmp_path)
    done = run("import cpc_ext; print(cpc_ext.__file__); print(cpc_ext.build_info()['module'])", folder)
    assert done.returncode == 0, done.stderr
    sources, module = done.stdout.split()
    assert Path(sources).parent == folder / "cpc_ext"
    assert Path(module).samefile(native.__file__)


def test_any_other_folder_works(tmp_path):
    done = run("import cpc_ext.ops; print(cpc_ext.__version__)", tmp_path, PYTHONPATH=str(CHECKOUT.parent))
    assert done.stdout.strip() == cpc_ext.__version__, done.stderr


@not_editable
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs to see what is loaded")
def test_the_openmp_runtime_is_pytorchs(tmp_path):
    code = "import cpc_ext._native; print(*(line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line))"
    loaded = set(run(code, tmp_path, PYTHONPATH=str(CHECKOUT.parent)).stdout.split())
    (brought,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")
    assert loaded == {str(brought)}


def call_a_kernel() -> None:
    results = torch.empty(()), torch.empty(())
    native.info_nce_reduced(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), None, *results, True, None)


def run_a_pixel() -> None:
    raw, map = torch.zeros(1, 6, 6, 2), torch.zeros(1, 6, 6, 3)
    step = (0, [(map, 1, [(0, 0)])], torch.ones(3, 2), torch.ones(2), None, None, raw, None, 1, (0, 0))
    native.PixelSteps([step], 1, 4, 4).run_pixel(0, 0)


@pytest.mark.parametrize("call", [native.build_info, call_a_kernel, run_a_pixel])
def test_every_thread_of_python_has_pytorchs_number_of_threads(call):
    """OpenMP keeps one for each of them, to which torch.set_num_threads in another is nothing."""
    (runtime,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")
    library = ctypes.CDLL(str(runtime))
    before = torch.get_num_threads()

    def threads_after_a_call() -> int:
        call()
        return library.omp_get_max_threads()

    try:
        torch.set_num_threads(before + 3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(threads_after_a_call).result() == before + 3
    finally:
        torch.set_num_threads(before)


def test_a_stale_module_is_an_error_that_says_what_to_do(tmp_path):
    folder = copy_of_the_sources(tmp_path)
    (folder / "cpc_ext" / "_version.py").write_text('__version__ = "99.0"\n')
    done = run("import cpc_ext.ops", folder)
    assert done.returncode != 0
    assert f"is cpc_ext {cpc_ext.__version__}" in done.stderr
    assert "is 99.0" in done.stderr
    assert "pip install" in done.stderr


def test_a_missing_module_is_an_error_that_says_what_to_do(tmp_path):
    folder = copy_of_the_sources(tmp_path)
    hide = "import importlib.metadata as m; m.distributions = lambda **_: []; import sys; sys.meta_path = [f for f in "
    hide += "sys.meta_path if 'ScikitBuild' not in type(f).__name__]; import cpc_ext.ops"
    done = run(hide, folder)
    assert "has no compiled module" in done.stderr
    assert "pip install" in done.stderr


def test_a_file_that_is_no_module_is_an_error_that_names_it(tmp_path):
    done = run("import cpc_ext.ops", tmp_path, PYTHONPATH=str(CHECKOUT.parent), CPC_EXT_NATIVE="module.txt")
    assert "ImportError: CPC_EXT_NATIVE=module.txt is no compiled module" in done.stderr


def test_build_info_tells_what_is_in():
    info = cpc_ext.build_info()
    assert info["version"] == cpc_ext.__version__ == native.__version__
    assert info["simd"] in (*LEVELS, "native")
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)


def test_the_module_prints_a_report(tmp_path):
    done = subprocess.run([sys.executable, "-m", "cpc_ext"], cwd=CHECKOUT.parent, capture_output=True, text=True)
    for fact in ("cpc_ext simd", "cpc_ext cuda", "torch "):
        assert fact in done.stdout


@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_gives_the_same_results(tmp_path, level):
    code = """
import sys, torch, cpc_ext
from cpc_ext.ops import extract_patches, info_nce, masked_conv2d
images = torch.arange(3 * 3 * 40 * 44).reshape(3, 3, 40, 44).remainder(251).to(torch.uint8)
images, floating = images, (images.float() / 251).requires_grad_()
flip = torch.tensor([True, False, True])
out = [extract_patches(images, 9, 4, patch_norm=True, flip=flip, dtype=t, channels_last=c).float()
       for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for c in (True, False)]
out.append(torch.autograd.grad(extract_patches(floating, 9, 4, patch_norm=True).square().sum(), floating)[0])
wave = torch.arange(70 * 33 * 9).reshape(70, 33, 3, 3).mul(0.7).sin()
mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x, w = wave[:5, :, :, :].to(t).requires_grad_(), (wave / 16).to(t).requires_grad_()
    y = masked_conv2d(x, w, mask=mask, activation='gated')
    out += [v.float() for v in (y, *torch.autograd.grad(y, (x, w), torch.ones_like(y)))]
out.append(info_nce(torch.ones(1, 1), torch.tensor([[1.0], [torch.inf]])).loss)  # Infinite.
torch.save(out, sys.argv[1] if len(sys.argv) > 1 else 'out.pt')
print(cpc_ext.build_info()['simd'])
"""
    done = run(code, tmp_path, CPC_EXT_ISA=level, PYTHONPATH=str(CHECKOUT.parent))
    assert done.returncode == 0, done.stderr
    # A level above the processor's falls back to what it has; a module for one processor has one.
    used = done.stdout.strip()
    assert used == "native" or LEVELS.index(used) <= LEVELS.index(level)
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    run(code, tmp_path, PYTHONPATH=str(CHECKOUT.parent), CPC_EXT_ISA="baseline")
    for result, expected in zip(results, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
        # bfloat16 may round to either neighbour, sums of them by a few.
        torch.testing.assert_close(result, expected, rtol=2**-6, atol=2**-8)


def test_an_unknown_simd_level_is_refused(tmp_path):
    done = run("import cpc_ext.ops", tmp_path, CPC_EXT_ISA="sse9", PYTHONPATH=str(CHECKOUT.parent))
    assert "CPC_EXT_ISA must be one of baseline, avx2, avx512, avx512_bf16, got sse9" in done.stderr


def arguments(**change):
    values = {"offsets": None, "flip": None, "patch_size": 4, "stride": 2, "height": 8, "width": 8}
    values |= {"gray": False, "patch_norm": False, "channels_last": False, "scale": [1.0], "shift": [0.0]}
    return values | change


def test_numpy_arrays_cross_too():
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), dtype=np.uint8)
    images.flags.writeable = False
    patches = np.empty((2, 3, 3, 1, 4, 4), dtype=np.float32)
    native.extract_patches(images, patches, **arguments())
    expected = np.lib.stride_tricks.sliding_window_view(images, (4, 4), (2, 3))[:, :, ::2, ::2].transpose(
        0, 2, 3, 1, 4, 5
    )
    np.testing.assert_array_equal(patches, expected)


def test_parameters_and_tensors_that_require_grad_cross():
    patches = torch.empty(1, 3, 3, 1, 4, 4)
    native.extract_patches(torch.nn.Parameter(torch.ones(1, 1, 8, 8)), patches, **arguments())
    assert torch.equal(patches, torch.ones_like(patches))


def test_read_only_outputs_are_refused():
    patches = np.empty((1, 3, 3, 1, 4, 4), dtype=np.float32)
    patches.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        native.extract_patches(torch.ones(1, 1, 8, 8), patches, **arguments())


@pytest.mark.parametrize("value", [None, 3, [1.0, 2.0], "tensor"])
def test_what_is_no_tensor_is_a_type_error(value):
    with pytest.raises(TypeError, match="expected a tensor, got"):
        native.probe(value)


def test_types_that_no_kernel_reads_are_type_errors():
    with pytest.raises(TypeError, match="element type"):
        native.probe(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="9 dimensions"):
        native.probe(torch.zeros([1] * 9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"stride": -1}, "stride must be at least 1"),
        ({"height": 9}, "must hold a patch of 4 and lie within"),
        ({"width": 3}, "must hold a patch of 4"),
        ({"stride": 1}, r"patches must be \[1, 5, 5, 1, 4, 4\], got \[1, 3, 3, 1, 4, 4\]"),
        ({"scale": []}, "one value per channel"),
        ({"channels_last": False, "flip": torch.zeros(2, dtype=torch.bool)}, r"flip must be \[1\]"),
        ({"offsets": torch.tensor([[0, 1]])}, "offsets must be in"),
        ({"offsets": torch.zeros(1, 2)}, "offsets must be int64"),
    ],
)
def test_the_module_checks_for_itself(change, words):
    with pytest.raises(ValueError, match=words):
        native.extract_patches(torch.ones(1, 1, 8, 8), torch.empty(1, 3, 3, 1, 4, 4), **arguments(**change))


def test_outputs_in_another_order_are_refused():
    patches = torch.empty(1, 3, 3, 2, 4, 4).permute(0, 2, 1, 3, 4, 5)
    with pytest.raises(ValueError, match="patches must be dense"):
        native.extract_patches(torch.ones(1, 2, 8, 8), patches, **arguments(scale=[1, 1], shift=[0, 0]))


@pytest.mark.parametrize(
    "module", ["cpc_ext.ops", "cpc_ext.nn", "cpc_ext.models", "cpc_ext.interop", "cpc_ext.measures"]
)
def test_importing_does_not_load_the_compiler(tmp_path, module):
    """Which takes longer than all else that is imported, PyTorch among it."""
    code = f"import sys, torch, {module}; print([name for name in sys.modules if name.startswith('torch._dynamo')])"
    done = run(code, tmp_path, PYTHONPATH=str(CHECKOUT.parent))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
