import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import matmul


@pytest.mark.parametrize(
    "spec, x, w",
    [
        ("btd,df->btf", (2, 3, 4), (4, 5)),
        ("btd,fd->btf", (2, 3, 4), (5, 4)),
        ("btd,dnh->btnh", (2, 3, 4), (4, 2, 3)),
        ("btnh,nhd->btd", (2, 3, 2, 3), (2, 3, 4)),
    ],
)
def test_equals_einsum(spec, x, w):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in (x, w))

    def both(product):
        return jax.value_and_grad(lambda x, w: jnp.sin(product(spec, x, w)).sum(), (0, 1))(x, w)

    want, got = jax.jit(lambda: (both(jnp.einsum), both(matmul.project)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)
