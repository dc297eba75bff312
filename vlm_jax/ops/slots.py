"""Vectors that stand at marked places of rows: soft tokens in, states of tokens out.

Every row has a fixed number of slots. The k-th marked place of a row, counted from its left,
belongs to slot k of that row, so rows never depend on each other and shapes never depend on data:

    marks   . . x . x . .        slots of the row   0 1 2 (3 of them)
                0   1            valid              1 1 0
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def put(
    x_btd: jax.Array, marks_bt: jax.Array, values_bkd: jax.Array, valid_bk: jax.Array | None = None
) -> jax.Array:
    """Replaces vectors at marked places by those of the slots.

    Args:
      x_btd: float.
      marks_bt: bool.
      values_bkd: float, cast to x's dtype.
      valid_bk: bool, False for slots that are empty; None is all valid.

    Returns:
      float[B, T, D]. Places whose slot is empty or does not exist keep their vector.
    """
    num_slots = values_bkd.shape[1]
    if not num_slots:
        return x_btd
    slot_bt = jnp.cumsum(marks_bt, axis=1, dtype=jnp.int32) - 1
    filled_bt = marks_bt & (slot_bt < num_slots)
    slot_bt = jnp.clip(slot_bt, 0, num_slots - 1)
    if valid_bk is not None:
        filled_bt &= jnp.take_along_axis(valid_bk, slot_bt, axis=1)
    values_btd = jnp.take_along_axis(values_bkd.astype(x_btd.dtype), slot_bt[..., None], axis=1)
    return jnp.where(filled_bt[..., None], values_btd, x_btd)


def take(x_btd: jax.Array, marks_bt: jax.Array, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """The vectors at marked places, by slots.

    Args:
      x_btd: float[B, T, D], or [B, T].
      marks_bt: bool.
      num_slots: places per row; further ones are left out.

    Returns:
      (values_bkd in x's dtype, 0 in empty slots; valid_bk bool).
    """
    # Marked places first, in their order.
    places_bt = jnp.argsort(~marks_bt, axis=1, stable=True)
    places_bk = places_bt[:, :num_slots]
    if short := num_slots - places_bk.shape[1]:
        places_bk = jnp.pad(places_bk, ((0, 0), (0, short)))
    valid_bk = jnp.arange(num_slots) < marks_bt.sum(axis=1, keepdims=True)
    if x_btd.ndim == 2:
        values_bk = jnp.take_along_axis(x_btd, places_bk, axis=1)
        return jnp.where(valid_bk, values_bk, jnp.zeros((), x_btd.dtype)), valid_bk
    values_bkd = jnp.take_along_axis(x_btd, places_bk[..., None], axis=1)
    return jnp.where(valid_bk[..., None], values_bkd, jnp.zeros((), x_btd.dtype)), valid_bk
