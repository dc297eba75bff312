"""Token files that do not fit the recipe are refused, or what is lost is said, before training."""

import dataclasses
import json

import numpy as np
import pytest

from vlm_jax.data import pipeline
from vlm_jax.datasets import visual_sentences
from vlm_jax.encoders import image_tokenizer
from vlm_jax.program import config
from vlm_jax.systems import lvm
from vlm_jax.systems.lvm import format as lvm_format
from vlm_jax.systems.lvm import token_files

PER_IMAGE, CODES = 16, 1024
MODEL = dict(vocab_size=CODES + 100, width=32, depth=1, mlp_width=32, num_heads=2, max_tokens=64)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    token_files._say_once.cache_clear()


def write(path, lengths, num_images=None):
    rng = np.random.default_rng(0)
    visual_sentences.write(
        path,
        (
            visual_sentences.Sentence(
                rng.integers(0, CODES, n), num_images or (1 if n % 16 else n // 16), f"s{i}"
            )
            for i, n in enumerate(lengths)
        ),
    )
    return {"type": path.suffix[1:], "path": str(path)}


def check(entries, packing="documents", max_tokens=63, **task):
    fields = {"codebook_size": CODES, "tokens_per_image": PER_IMAGE} | task
    formatter = lvm_format.Formatter(
        max_tokens=max_tokens, bos_id=CODES, eos_id=CODES + 1, vocab_size=CODES + 100
    )
    data = pipeline.DataConfig(mixture=entries, packing=packing)
    lvm.make_task(MODEL, **fields).check_data(data, formatter, "data")


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
def test_sentences_that_fit_say_nothing(tmp_path, kind, capsys):
    # 62 ids of 63 inputs and a target; upstream's files have no manifest.
    check({"a": write(tmp_path / f"a.{kind}", [48, 32, 16])})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
@pytest.mark.parametrize("packing", ["documents", "none", "stream"])
def test_ids_that_are_no_whole_images_are_refused(tmp_path, kind, packing):
    entry = write(tmp_path / f"a.{kind}", [48, 24, 40])
    with pytest.raises(config.ConfigError) as caught:
        check({"a": entry}, packing)
    assert "data.mixture.a" in str(caught.value) and "task.tokens_per_image" in str(caught.value)


@pytest.mark.parametrize(("whole", "broken"), [(200, 1), (4, 4)])
def test_broken_sentences_among_whole_ones_are_said(tmp_path, capsys, whole, broken):
    check({"a": write(tmp_path / "a.jsonl", [48] * whole + [47] * broken)})
    said, total = capsys.readouterr().err, whole + broken
    assert f"{broken} of {total} sentences are not whole images of task.tokens_per_image=16" in said
    assert f"a.jsonl:{whole + 1} with 47 ids" in said


def test_multiples_of_an_image_are_seen_by_the_number_of_images(tmp_path):
    entry = write(tmp_path / "a.array_record", [64, 64], num_images=1)
    with pytest.raises(config.ConfigError, match="has 1 images of 64 ids, and .* is 16"):
        check({"a": entry}, max_tokens=127)


@pytest.mark.parametrize(
    ("packing", "fate"), [("documents", "are cut"), ("none", "are cut"), ("stream", "go on in")]
)
def test_sentences_longer_than_a_row_are_counted(tmp_path, packing, fate, capsys):
    check({"a": write(tmp_path / "a.jsonl", [48, 80, 96])}, packing)
    said = capsys.readouterr().err
    assert "data.mixture.a: 2 of 3 sentences are longer than a row" in said and fate in said
    assert "formatter.max_tokens=63, and 97 would hold the longest" in said


def manifest(folder, tokenizer, **fields):
    made_of = {
        "tokenizer_sha256": token_files.digest(tokenizer),
        "tokenizer_config": dataclasses.asdict(tokenizer.cfg),
    } | fields
    (folder / "manifest.json").write_text(json.dumps({"made_of": made_of}))


def test_files_of_another_tokenizer_are_refused(tmp_path):
    tokenizer = image_tokenizer.ImageTokenizer.load("tiny", side=16)
    entries = {}
    for name in "ab":
        (tmp_path / name).mkdir()
        entries[name] = write(tmp_path / name / "x.jsonl", [48])
        manifest(tmp_path / name, tokenizer)
    check(entries)
    check(entries, tokenizer="tiny", image_side=16)
    manifest(tmp_path / "b", tokenizer, tokenizer_sha256="0" * 64)
    with pytest.raises(config.ConfigError, match="data.mixture.b: .*b were made with the tokeniz"):
        check(entries, tokenizer="tiny", image_side=16)
    with pytest.raises(config.ConfigError, match="ids of two tokenizers cannot be mixed"):
        check(entries)
    manifest(tmp_path / "b", image_tokenizer.ImageTokenizer.load("tiny", side=32))
    with pytest.raises(config.ConfigError, match="made with tokens_per_image=64, and .* is 16"):
        check(entries)


@pytest.mark.parametrize("content", ["", "[]", '{"made_of": 3}', '{"made_of": {}}', "[" * 9999])
def test_manifests_of_others_are_passed_over(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    check({"a": write(tmp_path / "a.jsonl", [48])})


def test_a_tokenizer_that_is_not_there_shows_at_the_start(tmp_path):
    entries = {"a": write(tmp_path / "a.jsonl", [48])}
    with pytest.raises(config.ConfigError, match="task.tokenizer='.*gone'"):
        check(entries, tokenizer=str(tmp_path / "gone"))
    with pytest.raises(config.ConfigError, match="task.tokenizer='tiny': .*has 64 ids per image"):
        check(entries, tokenizer="tiny", image_side=32)
