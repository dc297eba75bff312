"""Training the tokenizer as a Task.

    loss = l1_weight * |recon - image| + l2_weight * (recon - image)^2
         + quantizer_weight * quantizer loss + entropy_weight * entropy penalty

Weights of zero are skipped when the step is traced. Adversarial and perceptual terms are further
entries of `_terms`; the trainer sees one scalar.

    predict["reconstruct"]   image01, recon01 (clamped to [0, 1]) float32[B, S, S, 3],
                             ids int32[B, T]
    predict["encode"]        ids
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config as config_lib
from vlm_jax.models import vqgan
from vlm_jax.nn import functional


@dataclasses.dataclass(frozen=True)
class VqganTask:
    """See the module.

    Attributes:
      cfg: of the network.
      l1_weight, l2_weight: of the mean absolute and mean squared pixel error.
      quantizer_weight: of the quantizer loss.
      factor_on: which of its terms carries cfg.commitment_cost; see `vqgan.quantizer_loss`.
      entropy_weight, entropy_temperature: of the entropy penalty; see `vqgan.entropy_penalty`.
    """

    cfg: vqgan.VqganConfig
    l1_weight: float = 1.0
    l2_weight: float = 0.0
    quantizer_weight: float = 1.0
    factor_on: str = "codebook"
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01

    sharding_rules = vqgan.SHARDING_RULES

    def __post_init__(self):
        if self.factor_on not in ("codebook", "commitment"):
            raise ValueError(f"task.factor_on={self.factor_on!r}: 'codebook' or 'commitment'")
        if self.entropy_temperature <= 0:
            raise ValueError(f"task.entropy_temperature={self.entropy_temperature}: must be > 0")

    @functools.cached_property
    def network(self) -> functional.Functional:
        """The network behind its functional boundary."""
        return vqgan.make(self.cfg)

    @property
    def predict(self) -> Mapping[str, Any]:
        """Named predictors; see the module."""
        return {"reconstruct": self._reconstruct, "encode": self._encode}

    def init(self, rng: jax.Array) -> functional.Params:
        """Random parameters."""
        return self.network.init(rng)

    def loss(self, params, batch, rng):
        """(loss, metrics) of a batch; see the table in `format.py`. Deterministic."""
        del rng
        terms, metrics = self._terms(self.network.bind(params), batch)
        return sum(terms.values()), metrics | {f"loss/{name}": x for name, x in terms.items()}

    def _terms(self, module, batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Weighted terms of the loss by name, and plain metrics."""
        image01, weight_b = batch["image01"], batch["valid"].astype(jnp.float32)
        z_byxc = module.encode_latents(image01)
        quantized = module.straight_through(z_byxc, factor_on=self.factor_on, weight_b=weight_b)
        error = module.decode_latents(quantized.codes_byxc) - image01
        l1 = vqgan.weighted_mean(jnp.abs(error), weight_b)
        l2 = vqgan.weighted_mean(jnp.square(error), weight_b)
        terms = {"quantizer": self.quantizer_weight * quantized.loss}
        if self.l1_weight:
            terms["l1"] = self.l1_weight * l1
        if self.l2_weight:
            terms["l2"] = self.l2_weight * l2
        if self.entropy_weight:
            terms["entropy"] = self.entropy_weight * vqgan.entropy_penalty(
                quantized.distances_bte, temperature=self.entropy_temperature, weight_b=weight_b
            )
        perplexity = _code_perplexity(quantized.ids_bt, weight_b, self.cfg.num_embeddings)
        metrics = {"l1": l1, "l2": l2, "psnr": -10 * jnp.log10(jnp.maximum(l2, 1e-10))}
        return terms, metrics | {"batch_code_perplexity": perplexity}

    def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises ConfigError when the pictures do not fit the network."""
        _, height, width, channels = batch["image01"].shape
        factor = self.cfg.downsampling
        if height % factor or width % factor or channels != self.cfg.num_channels:
            raise config_lib.ConfigError(
                f"pictures of {height}x{width}x{channels} do not fit the model: sides must be "
                f"multiples of {factor}, channels {self.cfg.num_channels}; set formatter.size"
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


def _code_perplexity(ids_bt, weight_b, codes):
    """exp of the entropy of the code frequencies of this batch; at most the number of codes."""
    weight_bt = jnp.broadcast_to(weight_b[:, None], ids_bt.shape)
    counts_e = jnp.zeros(codes).at[ids_bt].add(weight_bt)
    p_e = counts_e / jnp.maximum(counts_e.sum(), 1.0)
    return jnp.exp(-jnp.sum(p_e * jnp.log(jnp.maximum(p_e, 1e-12))))
