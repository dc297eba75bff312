"""A cache folder of its own, so that no test reads what another run has kept."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VLM_JAX_CACHE", str(folder))
    return folder
