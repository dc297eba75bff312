"""NExT-Chat: ask about images, with boxes and masks in question and answer.

    --image a.jpg b.jpg --ask "Where is the dog?"             one question about every image
    --image a.jpg --box 10 20 90 80 --ask "What is [0]?"      boxes of the question, in pixels
    --image a.jpg --chat                                      a conversation in the terminal

--image takes files, URLs, folders, globs, @LIST (a path per line) and - (paths on standard input).
--out is a folder: OUT/answers.jsonl has a line per image (text, boxes, masks as COCO's run lengths,
scores, spans), and beside it every image with what the answer shows. Images that cannot be read are
listed in OUT/answers.jsonl.failed and do not stop the others. In a chat, `/box 10 20 90 80` adds a
box, `/new` begins anew, and an empty line ends.
"""

from __future__ import annotations

import json
import pathlib
import sys

from vlm_jax import loading
from vlm_jax.data import drawing, images, inputs, records
from vlm_jax.systems.nextchat import model as model_lib

_FIELDS = ("clip", "sam", "tokenizer", "dtype")  # of the weights
_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "seed")

EXAMPLE = '--image photo.jpg --ask "Where is the dog?"'  # what a finished run suggests


def add_arguments(parser):
    """Adds the arguments of this system."""
    add = parser.add_argument
    add("--image", nargs="+", action="extend", required=True, metavar="INPUT", help="see above")
    add("--ask", default="", help="the question about every image")
    add("--chat", action="store_true", help="talk about one image in the terminal")
    help_ = "x0 y0 x1 y1 in pixels, [0], [1], ... of the question"
    add("--box", nargs=4, type=float, action="append", default=[], metavar="PIXELS", help=help_)
    add("--max_tokens", type=int, default=model_lib.MAX_TOKENS, help="of an answer")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top_k", type=int, default=0, help="draw from so many; 0 is all")
    add("--top_p", type=float, default=1.0, help="draw from so much of the probability")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--clip", default="", help="the CLIP file of a released checkpoint without a tower")
    add("--sam", default="", help="SAM's file, for what a released checkpoint lacks")
    add("--tokenizer", default="", help="tokenizer file, when it lies elsewhere")
    add("--dtype", default="", help="empty: bfloat16 on an accelerator, float32 on a CPU")


def predict(args) -> int:
    """Loads, answers, writes, prints; returns the exit status."""
    if bool(args.ask) == args.chat:
        raise ValueError("give a question (--ask TEXT) or talk (--chat), one of the two")
    paths = inputs.find(args.image)
    if args.chat and len(paths) != 1:
        raise ValueError(f"--chat is about one image, not {len(paths)}")
    given = {"averaged": args.averaged}
    given |= {name: x for name in _FIELDS if (x := getattr(args, name))}
    model = loading.load("nextchat", args.checkpoint, **given)
    options = {name: getattr(args, name) for name in _OPTIONS}
    out = pathlib.Path(args.out)
    if args.chat:
        return _talk(model, paths[0], out, options)
    return _ask(model, paths, args, out, options)


def _ask(model, paths, args, out, options) -> int:
    out.mkdir(parents=True, exist_ok=True)
    file, answered, failed = out / "answers.jsonl", 0, []
    with open(file, "w", **records.TEXT) as stream:
        for number, path in enumerate(paths):
            try:
                image_u8 = images.as_image(path, name=str(path))
                said = model.chat(image_u8, args.ask, boxes=args.box, **options)
            except images.ImageError as error:
                failed.append(f"{path}\t{error}")
                continue
            name = f"{number:05d}_{pathlib.Path(str(path)).stem}.png"
            (out / name).write_bytes(images.encode(drawing.of_answer(image_u8, said)))
            line = {"id": str(path), "picture": name, **said.to_json()}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            answered += 1
            print(f"{path}: {said.text}" + (f"   ({said.problem})" if said.problem else ""))
    failures = file.with_name(file.name + ".failed")
    failures.unlink(missing_ok=True)
    if failed:
        failures.write_text("".join(f"{line}\n" for line in failed), **records.TEXT)
        print(f"{len(failed)} of {len(paths)} images cannot be read: {failures}", file=sys.stderr)
    print(f"wrote {file}")
    return 0 if answered else 1


def _talk(model, path, out, options) -> int:
    """Turns from standard input until an empty line."""
    image_u8 = images.as_image(path, name=str(path))
    talk, boxes, turn = model.conversation(image_u8), [], 0
    out.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            text = ""
        if not text:
            return 0
        if text == "/new":
            talk, boxes = model.conversation(image_u8), []
            continue
        try:
            if text.startswith("/box"):
                boxes.append([float(x) for x in text.split()[1:]])
                print(f"[{len(boxes) - 1}] is {boxes[-1]}")
                continue
            said = talk.say(text, boxes=boxes if "[" in text else (), **options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        turn += 1
        picture = out / f"turn_{turn}.png"
        picture.write_bytes(images.encode(drawing.of_answer(image_u8, said)))
        print(f"model> {said.text}   ({picture})")
        if said.problem:
            print(f"       {said.problem}")
