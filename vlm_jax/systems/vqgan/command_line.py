"""VQGAN: pictures to ids and back.

    --image PHOTOS --out=ids.jsonl       a line per picture: {"id": its path, "ids": [...]}
    --image PHOTOS --out=FOLDER          what is left of each after encoding and decoding
    --ids ids.jsonl --out=FOLDER         pictures of ids, lines as above

--image takes files, URLs, folders, globs, @LIST (a path per line) and - (paths on standard input).
Pictures go to FOLDER/pictures/NAME.png, FOLDER/pictures.jsonl says whose, FOLDER/grid.png
shows the first ones. The same command run again goes on where it stopped. What cannot be read is
listed in OUT.failed and does not stop the rest; the exit status is 1 when there was no other.
"""

from __future__ import annotations

import itertools
import pathlib

import numpy as np

from vlm_jax import loading
from vlm_jax.data import images, inputs, records, results

_SHOWN = 32  # pictures on the grid

EXAMPLE = "--image photo.jpg"  # what a finished run suggests


def add_arguments(parser):
    """Adds the arguments of this system."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", nargs="+", action="extend", metavar="INPUT", help="see above")
    what.add_argument("--ids", metavar="FILE", help="lines to decode, see above")
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="pictures per device call")
    add("--num_processes", type=int, default=0, help="that share the pictures")
    add("--process_id", type=int, default=-1, help="from 0")


def predict(args) -> int:
    """Loads, encodes or decodes, writes; returns the exit status."""
    out = pathlib.Path(args.out)
    is_file = out.suffix.lower() == ".jsonl"
    if args.ids and is_file:
        raise ValueError(f"--ids become pictures; --out={args.out} must be a folder")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size={args.batch_size} must be at least 1")
    tokenizer = loading.load("vqgan", args.checkpoint, averaged=args.averaged)
    count, rank = inputs.processes(args.num_processes, args.process_id)
    known = _read_ids(args.ids) if args.ids else {}
    names = list(known) or inputs.find(args.image)
    file = results.of_process(out if is_file else out / "pictures.jsonl", count, rank)
    does = "encode" if is_file else "decode" if args.ids else "reconstruct"
    made = results.Results(
        file, {"checkpoint": args.checkpoint, "averaged": args.averaged, "does": does}
    )
    job = _Job(tokenizer, args.batch_size, file.parent, inputs.output_names(names), known)
    run = {"encode": job.encode, "decode": job.decode, "reconstruct": job.reconstruct}[does]
    rows = job.ids_row if is_file else job.picture_row
    status = results.run(names[rank::count], made, run, rows, batch_size=args.batch_size)
    if not is_file:
        job.draw(made, file.with_name(file.name.replace("pictures", "grid")).with_suffix(".png"))
    print(f"wrote {file}")
    return status


class _Job:
    """What is done with names, batch by batch, and what becomes of the results."""

    def __init__(self, tokenizer, batch_size, folder, names, known):
        self._tokenizer, self._folder, self._known = tokenizer, folder, known
        self._options = {"batch_size": batch_size, "on_error": "yield"}
        self._files = {name: f"pictures/{short}.png" for name, short in names.items()}

    def encode(self, names):
        """Ids of pictures."""
        return self._tokenizer.encode_stream(names, **self._options)

    def reconstruct(self, names):
        """Pictures from ids of pictures."""
        return self._tokenizer.decode_stream(self.encode(names), **self._options)

    def decode(self, names):
        """Pictures from the ids of the file."""
        ids = (self._known[name] for name in names)
        return self._tokenizer.decode_stream(ids, **self._options)

    def ids_row(self, name, ids):
        """A line of the file."""
        return [{"id": name, "ids": ids.tolist()}]

    def picture_row(self, name, image_u8):
        """Writes the picture; the line that says where."""
        path = self._folder / self._files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.encode(image_u8))
        return [{"id": name, "file": self._files[name]}]

    def draw(self, made, path):
        """Originals, where there are any, above what was made of them."""
        rows = list(itertools.islice(made.rows(), _SHOWN))
        shown = [[images.decode(self._folder / row["file"]) for row in rows]]
        if not self._known:
            shown.insert(0, [self._original(row["id"]) for row in rows])
        if rows:
            path.write_bytes(images.encode(images.draw_grid(shown)))
            print(f"{path.name} shows {len(rows)} of {len(made)} pictures")

    def _original(self, name):
        try:
            return images.resize(images.as_image(name), self._tokenizer.side)
        except images.ImageError:  # gone since
            return None


def _read_ids(path):
    """Name -> ids of a file of them.

    Raises:
      DataError: no line, one of another form, or a name twice.
    """
    found = {}
    try:
        with open(path, **records.TEXT) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    row = records.parse_json(line)
                    name, ids = str(row["id"]), np.array(row["ids"])
                except (records.BadRecordError, LookupError, TypeError, ValueError) as error:
                    raise records.DataError(f"{path}:{number}: no id and ids: {error}") from error
                whole = ids.dtype.kind == "i" and ids.ndim == 1
                if not whole or (ids != ids.astype(np.int32)).any() or name in found:
                    raise records.DataError(
                        f"{path}:{number}: ids of another form, or a name twice"
                    )
                found[name] = ids.astype(np.int32)
    except OSError as error:
        raise records.DataError(f"{path}: cannot read: {error.strerror}") from error
    if not found:
        raise records.DataError(f"{path}: holds no ids")
    return found
