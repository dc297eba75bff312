"""What type checkers see of `load`."""

import importlib
import inspect
import pathlib
import typing

import pytest

import vlm_jax
from vlm_jax import loading

SYSTEMS = {"lvm": "lvm.Lvm", "nxtp": "nxtp.Nxtp", "vqgan": "image_tokenizer.ImageTokenizer"}


def overloads():
    found = {}
    for function in typing.get_overloads(loading.load):
        signature = inspect.signature(function)
        found[signature.parameters["system"].annotation.replace("'", '"')] = signature
    return found


@pytest.mark.parametrize("system, made", SYSTEMS.items())
def test_every_system_has_its_own_type(system, made):
    signature = overloads()[f'Literal["{system}"]']
    assert signature.return_annotation == made
    # Its fields are those of the two functions behind it.
    module = importlib.import_module(f"vlm_jax.systems.{system}")
    fields = {
        name
        for function in (module.from_run, module.from_upstream)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert set(signature.parameters) == {"system", "checkpoint", "averaged"} | fields


def test_the_types_exist():
    from vlm_jax.encoders.image_tokenizer import ImageTokenizer
    from vlm_jax.systems import lvm, nxtp

    assert all(hasattr(cls, "save") for cls in (ImageTokenizer, lvm.Lvm, nxtp.Nxtp))


def test_the_package_is_typed():
    assert (pathlib.Path(vlm_jax.__file__).parent / "py.typed").exists()
    assert vlm_jax.load is loading.load
