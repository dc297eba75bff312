"""Images <-> ids: a trained VQGAN with its resizing, batched and compiled once per bucket.

What systems over visual ids, evaluators and notebooks use; training is `systems/vqgan`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data import images
from vlm_jax.models import vqgan
from vlm_jax.nn import functional
from vlm_jax.ops import buckets
from vlm_jax.weights import vqgan as vqgan_weights


@dataclasses.dataclass(frozen=True)
class ImageTokenizer:
    """A VQGAN with its parameters.

    Attributes:
      cfg, params: of the network.
      max_batch: images per device call; the last bucket is filled up.
    """

    cfg: vqgan.VqganConfig
    params: Any
    max_batch: int = 16

    @classmethod
    def load(
        cls,
        name: str,
        *,
        side: int = 0,
        codebook_size: int = 0,
        tokens_per_image: int = 0,
        max_batch: int = 16,
    ) -> ImageTokenizer:
        """The tokenizer called `name`: "tiny" (shipped) or a folder; see `weights.vqgan.load`.

        Args:
          name: see above.
          side: pixels of its images; 0 is the side it was trained for. Without attention the
            network is a convolution and takes any multiple of its downsampling.
          codebook_size, tokens_per_image: what the language model needs; 0 does not check.
          max_batch: images per device call.

        Raises:
          ValueError: another codebook or another number of ids per image than asked for. A language
            model paired with a tokenizer that it was not trained on runs and gives noise.
        """
        cfg, params = vqgan_weights.load(name)
        if side:
            cfg = dataclasses.replace(cfg, resolution=side)
        for what, has, needs in (
            ("codes", cfg.num_embeddings, codebook_size),
            ("ids per image", cfg.tokens_per_image, tokens_per_image),
        ):
            if needs and has != needs:
                raise ValueError(
                    f"tokenizer {name!r} has {has} {what}, the language model needs {needs}; "
                    f"give the tokenizer that the ids were made with"
                )
        return cls(cfg, params, max_batch)

    @property
    def side(self) -> int:
        """Pixels along a side of its images."""
        return self.cfg.resolution

    def encode_u8(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 images of any size -> int32[N, tokens_per_image]; stretched as the reference."""
        small = [images.to01(images.resize(picture, self.side)) for picture in pictures]
        return self.encode(np.stack(small)) if small else self._no_ids()

    def encode(self, image01: np.ndarray) -> np.ndarray:
        """float32[N, side, side, 3] in [0, 1] -> int32[N, tokens_per_image]."""
        return self._in_buckets(self._functions[0], image01)

    def decode_u8(self, ids: np.ndarray) -> np.ndarray:
        """int32[N, tokens_per_image] -> uint8[N, side, side, 3]."""
        return images.to_u8(self.decode(ids))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int32[N, tokens_per_image] -> float32[N, side, side, 3], clipped to [0, 1].

        Raises:
          ValueError: ids that are not in the codebook.
        """
        ids = np.asarray(ids)
        if ids.size and not (0 <= ids.min() and ids.max() < self.cfg.num_embeddings):
            raise ValueError(
                f"ids {ids.min()}..{ids.max()} are not all in the codebook of "
                f"{self.cfg.num_embeddings}"
            )
        return np.clip(self._in_buckets(self._functions[1], ids), 0, 1)

    @functools.cached_property
    def _functions(self):
        network = functional.Functional(lambda rngs: vqgan.Vqgan(self.cfg, rngs))
        encode = jax.jit(lambda params, x: network.bind(params).encode(x))
        decode = jax.jit(lambda params, ids: network.bind(params).decode(ids))
        return encode, decode

    def _in_buckets(self, function, x: np.ndarray) -> np.ndarray:
        parts = [
            np.asarray(function(self.params, jnp.asarray(filled)))[:count]
            for _, count, (filled,) in buckets.pieces(self.max_batch, x)
        ]
        return np.concatenate(parts) if parts else function(self.params, x[:0])

    def _no_ids(self) -> np.ndarray:
        return np.zeros((0, self.cfg.tokens_per_image), np.int32)
