"""Token losses, float32.

Two means are in use and they differ whenever rows hold different numbers of scored tokens:

    "row"    mean over rows of (sum w*l / sum w): what the LVM code does. A row with few tokens
             weighs as much as a full one; a row with none contributes 0 and still counts.
    "token"  sum w*l / sum w over the whole batch.

Both are `sum(factor * l)` for per-token factors that do not depend on the logits; everything below
is written in terms of those.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vlm_jax.ops import matmul, partition


def token_factors(weights_bt: jax.Array, mean: str = "token") -> jax.Array:
    """Per-token factors with which the sum of losses is the mean asked for.

        weights 1 1 0 0     row  1/4 1/4  0   0      token  1/5 1/5  0   0
                1 1 1 0          1/6 1/6 1/6  0             1/5 1/5 1/5  0

    Args:
      weights_bt: float, 0 = no loss.
      mean: "token" or "row".

    Returns:
      float32 factor_bt.

    Raises:
      ValueError: another mean.
    """
    weights_bt = weights_bt.astype(jnp.float32)
    if mean == "row":
        total_b1 = jnp.maximum(weights_bt.sum(axis=1, keepdims=True), 1e-10)
        return weights_bt / total_b1 / weights_bt.shape[0]
    if mean == "token":
        return weights_bt / jnp.maximum(weights_bt.sum(), 1e-10)
    raise ValueError(f"mean {mean!r} is neither 'row' nor 'token'")


def token_logp(logits_btv: jax.Array, targets_bt: jax.Array) -> jax.Array:
    """float32 log-probability of every target, normalised over the whole vocabulary."""
    logits_btv = logits_btv.astype(jnp.float32)
    # A comparison with an iota instead of a gather: its gradient is no scatter, and it stays local
    # when the vocabulary is sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])
    picked_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1)
    return picked_bt - jax.nn.logsumexp(logits_btv, axis=-1)


def cross_entropy(logits_btv, targets_bt, weights_bt, *, mean: str = "token"):
    """Mean negative log-likelihood and accuracy.

    Args:
      logits_btv: any float dtype; computed in float32.
      targets_bt: int32.
      weights_bt: float, 0 = no loss.
      mean: "token" or "row", see above.

    Returns:
      (loss, {"loss", "accuracy", "tokens"}): float32 scalars; tokens is the sum of weights.
    """
    factor_bt = token_factors(weights_bt, mean)
    loss = -jnp.sum(factor_bt * token_logp(logits_btv, targets_bt))
    right_bt = jnp.argmax(logits_btv, axis=-1) == targets_bt
    return loss, _metrics(loss, jnp.sum(factor_bt * right_bt), weights_bt)


def chunked_cross_entropy(
    hidden_btd, head_dv, targets_bt, weights_bt, *, mean: str = "token", chunk: int = 256
):
    """`cross_entropy(hidden @ head, ...)` without ever holding all logits.

    Positions are processed `chunk` at a time: B * chunk * V logits live at once instead of
    B * T * V (LLaMA-7B on 4,096 tokens and a vocabulary of 32,000: 33 MB instead of 524 MB a row,
    at chunk 256). When a gradient is wanted it is made in the same pass, while the logits are at
    hand, so unlike with rematerialisation the head is multiplied three times, as without chunks.

    Args:
      hidden_btd: outputs of the final norm.
      head_dv: output projection; multiplied in hidden's dtype.
      targets_bt, weights_bt, mean: as in `cross_entropy`.
      chunk: positions of every row per step. T need not be a multiple.

    Returns:
      As `cross_entropy`.

    Raises:
      ValueError: chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    factor_bt = token_factors(weights_bt, mean)
    loss, accuracy = _chunked(hidden_btd, head_dv, targets_bt, factor_bt, chunk)
    return loss, _metrics(loss, accuracy, weights_bt)


def _metrics(loss, accuracy, weights_bt):
    tokens = weights_bt.astype(jnp.float32).sum()
    return {"loss": loss, "accuracy": jax.lax.stop_gradient(accuracy), "tokens": tokens}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden_btd, head_dv, targets_bt, factor_bt, chunk):
    head_dv = head_dv.astype(hidden_btd.dtype)

    def add(sums, part):
        loss, right, _ = _score(head_dv, *part)
        return (sums[0] + loss, sums[1] + right), None

    sums, _ = jax.lax.scan(add, (0.0, 0.0), _split(hidden_btd, targets_bt, factor_bt, chunk))
    return sums


def _chunked_forward(hidden_btd, head_dv, targets_bt, factor_bt, chunk):
    head = head_dv.astype(hidden_btd.dtype)

    def add(sums, part):
        loss, right, slope_btv = _score(head, *part)
        slope_btv = slope_btv.astype(head.dtype)
        d_hidden = matmul.einsum("btv,dv->btd", slope_btv, head)
        d_head = matmul.einsum(
            "btd,btv->dv", part[0], slope_btv, preferred_element_type=jnp.float32
        )
        return (sums[0] + loss, sums[1] + right, sums[2] + d_head), d_hidden

    start = (0.0, 0.0, jnp.zeros(head_dv.shape, jnp.float32))
    parts = _split(hidden_btd, targets_bt, factor_bt, chunk)
    (loss, right, d_head_dv), d_parts = jax.lax.scan(add, start, parts)
    b, t, d = hidden_btd.shape
    d_hidden_btd = d_parts.swapaxes(0, 1).reshape(b, -1, d)[:, :t]
    return (loss, right), (d_hidden_btd, d_head_dv.astype(head_dv.dtype))


def _chunked_backward(chunk, saved, cotangents):
    # The loss is a scalar, so its gradient only has to be scaled. Accuracy has none.
    d_hidden_btd, d_head_dv = saved
    scale = cotangents[0]
    return (
        (d_hidden_btd * scale).astype(d_hidden_btd.dtype),
        (d_head_dv * scale).astype(d_head_dv.dtype),
        None,
        None,
    )


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _split(hidden_btd, targets_bt, factor_bt, chunk):
    """[B, T, ...] -> [chunks, B, chunk, ...]; rows stay whole, so their sharding stays too."""
    t = targets_bt.shape[1]
    chunk = min(chunk, t)
    extra = -t % chunk

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return split(hidden_btd), split(targets_bt), split(factor_bt)


def _score(head_dv, hidden_btd, targets_bt, factor_bt):
    """(summed loss, summed right answers, d loss / d logits) of one chunk."""
    logits_btv = matmul.einsum(
        "btd,dv->btv", hidden_btd, head_dv, preferred_element_type=jnp.float32
    )
    logits_btv = partition.constrain(logits_btv, partition.BATCH, None, "tensor")
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])
    top_bt = logits_btv.max(axis=-1)
    exp_btv = jnp.exp(logits_btv - top_bt[..., None])
    total_bt = exp_btv.sum(axis=-1)
    picked_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1)
    loss = jnp.sum(factor_bt * (top_bt + jnp.log(total_bt) - picked_bt))
    right = jnp.sum(factor_bt * (jnp.argmax(logits_btv, axis=-1) == targets_bt))
    slope_btv = factor_bt[..., None] * (exp_btv / total_bt[..., None] - hit_btv)
    return loss, right, slope_btv
