"""Training the tokenizer as a Task.

    loss = l1_weight * |recon - image| + l2_weight * (recon - image)^2
         + perceptual_weight * LPIPS(recon, image)
         + quantizer_weight * quantizer loss + entropy_weight * entropy penalty
         + gan_weight * lambda * generator loss + discriminator loss         (adversary.py)

Terms of weight zero are left out when the step is traced, and their parameters do not exist. The
tokenizer is the root of the parameter tree; beside it lie, where they are needed,

    discriminator/     learned
    perceptual/        VGG16 and the heads of LPIPS; frozen, read by `pretrained`
    codebook_usage/    state of reviving codes (revival.py); not learned by gradients

so `optim.trainable` has to leave out the last two: "^(?!perceptual|codebook_usage)".

    predict["reconstruct"]   image01, recon01 (clamped to [0, 1]) float32[B, S, S, 3],
                             ids int32[B, T]
    predict["encode"]        ids
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vlm_jax.models import patch_discriminator, vgg, vqgan
from vlm_jax.nn import functional
from vlm_jax.ops import losses
from vlm_jax.program import config as config_lib
from vlm_jax.systems.vqgan import adversary, revival
from vlm_jax.weights import lpips


@dataclasses.dataclass(frozen=True)
class VqganTask:
    """See the module.

    Attributes:
      cfg: of the network.
      l1_weight, l2_weight: of the mean absolute and mean squared pixel error.
      quantizer_weight: of the quantizer loss.
      factor_on: which of its terms carries cfg.commitment_cost; see `vqgan.quantizer_loss`.
      entropy_weight, entropy_temperature: of the entropy penalty; see `vqgan.entropy_penalty`.
      perceptual_weight: of LPIPS.
      perceptual_stages: of VGG16; 3 (up to relu3_3) costs 0.6 of all 5, and suffices on a CPU.
      perceptual_dtype: of its convolutions.
      perceptual_vgg, perceptual_heads: files with its weights; see `weights.lpips.load`.
      gan_weight: of the generator loss.
      gan_adaptive: multiply it by the adaptive weight; see `adversary.adaptive_weight`.
      gan_start: update at which generator and discriminator loss set in.
      gan_loss: one of `patch_discriminator.LOSSES`, of both sides.
      r1_weight: of the gradient penalty of the discriminator.
      disc_width, disc_layers, disc_groups: of `patch_discriminator.DiscriminatorConfig`.
      revive_every: updates between measurements of the codes' use; 0 revives none.
      revive_floor, revive_decay: see `revival.update`.
      revive_rows: images of a batch that are measured, and that latents are taken from.
    """

    cfg: vqgan.VqganConfig
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    quantizer_weight: float = 1.0
    factor_on: str = "codebook"
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    perceptual_weight: float = 0.0
    perceptual_stages: int = 5
    perceptual_dtype: str = "float32"
    perceptual_vgg: str = ""
    perceptual_heads: str = ""
    gan_weight: float = 0.0
    gan_adaptive: bool = True
    gan_start: int = 0
    gan_loss: str = "hinge"
    r1_weight: float = 0.0
    disc_width: int = 64
    disc_layers: int = 3
    disc_groups: int = 32
    revive_every: int = 0
    revive_floor: float = 0.05
    revive_decay: float = 0.9
    revive_rows: int = 64

    sharding_rules = (
        *vgg.SHARDING_RULES,
        *patch_discriminator.SHARDING_RULES,
        *revival.SHARDING_RULES,
        *vqgan.SHARDING_RULES,
    )

    def __post_init__(self):
        if self.factor_on not in ("codebook", "commitment"):
            raise ValueError(f"task.factor_on={self.factor_on!r}: 'codebook' or 'commitment'")
        if not self.entropy_temperature > 0:
            raise ValueError(f"task.entropy_temperature={self.entropy_temperature}: must be > 0")
        weights = [field.name for field in dataclasses.fields(self) if "_weight" in field.name]
        counts = ("gan_start", "revive_every", "revive_rows")
        config_lib.check_ranges(
            self, disc_groups=(1, 2**31), **dict.fromkeys((*weights, *counts), (0, math.inf))
        )
        if self.gan_loss not in patch_discriminator.LOSSES:
            known = " or ".join(map(repr, patch_discriminator.LOSSES))
            raise ValueError(f"task.gan_loss={self.gan_loss!r}: {known}")
        if not (0 < self.revive_decay < 1 and 0 < self.revive_floor < 1):
            raise ValueError(
                f"task.revive_decay={self.revive_decay}, task.revive_floor={self.revive_floor}: "
                f"both are between 0 and 1"
            )
        # Their own checks, now rather than at the first trace.
        _ = self.discriminator, self.perceptual

    @functools.cached_property
    def network(self) -> functional.Functional:
        """The network behind its functional boundary."""
        return vqgan.make(self.cfg)

    @functools.cached_property
    def discriminator(self) -> functional.Functional:
        """The patch discriminator; used where gan_weight is not 0."""
        cfg = patch_discriminator.DiscriminatorConfig(
            self.disc_width, self.disc_layers, self.disc_groups, self.cfg.dtype
        )
        return patch_discriminator.make(cfg)

    @functools.cached_property
    def perceptual(self) -> functional.Functional:
        """LPIPS; used where perceptual_weight is not 0."""
        return vgg.make(vgg.LpipsConfig(self.perceptual_stages, self.perceptual_dtype))

    @property
    def predict(self) -> Mapping[str, Any]:
        """Named predictors; see the module."""
        return {"reconstruct": self._reconstruct, "encode": self._encode}

    def init(self, rng: jax.Array) -> functional.Params:
        """Random parameters; those of `perceptual` mean nothing before `pretrained`."""
        params = dict(self.network.init(rng))
        if self.gan_weight:
            params["discriminator"] = self.discriminator.init(jax.random.fold_in(rng, 1))
        if self.perceptual_weight:
            params["perceptual"] = self.perceptual.init(jax.random.fold_in(rng, 2))
        if self.revive_every:
            params[revival.USAGE] = revival.init(self.cfg.num_embeddings)
        return params

    def pretrained(self) -> dict[str, Any]:
        """The weights of LPIPS, where the loss has it."""
        if not self.perceptual_weight:
            return {}
        return {
            "perceptual": lpips.load(
                self.perceptual_vgg, self.perceptual_heads, stages=self.perceptual_stages
            )
        }

    def loss(self, params, batch, rng):
        """(terms, metrics) of a batch, every term on; see the table in `format.py`."""
        return self.loss_at(params, batch, rng, step=None)

    def loss_at(self, params, batch, rng, *, step):
        """The loss of update number `step`; deterministic."""
        del rng
        values, metrics, injected = self._terms(params, batch, step)
        count = batch["valid"].astype(jnp.float32).sum()
        terms = {name: losses.weighted(x, count) for name, x in values.items()}
        if self.gan_weight:  # no value of its own, only a gradient
            terms["gan"] = losses.weighted(values["gan"] + injected, count)
        means = {name for name in metrics if name in ("l1", "l2", "lpips") or "disc/" in name}
        return terms, {
            name: losses.weighted(x, count) if name in means else x for name, x in metrics.items()
        }

    def _terms(self, params, batch, step):
        """Weighted terms of the loss by name, plain metrics, and gradients already taken (0)."""
        module = self.network.bind(params)
        image01, weight_b = batch["image01"], batch["valid"].astype(jnp.float32)
        z_byxc = module.encode_latents(image01)
        quantized = module.straight_through(z_byxc, factor_on=self.factor_on, weight_b=weight_b)
        features_byxc = module.decode_features(quantized.codes_byxc)
        recon01 = module.last_conv(features_byxc)
        score = functools.partial(self._score, params, image01, weight_b)
        terms, injected = {"quantizer": self.quantizer_weight * quantized.loss}, 0
        if self.gan_weight:
            last_conv = functools.partial(module.last_conv, lax.stop_gradient(features_byxc))
            scored, metrics, injected = self._adversarial(
                params, image01, recon01, weight_b, score, last_conv, step
            )
        else:
            scored, metrics = score(recon01)
        terms |= scored
        if self.entropy_weight:
            terms["entropy"] = self.entropy_weight * vqgan.entropy_penalty(
                quantized.distances_bte, temperature=self.entropy_temperature, weight_b=weight_b
            )
        perplexity = _code_perplexity(quantized.ids_bt, weight_b, self.cfg.num_embeddings)
        latent_rms = jnp.sqrt(vqgan.weighted_mean(jnp.square(z_byxc), weight_b))
        metrics |= {"batch_code_perplexity": perplexity, "latent_rms": latent_rms}
        if self.revive_every:
            usage = params[revival.USAGE]
            metrics |= {"codes/revived": usage["revived"], "codes/min_share": usage["share"].min()}
        return terms, metrics, injected

    def _score(self, params, image01, weight_b, recon01):
        """Weighted terms and metrics of a reconstruction that need no discriminator."""
        error = recon01 - image01
        l1 = vqgan.weighted_mean(jnp.abs(error), weight_b)
        l2 = vqgan.weighted_mean(jnp.square(error), weight_b)
        terms = {}
        if self.l1_weight:
            terms["l1"] = self.l1_weight * l1
        if self.l2_weight:
            terms["l2"] = self.l2_weight * l2
        metrics = {"l1": l1, "l2": l2, "psnr": -10 * jnp.log10(jnp.maximum(l2, 1e-10))}
        if self.perceptual_weight:
            distance = self.perceptual.bind(lax.stop_gradient(params["perceptual"]))
            metrics["lpips"] = vqgan.weighted_mean(distance(image01, recon01), weight_b)
            terms["perceptual"] = self.perceptual_weight * metrics["lpips"]
        return terms, metrics

    def _adversarial(self, params, image01, recon01, weight_b, score, last_conv, step):
        """The terms of `score` and both of the game, their gradients injected at `recon01`."""

        def total(recon01):
            terms, metrics = score(recon01)
            return sum(terms.values(), jnp.zeros(())), (terms, metrics)

        to_recon, (terms, metrics) = jax.grad(total, has_aux=True)(lax.stop_gradient(recon01))
        is_on = None if step is None or not self.gan_start else step >= self.gan_start
        verdict = adversary.when(
            is_on,
            lambda: adversary.judge(
                self.discriminator,
                params["discriminator"],
                image01,
                recon01,
                weight_b,
                kind=self.gan_loss,
                r1_weight=self.r1_weight,
            ),
        )
        weight = jnp.asarray(self.gan_weight, jnp.float32)
        if self.gan_adaptive:
            kernel = params["decoder"]["conv_out"]["kernel"]
            weight *= adversary.adaptive_weight(last_conv, kernel, to_recon, verdict.cotangent_byxc)
        terms["gan"] = weight * verdict.generator
        terms["discriminator"] = verdict.discriminator
        metrics |= verdict.metrics | {"gan/weight": weight if is_on is None else weight * is_on}
        injected = adversary.inject(recon01, to_recon + weight * verdict.cotangent_byxc)
        return terms, metrics, injected

    def after_update(self, state, batch, rng):
        """Revives codes that are no longer chosen.

        Raises:
          ConfigError: the optimizer trains what must stay frozen.
        """
        if self.perceptual_weight:
            _check_frozen(state["opt_state"])
        if not self.revive_every:
            return state

        def latents(params):
            stride = max(1, len(batch["valid"]) // self.revive_rows)
            image01, valid_b = (batch[key][::stride] for key in ("image01", "valid"))
            module = self.network.bind(params)
            z_byxc = module.encode_latents(image01)
            ids_bt = module.quantize(z_byxc)
            weight_bt = jnp.broadcast_to(valid_b[:, None].astype(jnp.float32), ids_bt.shape)
            return z_byxc.reshape(-1, z_byxc.shape[-1]), ids_bt.ravel(), weight_bt.ravel()

        return revival.update(
            state,
            latents,
            rng,
            every=self.revive_every,
            decay=self.revive_decay,
            floor=self.revive_floor,
        )

    def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises ConfigError when the pictures do not fit the network."""
        _, height, width, channels = batch["image01"].shape
        factor = self.cfg.downsampling
        if height % factor or width % factor or channels != self.cfg.num_channels:
            raise config_lib.ConfigError(
                f"pictures of {height}x{width}x{channels} do not fit the model: sides must be "
                f"multiples of {factor}, channels {self.cfg.num_channels}; set formatter.size"
            )
        least = 3 * 2**self.disc_layers if self.gan_weight else 0
        least = max(least, 2 ** (self.perceptual_stages - 1) if self.perceptual_weight else 0)
        if min(height, width) < least:
            raise config_lib.ConfigError(
                f"pictures of {height}x{width} are too small: task.disc_layers={self.disc_layers} "
                f"and task.perceptual_stages={self.perceptual_stages} need {least} pixels"
            )

    def units_per_step(self, batch) -> tuple[str, float]:
        """Images per update."""
        return "images", float(batch["image01"].shape[0])

    def _reconstruct(self, params, batch, rng):
        del rng
        module = self.network.bind(params)
        ids = module.encode(batch["image01"])
        recon01 = jnp.clip(module.decode(ids), 0.0, 1.0)
        return {"image01": batch["image01"], "recon01": recon01, "ids": ids}

    def _encode(self, params, batch, rng):
        del rng
        return {"ids": self.network.bind(params).encode(batch["image01"])}


