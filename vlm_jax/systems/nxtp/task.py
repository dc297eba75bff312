"""NXTP as a Task: next-token prediction of labels behind an image (arXiv 2312.02142).

    image_u8 ─ normalise ─ vision ─ projection ─┐
    tokens ─────────────── embed ───────────────┴─ decoder, masks.labels ─ logits ─ cross-entropy

    predict["score"]      logp float32[B, T] of every target
    predict["one_shot"]   ids int32[B, k, max_tokens], probs, lengths, ended: decoding.one_shot

Parameters are {vision, projection, decoder}. What is trained is the recipe's business:
`systems.nxtp.weights.trained` is the reference's choice. Blocks that are not trained lie before all
that are, so their backward pass does not exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.decoding import one_shot
from vlm_jax.models import clip, llama
from vlm_jax.nn import functional
from vlm_jax.ops import losses, masks
from vlm_jax.program import config as config_lib
from vlm_jax.systems.nxtp import format as format_lib
from vlm_jax.systems.nxtp import network as network_lib
from vlm_jax.weights import lpips


@dataclasses.dataclass(frozen=True)
class NxtpTask:
    """See the module.

    Attributes:
      cfg: of the network.
      mask: who sees whom in training: "labels" (`masks.labels`), and for ablations "image_prefix"
        (`masks.prefix`) and "causal".
      positions: "absolute" counts through the row, "labels" starts every label at the same place.
      loss_chunk: positions whose logits exist at once; 0 makes all logits.
      k: labels of predict["one_shot"], where its option `k` does not say.
      max_tokens: limit of a label, its delimiter included, where the option `max_tokens` does not
        say; upstream: max_update_iter - 1.
      delimiter_id: of the tokenizer, 29892 in LLaMA's.
    """

    cfg: network_lib.NxtpConfig
    mask: str = "labels"
    positions: str = "absolute"
    loss_chunk: int = 0
    k: int = 10
    max_tokens: int = 19
    delimiter_id: int = 29892

    sharding_rules = network_lib.SHARDING_RULES
    inference_rules = network_lib.INFERENCE_RULES

    def __post_init__(self):
        for name, known in (
            ("mask", ("labels", "image_prefix", "causal")),
            ("positions", ("absolute", "labels")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"task.{name}={getattr(self, name)!r} is none of {known}")
        config_lib.check_ranges(self, loss_chunk=(0, math.inf))
        num_ids = self.cfg.decoder.vocab_size - network_lib.NUM_ADDED
        if not 0 <= self.delimiter_id < num_ids:
            raise ValueError(
                f"task.delimiter_id={self.delimiter_id} is not in the vocabulary of {num_ids}"
            )
        if not 1 <= self.k <= num_ids:
            raise ValueError(f"task.k={self.k} is not in 1 ... {num_ids}, the vocabulary's size")
        if self.max_tokens < 1:
            raise ValueError(f"task.max_tokens={self.max_tokens} must be at least 1")

    @functools.cached_property
    def network(self) -> functional.Functional:
        """The network behind its functional boundary."""
        return network_lib.make(self.cfg)

    @property
    def predict(self) -> Mapping[str, Any]:
        """Named predictors; see the module."""
        return {"score": self._score, "one_shot": self._one_shot}

    def init(self, rng: jax.Array) -> functional.Params:
        """Random parameters."""
        return self.network.init(rng)

    def pretrained(self) -> dict[str, Any]:
        """The published VGG16, where it is the tower; CLIP comes with `init.upstream`."""
        if isinstance(self.cfg.vision, clip.VisionConfig):
            return {}
        return {"vision": {"vgg": lpips.load(stages=self.cfg.vision.stages)["vgg"]}}

    def loss(self, params, batch, rng):
        """(terms, metrics) of a batch; see the table in `format.py`. Mean over all its targets."""
        del rng
        module = self.network.bind(params)
        hidden_btd = self.hidden(module, batch)
        targets, weights = batch["targets"], batch["weights"]
        if self.loss_chunk:
            head = module.decoder.head_matrix()
            loss, metrics = losses.chunked_cross_entropy_terms(
                hidden_btd, head, targets, weights, chunk=self.loss_chunk
            )
        else:
            logits_btv = module.decoder.logits(hidden_btd)
            loss, metrics = losses.cross_entropy_terms(logits_btv, targets, weights)
        return {"tokens": loss}, {
            "accuracy": metrics["accuracy"],
            "scored_tokens": metrics["tokens"],
        }

    def hidden(self, module, batch):
        """Outputs of the decoder at the text's places, hidden_btd."""
        tokens, segments = batch["tokens"], batch["segments"]
        num_image = self.cfg.num_image
        x_bsd = module.inputs(clip.normalize(batch["image_u8"]), tokens)
        # The image belongs to the prompt, which all labels see.
        segments_bs = jnp.pad(segments, ((0, 0), (num_image, 0)), constant_values=1)
        num_tokens = x_bsd.shape[1]
        mask_bts = {
            "labels": lambda: masks.labels(segments_bs, num_image),
            "image_prefix": lambda: masks.prefix(num_tokens, num_image)[None],
            "causal": lambda: masks.causal(num_tokens)[None],
        }[self.mask]()
        text_bt = batch["label_positions"]
        if self.positions == "absolute":
            text_bt = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        image_bt = jnp.broadcast_to(jnp.arange(num_image), (tokens.shape[0], num_image))
        positions_bt = jnp.concatenate([image_bt, text_bt + num_image], axis=1)
        hidden_bsd, _ = module.decoder.transform(
            x_bsd, positions_bt=positions_bt, mask_bts=mask_bts
        )
        return hidden_bsd[:, num_image:]

    def check_data(self, data: Any, formatter: Any, name: str) -> None:
        """Raises ConfigError unless labels end for the formatter where they end for the model."""
        del data, name
        if not isinstance(formatter, format_lib.Formatter):
            return
        if (found := formatter.vocabulary.delimiter_id) != self.delimiter_id:
            raise config_lib.ConfigError(
                f"task.delimiter_id={self.delimiter_id}, but the delimiter of formatter.tokenizer="
                f"{formatter.tokenizer} is {found}; set it to that"
            )

    def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises ConfigError when a batch cannot be learned from by this model."""
        side, (_, height, width, _) = self.cfg.vision.image_size, batch["image_u8"].shape
        if (height, width) != (side, side):
            raise config_lib.ConfigError(
                f"pictures of {height}x{width} for a tower of {side}; set formatter.image_size"
            )
        length = batch["tokens"].shape[1] + self.cfg.num_image
        if length > self.cfg.decoder.max_tokens:
            raise config_lib.ConfigError(
                f"{self.cfg.num_image} places of the image and {batch['tokens'].shape[1]} of the "
                f"text are more than model.decoder.max_tokens={self.cfg.decoder.max_tokens}; lower "
                "formatter.max_tokens"
            )
        largest = int(batch["tokens"].max())
        if largest >= self.cfg.decoder.vocab_size:
            raise config_lib.ConfigError(
                f"token id {largest} for a decoder of {self.cfg.decoder.vocab_size} ids (the two "
                "added ones counted): formatter.tokenizer is another model's"
            )
        self._check_tokenizer(batch["prompt"][0])
        if not np.any(batch["weights"]):
            raise config_lib.ConfigError("no token of the first batch carries loss; check the data")
        segments, tokens = batch["segments"], batch["tokens"]
        if segments.max() < 2 and jax.process_index() == 0:
            print(
                "[nxtp] warning: no row of the first batch has a label; are the captions empty?",
                file=sys.stderr,
            )
        # Where one label follows another, the first ended in a delimiter.
        ends = (segments[:, :-1] > 1) & (segments[:, 1:] == segments[:, :-1] + 1)
        wrong = set(np.unique(tokens[:, :-1][ends]).tolist()) - {self.delimiter_id}
        if wrong:
            raise config_lib.ConfigError(
                f"labels end in id {sorted(wrong)}, but task.delimiter_id={self.delimiter_id}; "
                "take that of formatter.tokenizer"
            )

    def _check_tokenizer(self, prompt_t: np.ndarray) -> None:
        """The formatter's tokenizer, which made the prompt, is the model's."""
        num_ids = self.cfg.decoder.vocab_size
        marker = int(prompt_t[0])
        if marker != self.cfg.image_id:
            raise config_lib.ConfigError(
                f"formatter.tokenizer has {marker + network_lib.NUM_ADDED} ids with the two added "
                f"ones, the model model.decoder.vocab_size={num_ids}: <image> would be another "
                f"row than the one that is trained. Set it to {marker + network_lib.NUM_ADDED} "
                "(of a padded table the rows in use are loaded), or take the model's own tokenizer"
            )

    def units_per_step(self, batch) -> tuple[str, float]:
        """Images per update."""
        return "images", float(batch["tokens"].shape[0])

    def flops_per_step(self, batch) -> float:
        """Model FLOPs of one update, as if everything were trained."""
        rows, length = batch["tokens"].shape
        length += self.cfg.num_image
        decoder = llama.flops_per_token(self.cfg.decoder, length, causal_half=False)
        return rows * (length * decoder + self.cfg.vision.training_flops)

    def inference_params(self, params):
        """The decoder in the decode layout; see `llama.decode_form`."""
        return {**params, "decoder": llama.decode_form(params["decoder"], self.cfg.decoder)[0]}

    def _score(self, params, batch, rng):
        del rng
        layout, network = llama.decoding_config(params["decoder"], self.cfg.decoder), self.network
        if layout.fused:
            network = network_lib.make(dataclasses.replace(self.cfg, decoder=layout))
        module = network.bind(params)
        logits_btv = module.decoder.logits(self.hidden(module, batch))
        return {"logp": losses.token_logp(logits_btv, batch["targets"])}

    def _one_shot(self, params, batch, rng, *, k=None, max_tokens=None):
        del rng
        k = self.k if k is None else k
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        num_ids = self.cfg.decoder.vocab_size - network_lib.NUM_ADDED
        if not 1 <= k <= num_ids or max_tokens < 1:
            raise config_lib.ConfigError(
                f"{k} labels of {max_tokens} tokens are wanted; it must be 1 to {num_ids} labels, "
                "the vocabulary's size, of one token at least"
            )
        decoder = llama.decoding_config(params["decoder"], self.cfg.decoder)
        module = network_lib.make(dataclasses.replace(self.cfg, decoder=decoder)).bind(params)
        x_bsd = module.inputs(clip.normalize(batch["image_u8"]), batch["prompt"])
        found = one_shot.decode(
            module.decoder,
            x_bsd.astype(decoder.dtype),
            k=k,
            max_tokens=max_tokens,
            delimiter_id=self.delimiter_id,
            prefix_block=self.cfg.num_image,
        )
        return {
            "ids": found.ids_bkt,
            "probs": found.probs_bkt,
            "lengths": found.lengths_bk,
            "ended": found.ended_bk,
        }


def make_task(model: Mapping[str, Any], **task: Any) -> NxtpTask:
    """The task from `config.model`, {vision, decoder}, each a preset and fields, and `config.task`.

    Raises:
      ConfigError: unknown preset, unknown keys, sizes that do not fit each other.
    """
    halves = config_lib.plain(model)
    if unknown := sorted(set(halves) - {"vision", "decoder"}):
        raise config_lib.ConfigError(
            f"unknown key model.{unknown[0]}; the parts are model.vision and model.decoder"
        )
    parts = {}
    tower = network_lib.VISIONS.get(halves.get("vision", {}).get("preset", ""))
    for name, cls, presets in (
        ("vision", type(tower) if tower else clip.VisionConfig, network_lib.VISIONS),
        ("decoder", llama.LlamaConfig, network_lib.DECODERS),
    ):
        try:
            parts[name] = config_lib.model_section(cls, presets, halves.get(name, {}))
        except config_lib.ConfigError as error:
            message = str(error).replace("model.", f"model.{name}.")
            raise config_lib.ConfigError(message) from error
    cfg = network_lib.NxtpConfig(**parts)
    task.pop("tokenizer", None)  # older recipes name the formatter's file here too
    return config_lib.section(NxtpTask, {"cfg": cfg, **task}, "task")
