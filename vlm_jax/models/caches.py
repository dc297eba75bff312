"""What a decoder remembers of earlier tokens, and what its blocks need to know of a call.

    cache ── open(x_btd, context) ──> Call ── attend, layer by layer ── close ──> cache

A cache knows how its queries read: a network opens it, hands every block the call, and asks it for
the new cache. So `Llama.transform` is written once, for no cache and for every kind of it:

    None        the tokens of this call read each other
    Cache       keys and values in slots: a prompt, then one token after another
    Branches    several continuations of one prefix, whose keys are stored once, never repeated

    prefix   s s s s s s s           one row per image: computed by the prefill
                         |- t t t    branch 0: own keys only
                         |- t t t    branch 1
                         |- t t t    ...

A branch reads the whole prefix and its own tokens, no other branch. Within a call the branches take
the place of the token axis: [B, R, D] is one token of each of R branches, so that every matrix
product has B * R rows.

Another decoder brings its own class with the same members (`open`, `fork`, `rows`, `select`); what
belongs to an image and not to a continuation, as the keys of an encoder, it leaves in place there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.ops import attention


class Step(NamedTuple):
    """One call of a decoding loop.

    Attributes:
      logits: float32[B, V] after the last token; [B, R, V] of branches.
      hidden: what they were made from, [B, D] or [B, R, D].
      cache: with the tokens of the call.
    """

    logits: jax.Array
    hidden: jax.Array
    cache: Any


@dataclasses.dataclass(frozen=True)
class Context:
    """Who reads whom among the tokens of a call, and where they stand.

    Attributes:
      positions_bt: int32; None counts the valid tokens of each row from 0, cached ones included.
      segments_bt: int32 document numbers, 0 is padding; tokens see only their own document. Not
        together with a cache.
      valid_bt: bool, False for padding, which nobody reads; None is all valid.
      prefix_block: the first so many tokens see one another both ways (an image); static.
      mask_bts: bool, who reads whom, instead of the causal order. Not together with a cache.
    """

    positions_bt: jax.Array | None = None
    segments_bt: jax.Array | None = None
    valid_bt: jax.Array | None = None
    prefix_block: int = 0
    mask_bts: jax.Array | None = None

    def positions(self, length: int, seen_b1: Any = 0) -> jax.Array:
        """int32 [B or 1, T], behind `seen_b1` earlier tokens."""
        if self.positions_bt is not None:
            return self.positions_bt
        if self.valid_bt is None:
            count_bt = jnp.arange(1, length + 1)[None]
        else:
            count_bt = jnp.cumsum(self.valid_bt, axis=1, dtype=jnp.int32)
        return jnp.maximum(seen_b1 + count_bt - 1, 0)


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass of tokens through the blocks, without a cache.

    Attributes:
      positions_bt: int32, of rotary embedding.
      where: arguments of `attention.attend`.
      own: per layer, what the call changes: leaves [L, ...] for scanned layers, else a dict of
        layers; None is nothing.
      shared: per layer, what it only reads.
    """

    positions_bt: jax.Array
    where: dict
    own: Any = None
    shared: Any = None

    def attend(self, own, shared, q_btnh, k_btkh, v_btkh, **options):
        """(o_btnh, own): what one layer's queries read, and its state with the new keys.

        Args:
          own, shared: of this layer.
          q_btnh, k_btkh, v_btkh: of the new tokens, rotated.
          **options: further arguments of `attention.attend`, a bias for example.
        """
        del shared
        return attention.attend(q_btnh, k_btkh, v_btkh, **self.where, **options), own

    def close(self, own):
        """The cache behind the call, given what the layers made of their states."""
        del own


def open_call(cache: Any, x_btd: jax.Array, context: Context) -> Any:
    """The call of these vectors; cache None is none.

    Raises:
      ValueError: more tokens than free slots, or a context that the cache cannot follow.
    """
    if cache is not None:
        return cache.open(x_btd, context)
    where = dict(causal=True, prefix=context.prefix_block)
    if context.mask_bts is not None:
        where = dict(mask_bts=context.mask_bts)
    if context.segments_bt is not None:
        segments_bt = context.segments_bt
        where.update(q_segments_bt=segments_bt, kv_segments_bs=segments_bt)
    if context.valid_bt is not None:
        where.update(kv_valid_bs=context.valid_bt)
    return Call(context.positions(x_btd.shape[1]), where)