def make_task(model: Mapping[str, Any], **task: Any) -> VqganTask:
    """The task from `config.model` (preset and fields of `VqganConfig`) and `config.task`.

    Raises:
      ConfigError: unknown preset, unknown keys, sizes that do not fit each other.
    """
    cfg = config_lib.model_section(vqgan.VqganConfig, vqgan.PRESETS, model)
    return config_lib.section(VqganTask, {"cfg": cfg, **task}, "task")


def _check_frozen(opt_state: Any) -> None:
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]
    ]
    if any("/perceptual/" in path for path in paths):
        raise config_lib.ConfigError(
            "optim.trainable matches the parameters of LPIPS, which measure and must not learn; "
            'leave them out, for example "^(?!perceptual|codebook_usage)"'
        )


def _code_perplexity(ids_bt, weight_b, codes):
    """exp of the entropy of the code frequencies of this batch; at most the number of codes."""
    weight_bt = jnp.broadcast_to(weight_b[:, None], ids_bt.shape)
    counts_e = jnp.zeros(codes).at[ids_bt].add(weight_bt)
    p_e = counts_e / jnp.maximum(counts_e.sum(), 1.0)
    return jnp.exp(-jnp.sum(p_e * jnp.log(jnp.maximum(p_e, 1e-12))))
