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


def prefix(
    num_queries: int,
    length: int | jax.Array,
    num_keys: int | None = None,
    offset: int | jax.Array = 0,
) -> jax.Array:
    """Causal, and the first `length` tokens see one another: an image before a text.

        length 2      s 0 1 2 3
                  t 0   1 1 . .
                    1   1 1 . .
                    2   1 1 1 .
                    3   1 1 1 1

    Args:
      num_queries, num_keys, offset: as in `causal`.
      length: tokens of the prefix.

    Returns:
      mask_ts, bool.
    """
    num_keys = num_queries if num_keys is None else num_keys
    early_t = jnp.arange(num_queries) + offset < length
    early_s = jnp.arange(num_keys) < length
    return causal(num_queries, num_keys, offset) | (early_t[:, None] & early_s[None, :])


def labels(segments_bs: jax.Array, num_image: int | jax.Array) -> jax.Array:
    """Labels that do not see one another, behind an image and a prompt (NXTP, fig. 3).

    Segments: 1 is image and prompt, 2, 3, ... the labels (a label's delimiter belongs to it),
    0 a token that sees the prefix but no label, not even itself. Image of two, a prompt of four
    whose last token is `are`, labels `so fa ,` and `cat ,`, then two tokens without a segment:

        segment   1  1  1  1  1  1  2  2  2  3  3  0  0
                  i  i  IM BO P  ar so fa ,  ca ,  x  y
             i    1  1  .  .  .  .  .  .  .  .  .  .  .
             i    1  1  .  .  .  .  .  .  .  .  .  .  .
             IM   1  1  1  .  .  .  .  .  .  .  .  .  .
             BO   1  1  1  1  .  .  .  .  .  .  .  .  .
             P    1  1  1  1  1  .  .  .  .  .  .  .  .
             ar   1  1  1  1  1  1  .  .  .  .  .  .  .
             so   1  1  1  1  1  1  1  .  .  .  .  .  .
             fa   1  1  1  1  1  1  1  1  .  .  .  .  .
             ,    1  1  1  1  1  1  1  1  1  .  .  .  .
             ca   1  1  1  1  1  1  .  .  .  1  .  .  .
             ,    1  1  1  1  1  1  .  .  .  1  1  .  .
             x    1  1  1  1  1  1  .  .  .  .  .  .  .
             y    1  1  1  1  1  1  .  .  .  .  .  .  .

    The released weights were trained with everything after the last delimiter (the last label
    too) in segment 0, as drawn; a last label with a number of its own sees itself like the others.

    Args:
      segments_bs: int32, see above.
      num_image: the first tokens, which all see one another.

    Returns:
      mask_bts with t = s, bool.
    """
    num_tokens = segments_bs.shape[1]
    own_bts = segments(segments_bs, segments_bs) & (segments_bs > 1)[:, None, :]
    shared_b1s = (segments_bs == 1)[:, None, :]
    image_s = jnp.arange(num_tokens) < num_image
    image_ts = image_s[:, None] & image_s[None, :]
    return image_ts | (causal(num_tokens) & (own_bts | shared_b1s))


def sequential_labels(
    segments_bs: jax.Array, closed_b: jax.Array, num_image: int | jax.Array
) -> jax.Array:
    """How NXTP's code hides earlier labels while it writes them one after another.

    Unlike `labels`, a label is hidden only when the label after it is complete, from then on for
    all later rows, and with it the last token of the prompt. Segments count on for the unfinished
    label. Here two labels are complete, so that the first is hidden from everything behind it:

        segment   1  1  1  1  1  1  2  2  2  3  3  4  4
                  i  i  IM BO P  ar so fa ,  ca ,  x  y
             ar   1  1  1  1  1  1  .  .  .  .  .  .  .
             so   1  1  1  1  1  1  1  .  .  .  .  .  .
             fa   1  1  1  1  1  1  1  1  .  .  .  .  .
             ,    1  1  1  1  1  1  1  1  1  .  .  .  .
             ca   1  1  1  1  1  .  .  .  .  1  .  .  .
             ,    1  1  1  1  1  .  .  .  .  1  1  .  .
             x    1  1  1  1  1  .  .  .  .  1  1  1  .
             y    1  1  1  1  1  .  .  .  .  1  1  1  1

    Rows change after they were computed, so a cache of keys is not exact with this mask.

    Args:
      segments_bs: int32, 1 for image and prompt, then 2, 3, ... for the labels.
      closed_b: int32, labels that have their delimiter.
      num_image: the first tokens, which all see one another.

    Returns:
      mask_bts with t = s, bool.
    """
    num_tokens = segments_bs.shape[1]
    next_bs = jnp.roll(segments_bs, -1, axis=1).at[:, -1].set(2)
    # The prompt's last token goes with the first label: number 0. Before it: -1.
    label_bs = jnp.where((segments_bs == 1) & (next_bs != 1), 0, segments_bs - 2)
    hidden_before_bt = jnp.minimum(label_bs, closed_b[:, None] - 1)
    label_b1s = label_bs[:, None, :]
    hidden_bts = (label_b1s >= 0) & (label_b1s < hidden_before_bt[:, :, None])
    return prefix(num_tokens, num_image)[None] & ~hidden_bts
