"""The adversarial term: generator and discriminator in one backward pass.

    image01 ─────────────────── D ── logits of photos            discriminator loss
    recon01 ── no gradient ──── D ── logits of reconstructions   (gradient to D alone)
    recon01 ─────────────────── D without gradient               generator loss
                                                                 (gradient to the decoder alone)

Both losses are in the one scalar that the trainer differentiates, so accumulation, sharding,
averages and checkpoints are those of any other loss; the two learning rates are `optim.lr_scale`.
One update of both from the same batch, as in taming-transformers, where they take turns with it.

Adaptive weight (Esser et al. 2021, eq. 7): the generator loss is multiplied by the ratio of the
lengths that the two gradients have in the kernel of the decoder's last convolution. Both gradients
are taken once, with respect to the reconstruction; from there to that kernel is one convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.models import patch_discriminator, vqgan


class Verdict(NamedTuple):
    """What the discriminator says of a batch; all zero before its start.

    Attributes:
      generator: scalar, its loss, without gradient.
      cotangent_byxc: float32 like the images, d generator / d reconstruction.
      discriminator: scalar, its loss, differentiable in its parameters.
      metrics: scalars worth plotting.
    """

    generator: jax.Array
    cotangent_byxc: jax.Array
    discriminator: jax.Array
    metrics: dict[str, jax.Array]


def judge(network, params, image01, recon01, weight_b, *, kind, r1_weight=0.0) -> Verdict:
    """Both losses of a batch.

    Args:
      network: `patch_discriminator.make(cfg)`.
      params: of the discriminator.
      image01, recon01: float32[B, H, W, 3]; no gradient goes to either.
      weight_b: float32[B] of each example in the means.
      kind: one of `patch_discriminator.LOSSES`.
      r1_weight: of the gradient penalty on photos.
    """
    image01, recon01 = lax.stop_gradient((image01, recon01))
    fixed, learning = network.bind(lax.stop_gradient(params)), network.bind(params)

    def generator_loss(recon01):
        loss_b = patch_discriminator.generator_loss_b(fixed(recon01), kind)
        return vqgan.weighted_mean(loss_b, weight_b)

    generator, cotangent = jax.value_and_grad(generator_loss)(recon01)
    real_byx, fake_byx = learning(image01), learning(recon01)
    loss_b = patch_discriminator.discriminator_loss_b(real_byx, fake_byx, kind)
    metrics = {
        "real": real_byx,
        "fake": fake_byx,
        # How many patches it tells apart, and how many beyond the margin of the hinge.
        "accuracy": 0.5 * ((real_byx > 0).astype(jnp.float32) + (fake_byx < 0)),
        "decided": 0.5 * ((real_byx > 1).astype(jnp.float32) + (fake_byx < -1)),
        "loss": loss_b,
    }
    if r1_weight:
        penalty_b = patch_discriminator.gradient_penalty_b(learning, image01)
        loss_b = loss_b + r1_weight * penalty_b
        metrics["r1"] = penalty_b
    metrics = {f"disc/{name}": vqgan.weighted_mean(x, weight_b) for name, x in metrics.items()}
    loss = vqgan.weighted_mean(loss_b, weight_b)
    return Verdict(generator, cotangent, loss, metrics | {"gan": generator})


def when(is_on: Any, verdict: Callable[[], Verdict]) -> Verdict:
    """`verdict()` where `is_on`, else zeros; not computed then on accelerators. None is on."""
    if is_on is None:
        return verdict()
    if not _branches_are_cheap():
        return jax.tree.map(lambda x: jnp.where(is_on, x, 0), verdict())
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(verdict))
    return lax.cond(is_on, verdict, lambda: zeros)


def adaptive_weight(last_conv, kernel, to_recon, to_gan) -> jax.Array:
    """|d rec / d kernel| / (|d gan / d kernel| + 1e-4), at most 1e4, without gradient.

    Args:
      last_conv: kernel -> reconstruction, of this batch.
      kernel: of the decoder's last convolution.
      to_recon, to_gan: float32[B, H, W, 3], gradients of both losses in the reconstruction.
    """
    _, pull = jax.vjp(last_conv, lax.stop_gradient(kernel))
    recon, gan = (jnp.linalg.norm(pull(x)[0].ravel()) for x in (to_recon, to_gan))
    return lax.stop_gradient(jnp.clip(recon / (gan + 1e-4), 0.0, 1e4))


def inject(recon01, cotangent) -> jax.Array:
    """A term of value 0 whose gradient in `recon01` is `cotangent`."""
    product = jnp.sum(lax.stop_gradient(cotangent) * recon01)
    return product - lax.stop_gradient(product)


def _branches_are_cheap() -> bool:
    # XLA's CPU back end runs convolutions inside a branch about 15 times slower than outside.
    return jax.default_backend() != "cpu"
