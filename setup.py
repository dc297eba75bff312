"""Packaging. Lower bounds here; the versions that the tests ran with are in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vlm_jax" / "__init__.py").read_text()).group(
    1
)

EXTRAS = {
    # Images, videos and TFDS data sets.
    "data": ["av>=12", "tensorflow-datasets>=4.9.7", "importlib_resources>=6"],
    # Tokenizers of the language models.
    "text": ["transformers>=4.50", "tokenizers>=0.20", "sentencepiece>=0.2"],
    # Nouns of captions. From 3.9 on NLTK's data files are not pickles.
    "labels": ["nltk>=3.9", "textblob>=0.18", "lemminflect>=0.2.3"],
    # Curves, event files.
    "logging": ["matplotlib>=3.8", "tensorboardX>=2.6"],
    # Reading .bin and .pth checkpoints. 2.6 is the first safe release: CVE-2025-32434.
    "torch": ["torch>=2.6"],
    # The API reference, docs/api.py.
    "docs": ["pdoc>=15"],
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
}
EXTRAS["demo"] = [*EXTRAS["data"], *EXTRAS["logging"], "tokenizers>=0.20"]
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    "mypy>=1.13",
    "setuptools>=77",  # one test builds the wheel
    "wheel",
    "gguf>=0.10",  # an independent reader to compare with
    *EXTRAS["demo"],
    *EXTRAS["text"],
    *EXTRAS["labels"],
    *EXTRAS["torch"],
    *EXTRAS["docs"],
]

setup(
    name="vlm_jax",
    version=VERSION,
    description="Vision as next-token prediction in JAX: LVM, NXTP, NExT-Chat, PixelLLM",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "third_party/NOTICE.md"],
    python_requires=">=3.11",
    # Recipes travel inside the package, so that an installed wheel can run them.
    packages=[
        *find_packages(include=["vlm_jax", "vlm_jax.*"]),
        "vlm_jax.configs",
        "vlm_jax.configs.parts",
    ],
    package_dir={"vlm_jax.configs": "configs", "vlm_jax.configs.parts": "configs/parts"},
    # Editable installs put the checkout on the path. Setuptools' default, a hook behind the path,
    # loses against a folder vlm_jax beside the user's script, as `git clone` makes one.
    options={"editable_wheel": {"mode": "compat"}},
    package_data={"vlm_jax": ["py.typed", "assets/*", "assets/*/*", "systems/*/README.md"]},
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12.8",
        "grain>=0.2.10",
        "jax>=0.10",
        "ml_collections>=1.0",
        "msgpack>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "pillow>=10.1",
        "pycocotools>=2.0.8",
        "safetensors>=0.5",
    ],
    extras_require=EXTRAS,
)
