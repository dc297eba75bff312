"""Dead codes get a second life: a code that latents no longer choose becomes one of them.

For every code a moving average of how often it is chosen is kept, 1 being an even share. A code
whose share falls under a floor is replaced by a random latent of the current batch, and its share
starts at 1 again, which gives it log(floor)/log(decay) measurements to be chosen. After
Dhariwal et al. 2020 (Jukebox, arXiv 2005.00341, sec. 3.1: random restarts).

    params/codebook_usage/share     float32[codes]
    params/codebook_usage/revived   float32[], codes revived so far
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from vlm_jax.program import config as config_lib

CODEBOOK = "quantize/embedding"
USAGE = "codebook_usage"
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (rf"(^|/){USAGE}/(share|revived)$", PartitionSpec()),
)


def init(codes: int) -> dict[str, jax.Array]:
    """Nothing measured yet."""
    return {"share": jnp.ones(codes), "revived": jnp.zeros(())}


def update(
    state: Mapping[str, Any],
    latents: Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]],
    rng: jax.Array,
    *,
    every: int,
    decay: float,
    floor: float,
) -> dict[str, Any]:
    """The training state after measuring and reviving, every so many updates.

    Revived rows are replaced in the parameters and in their moving average; the optimizer's moments
    of these rows become zero.

    Args:
      state: of the trainer; its step is the number of finished updates.
      latents: params -> (z float32[N, C], ids int32[N], weight float32[N]), 0 for what must not
        count; called only when due.
      rng: for the choice of latents.
      every: updates between measurements.
      decay: of the moving average, per measurement.
      floor: share below which a code is dead.

    Raises:
      ConfigError: the codebook is not trained.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    books = {name: x for name, (_, x) in zip(names, leaves) if name.endswith(CODEBOOK)}
    if not any(name.startswith("opt_state/") for name in books):
        raise config_lib.ConfigError(
            f"task.revive_every={every} needs a codebook that learns; let optim.trainable match "
            f"{CODEBOOK!r}, or set task.revive_every=0"
        )

    def measure(books, usage):
        z_nc, ids_n, weight_n = latents(state["params"])
        usage, dead_e, chosen_e = _measure(usage, ids_n, weight_n, rng, decay, floor)
        fresh_ec = z_nc[chosen_e]
        revived = {
            name: jnp.where(
                dead_e[:, None], 0 if name.startswith("opt_state/") else fresh_ec, x
            ).astype(x.dtype)
            for name, x in books.items()
        }
        return revived, usage

    due = state["step"] % every == 0
    books, usage = lax.cond(due, measure, lambda *same: same, books, state["params"][USAGE])
    values = [books.get(name, x) for name, (_, x) in zip(names, leaves)]
    state = jax.tree.unflatten(tree, values)
    return {**state, "params": {**state["params"], USAGE: usage}}


def _measure(usage, ids_n, weight_n, rng, decay, floor):
    """(usage, bool[codes] dead, int32[codes] index of the latent that would replace each)."""
    codes = usage["share"].shape[0]
    counts_e = jnp.zeros(codes).at[ids_n].add(weight_n)
    total = counts_e.sum()
    share_e = decay * usage["share"] + (1 - decay) * codes * counts_e / jnp.maximum(total, 1e-9)
    share_e = jnp.where(total > 0, share_e, usage["share"])
    dead_e = (share_e < floor) & (total > 0)
    # The latents in random order, those that do not count last; each dead code takes the next.
    order_n = jnp.argsort(jax.random.uniform(rng, ids_n.shape) + 2.0 * (weight_n <= 0))
    rank_e = jnp.maximum(jnp.cumsum(dead_e) - 1, 0)
    chosen_e = order_n[rank_e % jnp.maximum((weight_n > 0).sum(), 1)]
    usage = {
        "share": jnp.where(dead_e, 1.0, share_e),
        "revived": usage["revived"] + dead_e.sum(),
    }
    return usage, dead_e, chosen_e