# ---- slots -----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far; a pytree, passed in and returned.

    Attributes:
      layers: {"k", "v"}: [L, B*K, S, H] for scanned layers, else one such dict per layer with
        [B*K, S, H]: the layout in which one query reads it in place
        (`ops/attention/one_query.py`).
      valid_bs: bool, slots that hold a real token.
      index: int32, the next free slot, the same for all rows (shorter prompts are left-padded).
      fresh: nothing is in it (static). Attention then reads the new tokens only, without a mask
        over slots, and may use a fast kernel; the structure differs from that of a used cache, so
        that a loop starts behind the first call.
    """

    layers: dict
    valid_bs: jax.Array
    index: jax.Array
    fresh: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def rows(self, index_r: jax.Array) -> Cache:
        """The cache of these rows: repeats a prompt for several samples."""
        axis = 1 if "k" in self.layers else 0
        b = self.valid_bs.shape[0]

        def take(x):
            split = x.reshape(*x.shape[:axis], b, -1, *x.shape[axis + 1 :])
            rows = jnp.take(split, index_r, axis=axis)
            return rows.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

        layers = jax.tree.map(take, self.layers)
        return dataclasses.replace(self, layers=layers, valid_bs=self.valid_bs[index_r])

    def cut(self, length: jax.Array) -> Cache:
        """The cache of the first `length` slots; what is in the others will be overwritten."""
        valid_bs = self.valid_bs & (jnp.arange(self.valid_bs.shape[1]) < length)
        index = jnp.asarray(length, jnp.int32)
        return dataclasses.replace(self, valid_bs=valid_bs, index=index)

    def fork(self, num_branches: int, num_slots: int) -> Branches:
        """Starts continuations behind what is in it, with room for `num_slots` tokens each.

        Slots that are still free stay empty for ever: make the cache as long as the prefix.
        """
        b = self.valid_bs.shape[0]

        def empty(x):
            *stack, z, _, h = x.shape
            return jnp.zeros((*stack, b, num_branches, z // b, num_slots, h), x.dtype)

        return Branches(self, jax.tree.map(empty, self.layers), jnp.zeros((), jnp.int32))

    def open(self, x_btd: jax.Array, context: Context) -> _SlotCall:
        """See `open_call`."""
        b, t, _ = x_btd.shape
        for name in ("mask_bts", "segments_bt"):
            if getattr(context, name) is not None:
                raise ValueError(f"{name} and cache cannot be combined")
        if t > self.valid_bs.shape[1]:
            raise ValueError(f"{t} tokens for a cache of {self.valid_bs.shape[1]} slots")
        index = 0 if self.fresh else self.index
        seen_b1 = 0 if self.fresh else self.valid_bs.sum(axis=1, dtype=jnp.int32)[:, None]
        new_bt = jnp.ones((b, t), bool) if context.valid_bt is None else context.valid_bt
        valid_bs = jax.lax.dynamic_update_slice(self.valid_bs, new_bt, (0, index))
        where = dict(causal=True, prefix=context.prefix_block)
        if not self.fresh:
            where.update(q_offset=index, kv_valid_bs=valid_bs)
        elif context.valid_bt is not None:
            where.update(kv_valid_bs=context.valid_bt)
        positions_bt = context.positions(t, seen_b1)
        after = Cache(self.layers, valid_bs, self.index + t)
        return _SlotCall(positions_bt, where, self.layers, None, index, self.fresh, after)

    def last(self, hidden_btd, valid_bt=None, length=None):
        """(hidden_b1d after the last real token of every row, the cache up to there).

        Args:
          hidden_btd: what the call that made this cache gave.
          valid_bt: bool, its real tokens; None is all.
          length: int32, only the first so many are real, in every row.
        """
        if length is not None:
            return jax.lax.dynamic_slice_in_dim(hidden_btd, length - 1, 1, axis=1), self.cut(length)
        if valid_bt is None:
            return hidden_btd[:, -1:], self
        last_b = valid_bt.shape[1] - 1 - jnp.argmax(valid_bt[:, ::-1], axis=1)
        return jnp.take_along_axis(hidden_btd, last_b[:, None, None], axis=1), self

    @staticmethod
    def squeeze(x_b1v: jax.Array) -> jax.Array:
        """What `last` made, without the axis of tokens."""
        return x_b1v[:, 0]


@dataclasses.dataclass(frozen=True)
class _SlotCall(Call):
    index: Any = 0
    fresh: bool = False
    after: Cache | None = None

    def attend(self, own, shared, q_btnh, k_btkh, v_btkh, **options):
        del shared
        own = {"k": _write(own["k"], k_btkh, self.index), "v": _write(own["v"], v_btkh, self.index)}
        if not self.fresh:
            k_btkh, v_btkh = (read(own[name], q_btnh.shape[0]) for name in ("k", "v"))
        return attention.attend(q_btnh, k_btkh, v_btkh, **self.where, **options), own

    def close(self, own):
        return dataclasses.replace(self.after, layers=own)


def _write(cache_zsh, new_btkh, index):
    _, t, _, h = new_btkh.shape
    new_zth = new_btkh.swapaxes(1, 2).reshape(-1, t, h).astype(cache_zsh.dtype)
    return jax.lax.dynamic_update_slice(cache_zsh, new_zth, (0, index, 0))


def read(cache_zsh: jax.Array, b: int) -> jax.Array:
    """Keys or values of one layer as [B, S, K, H]."""
    return cache_zsh.reshape(b, -1, *cache_zsh.shape[1:]).swapaxes(1, 2)


# ---- branches --------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branches:
    """The cache of R continuations per image; a pytree, passed in and returned.

    Attributes:
      prefix: the cache of the prefix, B rows; read only.
      own: its `layers`' tree with leaves [(L,) B, R, K, T, H].
      index: int32, the next free slot of `own`.
    """

    prefix: Cache
    own: dict
    index: jax.Array

    def select(self, index_bw: jax.Array) -> Branches:
        """The branches with these numbers; W may be smaller than R."""

        def take(x):
            leading = (1,) * (x.ndim - 5)
            index = index_bw.reshape(*leading, *index_bw.shape, 1, 1, 1)
            return jnp.take_along_axis(x, index, axis=-4)

        return dataclasses.replace(self, own=jax.tree.map(take, self.own))

    def open(self, x_brd: jax.Array, context: Context) -> _BranchCall:
        """See `open_call`; axis t of the vectors is one new token of each branch."""
        del x_brd
        given = dict(vars(context), prefix_block=context.prefix_block or None)
        if any(x is not None for x in given.values()):
            raise ValueError(
                "a token of each branch follows its own past; leave out positions_bt, segments_bt, "
                "valid_bt, prefix_block and mask_bts"
            )
        prefix = self.prefix
        seen_b1 = prefix.valid_bs.sum(axis=1, dtype=jnp.int32)[:, None]
        where = dict(length=self.index + 1, prefix_valid_bs=prefix.valid_bs)
        return _BranchCall(seen_b1 + self.index, where, self.own, prefix.layers, self)

    def last(self, hidden_brd, valid_bt=None, length=None):
        """Every branch has one new token: all of `hidden_brd`."""
        del valid_bt, length
        return hidden_brd, self

    @staticmethod
    def squeeze(x_brv: jax.Array) -> jax.Array:
        """Nothing to do: the branches stay an axis."""
        return x_brv


@dataclasses.dataclass(frozen=True)
class _BranchCall(Call):
    before: Branches | None = None

    def attend(self, own, shared, q_brnh, k_brkh, v_brkh, **options):
        index, new = self.before.index, {"k": k_brkh, "v": v_brkh}
        own = {name: _write_branches(own[name], new[name], index) for name in new}
        prefix = [read(shared[name], q_brnh.shape[0]) for name in new]
        o_brnh = attention.attend_branches(
            q_brnh, *prefix, own["k"], own["v"], **self.where, **options
        )
        return o_brnh, own

    def close(self, own):
        return Branches(self.before.prefix, own, self.before.index + 1)


def _write_branches(own_brkth, new_brkh, index):
    new = new_brkh[:, :, :, None].astype(own_brkth.dtype)
    return jax.lax.dynamic_update_slice(own_brkth, new, (0, 0, 0, index, 0))


# ---- looking inside --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Maps:
    """A call without a cache whose layers leave their attention instead of a state.

    Scores are never made here: attending to the columns of the identity gives the weights
    themselves, whatever implementation computes them.
    """

    call: Call

    @property
    def positions_bt(self) -> jax.Array:
        """Of the call."""
        return self.call.positions_bt

    own = shared = None

    def attend(self, own, shared, q_btnh, k_btkh, v_btkh, **options):
        """(o_btnh, maps_bnts float32)."""
        o_btnh, _ = self.call.attend(own, shared, q_btnh, k_btkh, v_btkh, **options)
        (_, t, _, h), dtype = k_btkh.shape, jnp.float32
        short, parts = -t % h, []
        for part_th in jnp.split(jnp.eye(t, t + short, dtype=dtype), (t + short) // h, axis=1):
            columns_btkh = jnp.broadcast_to(part_th[None, :, None], k_btkh.shape)
            parts.append(self.call.attend(None, None, q_btnh, k_btkh, columns_btkh, **options)[0])
        maps_btns = jnp.concatenate(parts, axis=-1)[..., :t]
        return o_btnh, maps_btns.swapaxes(1, 2).astype(dtype)
