r"""Annotation files of Shikra and NExT-Chat (JSON lines) as conversations with boxes.

    form               fields of a line that are read                      conversation
    rec                img_path, expression, bbox                          question; Answer: [box] .
    res                img_path, expressions, bbox, mask                   the same, with a mask
    region caption     img_path, expression or expressions, bbox           question, a box; words
    grounded caption   image_id, sentence, boxes, boxes_seq                question; words, boxes
    caption            img_path, caption                                   question; words
    vqa                image_path, question, annotation                    The answer is X.
    vqa-e, vqa-x       file_path, question, explanation or justification   reasons, then the answer
    reasoning          img_path, question, cot_with_ans, boxes, ..._seq    reasons with boxes
    reasoning, words   the same                                            reasons without boxes
    vcr                img_fn, boxes, question, answer_choices, ...        reason and answer, boxes
    pointing           file_path, question, candidates, answer             which of the boxes
    chat               image, conversations                                as it stands
    yes or no          image, text, label                                  The answer is yes .

One file told in several forms stands in the mixture once per form. Upstream draws a template at
random, we by the number of the line, so that a line is the same in every run; `templates` gives
others. Boxes are x0, y0, x1, y1 in pixels. arXiv 2311.04498, released loaders and files.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax.data import records
from vlm_jax.datasets import image_lines

LOCATION, IMAGE = image_lines.LOCATION, image_lines.IMAGE
_PHRASE = re.compile(r"<ph_st>(.*?)<ph_ed>", re.DOTALL)


def _rec_templates() -> tuple[str, ...]:
    heads = (
        "Where is", "Can you find", "Can you detect", "Can you locate", "Please find",
        "Please detect", "Please locate", "Find", "Detect", "Locate",
    )  # fmt: skip
    places = ("<expr>", "<expr> in the image", "<expr> in image")
    made = []
    for head, place in itertools.product(heads, places):
        bare = f"{IMAGE} {head} {place}"
        plain = head in ("Please find", "Find") and place == "<expr>"
        made += [bare, bare + ("." if plain else "?")]
    return tuple(made)


_VQA = (f"{IMAGE} <question>",)
_REASONS = tuple(
    f"{first} {end}"
    for first in (f"{IMAGE} <question>", f"<question> {IMAGE}")
    for end in (
        "Let's think step by step.", "Please include the reasoning process.", "Please explain.",
        "Please include the thinking process.",
    )
)  # fmt: skip
_BOXED = (
    f"<question> {IMAGE} Please include mentioned object locations.",
    f"{IMAGE} <question> Please include mentioned object locations.",
    f"{IMAGE} <question> Please mention related object locations.",
    f"{IMAGE} <question> Please mention object locations.",
    f"{IMAGE} <question> Please explain and include related object locations.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "rec": _rec_templates(),
    "res": _rec_templates(),
    "region caption": (f"{IMAGE} What is <objs>?", f"{IMAGE} Can you describe <objs>?"),
    "grounded caption": (f"{IMAGE} Can you describe the image and include object locations?",),
    "caption": (f"{IMAGE} What is in the image?", f"{IMAGE} Can you describe the image?"),
    "vqa": _VQA, "vqa-e": _REASONS, "vqa-x": _REASONS, "reasoning": _BOXED,
    "reasoning, words": _REASONS, "vcr": _BOXED, "pointing": _VQA, "yes or no": _VQA,
    "chat": (IMAGE,),
}  # fmt: skip


def _expression(line, fill):
    names = line.get("expressions") or [line["expression"]]
    return [fill(expr=_text(names[0])), f"Answer: {LOCATION} ."], [line["bbox"]]


def _with_mask(line, fill):
    return (*_expression(line, fill), [line["mask"]])


def _region(line, fill):
    names = line.get("expressions") or [line["expression"]]
    return [fill(objs=LOCATION), _text(names[0])], [line["bbox"]]


def _phrases(text, sequences, boxes, keep=True):
    """(text with a location behind every marked phrase, boxes in their order)."""
    found: list[Any] = []
    rest = iter(sequences)

    def replaced(match):
        # An entry is a box, or [image, box].
        numbers = [x[-1] if isinstance(x, list) else x for x in next(rest)]
        if not keep:
            return match.group(1)
        found.extend(boxes[i] for i in numbers)
        return match.group(1) + " ".join([LOCATION] * len(numbers))

    try:
        made = _PHRASE.sub(replaced, _text(text))
    except (StopIteration, RuntimeError) as error:
        raise records.BadRecordError("more marked phrases than entries of boxes_seq") from error
    if next(rest, None) is not None:
        raise records.BadRecordError("fewer marked phrases than entries of boxes_seq")
    return made, found


def _grounded_caption(line, fill):
    said, boxes = _phrases(line["sentence"], line["boxes_seq"], line["boxes"])
    return [fill(), said], boxes


def _caption(line, fill):
    return [fill(), _text(line["caption"])], []


def _vqa(line, fill):
    answer = line["annotation"]["multiple_choice_answer"]
    return [fill(question=line["question"]), f"The answer is {answer}."], []


def _vqa_e(line, fill):
    reasons = f"{line['explanation'][0]} So the answer is {line['multiple_answers']}."
    return [fill(question=line["question"]), reasons], []


def _vqa_x(line, fill):
    reasons = "".join(line["justification"])
    answer = f"{reasons} So the answer is {line['multiple_choice_answer']}."
    return [fill(question=line["question"]), answer], []


def _reasoning(line, fill, keep=True):
    asked, boxes = _phrases(line["question"], line["question_boxes_seq"], line["boxes"])
    said, more = _phrases(line["cot_with_ans"], line["answer_boxes_seq"], line["boxes"], keep)
    return [fill(question=asked), said], [*boxes, *more]


def _reasoning_words(line, fill):
    return _reasoning(line, fill, keep=False)


def _vcr(line, fill):
    """The question; the right reason, then the right answer."""
    boxes: list[Any] = []

    def words(parts):
        text = []
        for part in parts:
            if isinstance(part, list):
                boxes.extend(line["boxes"][i][:4] for i in part)
                text.append(" ".join([LOCATION] * len(part)))
            else:
                text.append(_text(part))
        return " ".join(text)

    asked = fill(question=f"QUESTION: {words(line['question'])}")
    reason = words(line["rationale_choices"][line["rationale_label"]])
    answer = words(line["answer_choices"][line["answer_label"]])
    return [asked, f"{reason} {answer}"], boxes


def _pointing(line, fill):
    candidates = [*line["candidates"]]
    if line["answer"] not in candidates:
        raise records.BadRecordError("the answer is none of the candidates")
    # In an order that does not tell which is right, and is the same in every run.
    candidates.sort(key=lambda box: zlib.crc32(f"{line['question']}{box}".encode()))
    places = " ".join([LOCATION] * len(candidates))
    asked = f"{line['question']} Candidates: {places} answer in box format."
    return [fill(question=asked), f"The answer is {LOCATION} ."], [*candidates, line["answer"]]


def _yes_or_no(line, fill):
    said = _text(line["label"]).lower()
    if said not in ("yes", "no"):
        raise records.BadRecordError(f"label is {said!r:.40}, neither yes nor no")
    return [fill(question=line["text"]), f"The answer is {said} ."], []


def _chat(line, fill):
    del fill
    turns = []
    for number, turn in enumerate(line["conversations"]):
        if turn["from"] != ("human", "gpt")[number % 2]:
            raise records.BadRecordError(f"turn {number + 1} is of {turn['from']!r:.20}")
        turns.append(_text(turn["value"]))
    return turns, []


FORMS: dict[str, Callable[..., tuple]] = {
    "rec": _expression, "res": _with_mask, "region caption": _region,
    "grounded caption": _grounded_caption, "caption": _caption, "vqa": _vqa, "vqa-e": _vqa_e,
    "vqa-x": _vqa_x, "reasoning": _reasoning, "reasoning, words": _reasoning_words, "vcr": _vcr,
    "pointing": _pointing, "chat": _chat, "yes or no": _yes_or_no,
}  # fmt: skip
_IMAGES = ("img_path", "image_path", "file_path", "img_fn", "image")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise records.BadRecordError(f"{value!r:.40} is no text")
    return value


def told(line: Mapping[str, Any], form: str, template: str) -> dict[str, Any]:
    """{"turns", "boxes_px", "masks"} of a line; see the module.

    Raises:
      BadRecordError: a field is missing or of another kind.
    """

    def fill(**fields: str) -> str:
        text = template
        for name, value in fields.items():
            text = text.replace(f"<{name}>", _text(value))
        return text

    try:
        turns, boxes, *masks = FORMS[form](line, fill)
        boxes = [[float(x) for x in box] for box in boxes]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, records.BadRecordError):
            raise
        raise records.BadRecordError(
            f"no line for form={form!r}: {type(error).__name__}: {error!s:.100}"
        ) from error
    return {"turns": turns, "boxes_px": boxes, "masks": masks[0] if masks else []}


@dataclasses.dataclass
class Annotations(image_lines.ImageLines):
    """Random-access source of {"image": bytes, "turns", "boxes_px", "masks", "id"}.

    Args:
      path: of the JSON lines; a file, glob, folder, or a list of these.
      root: folder that images start from; "" is that of the file.
      form: see the module.
      templates: a JSON file with a list of questions in place of ours.

    Raises:
      DataError: no such file, an unknown form, or templates that lack a place.
    """

    form: str = ""
    templates: str = ""

    def __post_init__(self):
        if self.form not in FORMS:
            raise records.DataError(f"form={self.form!r} is none of {', '.join(FORMS)}")
        super().__post_init__()
        self._templates = TEMPLATES[self.form]
        if self.templates:
            self._templates = _read_templates(self.templates, self._templates[0])

    def __getitem__(self, index: int) -> records.Record:
        line = self.line(index)
        made = told(line, self.form, self._templates[index % len(self._templates)])
        name = next((line[key] for key in _IMAGES if key in line), None)
        if name is None and "image_id" in line:
            name = f"{line['image_id']}.jpg"  # Flickr30k
        if not isinstance(name, str) or not name:
            raise records.BadRecordError(f"no image: none of {', '.join(_IMAGES)}, image_id")
        return {"image": self.content(name), "id": self.record_id(index), **made}


def _read_templates(path: str, example: str) -> Sequence[str]:
    text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    found = records.parse_json(text.encode())
    places = re.findall(r"<\w+>", example)
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        raise records.DataError(f"{path}: not a list of questions, {json.dumps([example])} say")
    for question in found:
        if lacking := [place for place in places if question.count(place) != 1]:
            raise records.DataError(f"{path}: {question!r:.60} must have {lacking[0]} once")
    return found


def make_source(form: str = "", **fields: Any) -> Annotations:
    """For `type="grounded_annotations"` in a config; `form` is that of the entry."""
    return Annotations(form=form, **fields)
