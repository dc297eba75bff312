"""NExT-Chat as a Task: words, boxes and masks of one conversation (arXiv 2311.04498).

A batch; B rows, T places of text, K locations of a row, S pixels:

| key | dtype, shape | meaning |
|---|---|---|
| `image_u8` | uint8[B, S, S, 3] | the padded square; not read in rows without `<im_patch>` |
| `tokens`, `targets` | int32[B, T] | the conversation, and the id that follows each |
| `weights` | float32[B, T] | of each target in the loss; `<boxes>` as a target never has one |
| `token_valid` | bool[B, T] | False for tokens that nobody reads: padding |
| `boxes` | float32[B, K, 4] | of the `<boxes>` tokens in their order: x0 y0 x1 y1 in 0..1 |
| `box_valid` | bool[B, K] | False for slots behind them |

with masks (`model.sam`) besides, for M locations of answers and SAM's side S:

| key | dtype, shape | meaning |
|---|---|---|
| `sam_u8` | uint8[B, S, S, 3] | the photo in the middle of SAM's square |
| `sam_place` | int32[B, 4] | x0 y0 x1 y1 of the photo there; what is outside is read as 0 |
| `masks` | uint8[B, M, S, S] | 0 and 1, of the answer's locations in their order |
| `mask_valid` | bool[B, M] | False for locations without a mask, and behind them |

A location whose `<at>` is itself a supervised target belongs to an answer; those of questions are
read, and are in one cycle loss.

    predict["score"]   logp float32[B, T] of every target
    predict["boxes"]   boxes float32[B, K, 4] decoded at each `<at>` when the conversation is given,
                       box_valid bool[B, K], those of answers; of a forced answer this is REC's
                       evaluation
    predict["masks"]   the same, and mask_logits float32[B, K, S/4, S/4], mask_iou float32[B, K]
    predict["answer"]    the last answer, generated from what stands before it, greedily: tokens
                       int32[B, N], lengths int32[B], boxes, box_valid, lost int32[B], locations
                       beyond the slots; with masks also their keys

Boxes are fractions of the padded square's side. Terms of the loss: "text" and those of `losses.py`.
Every term has a count of its own, so rows of all tasks may share a batch.
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

from vlm_jax.models import clip, llama, sam
from vlm_jax.nn import functional
from vlm_jax.ops import losses, slots
from vlm_jax.program import config as config_lib
from vlm_jax.systems.nextchat import generation
from vlm_jax.systems.nextchat import losses as losses_lib
from vlm_jax.systems.nextchat import network as network_lib

# What upstream trains, by stage: `optim.trainable`.
TRAINED = {
    1: r"^(decoder|projector|box_encoder|box_decoder)/",
    2: r"^(decoder|projector|box_encoder|box_decoder)/",
    3: r"^(mask_prompt|sam/mask_decoder)/",
}


@dataclasses.dataclass(frozen=True)
class NextChatTask:
    """See the module.

    Attributes:
      cfg: of the network.
      text_weight, l1_weight, giou_weight, cycle_weight: of the terms in the loss, the released
        code's; the paper has 0.8 for GIoU. What has weight 0 is not computed; stage 3 has none.
      mask_weight: of the three terms of masks, where the model makes them.
      giou_mean: see `losses.box_terms`: "boxes", or "ordered" as released.
      masks_per_device: see `losses.mask_terms`; 0 counts them, as released.
      loss_chunk: places whose logits exist at once; 0 makes all logits.
      eos_id: ends an answer of predict["answer"].
    """

    cfg: network_lib.NextChatConfig
    text_weight: float = 1.0
    l1_weight: float = 2.0
    giou_weight: float = 0.2
    cycle_weight: float = 1.0
    mask_weight: float = 1.0
    giou_mean: str = "boxes"
    masks_per_device: int = 8
    loss_chunk: int = 0
    eos_id: int = 2

    sharding_rules = network_lib.SHARDING_RULES
    inference_rules = network_lib.INFERENCE_RULES

    def __post_init__(self):
        weights = [f"{name}_weight" for name in ("text", "l1", "giou", "cycle", "mask")]
        config_lib.check_ranges(
            self, **dict.fromkeys(("loss_chunk", "masks_per_device", *weights), (0, math.inf))
        )
        if not any(self._scales().values()):
            raise ValueError("all weights of the loss are 0; nothing would be learned")
        if self.giou_mean not in losses_lib.GIOU_MEANS:
            raise ValueError(
                f"task.giou_mean={self.giou_mean!r} is none of {losses_lib.GIOU_MEANS}"
            )

    def _scales(self):
        """Term -> its weight in the loss."""
        masks = self.mask_weight if self.cfg.sam else 0.0
        return dict(
            text=self.text_weight,
            box_l1=self.l1_weight,
            box_giou=self.giou_weight,
            cycle_state=self.cycle_weight,
            cycle_box=self.cycle_weight,
            mask_focal=20 * masks,
            mask_dice=masks,
            mask_iou=masks,
        )

    @functools.cached_property
    def network(self) -> functional.Functional:
        """The network behind its functional boundary."""
        return network_lib.make(self.cfg)

    @property
    def predict(self) -> Mapping[str, Any]:
        """Named predictors; see the module."""
        found = {"score": self._score, "boxes": self._boxes, "answer": self._answer}
        return {**found, "masks": self._masks} if self.cfg.sam else found

    def init(self, rng: jax.Array) -> functional.Params:
        """Random parameters."""
        return self.network.init(rng)

    # ---- loss ----------------------------------------------------------------------------------

    def loss(self, params, batch, rng):
        """(terms, metrics) of a batch; see the module."""
        del rng
        module = self.network.bind(params)
        hidden_btd = self.hidden(module, batch)
        scales, terms, metrics = self._scales(), {}, {}
        for make, names in (
            (self._text, ("text",)),
            (self._locations, ("box_l1", "box_giou", "cycle_state", "cycle_box")),
            (self._mask_terms, ("mask_focal", "mask_dice", "mask_iou")),
        ):
            if any(scales[name] for name in names):
                more, to_show = make(module, hidden_btd, batch)
                terms |= {name: more[name].scaled(scales[name]) for name in more if scales[name]}
                metrics |= to_show
        return terms, metrics

    def hidden(self, module, batch):
        """Outputs of the decoder, hidden_btd."""
        image_byxc = clip.normalize(batch["image_u8"])
        x_btd = module.inputs(batch["tokens"], image_byxc, batch["boxes"], batch["box_valid"])
        return module.hidden(x_btd, batch["token_valid"])

    def _text(self, module, hidden_btd, batch):
        targets = batch["targets"]
        # What follows `<at>` is known; upstream takes it out of its labels, too.
        weights = jnp.where(targets == self.cfg.boxes_id, 0.0, batch["weights"])
        if self.loss_chunk:
            head = module.decoder.head_matrix()
            term, metrics = losses.chunked_cross_entropy_terms(
                hidden_btd, head, targets, weights, chunk=self.loss_chunk
            )
        else:
            logits_btv = module.decoder.logits(hidden_btd)
            term, metrics = losses.cross_entropy_terms(logits_btv, targets, weights)
        return {"text": term}, {"accuracy": metrics["accuracy"], "scored_tokens": metrics["tokens"]}

    def _locations(self, module, hidden_btd, batch):
        true_bkx, valid_bk = batch["boxes"], batch["box_valid"]
        true_bkx = jnp.where(valid_bk[..., None], true_bkx, 0.0)
        states_bkd, found_bk = module.locations(hidden_btd, batch["tokens"], true_bkx.shape[1])
        valid_bk = valid_bk & found_bk
        answer_bk = valid_bk & self._in_answer(batch, true_bkx.shape[1])
        boxes_bkx = module.box_decoder(states_bkd)
        terms, metrics = losses_lib.box_terms(
            boxes_bkx, true_bkx, answer_bk, giou_mean=self.giou_mean
        )
        if self.cycle_weight:
            terms |= losses_lib.cycle_terms(
                states_bkd,
                module.box_encoder(boxes_bkx),
                answer_bk,
                true_bkx,
                module.box_decoder(module.box_encoder(true_bkx)),
                valid_bk,
            )
        return terms, metrics

    def _mask_terms(self, module, hidden_btd, batch):
        valid_bm, true_bmyx = batch["mask_valid"], batch["masks"]
        marks_bt = (batch["tokens"] == self.cfg.at_id) & self._is_target(batch)
        states_bmd, found_bm = slots.take(hidden_btd, marks_bt, valid_bm.shape[1])
        states_bmd = states_bmd.astype(jnp.float32)
        logits_bmyx, iou_bm = module.masks(
            self._encoding(module, batch), states_bmd, module.box_decoder(states_bmd)
        )
        return losses_lib.mask_terms(
            sam.upsample(logits_bmyx, true_bmyx.shape[-1]),
            iou_bm,
            true_bmyx,
            valid_bm & found_bm,
            masks_per_device=self.masks_per_device,
        )

    def _encoding(self, module, batch):
        return module.encode_for_masks(sam.normalize(batch["sam_u8"], batch["sam_place"]))

    def _in_answer(self, batch, num_slots):
        """bool[B, K]: the `<at>` of a location is a target with a weight."""
        at_bt = batch["tokens"] == self.cfg.at_id
        return slots.take(self._is_target(batch), at_bt, num_slots)[0]

    def _is_target(self, batch):
        """bool[B, T]: tokens that are a target with a weight."""
        return jnp.pad(batch["weights"][:, :-1] > 0, ((0, 0), (1, 0)))

    # ---- what the program asks -----------------------------------------------------------------

    def check_batch(self, batch: Mapping[str, np.ndarray]) -> None:
        """Raises ConfigError when a batch cannot be learned from by this model."""
        self._check_image(batch)
        self._check_tokens(batch)
        self._check_boxes(batch)
        if self._scales()["mask_dice"]:
            self._check_masks(batch)
        if self.text_weight and not np.any(batch["weights"]):
            raise config_lib.ConfigError("no token of the first batch carries loss; check the data")

    def _check_image(self, batch):
        side, (_, height, width, _) = self.cfg.vision.image_size, batch["image_u8"].shape
        if (height, width) != (side, side):
            raise config_lib.ConfigError(
                f"images of {height}x{width} for a tower of {side}; set formatter.image_size"
            )
        patches_b = (batch["tokens"] == self.cfg.patch_id).sum(axis=1)
        wrong = sorted(set(patches_b.tolist()) - {0, self.cfg.num_image})
        if wrong:
            raise config_lib.ConfigError(
                f"a row with {wrong[0]} places of an image, but an image of {side} pixels has "
                f"{self.cfg.num_image}: one image per row, and of this size"
            )

    def _check_tokens(self, batch):
        tokens, length = batch["tokens"], batch["tokens"].shape[1]
        if length > self.cfg.decoder.max_tokens:
            raise config_lib.ConfigError(
                f"rows of {length} tokens are more than model.decoder.max_tokens="
                f"{self.cfg.decoder.max_tokens}; lower formatter.max_tokens"
            )
        if (largest := int(tokens.max())) >= self.cfg.decoder.vocab_size:
            raise config_lib.ConfigError(
                f"token id {largest} for a decoder of {self.cfg.decoder.vocab_size} ids (the "
                f"{network_lib.NUM_ADDED} added ones counted): formatter.tokenizer is another "
                "model's"
            )

    def _check_boxes(self, batch):
        tokens, boxes, valid = batch["tokens"], batch["boxes"], batch["box_valid"]
        for row, (ids, filled) in enumerate(zip(tokens, valid)):
            places, at = np.flatnonzero(ids == self.cfg.boxes_id), ids == self.cfg.at_id
            if len(places) != filled.sum() or np.any(~filled[: len(places)]):
                raise config_lib.ConfigError(
                    f"row {row} of the first batch has {len(places)} <boxes> tokens and "
                    f"{int(filled.sum())} boxes; each token needs one, from the first slot on"
                )
            if not np.all(at[places - 1]) or at.sum() != len(places):
                raise config_lib.ConfigError(
                    f"row {row} of the first batch has a <boxes> that does not follow <at>, or the "
                    "reverse; a location is both"
                )
        kept = boxes[valid]
        low, high = kept[:, :2], kept[:, 2:]
        if not np.all((low >= 0) & (high <= 1) & (high >= low)):
            raise config_lib.ConfigError(
                "boxes of the first batch are not x0 y0 x1 y1 in 0..1 with ordered corners: "
                f"{kept[~((low >= 0) & (high <= 1) & (high >= low)).all(axis=1)][0].tolist()}"
            )

    def _check_masks(self, batch):
        side, shape = self.cfg.sam.image_size, batch["sam_u8"].shape[1:3]
        if shape != (side, side) or batch["masks"].shape[2:] != (side, side):
            raise config_lib.ConfigError(
                f"images of {shape} and masks of {batch['masks'].shape[2:]} for a SAM of {side}; "
                "set formatter.sam_size"
            )
        answers_b = (batch["tokens"][:, 1:] == self.cfg.at_id) & (batch["weights"][:, :-1] > 0)
        for row, (count, filled) in enumerate(zip(answers_b.sum(axis=1), batch["mask_valid"])):
            if np.any(filled[count:]):
                raise config_lib.ConfigError(
                    f"row {row} of the first batch has {int(filled.sum())} masks and {count} "
                    "locations in its answer; a mask belongs to one of those"
                )
        if batch["masks"].max() > 1:
            raise config_lib.ConfigError(
                f"masks of the first batch have values up to {batch['masks'].max()}; 0 is outside "
                "and 1 inside"
            )
        if np.any(batch["mask_valid"] & ~batch["masks"].any(axis=(2, 3))):
            raise config_lib.ConfigError(
                "a mask of the first batch is empty; such a location has none (mask_valid)"
            )

    def units_per_step(self, batch) -> tuple[str, float]:
        """Images per update."""
        return "images", float(batch["tokens"].shape[0])

    def flops_per_step(self, batch) -> float:
        """Model FLOPs of an update: both image encoders, and what only masks ask for, forward."""
        rows, length = batch["tokens"].shape
        scales = self._scales()
        learns = any(scales[name] for name in scales if not name.startswith("mask"))
        decoder = length * llama.flops_per_token(self.cfg.decoder, length)
        encode = self.cfg.sam.encode_flops if scales["mask_dice"] else 0.0
        tower = self.cfg.vision.training_flops / 3
        return rows * (decoder * (1 if learns else 1 / 3) + tower + encode)

    # ---- predictors ----------------------------------------------------------------------------

    def inference_params(self, params):
        """The decoder in the decode layout; see `llama.decode_form`."""
        return {**params, "decoder": llama.decode_form(params["decoder"], self.cfg.decoder)[0]}

    def bind(self, params):
        """The network over parameters of either layout, in the dtype of decoding."""
        layout = llama.decoding_config(params["decoder"], self.cfg.decoder)
        return network_lib.make(dataclasses.replace(self.cfg, decoder=layout)).bind(params)

    def _score(self, params, batch, rng):
        del rng
        module = self.bind(params)
        logits_btv = module.decoder.logits(self.hidden(module, batch))
        return {"logp": losses.token_logp(logits_btv, batch["targets"])}

    def _boxes(self, params, batch, rng):
        del rng
        return self._forced(self.bind(params), batch)[0]

    def _masks(self, params, batch, rng):
        del rng
        module = self.bind(params)
        found, states_bkd = self._forced(module, batch)
        encoding_byxd = self._encoding(module, batch)
        logits_bkyx, iou_bk = module.masks(encoding_byxd, states_bkd, found["boxes"])
        return {**found, "mask_logits": logits_bkyx, "mask_iou": iou_bk}

    def _forced(self, module, batch):
        """({"boxes", "box_valid"}, states_bkd) at each `<at>` of the conversation."""
        hidden_btd, num_slots = self.hidden(module, batch), batch["boxes"].shape[1]
        states_bkd, found_bk = module.locations(hidden_btd, batch["tokens"], num_slots)
        valid_bk = found_bk & self._in_answer(batch, num_slots)
        return {"boxes": module.box_decoder(states_bkd), "box_valid": valid_bk}, states_bkd

    def _answer(self, params, batch, rng, *, max_tokens=20, locations=8):
        if max_tokens < 1 or locations < 1:
            raise config_lib.ConfigError(
                f"max_tokens={max_tokens} and locations={locations} must be at least 1"
            )
        module = self.bind(params)
        image_byxc = clip.normalize(batch["image_u8"])
        x_btd = module.inputs(batch["tokens"], image_byxc, batch["boxes"], batch["box_valid"])
        x_btd, valid_bt = _before_the_answer(x_btd, batch, self.cfg.boxes_id)
        made = generation.answer(
            module, x_btd, valid_bt, rng, num_new=max_tokens, eos_id=self.eos_id,
            num_slots=locations,
        )  # fmt: skip
        found = {
            "tokens": made.tokens_bt,
            "lengths": made.lengths_b,
            "lost": made.lost_b,
            "boxes": made.boxes_bkx,
            "box_valid": made.valid_bk,
        }
        if self.cfg.sam:
            encoding_byxd = self._encoding(module, batch)
            logits_bkyx, iou_bk = module.masks(encoding_byxd, made.states_bkd, made.boxes_bkx)
            found |= {"mask_logits": logits_bkyx, "mask_iou": iou_bk}
        return found


def _before_the_answer(x_btd, batch, boxes_id):
    """(x_btd, valid_bt): what stands before the last answer of each row, at the right end.

    An answer begins where a target has a weight and the one before has none; `<boxes>`, which never
    has one, is inside of it.
    """
    learned_bt = batch["weights"] > 0
    inside_bt = learned_bt | (batch["targets"] == boxes_id)
    before_bt = jnp.pad(inside_bt[:, :-1], ((0, 0), (1, 0)))
    length, places = x_btd.shape[1], jnp.arange(x_btd.shape[1])
    # The token at such a place is the last of the prompt; without one, all of the row is.
    last_b = jnp.max(jnp.where(learned_bt & ~before_bt, places, -1), axis=1)
    end_b = jnp.max(jnp.where(batch["token_valid"], places, 0), axis=1)
    last_b = jnp.where(last_b < 0, end_b, last_b)
    from_bt = places + last_b[:, None] + 1 - length
    kept_bt = jnp.maximum(from_bt, 0)
    valid_bt = (from_bt >= 0) & jnp.take_along_axis(batch["token_valid"], kept_bt, axis=1)
    return jnp.take_along_axis(x_btd, kept_bt[..., None], axis=1), valid_bt


def make_task(model: Mapping[str, Any], **task: Any) -> NextChatTask:
    """The task from `config.model`, {vision, decoder, sam} and sizes, and `config.task`.

    Each part is a preset and fields; see `network.VISIONS`, `network.DECODERS` and `network.SAMS`.
    Without `sam` the model makes no masks.

    Raises:
      ConfigError: unknown preset, unknown keys, sizes that do not fit each other.
    """
    fields = config_lib.plain(model)
    parts = {}
    for name, cls, presets in (
        ("vision", clip.VisionConfig, network_lib.VISIONS),
        ("decoder", llama.LlamaConfig, network_lib.DECODERS),
        ("sam", sam.SamConfig, network_lib.SAMS),
    ):
        if name == "sam" and not fields.get("sam"):
            fields.pop("sam", None)
            continue
        try:
            parts[name] = config_lib.model_section(cls, presets, fields.pop(name, {}))
        except config_lib.ConfigError as error:
            message = str(error).replace("model.", f"model.{name}.")
            raise config_lib.ConfigError(message) from error
    cfg = config_lib.section(network_lib.NextChatConfig, {**parts, **fields}, "model")
    return config_lib.section(NextChatTask, {"cfg": cfg, **task}, "task")
