"""Rows per second of the input pipeline alone, beside torch's DataLoader and plain grain.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --ids 512 --kinds token_table jsonl --seconds 5

Rows of ids from a table, JSONL and ArrayRecord; photos from tar shards, decoded, cut at random and
resized to 256 pixels. The others do the same work per record as one would write it by hand, in no
other threads or processes unless their name says so, and shuffle nothing; nor do we. Packing has no
counterpart there. Rows are compared first. CPU microseconds are of all threads of this process, so
programs with processes of their own show none.
"""

import argparse
import base64
import io
import itertools
import json
import os
import pathlib
import tarfile
import tempfile
import time

import machine
import numpy as np
from PIL import Image

from vlm_jax.data import pipeline, records
from vlm_jax.datasets import visual_sentences
from vlm_jax.systems.lvm import format as lvm_format
from vlm_jax.systems.vqgan import format as vqgan_format

CODES, SIDE, PHOTOS = 1024, 256, 64


def make_files(folder, kind, size, count):
    """A file of `count` sentences of `size` ids, or of photos; the fields of its source."""
    path = folder / f"{kind}_{size}"
    if kind == "photos":
        path = path.with_suffix(".tar")
        write_photos(path, count)
        return dict(type="tar", path=str(path))
    ids = np.random.default_rng(0).integers(0, CODES, (count, size))
    if kind == "token_table":
        np.save(path.with_suffix(".npy"), ids.astype(np.uint16))
        return dict(type=kind, path=str(path.with_suffix(".npy")), tokens_per_image=size // 8)
    path = path.with_suffix(".jsonl" if kind == "jsonl" else ".array_record")
    sentences = (visual_sentences.Sentence(row, 8, f"s{i}") for i, row in enumerate(ids))
    visual_sentences.write(path, sentences)
    return dict(type=kind, path=str(path))


def write_photos(path, count):
    """JPEG of 500x375: waves with a little noise, about as large as photos are."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:375, :500][..., None]
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            waves = np.sin(x / rng.uniform(5, 80, 3)) + np.sin(y / rng.uniform(5, 80, 3))
            noisy = 128 + 50 * waves + rng.normal(0, 6, waves.shape)
            stream = io.BytesIO()
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(stream, "jpeg")
            member = tarfile.TarInfo(f"{number:05}.jpg")
            member.size = len(stream.getvalue())
            tar.addfile(member, io.BytesIO(stream.getvalue()))


class ByHand:
    """The records of a file, formatted by hand: for torch and grain."""

    def __init__(self, kind, path, size):
        self.kind, self.size = kind, size
        self.file = os.open(path, os.O_RDONLY)
        if kind == "token_table":
            self.table = np.load(path, mmap_mode="r")
            self.count = len(self.table)
        elif kind == "jsonl":
            sizes = [len(line) for line in open(path, "rb")]
            self.places = list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes))
            self.count = len(sizes)
        elif kind == "array_record":
            module = records.require("array_record.python.array_record_module")
            self.reader = module.ArrayRecordReader(path)
            self.count = self.reader.num_records()
        else:
            with tarfile.open(path) as tar:
                self.places = [(m.offset_data, m.size) for m in tar.getmembers()]
            self.count = len(self.places)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if self.kind == "photos":
            return self.photo(index)
        size = self.size
        row = {k: np.zeros(size, np.int32) for k in ("tokens", "targets", "segments", "positions")}
        ids = np.concatenate([[CODES], self.ids(index), [CODES + 1]])[: size + 1]
        row["tokens"][:], row["targets"][:], row["segments"][:] = ids[:-1], ids[1:], 1
        row["positions"][:] = np.arange(size)
        return {**row, "weights": np.ones(size, np.float32)}

    def ids(self, index):
        if self.kind == "token_table":
            return self.table[index]
        if self.kind == "jsonl":
            return np.frombuffer(base64.b64decode(json.loads(self.read(index))["tokens"]), "<i4")
        return np.frombuffer(records.unpack(self.reader.read([index])[0])["tokens"], "<i4")

    def read(self, index):
        offset, size = self.places[index]
        return os.pread(self.file, size, offset)

    def photo(self, index):
        rng = np.random.default_rng(index)
        image = Image.open(io.BytesIO(self.read(index))).convert("RGB")
        side = int(rng.integers(min(image.size) // 2, min(image.size) + 1))
        x, y = (int(rng.integers(n - side + 1)) for n in image.size)
        box = (x, y, x + side, y + side)
        image = image.crop(box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return {"image01": np.asarray(image, np.float32) / 255}


def ours(fields, formatter, packing, batch_size):
    config = pipeline.DataConfig(dict(all=fields), packing=packing, shuffle=False)
    with pipeline.make_batches(config, formatter, batch_size=batch_size, seed=0) as batches:
        for batch in batches:
            yield batch.arrays


def torch_loader(data, batch_size, workers):
    import torch

    options = dict(num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    loader = torch.utils.data.DataLoader(data, batch_size, **options)
    for _ in itertools.count():
        yield from loader


def plain_grain(data, batch_size):
    grain = records.require("grain")
    source = grain.MapDataset.source(data).repeat()
    yield from source.to_iter_dataset().batch(batch_size, drop_remainder=True)


def programs(kind, fields, size, packing, batch_size):
    """Name -> endless batches of the same rows."""
    if kind == "photos":
        formatter = vqgan_format.Formatter(size=SIDE, crop="random")
    else:
        formatter = lvm_format.Formatter(
            max_tokens=size, bos_id=CODES, eos_id=CODES + 1, vocab_size=CODES + 2
        )
    found = {"vlm_jax": lambda: ours(fields, formatter, packing, batch_size)}
    if packing == "none":

        def by_hand():
            return ByHand(kind, fields["path"], size)

        found["torch DataLoader"] = lambda: torch_loader(by_hand(), batch_size, 0)
        found["torch DataLoader, 2 processes"] = lambda: torch_loader(by_hand(), batch_size, 2)
        found["plain grain, its threads"] = lambda: plain_grain(by_hand(), batch_size)
    return found


def measure(batches, batch_size, seconds):
    """Rows per second and CPU seconds of a row, after the first two batches; and the first."""
    first = next(batches)
    next(batches)
    start, cpu, rows = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        rows += batch_size
    rate, cpu_s = rows / (time.perf_counter() - start), (time.process_time() - cpu) / rows
    batches.close()
    return rate, cpu_s, first


def compare(kind, fields, size, packing, args):
    """The rows of one table: every program on one file."""
    table, rates = [], {}
    expected = None
    for name, make in programs(kind, fields, size, packing, args.batch).items():
        rate, cpu_s, first = measure(make(), args.batch, args.seconds)
        expected = first if expected is None else expected
        if kind != "photos":  # which are cut elsewhere
            for key, found in first.items():
                np.testing.assert_array_equal(np.asarray(found), expected[key])
        rates[name] = rate
        row = {"source": kind, "ids": size or "", "packing": packing, "program": name}
        row |= {"rows/s": f"{rate:,.0f}", "tokens/s": f"{rate * size:,.0f}" if size else ""}
        row |= {"CPU us/row": "" if "processes" in name else f"{cpu_s * 1e6:.0f}"}
        table.append(machine.note(row | {"ours / its": f"{rates['vlm_jax'] / rate:.1f}"}))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["token_table", "jsonl", "array_record", "photos"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--ids", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--packing", nargs="+", default=["none", "documents"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2000, help="of every file of ids")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each program")
    args = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            photos = kind == "photos"
            for size in [0] if photos else args.ids:
                fields = make_files(
                    pathlib.Path(folder),
                    kind,
                    size,
                    max(PHOTOS, args.batch) if photos else args.rows,
                )
                for packing in ["none"] if photos else args.packing:
                    table += compare(kind, fields, size, packing, args)
    machine.print_table(table)
    print(machine.describe())


if __name__ == "__main__":
    main()
