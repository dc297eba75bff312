"""Who may attend to whom. Every mask is bool [(b,) t, s]; True means query t may read key s.

`ops.attention.attend` takes the structure and calls these only where an implementation needs the
dense mask; fast kernels never see one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal(num_queries: int, num_keys: int | None = None, offset: int | jax.Array = 0):
    """A query reads itself and everything before it.

    `offset` is the key slot of query 0. Three queries behind two cached tokens, six slots:

        offset 2      s 0 1 2 3 4 5
                  t 0   1 1 1 . . .
                    1   1 1 1 1 . .
                    2   1 1 1 1 1 .

    Args:
      num_queries: t.
      num_keys: s; None is t.
      offset: int or int32 scalar.

    Returns:
      mask_ts, bool.
    """
    num_keys = num_queries if num_keys is None else num_keys
    slots_t = jnp.arange(num_queries) + offset
    return slots_t[:, None] >= jnp.arange(num_keys)[None, :]


def segments(q_segments_bt: jax.Array, kv_segments_bs: jax.Array) -> jax.Array:
    """Tokens of one document see only one another; padding (0) sees only padding.

        q, kv = 1 1 2 0       1 1 2 0
                            1 1 1 . .
                            1 1 1 . .
                            2 . . 1 .
                            0 . . . 1

    Args:
      q_segments_bt: int32.
      kv_segments_bs: int32.

    Returns:
      mask_bts, bool; not causal by itself.
    """
    return q_segments_bt[:, :, None] == kv_segments_bs[:, None, :]


def cache(valid_bs: jax.Array, num_queries: int, offset: int | jax.Array) -> jax.Array:
    """New tokens read the real slots of the cache up to and including their own.

    Slot 0 is left padding, slots 1 and 2 hold the prompt, two new tokens go to slots 3 and 4:

        valid       . 1 1 1 1 .
                  s 0 1 2 3 4 5
              t 0   . 1 1 1 . .
                1   . 1 1 1 1 .

    Args:
      valid_bs: bool, slots that hold a real token (the new ones included).
      num_queries: t.
      offset: slot of the first new token.

    Returns:
      mask_bts, bool.
    """
    return causal(num_queries, valid_bs.shape[1], offset)[None] & valid_bs[:, None, :]
