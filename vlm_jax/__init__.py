"""vlm_jax: vision as next-token prediction, in JAX. See README.md."""

import typing

if typing.TYPE_CHECKING:
    from vlm_jax.loading import load as load

__version__ = "0.1.0"


def __getattr__(name):
    # Lazy, so that `import vlm_jax.models.llama` loads jax, flax and numpy and nothing else.
    if name == "load":
        from vlm_jax.loading import load

        return load
    raise AttributeError(f"module 'vlm_jax' has no attribute {name!r}")
