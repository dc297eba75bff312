"""What inference compiles is kept for the next process."""

import jax
import pytest

from vlm_jax.machines import compilation_cache


@pytest.fixture
def cache_dir(monkeypatch, tmp_path):
    """No cache is configured; afterwards all is as it was."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_go_to_the_cache_folder(cache_dir):
    compilation_cache.enable()
    folder = jax.config.jax_compilation_cache_dir
    assert folder.startswith(f"{cache_dir / 'compiled'}/")
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == folder


def test_it_can_be_switched_off_and_never_stands_in_the_way(cache_dir, monkeypatch):
    monkeypatch.setenv("VLM_JAX_COMPILED", "0")
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("VLM_JAX_COMPILED")
    (cache_dir / "compiled").write_text("a file where the folder should be")
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "/somebody's")
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == "/somebody's"
