"""The batches of a run are what they were when these digests were recorded: do not edit them.

A run that resumes under another version of this program must see the same rows.
"""

import hashlib
import json

import numpy as np
import pytest

from vlm_jax.data import pipeline, records
from vlm_jax.datasets import visual_sentences
from vlm_jax.systems.lvm import format as lvm_format
from vlm_jax.systems.vqgan import format as vqgan_format

TOKENS = lvm_format.Formatter(max_tokens=32, bos_id=50, eos_id=51, vocab_size=64)
FIELDS = lvm_format.Formatter(
    max_tokens=40, fields="<|bos|>,[{tokens}],<|60|>,{answer},[<|eos|>]",
    bos_id=50, eos_id=51, vocab_size=64,
)  # fmt: skip


class Drawing:
    """Calls its generator, so that its seeds show; refuses every fifth record."""

    def __call__(self, record, rng):
        if record["n"] % 5 == 4:
            raise records.BadRecordError("a fifth")
        return {"n": np.int64(record["n"]), "draw": rng.integers(0, 1000, 3)}


def ids_of(n, most=45):
    """3 to `most` ids below 50."""
    size = 3 + n * 7919 % (most - 2)
    return (np.arange(size) * (n + 3) + n * n) % 50


def jsonl(folder, name, numbers):
    path = folder / f"{name}.jsonl"
    lines = []
    for n in numbers:
        ids = ids_of(n)
        line = {"n": n, "tokens": lvm_format.to_base64(ids), "answer": ids_of(n + 1).tolist()}
        lines.append(json.dumps(line if n % 7 else {**line, "tokens_weights": [0.5] * len(ids)}))
    path.write_text("\n".join(lines) + "\n")
    return {"type": "jsonl", "path": str(path)}


def array_record(folder):
    pytest.importorskip("array_record.python.array_record_module")
    path = folder / "a.array_record"
    visual_sentences.write(
        path, [visual_sentences.Sentence(ids_of(n), 1, f"s{n}") for n in range(31)]
    )
    return {"type": "array_record", "path": str(path)}


def token_table(folder, name, dtype, **fields):
    path = folder / f"{name}.npy"
    np.save(path, ((np.arange(17)[:, None] * 5 + np.arange(32)) % 50).astype(dtype))
    return {"type": "token_table", "path": str(path), "tokens_per_image": 8, **fields}


def picture_table(folder):
    path = folder / "p.npy"
    np.save(path, (np.arange(13 * 8 * 8 * 3) * 37 % 256).astype(np.uint8).reshape(13, 8, 8, 3))
    return {"type": "picture_table", "path": str(path)}


def two_jsonl(folder):
    return {
        "a": jsonl(folder, "a", range(23)) | {"weight": 0.7},
        "b": jsonl(folder, "b", range(100, 109)) | {"weight": 0.3},
    }


def tables(folder):
    return {
        "wide": token_table(folder, "wide", np.int32, weight=0.6),
        "short": token_table(folder, "short", np.uint16, question_weight=0.1, weight=0.4),
        "lines": jsonl(folder, "lines", range(9)),
    }


RECIPES = {
    "jsonl": (two_jsonl, TOKENS),
    "fields": (two_jsonl, FIELDS),
    "array_record": (lambda folder: {"a": array_record(folder)}, TOKENS),
    "tables": (tables, TOKENS),
    "pictures": (
        lambda folder: {"p": picture_table(folder)}, vqgan_format.Formatter(size=8, flip=True)
    ),
    "draws": (two_jsonl, Drawing()),
}  # fmt: skip
# Of batches from step 2 on, and of one pass.
RECORDED = {
    ("jsonl", "none", True): ("167282f80e56cb01", "c55c929335a57550"),
    ("jsonl", "none", False): ("9a837be0691523a4", "c55c929335a57550"),
    ("jsonl", "stream", True): ("a2c76cbea71344f8", "0baea7eb00b2f830"),
    ("jsonl", "stream", False): ("10050a9b2a8d7047", "0baea7eb00b2f830"),
    ("jsonl", "documents", True): ("d047bb01e9ea26f2", "2252352760990c30"),
    ("jsonl", "documents", False): ("2a7a4e81a0afb3c6", "2252352760990c30"),
    ("fields", "none", True): ("7cecf92646028f1f", "8bc4bd7d89bf896d"),
    ("fields", "none", False): ("c6faf7e868a65727", "8bc4bd7d89bf896d"),
    ("fields", "stream", True): ("c55fcf9e7e2d48c8", "a5c8a254bc2039d0"),
    ("fields", "stream", False): ("2bf074bc7805154b", "a5c8a254bc2039d0"),
    ("fields", "documents", True): ("5bf0d5ae360035ce", "f7b9a33534a4e682"),
    ("fields", "documents", False): ("3521cda2be6e2b26", "f7b9a33534a4e682"),
    ("array_record", "none", True): ("f2c06eef414db5f6", "58c0810718e60c6e"),
    ("array_record", "none", False): ("093b13268b2514b0", "58c0810718e60c6e"),
    ("array_record", "stream", True): ("78c5e566b152ae9d", "72d6f5815ed4fb6a"),
    ("array_record", "stream", False): ("ed9ebdf1b01de1d3", "72d6f5815ed4fb6a"),
    ("array_record", "documents", True): ("66b522c01d308e5f", "0e46dc517da9cee4"),
    ("array_record", "documents", False): ("3c3f8b30bb5a6611", "0e46dc517da9cee4"),
    ("tables", "none", True): ("e83b8d419c5e1eea", "04923c853af88690"),
    ("tables", "none", False): ("879932081ff816df", "04923c853af88690"),
    ("tables", "stream", True): ("44e175c711566bc0", "f41ed31ad847265c"),
    ("tables", "stream", False): ("670f76b1c7907df0", "f41ed31ad847265c"),
    ("tables", "documents", True): ("d4d4b205dc9e65f1", "ff90011ff837e4df"),
    ("tables", "documents", False): ("2eca8010a3d094ca", "ff90011ff837e4df"),
    ("pictures", "none", True): ("fb846b27e28ab5b2", "a3fe07733ffbae95"),
    ("pictures", "none", False): ("523479e2c0af7014", "a3fe07733ffbae95"),
    ("draws", "none", True): ("685bb27665624fd6", "9fc35c799fc9012e"),
    ("draws", "none", False): ("acbc2a8c313a8ebc", "9fc35c799fc9012e"),
}  # fmt: skip


def digest(batches, folder):
    """Of keys, dtypes, shapes, values and names of records."""
    found = hashlib.sha256()
    for arrays, record_ids in batches:
        for key, array in sorted(arrays.items()):
            found.update(f"{key} {array.dtype.str} {array.shape}".encode() + array.tobytes())
        found.update(json.dumps(record_ids).replace(f"{folder}/", "").encode())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(("recipe", "packing", "shuffle"), list(RECORDED))
def test_batches_are_those_recorded(tmp_path, recipe, packing, shuffle):
    make_mixture, formatter = RECIPES[recipe]
    config = pipeline.DataConfig(
        make_mixture(tmp_path), packing=packing, shuffle=shuffle, max_bad_fraction=0.5
    )
    with pipeline.make_batches(config, formatter, batch_size=7, seed=3, start_step=2) as made:
        endless = [(batch.arrays, batch.record_ids) for batch in (next(made) for _ in range(9))]
    once = [
        (batch.arrays, batch.record_ids)
        for batch in pipeline.one_pass(config, formatter, batch_size=6, seed=3)
    ]
    found = digest(endless, tmp_path), digest(once, tmp_path)
    assert found == RECORDED[recipe, packing, shuffle]
