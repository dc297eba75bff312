"""NExT-Chat as an object with verbs.

model = vlm_jax.load("nextchat", "nextchat-7b-336")
said = model.chat("dog.jpg", "Where is the dog?")
said.text            "Answer: [0] ."
said.boxes_xyxy_px   float32[1, 4], pixels of the photo
said.masks           COCO's run lengths; said.spans ties "[0]" to box and mask

talk = model.conversation("dog.jpg")
talk.say("What is [0]?", boxes=[[10, 20, 90, 80]])
talk.say("And what is it doing?")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import answer, saving
from vlm_jax.data import annotations as annotations_lib
from vlm_jax.data import geometry
from vlm_jax.data import images as images_lib
from vlm_jax.decoding import sampling
from vlm_jax.models import clip, llama
from vlm_jax.models import sam as sam_lib
from vlm_jax.ops import partition
from vlm_jax.systems.nextchat import conversation as conversation_lib
from vlm_jax.systems.nextchat import format as format_lib
from vlm_jax.systems.nextchat import generation, tokenization
from vlm_jax.systems.nextchat import network as network_lib
from vlm_jax.systems.nextchat.task import NextChatTask

MAX_TOKENS = 256  # of an answer, unless another number is asked for
_PROMPT_STEP = 64  # prompts are padded to multiples of so many tokens: few programs
_STRAY = re.compile("\\s*(?:" + "|".join(map(re.escape, network_lib.ADDED_TOKENS)) + ")\\s*")
_SLOTS = (4, 16, 64)  # boxes of a question: one program for each


class NextChat(saving.Model):
    """The network with its tokenizer.

    Args:
      cfg, params: of the network, in the training layout.
      tokenizer: of the language model.
      sections: "task" and "formatter" of the run's recipe, for `save`.
    """

    def __init__(
        self,
        cfg: network_lib.NextChatConfig,
        params: Any,
        tokenizer: tokenization.Tokenizer,
        *,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if tokenizer.size != cfg.decoder.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.size} ids with the five added ones, the decoder "
                f"{cfg.decoder.vocab_size}; give the tokenizer that it was trained with"
            )
        self.cfg, self.tokenizer, self.params = cfg, tokenizer, params
        self._sections = dict(sections or {})
        self._task = NextChatTask(cfg)
        self._decode_params = jax.device_put(self._task.inference_params(params))
        self._compiled: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return self._described(self.cfg.decoder, self.params)

    def parts(self, *, copy_shipped: bool = True) -> saving.Parts:
        """See `saving.Model.parts`."""
        del copy_shipped  # nothing in it comes with the package
        file, write = self.tokenizer.file()
        formatter = dict(self._sections.get("formatter", {}))
        formatter |= dict(
            tokenizer=f"{{workdir}}/{file}",
            image_size=self.cfg.vision.image_size,
            patch_size=self.cfg.vision.patch_size,
            sam_size=self.cfg.sam.image_size if self.cfg.sam else 0,
        )
        model = {
            field.name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            for field in dataclasses.fields(self.cfg)
            if (value := getattr(self.cfg, field.name)) is not None
        }
        return saving.Parts(
            system="nextchat",
            sections={
                "model": model,
                "task": dict(self._sections.get("task", {})),
                "formatter": formatter,
                "load": {},
            },
            params=self.params,
            dtype=saving.dtype_of(self.params),
            files=write,
            source=self.source,
            title=f"NExT-Chat, chat with boxes, {saving.count_of(self.params)} parameters",
        )

    def chat(
        self,
        image: Any,
        text: str,
        *,
        boxes: Any = (),
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> answer.Answer:
        """One question about one image.

        Args:
          image: anything that `images.as_image` takes.
          text: the question. `[0]` and `[1, 2]` in it are the boxes given.
          boxes: x0, y0, x1, y1 of each in pixels of the image. A point is a small box, a mask is
            given by its box.
          max_tokens: of the answer.
          temperature, top_k, top_p, seed: 0, the default, takes the likeliest token; see
            `sampling.Sampler`.

        Returns:
          Answer: text with `[0]`, `[1]`, ... where something is shown, a box for each, a mask where
          the model makes some with `scores` (its own estimate of their IoU), and spans. `problem`
          says what was cut off.

        Raises:
          ValueError: boxes that are none, a region without a box, an empty question, options out of
            range, a conversation longer than the model's context.
          ImageError: no image.
        """
        options = dict(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        return self.conversation(image).say(text, boxes=boxes, seed=seed, **options)

    def conversation(self, image: Any) -> Conversation:
        """A conversation about an image, which is encoded once."""
        return Conversation(self, images_lib.as_image(image))

    # ---- what a conversation asks --------------------------------------------------------------

    def encode(self, image_u8: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        """(x_1pd for the decoder, SAM's encoding or None) of an image, once per conversation."""
        square = geometry.Square(image_u8.shape[:2])
        if "encode" not in self._compiled:

            def run(params, image, sam, place):
                module = self._task.bind(params)
                encoding = None
                if self.cfg.sam:
                    encoding = module.encode_for_masks(sam_lib.normalize(sam, place))
                return module.image_vectors(clip.normalize(image)), encoding

            self._compiled["encode"] = jax.jit(run)
        small = square.image_in(image_u8, self.cfg.vision.image_size)[None]
        canvas = place = np.zeros((1, 1), np.uint8)
        if self.cfg.sam:
            canvas, place = (x[None] for x in square.canvas(image_u8, self.cfg.sam.image_size))
        return self._compiled["encode"](
            self._decode_params, jnp.asarray(small), jnp.asarray(canvas), jnp.asarray(place)
        )

    def generate(
        self,
        image_1pd: jax.Array,
        ids: np.ndarray,
        boxes01: np.ndarray,
        max_tokens: int,
        sampler: sampling.Sampler,
        seed: int,
    ) -> generation.Answers:
        """An answer to one prompt, as NumPy arrays."""
        length = -(-len(ids) // _PROMPT_STEP) * _PROMPT_STEP
        slots = next((x for x in _SLOTS if x >= len(boxes01)), 0)
        if not slots:
            raise ValueError(f"{len(boxes01)} regions in a conversation; at most {_SLOTS[-1]}")
        tokens = np.zeros((1, length), np.int32)
        tokens[0, length - len(ids) :] = ids
        valid = np.arange(length)[None] >= length - len(ids)
        boxes, box_valid = np.zeros((1, slots, 4), np.float32), np.zeros((1, slots), bool)
        boxes[0, : len(boxes01)], box_valid[0, : len(boxes01)] = boxes01, True
        key = max_tokens, dataclasses.replace(sampler, temperature=1.0, top_k=0, top_p=1.0)
        if key not in self._compiled:
            fixed = key[1]

            def run(params, image_1pd, tokens, valid, boxes, box_valid, rng, knobs):
                module = self._task.bind(params)
                x_btd = module.inputs(
                    tokens, boxes_bkx=boxes, boxes_valid_bk=box_valid, image_bpd=image_1pd
                )
                return generation.answer(
                    module, x_btd, valid, rng, num_new=max_tokens,
                    eos_id=self.tokenizer.eos_id, num_slots=_SLOTS[1],
                    sampler=lambda rng, logits: fixed.draw(knobs, rng, logits),
                )  # fmt: skip

            self._compiled[key] = jax.jit(run)
        made = self._compiled[key](
            self._decode_params, image_1pd, tokens, valid, boxes, box_valid, jax.random.key(seed),
            sampler.knobs,
        )  # fmt: skip
        return jax.tree.map(np.asarray, made)

    def masks(self, encoding: jax.Array, made: generation.Answers) -> tuple[np.ndarray, np.ndarray]:
        """(logits [K, S, S] of SAM's square, IoU [K]) of all locations of an answer."""
        if "masks" not in self._compiled:

            def run(params, encoding, states, boxes):
                logits, iou = self._task.bind(params).masks(encoding, states, boxes)
                return sam_lib.upsample(logits, self.cfg.sam.image_size), iou

            self._compiled["masks"] = jax.jit(run)
        logits, iou = self._compiled["masks"](
            self._decode_params, encoding, made.states_bkd, made.boxes_bkx
        )
        return np.asarray(logits[0]), np.asarray(iou[0])


class Conversation:
    """Turns about one image; of `NextChat.conversation`.

    Attributes:
      turns: texts so far, user and assistant, as the model reads them.
    """

    def __init__(self, model: NextChat, image_u8: np.ndarray):
        self._model, self.image_u8 = model, image_u8
        self._square = geometry.Square(image_u8.shape[:2])
        self._encoded: Any = None
        self.turns: list[str] = []
        self._boxes01 = np.zeros((0, 4), np.float32)

    def say(
        self,
        text: str,
        *,
        boxes: Any = (),
        max_tokens: int = MAX_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> answer.Answer:
        """The next turn; see `NextChat.chat`. A turn that raises changes nothing."""
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens!r} must be a whole number from 1 on")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the question is empty")
        if conversation_lib.IMAGE in text or conversation_lib.LOCATION in text:
            raise ValueError("the question holds the model's own tokens; write [0] for a box")
        sampler = sampling.Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        given = self._square.boxes_in(boxes)
        text, chosen = conversation_lib.regions(text, len(given))
        if len(given) and not chosen:
            raise ValueError(
                f"{len(given)} boxes are given and the question names none; write [0] where it is "
                "meant"
            )
        turn = text if self.turns else f"{conversation_lib.IMAGE} {text}"
        boxes01 = np.concatenate([self._boxes01, given[chosen]])
        model = self._model
        encoded = conversation_lib.encode(
            [*self.turns, turn], model.tokenizer, model.cfg.num_image, len(boxes01)
        )
        room = model.cfg.decoder.max_tokens - len(encoded.ids)
        if room < max_tokens:
            raise ValueError(
                f"the conversation has {len(encoded.ids)} tokens and the model's context is "
                f"{model.cfg.decoder.max_tokens}: max_tokens={max_tokens} do not fit; begin a new "
                "conversation or ask for fewer"
            )
        if self._encoded is None:
            self._encoded = model.encode(self.image_u8)
        made = model.generate(self._encoded[0], encoded.ids, boxes01, max_tokens, sampler, seed)
        said, raw, boxes = self._read(made)
        self.turns += [turn, raw or "."]
        self._boxes01 = np.concatenate([boxes01, boxes])
        return said

    def _read(self, made: generation.Answers) -> tuple[answer.Answer, str, np.ndarray]:
        """(the answer, its text as the model reads it, its boxes in 0..1 of the square)."""
        model, count = self._model, int(made.valid_bk[0].sum())
        ids = made.tokens_bt[0, : made.lengths_b[0]].tolist()
        problems = []
        if not ids or ids[-1] != model.tokenizer.eos_id:
            problems.append(f"the answer was cut off after {len(ids)} tokens; raise max_tokens")
        if made.lost_b[0]:
            problems.append(f"{int(made.lost_b[0])} locations beyond {count} are left out")
        parts = _shown_parts(model.tokenizer.decode(ids), count)
        raw = conversation_lib.LOCATION.join(parts)
        boxes01 = made.boxes_bkx[0, :count]
        masks, scores = [], np.zeros(0, np.float32)
        if model.cfg.sam and count:
            logits, iou = model.masks(self._encoded[1], made)
            masks = [annotations_lib.encode_rle(self._square.mask_out(x)) for x in logits[:count]]
            scores = iou[:count]
        text, spans = "", []
        for number, part in enumerate(parts):
            if number:
                start, text = len(text), f"{text}[{number - 1}]"
                kinds = ("box", "mask") if masks else ("box",)
                spans += [answer.Span(start, len(text), kind, number - 1) for kind in kinds]
            text += part
        said = answer.Answer(
            text=text,
            boxes_xyxy_px=self._square.boxes_out(boxes01),
            masks=tuple(masks),
            scores=scores,
            spans=tuple(spans),
            problem="; ".join(problems),
        )
        return said, raw, np.clip(boxes01, 0, 1)


def _shown_parts(raw: str, count: int) -> list[str]:
    """What stands between the first `count` locations, without stray tokens of the model."""
    parts = raw.split(conversation_lib.LOCATION)
    parts = [*parts[:count], f" {conversation_lib.LOCATION} ".join(parts[count:])]
    return [_STRAY.sub(" ", part) for part in parts]


def from_run(
    task: NextChatTask,
    formatter: format_lib.Formatter,
    params: Any,
    *,
    tokenizer: str = "",
    dtype: str = "",
) -> NextChat:
    """A NextChat from a run of our own; `vlm_jax.load` calls it.

    Args:
      task, formatter: as the run was configured.
      params: of its newest good checkpoint.
      tokenizer: file; "" takes what the run was configured with.
      dtype: compute dtype; "" is bfloat16 on an accelerator, float32 on a CPU.
    """
    sections = {"task": saving.section_of(task), "formatter": saving.section_of(formatter)}
    sections["task"].pop("cfg", None)
    loaded = tokenization.load(tokenizer or formatter.tokenizer)
    return NextChat(_computed_in(task.cfg, dtype), params, loaded, sections=sections)


def from_upstream(
    checkpoint: str, *, clip: str = "", sam: str = "", tokenizer: str = "", dtype: str = ""
) -> NextChat:
    """A NextChat from released weights; `vlm_jax.load` calls it.

    Args:
      checkpoint: folder or file in the released layout.
      clip: the CLIP file that it was trained with, where it has no tower.
      sam: SAM's file, for what it lacks of SAM.
      tokenizer: file; "" is the tokenizer.model beside the weights.
      dtype: compute and storage; "" is bfloat16 on an accelerator, float32 on a CPU.

    Raises:
      FileNotFoundError, WeightsError, ConversionError: the weights cannot be read.
      DataError: no tokenizer.
    """
    from vlm_jax.systems.nextchat import weights
    from vlm_jax.weights import readers

    tensors = weights.read(checkpoint, clip)
    if sam:
        tensors = weights.over_sam(tensors, readers.read(sam))
    loaded = tokenization.load(tokenizer or readers.folder_of(checkpoint) / "tokenizer.model")
    cfg = _computed_in(weights.config_of(tensors, checkpoint), dtype)
    params = weights.from_tensors(tensors, network_lib.make(cfg).abstract())
    return NextChat(cfg, params, loaded)


def copy_dtype(dtype: str = "") -> str:
    """Of the copy of the decoder that computes, for a `dtype` as above."""
    return llama.decode_dtype(dtype or _default_dtype())


def _default_dtype() -> str:
    return "float32" if partition.platform() == "cpu" else "bfloat16"


def _computed_in(cfg: network_lib.NextChatConfig, dtype: str) -> network_lib.NextChatConfig:
    dtype = dtype or _default_dtype()
    parts = {
        name: dataclasses.replace(part, dtype=dtype, remat="none")
        for name in ("vision", "decoder")
        if (part := getattr(cfg, name)) is not None
    }
    return dataclasses.replace(cfg, **parts)
