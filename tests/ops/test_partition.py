import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlm_jax.ops import partition


def make_mesh(*sizes):
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 3)


def test_nothing_happens_without_a_mesh():
    x = jnp.ones((4, 2))
    assert partition.constrain(x, partition.BATCH, "tensor") is x


def test_constrains_under_jit():
    mesh = make_mesh(2, 2, 2)

    @jax.jit
    def f(x):
        with partition.use_mesh(mesh):
            return partition.constrain(x * 2, partition.BATCH, None, "tensor")

    out = f(jnp.ones((4, 3, 6)))
    assert out.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    np.testing.assert_array_equal(out, 2)
    assert partition.active_mesh() is None


def test_spec_drops_what_does_not_fit():
    mesh = make_mesh(4, 1, 2)
    axes = (partition.BATCH, None, "tensor")
    assert partition.spec((4, 3, 6), axes, mesh) == PartitionSpec("data", None, "tensor")
    assert partition.spec((1, 3, 5), axes, mesh) == PartitionSpec(None, None, None)
    assert partition.spec((4,), ("sequence",), mesh) == PartitionSpec(None)
    with pytest.raises(ValueError, match="3 sharding axes"):
        partition.spec((4, 3), axes, mesh)


def test_platform_is_that_of_the_mesh():
    assert partition.platform() == jax.default_backend()
    with partition.use_mesh(make_mesh(8, 1, 1)):
        assert partition.platform() == "cpu"
