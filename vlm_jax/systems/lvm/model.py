"""LVM in a notebook: images in, images out.

    model = vlm_jax.load("lvm", "path/to/run")       # or "tiny", which comes with the package
    model.continue_(frames, n=2)                     # uint8[1, 2, H, W, 3]
    model.analogy([(photo, mask), ...], query)       # uint8[1, 1, H, W, 3]
    model.perplexity(context, target)                # float64[1]

Every verb takes one prompt or a list of prompts; a list runs as one batch. Samplers default to
those of the reference: temperature 1 and, through a default of the library that it uses, top-k 50.
Batches and prompts are filled up to powers of two, so that few shapes are compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import saving
from vlm_jax.data import images, streaming
from vlm_jax.decoding import generate, sampling
from vlm_jax.encoders import image_tokenizer
from vlm_jax.models import llama
from vlm_jax.ops import buckets, losses

REFERENCE_TOP_K = 50  # upstream: inference.py leaves top_k unset, and generate() then takes 50
MAX_ROWS = 32  # sequences per device call
MAX_SCORED = 2**16  # tokens per device call of `perplexity`; 16 rows of 4,096


class Lvm(saving.Model):
    """A language model over visual ids with its image tokenizer.

    Args:
      cfg, params: of the LLaMA, in the training layout.
      tokenizer: an `ImageTokenizer`.
      context_images: images that a sequence holds, prompt and answer together; 16 upstream.
      lead_ids: ids in front of every prompt. The reference puts none there, although training
        had BOS; runs of our own continue as they were trained.
      sections: "task" and "formatter" of the run's recipe, for `save`.
    """

    def __init__(
        self,
        cfg: llama.LlamaConfig,
        params: Any,
        tokenizer: image_tokenizer.ImageTokenizer,
        *,
        context_images: int = 16,
        lead_ids: Sequence[int] = (),
        sections: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if context_images < 2:
            raise ValueError(f"context_images={context_images}: a prompt and an answer need 2")
        self.tokenizer = tokenizer
        self.context_images = context_images
        self.lead_ids = tuple(lead_ids)
        self._sections, self._stored = dict(sections or {}), saving.dtype_of(params)
        self.params, self.cfg = llama.decode_form(params, cfg)
        self._network = llama.make(self.cfg)
        self._generators: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return self._described(self.cfg, self.params, f"context {self.cfg.max_tokens}")

    def parts(self, *, copy_shipped: bool = True) -> saving.Parts:
        """See `saving.Model.parts`."""
        params, cfg = llama.training_form(self.params, self.cfg)
        codes, inner, name = self.tokenizer.cfg, {}, self.tokenizer.shipped
        if copy_shipped or not name:
            inner, name = {"tokenizer": self.tokenizer.parts()}, "{workdir}/tokenizer"
        task = dict(
            codebook_size=codes.num_embeddings,
            tokens_per_image=codes.tokens_per_image,
            context_images=self.context_images - 1,
            lead_tokens=len(self.lead_ids),
            tokenizer=name,
            image_side=codes.resolution,
        )
        fields = ",".join([*(f"<|{i}|>" for i in self.lead_ids), "{tokens}"])
        formatter = dict(fields=fields, vocab_size=cfg.vocab_size)
        # On a CPU they are held in more precision than they came in.
        held = self._stored if cfg.dtype == "float32" else cfg.dtype
        return saving.Parts(
            system="lvm",
            sections={
                "model": dataclasses.asdict(cfg),
                "task": {**self._sections.get("task", {}), **task},
                "formatter": self._sections.get("formatter", formatter),
            },
            params=params,
            dtype=held,
            inner=inner,
            source=self.source,
            title=f"LVM, a LLaMA over visual sentences, {saving.count_of(params)} parameters",
            casts=True,
        )

    def continue_(
        self,
        frames: Any,
        n: int = 1,
        *,
        candidates: int = 1,
        temperature: float = 1.0,
        top_k: int = REFERENCE_TOP_K,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """The n images that follow.

        Args:
          frames: images of one prompt, each anything that `images.as_image` takes, or a list of
            such lists. Prompts may differ in length.
          n: new images.
          candidates: independent continuations of every prompt.
          temperature, top_k, top_p: see `decoding.sampling`; temperature 0 is greedy.
          seed: equal seeds give equal images.

        Returns:
          uint8[candidates, n, side, side, 3], or a list of them for a list of prompts.

        Raises:
          ValueError: an empty prompt, images of the wrong form, n or candidates below 1.

        Warns:
          UserWarning: images that do not fit into the context are not used, see `dropped`.
        """
        prompts, single = _as_prompts(frames)
        prompts = self._fitting(prompts)
        ids = self.continue_ids(
            self._ids(prompts),
            n,
            candidates=candidates,
            sampler=sampling.Sampler(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                suppress_from=self.tokenizer.cfg.num_embeddings,
            ),
            seed=seed,
        )
        side, size = self.tokenizer.side, self.tokenizer.cfg.tokens_per_image
        made = self.tokenizer.decode_u8(ids.reshape(-1, size))
        made = made.reshape(len(prompts), candidates, n, side, side, 3)
        return made[0] if single else list(made)

    def continue_stream(
        self,
        prompts: Iterable[Any],
        n: int = 1,
        *,
        batch_size: int = 16,
        on_error: str = "raise",
        seed: int = 0,
        **options: Any,
    ) -> Iterator[Any]:
        """`continue_` of any number of prompts, in their order, with few of them in memory.

        Args:
          prompts: lists of images, as `continue_` takes them; may have no end.
          n, options: of `continue_`. Batch i draws with the seed `seed + i`.
          batch_size: prompts that run together.
          on_error: what becomes of a prompt that cannot be used: "raise", or "yield" the error.

        Yields:
          uint8[candidates, n, side, side, 3] of each prompt, or an ImageError.
        """
        seeds, side = itertools.count(seed), self.tokenizer.side
        said: list[int] = []

        def read(prompt):  # reduced at once: photos are large
            prompt = list(prompt)
            unused = self.dropped(len(prompt))
            if unused and not said:
                said.append(unused)
                self._warn(unused, len(prompt))
            return [images.resize(images.as_image(image), side) for image in prompt[unused:]]

        def run(batch):
            return self.continue_(batch, n, seed=next(seeds), **options)

        ready = streaming.prepared(prompts, read, ahead=2 * batch_size)
        return streaming.apply(ready, run, batch_size, on_error=on_error)

    def analogy(self, pairs: Any, query: Any, **options: Any) -> Any:
        """The image that stands to `query` as the second of each pair stands to the first.

        Args:
          pairs: [(image, image), ...], or a list of such lists for a batch.
          query: an image, or a list of as many images as there are prompts.
          **options: of `continue_`.

        Returns:
          uint8[candidates, 1, side, side, 3], or a list of them.

        Raises:
          ValueError: as `continue_`; pairs that are not pairs; numbers that differ.
        """
        queries, single = images.one_or_many(query)
        batches = [pairs] if single else pairs
        if len(batches) != len(queries):
            raise ValueError(f"{len(batches)} lists of pairs for {len(queries)} queries")
        prompts = []
        for batch, last in zip(batches, queries):
            if not len(batch) or any(len(pair) != 2 for pair in batch):
                raise ValueError("pairs must be a non-empty list of (image, image)")
            prompts.append([image for pair in batch for image in pair] + [last])
        made = self.continue_(self._fitting(prompts, pairs=True), 1, **options)
        return made[0] if single else made

    def perplexity(self, context: Any, target: Any) -> np.ndarray:
        """exp of the mean negative log-likelihood of the target's ids, per prompt.

        The reference protocol: no BOS, log-softmax over the whole vocabulary.

        Args:
          context, target: images of one prompt, or lists of such lists.

        Returns:
          float64[prompts]; the reference reports their arithmetic mean.
        """
        contexts, _ = _as_prompts(context)
        targets, _ = _as_prompts(target)
        if len(contexts) != len(targets):
            raise ValueError(f"{len(contexts)} contexts for {len(targets)} targets")
        return self.perplexity_ids(self._ids(contexts), self._ids(targets))

    def dropped(self, count: int, *, pairs: bool = False) -> int:
        """How many of the first images of a prompt do not fit into the context before a new one.

        Args:
          count: of the images.
          pairs: they are pairs and a query; then whole pairs are dropped.
        """
        over = max(0, count - (self.context_images - 1))
        return over + over % 2 if pairs else over

    def _fitting(self, prompts: Sequence[Any], *, pairs: bool = False) -> list[Any]:
        """The part of each prompt that fits; warns once, whatever their number."""
        unused = [self.dropped(len(prompt), pairs=pairs) for prompt in prompts]
        if cut := [i for i, count in enumerate(unused) if count]:
            more = f" (and those of {len(cut) - 1} more prompts)" if len(cut) > 1 else ""
            self._warn(unused[cut[0]], len(prompts[cut[0]]), more)
        return [prompt[count:] for prompt, count in zip(prompts, unused)]

    def _warn(self, unused: int, count: int, more: str = "") -> None:
        warnings.warn(
            f"the first {unused} of {count} images{more} are not used: the context holds "
            f"{self.context_images}, the new one included",
            stacklevel=4,  # who calls the verb
        )

    # ---- the same on ids ---------------------------------------------------------------------

    def continue_ids(
        self,
        prompts: Sequence[np.ndarray],
        n: int,
        *,
        candidates: int = 1,
        sampler: sampling.Sampler,
        seed: int = 0,
    ) -> np.ndarray:
        """int32[images, tokens_per_image] per prompt -> int32[prompts, candidates, n, size].

        The reference's window: the prompt is cut to its last images so that one more fits; as
        many new images as fit are made in one call, after that one per call over the last images
        of prompt and answer, positions restarting at 0.
        """
        for name, number in (("n", n), ("candidates", candidates)):
            if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
                raise ValueError(f"{name}={number!r} must be a whole number from 1 on")
        size = self.tokenizer.cfg.tokens_per_image
        keep = self.context_images - 1
        prompts = self._fitting(prompts)
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) > 1:  # a cache has one next slot for all of its rows
            return self._by_length(prompts, n, candidates, sampler, seed)
        context = np.stack([np.asarray(prompt) for prompt in prompts])
        fits = min(n, self.context_images - context.shape[1])
        made = self._generate(context, fits, candidates, sampler, seed, 0)
        made = made.reshape(len(prompts) * candidates, fits, size)
        context = np.repeat(context, candidates, axis=0)
        for extra in range(1, n - fits + 1):
            window = np.concatenate([context, made], axis=1)[:, -keep:]
            new = self._generate(window, 1, 1, sampler, seed, extra)
            made = np.concatenate([made, new.reshape(len(window), 1, size)], axis=1)
        return made.reshape(len(prompts), candidates, n, size)

    def perplexity_ids(
        self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]
    ) -> np.ndarray:
        """`perplexity` on int32[images, tokens_per_image] arrays; those of a bucket run together.

        Raises:
          ValueError: an empty context or target.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (context, target) in enumerate(zip(contexts, targets, strict=True)):
            if not context.size or not target.size:
                raise ValueError(f"prompt {index} has no context or no target to score")
            shape = self._room(context.size + target.size), self._room(target.size)
            groups.setdefault(shape, []).append(index)
        result = np.zeros(len(contexts))
        for (room, most_scored), indices in groups.items():
            ids = np.zeros((len(indices), room), np.int32)
            for row, i in enumerate(indices):
                both = np.concatenate([contexts[i].ravel(), targets[i].ravel()])
                ids[row, : len(both)] = both
            starts = np.array([contexts[i].size for i in indices], np.int32)
            fitting = max(1, MAX_SCORED // room)
            per_call = min(MAX_ROWS, 1 << (fitting.bit_length() - 1))
            for start, count, filled in buckets.pieces(per_call, ids, starts):
                logp = np.asarray(self._score(self.params, *filled, most_scored), np.float64)
                for i, row in zip(indices[start : start + count], logp):
                    result[i] = np.exp(-row[: targets[i].size].mean())
        return result

    def _room(self, tokens: int) -> int:
        """Tokens of the images that hold so many, in few different numbers."""
        size = self.tokenizer.cfg.tokens_per_image
        count = -(-tokens // size)
        return size * buckets.length(count, max(count, self.context_images))

    def _by_length(self, prompts, n, candidates, sampler, seed):
        groups: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(index)
        size = self.tokenizer.cfg.tokens_per_image
        result = np.zeros((len(prompts), candidates, n, size), np.int32)
        for indices in groups.values():
            result[indices] = self.continue_ids(
                [prompts[i] for i in indices], n, candidates=candidates, sampler=sampler, seed=seed
            )
        return result

    def _generate(self, context, num_images, candidates, sampler, seed, call):
        """int32[rows, images, size] -> int32[rows, candidates, num_images * size]."""
        rows, images_, size = context.shape
        keep = self.context_images - 1
        lead = np.tile(np.array(self.lead_ids, np.int32), (rows, 1))
        behind = np.zeros((rows, (buckets.length(images_, keep) - images_) * size), np.int32)
        prompt = np.concatenate([lead, context.reshape(rows, -1), behind], axis=1).astype(np.int32)
        most_images, new = buckets.length(num_images, keep), num_images * size
        lengths = generate.Lengths(np.int32(prompt.shape[1] - behind.shape[1]), np.int32(new))
        # Without its numbers: they are arguments, so that other ones compile nothing.
        fixed = dataclasses.replace(sampler, temperature=1.0, top_k=0, top_p=1.0)
        key = (most_images, candidates, fixed)
        if key not in self._generators:
            self._generators[key] = generate.compile(
                self._network.bind,
                most_images * size,
                sampler=fixed,
                num_samples=candidates,
            )
        rng = jax.random.fold_in(jax.random.key(seed), call)
        per_call = max(1, MAX_ROWS // candidates)
        parts = []
        for start, count, (filled,) in buckets.pieces(per_call, prompt):
            rng_ = jax.random.fold_in(rng, start)
            out = self._generators[key](
                self.params, filled, rng_, knobs=sampler.knobs, lengths=lengths
            )
            parts.append(np.asarray(out.tokens_bst)[:count, :, :new])
        return np.concatenate(parts)

    @property
    def _score(self):
        if "score" not in self._generators:

            def score(params, ids_bt, start_b, scored):
                module = self._network.bind(params)
                hidden_btd, _ = module.transform(module.embed(ids_bt[:, :-1]))
                # Only what is scored goes through the head: logits are the largest array here.
                # Places behind the row are scored as its last one; the caller drops them.
                place_bs = jnp.minimum(start_b[:, None] + jnp.arange(scored), ids_bt.shape[1] - 1)
                hidden_bsd = jnp.take_along_axis(hidden_btd, place_bs[..., None] - 1, axis=1)
                ids_bs = jnp.take_along_axis(ids_bt, place_bs, axis=1)
                return losses.token_logp(module.logits(hidden_bsd), ids_bs)

            self._generators["score"] = jax.jit(score, static_argnums=3)
        return self._generators["score"]

    def _ids(self, prompts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """int32[images, tokens_per_image] per prompt; all images are encoded together."""
        ids = self.tokenizer.encode_u8([image for prompt in prompts for image in prompt])
        return np.split(ids, np.cumsum([len(prompt) for prompt in prompts])[:-1])


def _as_prompts(frames: Any) -> tuple[list[list[Any]], bool]:
    """(list of prompts, whether there was just one)."""
    listed, alone = images.one_or_many(frames)
    if alone:
        raise ValueError("a prompt is a list of images; put the single image into a list")
    if not listed:
        raise ValueError("the prompt is empty; LVM continues at least one image")
    found = [images.one_or_many(item) for item in listed]
    if any(alone for _, alone in found):
        return [listed], True
    prompts = [pictures for pictures, _ in found]
    if not all(prompts):
        raise ValueError("a prompt is empty; LVM continues at least one image")
    return prompts, False
