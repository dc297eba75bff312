"""Images <-> ids: a trained VQGAN with its resizing, batched and compiled once per bucket.

What systems over visual ids, evaluators and notebooks use; training is `systems/vqgan`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import saving
from vlm_jax.data import image_files, images, records, streaming
from vlm_jax.models import vqgan
from vlm_jax.ops import buckets
from vlm_jax.weights import errors, shipped
from vlm_jax.weights import vqgan as vqgan_weights


def checked_config(
    name: str, *, side: int = 0, codebook_size: int = 0, tokens_per_image: int = 0
) -> vqgan.VqganConfig:
    """The config of a tokenizer, for images of another side if asked; its weights are not read.

    Args: as `ImageTokenizer.load` takes them.

    Raises:
      FileNotFoundError: no such tokenizer.
      WeightsError: another codebook or another number of ids per image than asked for. A language
        model paired with a tokenizer that it was not trained on runs and gives noise.
    """
    cfg = vqgan_weights.config_beside(name)
    if side:
        cfg = dataclasses.replace(cfg, resolution=side)
    for what, has, needs in (
        ("codes", cfg.num_embeddings, codebook_size),
        ("ids per image", cfg.tokens_per_image, tokens_per_image),
    ):
        if needs and has != needs:
            raise errors.WeightsError(
                f"tokenizer {name!r} has {has} {what}, the language model needs {needs}; "
                f"give the tokenizer that the ids were made with"
            )
    return cfg


@dataclasses.dataclass(frozen=True, repr=False)
class ImageTokenizer(saving.Model):
    """A VQGAN with its parameters.

    Attributes:
      cfg, params: of the network.
      max_batch: images per device call; the last bucket is filled up.
      shipped: the name of weights that come with the package.
    """

    cfg: vqgan.VqganConfig
    params: Any
    max_batch: int = 16
    shipped: str = ""

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
        """The tokenizer called `name`: "tiny" or "tiny32" (shipped) or a folder; see
        `weights.vqgan.load`.

        Args:
          name: see above.
          side: pixels of its images; 0 is the side it was trained for. Without attention the
            network is a convolution and takes any multiple of its downsampling.
          codebook_size, tokens_per_image: what the language model needs; 0 does not check.
          max_batch: images per device call.

        Raises:
          FileNotFoundError, WeightsError: see `checked_config` and `weights.vqgan.load`.
        """
        cfg = checked_config(
            name, side=side, codebook_size=codebook_size, tokens_per_image=tokens_per_image
        )
        shipped_as = str(name) if shipped.folder_of("vqgan", name) != name else ""
        return cls(cfg, vqgan_weights.load(name, cfg)[1], max_batch, shipped_as)

    def __repr__(self) -> str:
        what = f"{self.side} px, {self.cfg.num_embeddings:,} codes"
        return self._described(self.cfg, self.params, what)

    def parts(self, *, copy_shipped: bool = True) -> saving.Parts:
        """See `saving.Model.parts`."""
        del copy_shipped  # a copy is what is asked for
        return saving.Parts(
            system="vqgan",
            sections={"model": dataclasses.asdict(self.cfg)},
            params=self.params,
            dtype=saving.dtype_of(self.params),
            source=self.source if self.source.name else saving.Source(self.shipped),
            title=f"VQGAN, an image tokenizer of {self.cfg.num_embeddings:,} codes, "
            f"{self.side} pixels",
        )

    @property
    def side(self) -> int:
        """Pixels along a side of its images."""
        return self.cfg.resolution

    def encode(self, pictures: Any) -> np.ndarray:
        """Pictures -> their ids.

        Args:
          pictures: anything that `images.as_image` takes, of any size, or many of them: a list, or
            an array [N, H, W, 3]. Stretched to the tokenizer's side as the reference does; floats
            that have this size already are not rounded to bytes.

        Returns:
          int32[N, tokens_per_image]; of one picture int32[tokens_per_image].

        Raises:
          ImageError: see `images.as_image`.
        """
        listed, single = images.one_or_many(pictures)
        if not listed:
            return np.zeros((0, self.cfg.tokens_per_image), np.int32)
        image01 = [self._image01(x, f"picture {number}") for number, x in enumerate(listed)]
        ids = self._in_buckets(self._functions[0], np.stack(image01))
        return ids[0] if single else ids

    def encode_u8(self, pictures: Sequence[Any]) -> np.ndarray:
        """`encode` of many pictures, floats rounded to bytes too."""
        return self.encode(images.as_images(pictures))

    def encode_stream(
        self, pictures: Iterable[Any], *, batch_size: int = 0, on_error: str = "raise"
    ) -> Iterator[Any]:
        """Ids of any number of pictures, in their order, with few of them in memory.

        Args:
          pictures: as `encode` takes them; may have no end.
          batch_size: pictures per device call; 0 is `max_batch`.
          on_error: what becomes of one that cannot be used: "raise", or "yield" the error.

        Yields:
          int32[tokens_per_image] of each, or an ImageError.
        """
        size = batch_size or self.max_batch
        small = streaming.prepared(pictures, self._image01, ahead=2 * size)
        return streaming.apply(small, self.encode, size, on_error=on_error)

    def decode_stream(
        self, ids: Iterable[Any], *, batch_size: int = 0, on_error: str = "raise"
    ) -> Iterator[Any]:
        """Pictures of any number of ids, uint8[side, side, 3] each; as `encode_stream`."""
        checked = (x if isinstance(x, Exception) else self._checked(x) for x in ids)
        size = batch_size or self.max_batch
        return streaming.apply(
            checked, lambda batch: self.decode_u8(np.stack(batch)), size, on_error=on_error
        )

    def _checked(self, ids: Any) -> np.ndarray | records.BadRecordError:
        """Ids of one picture, or why they are none."""
        try:
            ids = np.asarray(ids)
        except ValueError as error:  # rows of different length
            return records.BadRecordError(f"no list of ids: {error!s:.80}")
        wanted = self.cfg.tokens_per_image
        whole = ids.dtype.kind in "iu" and ids.shape == (wanted,)
        if not whole or not (0 <= ids.min() and ids.max() < self.cfg.num_embeddings):
            return records.BadRecordError(
                f"{ids.size} ids; {wanted} of 0..{self.cfg.num_embeddings - 1} are a picture"
            )
        return ids

    def _image01(self, picture: Any, name: str = "picture") -> np.ndarray:
        array, shape = images.host_array(picture), (self.side, self.side, 3)
        if array is not None and array.dtype.kind == "f" and array.shape == shape:
            image_files.check_range(array.min(), array.max(), name)
            return array.astype(np.float32)
        return images.to01(images.resize(images.as_image(picture, name=name), self.side))

    def decode_u8(self, ids: np.ndarray) -> np.ndarray:
        """int32[N, tokens_per_image] -> uint8[N, side, side, 3]."""
        return images.to_u8(self.decode(ids))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """int32[N, tokens_per_image] -> float32[N, side, side, 3], clipped to [0, 1].

        Raises:
          ValueError: not whole numbers in rows, or not in the codebook.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{ids.dtype}{list(ids.shape)} are no ids: int32[N, {self.cfg.tokens_per_image}], "
                "a row for each picture, are needed"
            )
        if not len(ids):
            return np.zeros((0, self.side, self.side, 3), np.float32)
        if ids.size and not (0 <= ids.min() and ids.max() < self.cfg.num_embeddings):
            raise ValueError(
                f"ids {ids.min()}..{ids.max()} are not all in the codebook of "
                f"{self.cfg.num_embeddings}"
            )
        return np.clip(self._in_buckets(self._functions[1], ids), 0, 1)

    @functools.cached_property
    def _functions(self):
        network = vqgan.make(self.cfg)
        encode = jax.jit(lambda params, x: network.bind(params).encode(x))
        decode = jax.jit(lambda params, ids: network.bind(params).decode(ids))
        return encode, decode

    def _in_buckets(self, function, x: np.ndarray) -> np.ndarray:
        parts = [
            np.asarray(function(self.params, jnp.asarray(filled)))[:count]
            for _, count, (filled,) in buckets.pieces(self.max_batch, x)
        ]
        return np.concatenate(parts) if parts else function(self.params, x[:0])
