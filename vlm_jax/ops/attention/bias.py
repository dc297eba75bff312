"""What is added to the scores: dense, or a structure of which only the needed part is made.

A bias of 16 heads over 4,096 queries and keys is 1 GiB per image in float32. Each class here gives
the part of some queries and keys (`part`), so that attention in blocks never holds all of it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def part_of(x, start, size, axis):
    """`size` entries of an axis; None of None. A start that is traced is fine."""
    if x is None:
        return None
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GridBias:
    """Keys on a grid: the one in row r, column c gets rows[b, n, t, r] + cols[b, n, t, c].

    The decomposed relative positions of SAM's image encoder (arXiv 2304.02643), as in
    Li et al., arXiv 2112.01526, sec. 4.1.

        keys 0 1 2    are in rows 0 0 0    and columns 0 1 2
             3 4 5                1 1 1                0 1 2

    Attributes:
      rows_bntr: float[B, N, T, R].
      cols_bntc: float[B, N, T, C]; R * C keys, row after row. B and N may be 1 in both.
    """

    rows_bntr: jax.Array
    cols_bntc: jax.Array

    def part(self, start, size, keys):
        """bias_bnts float32 of `size` queries from `start` on and a slice of keys."""
        rows_bntr, cols_bntc = (
            part_of(x, start, size, axis=2).astype(jnp.float32)
            for x in (self.rows_bntr, self.cols_bntc)
        )
        bias_bntrc = rows_bntr[..., None] + cols_bntc[..., None, :]
        return bias_bntrc.reshape(*bias_bntrc.shape[:3], -1)[..., keys]

    def whole(self):
        """bias_bnts float32."""
        return self.part(0, self.rows_bntr.shape[2], slice(None))

    @property
    def width(self) -> int:
        """Features that `fold` adds to a head."""
        return self.rows_bntr.shape[3] + self.cols_bntc.shape[3]

    def fold(self, q_btnh, k_bskh, v_bskh, scale):
        """(q, k, v) without a bias that give the same scores, for kernels that take none.

        A query carries its terms as further features, a key the numbers of its row and column as
        one-hot vectors: their product is the bias. v gets zeros, as kernels want equal widths; the
        first h features of the result count.
        """
        (b, t, n, _), (s, k) = q_btnh.shape, k_bskh.shape[1:3]
        num_rows, num_cols = self.rows_bntr.shape[3], self.cols_bntc.shape[3]
        terms_btnf = jnp.concatenate(
            [
                jnp.broadcast_to(x, (b, n, t, x.shape[3])).swapaxes(1, 2)
                for x in (self.rows_bntr / scale, self.cols_bntc / scale)
            ],
            axis=3,
        )
        where_rc = np.indices((num_rows, num_cols)).reshape(2, s)
        one_hot_sf = np.concatenate(
            [np.eye(count)[at_s] for count, at_s in zip((num_rows, num_cols), where_rc)], axis=1
        )
        one_hot_bskf = jnp.broadcast_to(one_hot_sf[None, :, None], (b, s, k, self.width))
        return (
            jnp.concatenate([q_btnh, terms_btnf.astype(q_btnh.dtype)], axis=3),
            jnp.concatenate([k_bskh, one_hot_bskf.astype(k_bskh.dtype)], axis=3),
            jnp.pad(v_bskh, ((0, 0), (0, 0), (0, 0), (0, self.width))),
        )

    def check(self, b, n, t, s):
        """Raises ValueError unless it is for such scores."""
        rows, cols = self.rows_bntr.shape, self.cols_bntc.shape
        fits = len(rows) == len(cols) == 4 and rows[3] * cols[3] == s
        if not fits or any(
            x[0] not in (1, b) or x[1] not in (1, n) or x[2] != t for x in (rows, cols)
        ):
            raise ValueError(
                f"GridBias of rows {rows} and columns {cols} for {b} x {n} heads, {t} queries and "
                f"{s} keys; give [B, N, {t}, R] and [B, N, {t}, C] with R * C = {s}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BucketBias:
    """Every pair of a query and a key is in a bucket: the bias is table[n, buckets[t, s]].

    The relative positions of T5 (Raffel et al., arXiv 1910.10683, sec. 2.1), the same for all rows
    of a batch; `t5_buckets` numbers them.

    Attributes:
      table_nk: float[N, num_buckets].
      buckets_ts: int32.
    """

    table_nk: jax.Array
    buckets_ts: jax.Array

    def part(self, start, size, keys):
        """bias_1nts float32 of `size` queries from `start` on and a slice of keys."""
        buckets_ts = part_of(self.buckets_ts, start, size, axis=0)[:, keys]
        return self.table_nk.astype(jnp.float32)[None, :, buckets_ts]

    def whole(self):
        """bias_1nts float32."""
        return self.part(0, self.buckets_ts.shape[0], slice(None))

    def check(self, b, n, t, s):
        """Raises ValueError unless it is for such scores."""
        del b
        if self.table_nk.shape[0] != n or self.buckets_ts.shape != (t, s):
            raise ValueError(
                f"BucketBias of a table {self.table_nk.shape} and buckets {self.buckets_ts.shape} "
                f"for {n} heads, {t} queries and {s} keys; give [{n}, num_buckets] and [{t}, {s}]"
            )


@dataclasses.dataclass(frozen=True)
class DenseBias:
    """Of any structure; axes of size 1 broadcast."""

    bias_bnts: jax.Array

    def part(self, start, size, keys):
        """bias_bnts of these queries and keys, in its own dtype; axes of size 1 stay."""
        some = self.bias_bnts
        if some.shape[2] > 1:
            some = part_of(some, start, size, axis=2)
        return some if some.shape[3] == 1 else some[..., keys]

    def whole(self):
        """bias_bnts."""
        return self.bias_bnts


def t5_buckets(q_positions_t, kv_positions_s, *, num_buckets=32, max_distance=128, causal=False):
    """Buckets of T5: distances below half of them one by one, larger ones by their logarithm.

    Keys behind the query have the upper half of the buckets to themselves; with `causal` nobody
    reads them, they count as distance 0 and the other side has all buckets.

    Args:
      q_positions_t, kv_positions_s: int32; for a cache, the slots.
      num_buckets: of both sides together.
      max_distance: from here on all distances share the last bucket.
      causal: of a decoder.

    Returns:
      buckets_ts int32.
    """
    ahead_ts = jnp.asarray(kv_positions_s)[None, :] - jnp.asarray(q_positions_t)[:, None]
    side = num_buckets if causal else num_buckets // 2
    exact = side // 2
    far = np.arange(exact, max_distance + 1)
    # The smallest distance of each further bucket; as a search, no logarithm is rounded on devices.
    log = np.log(far / exact) / math.log(max_distance / exact) * (side - exact)
    number = np.minimum(exact + np.floor(log + 1e-9).astype(int), side - 1)
    starts = far[np.searchsorted(number, np.arange(exact + 1, side))]
    distance_ts = jnp.maximum(-ahead_ts, 0) if causal else jnp.abs(ahead_ts)
    beyond_ts = jnp.searchsorted(jnp.asarray(starts), distance_ts, side="right")
    bucket_ts = jnp.where(distance_ts < exact, distance_ts, exact + beyond_ts)
    if not causal:
        bucket_ts = bucket_ts + jnp.where(ahead_ts > 0, side, 0)
    return bucket_ts.astype(jnp.int32)
