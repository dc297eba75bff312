"""NXTP in a notebook: photos in, ranked labels out.

    model = vlm_jax.load("nxtp", "path/to/run")
    model = vlm_jax.load("nxtp", "ckpt_epoch_03.pth", clip="ViT-L-14.pt", llama="llama-2-7b")
    model.label(["cafe.jpg", "dog.jpg"], k=20)       # [[("coffee", .057), ...], [...]]
    model.attention("cafe.jpg")                      # float32[layers, heads, T, T]

Of LLaMA's folder only params.json and tokenizer.model are read. Few shapes are compiled: batches
are filled up to powers of two, numbers of labels to 5, 10, 20, 40, ...
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import saving
from vlm_jax.data import images as images_lib
from vlm_jax.data import streaming
from vlm_jax.decoding import one_shot
from vlm_jax.machines import memory
from vlm_jax.models import clip, llama
from vlm_jax.ops import buckets
from vlm_jax.systems.nxtp import format as format_lib
from vlm_jax.systems.nxtp import label_lists, vocabulary
from vlm_jax.systems.nxtp import network as network_lib

MAX_IMAGES = 32  # per device call
MAX_TOKENS = 19  # of a label; upstream: max_update_iter - 1
_UNIT = 5  # numbers of labels that are compiled: 5, 10, 20, 40, ...; ours
# Those that need nothing but the labels' own probabilities.
RANKINGS = tuple(name for name in label_lists.RANKINGS if not name.startswith("sim"))


class Nxtp(saving.Model):
    """The network with its tokenizer.

    Args:
      cfg, params: of the network, in the training layout.
      tokenizer: of labels, `vocabulary.Vocabulary`.
      prompt: what the labels follow.
      sections: "task" and "formatter" of the run's recipe, for `save`.
    """

    def __init__(
        self,
        cfg: network_lib.NxtpConfig,
        params: Any,
        tokenizer: vocabulary.Vocabulary,
        *,
        prompt: str = vocabulary.PROMPTS[0],
        sections: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if tokenizer.size != cfg.decoder.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.size} ids with the two added ones, the decoder "
                f"{cfg.decoder.vocab_size}; give the tokenizer that it was trained with"
            )
        self.cfg, self.tokenizer, self.params = cfg, tokenizer, params
        self._prompt_text, self._sections = prompt, dict(sections or {})
        self._prompt = np.array(tokenizer.prompt(prompt), np.int32)
        self._network, self._image_half = network_lib.make(cfg), network_lib.make_image_half(cfg)
        decode_params, decode_cfg = llama.decode_form(params["decoder"], cfg.decoder)
        self._decoder = network_lib.make_decoder(decode_cfg)
        image_params = {name: params[name] for name in ("vision", "projection")}
        self._halves = jax.device_put(image_params), decode_params
        self._compiled: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return self._described(self.cfg.decoder, self.params)

    def parts(self, *, copy_shipped: bool = True) -> saving.Parts:
        """See `saving.Model.parts`."""
        del copy_shipped  # nothing in it comes with the package
        file, write = self.tokenizer.file()
        task, formatter = (dict(self._sections.get(name, {})) for name in ("task", "formatter"))
        task |= dict(delimiter_id=self.tokenizer.delimiter_id)
        formatter |= dict(tokenizer=f"{{workdir}}/{file}", image_size=self.cfg.vision.image_size)
        return saving.Parts(
            system="nxtp",
            sections={
                "model": network_lib.section_of(self.cfg),
                "task": task,
                "formatter": formatter,
                "load": {"prompt": self._prompt_text},
            },
            params=self.params,
            dtype=saving.dtype_of(self.params),
            files=write,
            source=self.source,
            title=f"NXTP, labels of photos, {saving.count_of(self.params)} parameters",
        )

    def save(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """See `saving.Model.save`."""
        vocabulary.load.cache_clear()  # a tokenizer of the same path may be replaced
        return super().save(*args, **kwargs)

    def label(
        self,
        images: Any,
        k: int = 10,
        *,
        max_tokens: int = MAX_TOKENS,
        ranking: str = "prob",
        unfinished: bool = False,
        threshold: float = 0.0,
        prompt: str = "",
    ) -> Any:
        """Labels of one photo or of many.

        Args:
          images: a photo, anything that `images.as_image` takes, or many.
          k: branches: labels before equal texts are merged and empty ones dropped.
          max_tokens: of a label, its delimiter included.
          ranking: see `systems.nxtp.label_lists`: "prob", "first", "none", "ppl".
          unfinished: also those that were cut off at max_tokens.
          threshold: labels of a lower score are left out; for "prob" and "first".
          prompt: what the labels follow; "" is the model's own.

        Returns:
          [(label, score), ...], the best first; a list of such lists for a list.

        Raises:
          ValueError: k below 1 or above the vocabulary, an unknown ranking, no image.
          ImageError: a file that is no image.
        """
        run = self._labeller(k, max_tokens, ranking, unfinished, threshold, prompt)
        photos, single = self._photos(images)
        results = run(photos)
        return results[0] if single else results

    def label_stream(
        self,
        images: Iterable[Any],
        k: int = 10,
        *,
        batch_size: int = MAX_IMAGES,
        threads: int = streaming.THREADS,
        on_error: str = "raise",
        max_tokens: int = MAX_TOKENS,
        ranking: str = "prob",
        unfinished: bool = False,
        threshold: float = 0.0,
        prompt: str = "",
    ) -> Iterator[Any]:
        """Labels of any number of photos, in their order, with few of them in memory.

        Args:
          images: photos, as `label` takes them; may have no end.
          batch_size: photos per device call. threads: that read and cut them.
          on_error: what becomes of a photo that cannot be used: "raise", or "yield" the error.
          k, max_tokens, ranking, unfinished, threshold, prompt: as of `label`.

        Yields:
          [(label, score), ...] of each photo, or an ImageError.

        Raises:
          ValueError: as `label`; at once, not at the first photo.
        """
        run = self._labeller(k, max_tokens, ranking, unfinished, threshold, prompt)
        cut = streaming.prepared(images, self._cut, threads=threads, ahead=2 * batch_size)
        return streaming.apply(cut, lambda x: run(np.stack(x)), batch_size, on_error=on_error)

    def _labeller(
        self, k: int, max_tokens: int, ranking: str, unfinished: bool, threshold: float, prompt: str
    ) -> Callable[[np.ndarray], list[list[tuple[str, float]]]]:
        """Cut photos, uint8[N, S, S, 3] -> their labels. Checks the options."""
        if not 1 <= k <= self.tokenizer.size:
            raise ValueError(f"k={k} is not in 1 ... {self.tokenizer.size}, the vocabulary's size")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        if ranking not in RANKINGS:
            raise ValueError(f"ranking={ranking!r} is none of {', '.join(RANKINGS)}")
        if threshold and ranking in ("ppl", "none"):
            raise ValueError(f"threshold={threshold} needs scores that are better when larger")
        prompt_ids = np.array(self.tokenizer.prompt(prompt), np.int32) if prompt else self._prompt

        def run(photos: np.ndarray) -> list[list[tuple[str, float]]]:
            results = []
            for _, count, (filled,) in buckets.pieces(MAX_IMAGES, photos):
                lists = label_lists.rank_all(
                    self._find(filled, k, max_tokens, prompt_ids),
                    self.tokenizer.decode,
                    delimiter_id=self.tokenizer.delimiter_id,
                    by=ranking,
                    unfinished=unfinished,
                )
                results += [
                    [(x.text, x.score) for x in labels if x.score >= threshold]
                    for labels in lists[:count]
                ]
            return results

        return run

    def attention(self, image: Any) -> np.ndarray:
        """What every place of image and prompt reads, float32[layers, heads, T, T]."""
        photos, _ = self._photos([image])
        if "attention" not in self._compiled:

            def run(params, image_u8, prompt_bt):
                module = self._network.bind(params)
                x_btd = module.inputs(clip.normalize(image_u8), prompt_bt)
                return module.decoder.attention_maps(x_btd=x_btd, prefix_block=self.cfg.num_image)

            self._compiled["attention"] = jax.jit(run)
        maps = self._compiled["attention"](self.params, photos[:1], self._prompt[None])
        return np.asarray(maps[:, 0])

    def export(self, path: str | os.PathLike, *, released: bool = False, dtype="float16") -> None:
        """Writes a file in the reference's names; see `systems.nxtp.weights.save`.

        Args:
          path: of the new file: .pth, which the reference loads, or .safetensors.
          released: the tensors that the reference trains alone, as in its own files.
          dtype: of the file.
        """
        from vlm_jax.systems.nxtp import weights as nxtp

        nxtp.save(path, self.params, released=released, dtype=dtype)

    def _find(
        self, photos: np.ndarray, k: int, max_tokens: int, prompt: np.ndarray
    ) -> one_shot.OneShot:
        """`one_shot.decode` of photos, compiled for their number and one of few larger k."""
        most = buckets.length(k, self.tokenizer.size, _UNIT)
        key = most, max_tokens
        if key not in self._compiled:

            def run(image_params, decode_params, image_u8, prompt_bt, used):
                image_half = self._image_half.bind(image_params)
                image_bpd = image_half.image_vectors(clip.normalize(image_u8))
                network = self._decoder.bind(decode_params)
                text_btd = network.embed(prompt_bt)
                return one_shot.decode(
                    network,
                    jnp.concatenate([image_bpd.astype(text_btd.dtype), text_btd], axis=1),
                    k=most,
                    used=used,
                    max_tokens=max_tokens,
                    delimiter_id=self.tokenizer.delimiter_id,
                    prefix_block=self.cfg.num_image,
                )

            self._compiled[key] = jax.jit(run)
        prompt_bt = np.tile(prompt, (len(photos), 1))
        found = self._compiled[key](*self._halves, photos, prompt_bt, np.int32(k))
        return jax.tree.map(lambda x: np.asarray(x)[:, :k], found)

    def _photos(self, images: Any) -> tuple[np.ndarray, bool]:
        listed, single = images_lib.one_or_many(images)
        if not listed:
            raise ValueError("no image to label")
        # Cut one by one: only small ones are kept.
        return np.stack([self._cut(x, f"picture {i}") for i, x in enumerate(listed)]), single

    def _cut(self, image: Any, name: str = "") -> np.ndarray:
        side = self.cfg.vision.image_size
        return format_lib.crop(images_lib.as_image(image, name=name), side)


def from_run(
    task: Any,
    formatter: Any,
    params: Any,
    *,
    tokenizer: str = "",
    prompt: str = "",
    dtype: str = "",
) -> Nxtp:
    """An Nxtp from a run of our own; `vlm_jax.load` calls it.

    Args:
      task, formatter: as the run was configured.
      params: of its newest good checkpoint.
      tokenizer: file; "" takes what the run was configured with.
      prompt: what the labels follow; "" is the first of those that training draws from.
      dtype: compute dtype; "" is bfloat16 on an accelerator, float32 on a CPU.
    """
    loaded = vocabulary.load(tokenizer or formatter.tokenizer)
    return Nxtp(
        _computed_in(task.cfg, dtype),
        params,
        loaded,
        prompt=prompt or vocabulary.PROMPTS[0],
        sections={"task": saving.section_of(task), "formatter": saving.section_of(formatter)},
    )


def from_upstream(
    checkpoint: str,
    *,
    clip: str = "",
    llama: str = "",
    tokenizer: str = "",
    dtype: str = "",
) -> Nxtp:
    """An Nxtp from released weights; `vlm_jax.load` calls it.

    Args:
      checkpoint: .pth or .safetensors of the reference; released ones hold the trained part.
      clip: the CLIP file that it was trained from, for what a released one lacks.
      llama: folder with LLaMA's params.json and tokenizer.model; its weights are not read.
      tokenizer: file, when it lies elsewhere.
      dtype: compute and storage; "" is bfloat16 on an accelerator, float32 on a CPU.

    Raises:
      FileNotFoundError, WeightsError, ConversionError: the weights cannot be read.
      DataError: no tokenizer.
    """
    from vlm_jax.systems.nxtp import weights as nxtp

    tensors = nxtp.read(checkpoint, clip)  # opened, not loaded
    loaded = vocabulary.load(tokenizer or llama)
    sizes = pathlib.Path(llama).expanduser() / "params.json" if llama else None
    decoder = nxtp.decoder_config_of(tensors, sizes if sizes and sizes.exists() else "")
    cfg = network_lib.NxtpConfig(nxtp.vision_config_of(tensors), decoder)
    cfg = _computed_in(cfg, dtype, stored=True)
    abstract = network_lib.make(cfg).abstract()
    memory.require_for_loading(checkpoint, abstract, copy_dtype=copy_dtype(dtype))
    params = nxtp.from_tensors(tensors, abstract)
    return Nxtp(cfg, params, loaded)


def copy_dtype(dtype: str = "") -> str:
    """Of the copy of the decoder that computes, for a `dtype` as above."""
    return llama.decode_dtype(dtype or _default_dtype())


def _default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _computed_in(cfg, dtype, *, stored=False):
    dtype = dtype or _default_dtype()
    fields = dict(dtype=dtype) | ({"param_dtype": dtype} if stored else {})
    return dataclasses.replace(  # nothing is differentiated, so `remat` may stay
        cfg,
        vision=dataclasses.replace(cfg.vision, **fields),
        decoder=dataclasses.replace(cfg.decoder, **fields),
    )


def attention_sheet(maps_nts: np.ndarray, num_image: int, *, columns: int = 8) -> np.ndarray:
    """One layer's attention among the image's places, uint8[H, W, 3].

    Every head is a tile. In it, at every place of the image, stands a small map of the image: how
    much that place reads of each other one, from its least (white) to its most (blue).

    Args:
      maps_nts: of one layer, `Nxtp.attention`.
      num_image: places of the image, a square.
      columns: heads beside each other.
    """
    side = round(num_image**0.5)
    maps = np.asarray(maps_nts, np.float32)[:, :num_image, :num_image]
    low, high = maps.min(-1, keepdims=True), maps.max(-1, keepdims=True)
    shares = ((maps - low) / (high - low + 1e-6)).reshape(-1, side, side, side, side)
    tiles = shares.transpose(0, 1, 3, 2, 4).reshape(-1, side * side, side * side)
    blue = np.array([8, 48, 107], np.float32)
    tiles_u8 = np.rint(255 + tiles[..., None] * (blue - 255)).astype(np.uint8)
    rows = [list(tiles_u8[i : i + columns]) for i in range(0, len(tiles_u8), columns)]
    names = [f"heads {i}-{i + len(row) - 1}" for i, row in zip(range(0, len(maps), columns), rows)]
    return images_lib.draw_grid(rows, row_labels=names, cell=max(side * side, 64))
