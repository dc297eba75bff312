"""Meshes, rules and rows."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.program import sharding
from vlm_jax.program.config import ConfigError


def abstract(**shapes):
    return {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in shapes.items()}


def test_mesh_sizes():
    assert dict(sharding.make_mesh(sharding.MeshConfig()).shape) == {
        "data": 1,
        "fsdp": 8,
        "tensor": 1,
    }
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3, fsdp=-1), "multiple of 3 devices, and there are 8"),
        (dict(data=2, fsdp=2, tensor=1), "total of 4 devices, and there are 8"),
        (dict(data=-1, fsdp=-1), "at most one may be -1"),
        (dict(data=0), "at most one may be -1"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(sharding.MeshConfig(**sizes))


def test_rules_are_complete_and_ordered():
    params = {"a": abstract(kernel=(4, 8)), "b": abstract(scale=(4,))}
    rules = [("^a/kernel$", P("fsdp", None)), ("kernel", P()), ("^b/", P())]
    assert sharding.match(rules, params) == {"a/kernel": P("fsdp", None), "b/scale": P()}
    with pytest.raises(ConfigError, match="matches 1 parameters: b/scale"):
        sharding.match(rules[:2], params)
    with pytest.raises(ConfigError, match="more axes than the parameter has"):
        sharding.match([("", P(None, "fsdp"))], {"b": abstract(scale=(4,))})


def test_an_axis_that_does_not_divide_is_left_out_and_said_so(capsys):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4))
    rules = [("table", P("tensor", "fsdp"))]
    placed = sharding.of_params(mesh, rules, abstract(table=(8290, 6)))
    assert placed["table"].spec == P(None, "fsdp")
    assert "table (8290 by tensor)" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_reach_their_devices(sizes):
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    rows = sharding.rows_of_process(mesh, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    host = np.arange(32).reshape(16, 2)
    placed = sharding.place_batch(mesh, {"x": host}, rows, 16)["x"]
    np.testing.assert_array_equal(placed, host)
    assert placed.addressable_shards[0].data.shape[0] == 16 // (sizes[0] * sizes[1])


def test_moments_lie_with_their_parameters():
    mesh = sharding.make_mesh(sharding.MeshConfig())
    kernel = sharding.of_params(mesh, [("", P("fsdp"))], abstract(kernel=(8,)))["kernel"]
    tree = {"mu": {"a/kernel": abstract(x=(8,))["x"]}, "count": abstract(x=())["x"]}
    placed = sharding.like_params(mesh, tree, {"a/kernel": kernel})
    assert placed["mu"]["a/kernel"].spec == P("fsdp")
    assert placed["count"].spec == P()
