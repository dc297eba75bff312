"""Losses as sums with weights, and token losses, float32.

A loss is a mean of something, and a mean over parts of a batch is not the mean of the parts' means
when they hold different numbers of it. So a task hands back, per term of its loss, the sum and the
weight that it is to be divided by (`Term`); the trainer divides when it knows the whole batch.

Two means are in use and they differ whenever rows hold different numbers of scored tokens:

    "row"    mean over rows of (sum w*l / sum w): what the LVM code does. A row with few tokens
             weighs as much as a full one; a row with none contributes 0 and still counts.
    "token"  sum w*l / sum w over the whole batch.

Both are `sum(factor * l) / weight` for per-token factors that do not depend on the logits;
everything below is written in terms of those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.ops import matmul, partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """Part of a loss, or a metric: `scale * total / weight`; 0 where the weight is 0.

    Attributes:
      total: float32 scalar, a sum over the batch.
      weight: float32 scalar, what it is divided by; a function of the data alone, never of the
        parameters. None: a count, which is not divided.
      scale: of the term in the loss; static.
    """

    total: jax.Array
    weight: jax.Array | None
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))

    def over(self, weight: jax.Array | None) -> jax.Array:
        """The term with another weight: that of the whole batch, of which this is a part."""
        if weight is None:
            return self.scale * self.total
        return self.scale * self.total / jnp.maximum(weight, 1e-10)

    @property
    def mean(self) -> jax.Array:
        """Its value, float32 scalar."""
        return self.over(self.weight)

    def scaled(self, scale: float) -> Term:
        """The same term, weighted in a loss."""
        return dataclasses.replace(self, scale=self.scale * scale)


def weighted(value: jax.Array, weight: jax.Array, scale: float = 1.0) -> Term:
    """The term of a mean that was already divided by `weight`."""
    return Term(value * weight, weight, scale)


def value(loss: jax.Array | Mapping[str, Term]) -> jax.Array:
    """A loss as one number: the sum of its terms, each divided by its own weight."""
    if isinstance(loss, Mapping):
        return sum((term.mean for term in loss.values()), jnp.zeros(()))
    return loss


def terms(loss: jax.Array | Mapping[str, Term]) -> dict[str, Term]:
    """A loss as terms; a plain number is one whose weight is the same in every part of a batch."""
    return dict(loss) if isinstance(loss, Mapping) else {"": Term(loss, jnp.ones(()))}


def weights(loss: Mapping[str, Term]) -> dict[str, jax.Array]:
    """What every term is divided by, without a gradient."""
    return {name: jax.lax.stop_gradient(term.weight) for name, term in loss.items()}


def divided(loss: Mapping[str, Term], by: Mapping[str, jax.Array]) -> jax.Array:
    """The loss when its terms are divided by these weights.

    With the mean weight of the parts of a batch, the mean of this over the parts is the loss of
    the whole batch.
    """
    return sum((term.over(by[name]) for name, term in loss.items()), jnp.zeros(()))


def named(loss: Mapping[str, Term]) -> dict[str, Term]:
    """Its terms as metrics, where there is more than one."""
    loss = jax.lax.stop_gradient(dict(loss))
    return {f"loss/{name}": term for name, term in loss.items()} if len(loss) > 1 else {}


def numbers(result: tuple[Any, Mapping[str, Any]]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a task's loss gave, as (loss, metrics) of one batch by itself."""
    loss, metrics = result
    return value(loss), means({**named(terms(loss)), **metrics})


def means(metrics: Mapping[str, Any], parts: int = 1) -> dict[str, Any]:
    """Metrics as numbers; `parts`: they are means over so many parts of a batch."""

    def number(x):
        if not isinstance(x, Term):
            return x
        return x.mean * parts if x.weight is None else x.mean

    return {name: number(x) for name, x in metrics.items()}


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
    factor_bt, weight = _factors(weights_bt, mean)
    return factor_bt / jnp.maximum(weight, 1e-10)


def _factors(weights_bt, mean):
    """(factor_bt, weight): the loss is sum(factor * l) / weight."""
    weights_bt = weights_bt.astype(jnp.float32)
    if mean == "row":
        total_b1 = jnp.maximum(weights_bt.sum(axis=1, keepdims=True), 1e-10)
        return weights_bt / total_b1, jnp.float32(weights_bt.shape[0])
    if mean == "token":
        return weights_bt, weights_bt.sum()
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
    return _as_numbers(cross_entropy_terms(logits_btv, targets_bt, weights_bt, mean=mean))


def cross_entropy_terms(logits_btv, targets_bt, weights_bt, *, mean: str = "token"):
    """As `cross_entropy`, but (Term, {"accuracy", "tokens"}: Terms)."""
    factor_bt, weight = _factors(weights_bt, mean)
    loss = -jnp.sum(factor_bt * token_logp(logits_btv, targets_bt))
    right_bt = jnp.argmax(logits_btv, axis=-1) == targets_bt
    return _terms(loss, jnp.sum(factor_bt * right_bt), weight, weights_bt)


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
    terms = chunked_cross_entropy_terms(
        hidden_btd, head_dv, targets_bt, weights_bt, mean=mean, chunk=chunk
    )
    return _as_numbers(terms)


def chunked_cross_entropy_terms(
    hidden_btd, head_dv, targets_bt, weights_bt, *, mean: str = "token", chunk: int = 256
):
    """As `chunked_cross_entropy`, but (Term, {"accuracy", "tokens"}: Terms)."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    factor_bt, weight = _factors(weights_bt, mean)
    loss, right = _chunked(hidden_btd, head_dv, targets_bt, factor_bt, chunk)
    return _terms(loss, right, weight, weights_bt)


def _terms(loss, right, weight, weights_bt):
    tokens = weights_bt.astype(jnp.float32).sum()
    accuracy = Term(jax.lax.stop_gradient(right), weight)
    return Term(loss, weight), {"accuracy": accuracy, "tokens": Term(tokens, None)}


def _as_numbers(terms):
    loss, metrics = terms
    return loss.mean, {"loss": loss.mean, **means(metrics)}


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
