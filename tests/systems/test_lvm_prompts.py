"""Prompts as ids, and the evaluations on the tiny reference model against its verbs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.datasets import test_pascal5i as voc
from vlm_jax import predict
from vlm_jax.data import images, records, sources
from vlm_jax.decoding import sampling
from vlm_jax.encoders import image_tokenizer
from vlm_jax.program import config as config_lib
from vlm_jax.program import evaluate, sharding
from vlm_jax.systems import lvm
from vlm_jax.systems.lvm import command_line, prompts
from vlm_jax.systems.lvm import task as task_lib
from vlm_jax.weights import llama as llama_weights
from vlm_jax.weights import vqgan as vqgan_weights

BOS = 64


@pytest.fixture(scope="module")
def golden(golden_lvm):
    return np.load(golden_lvm / "io.npz")


@pytest.fixture(scope="module")
def parts(golden_lvm):
    settings = json.loads((golden_lvm / "config.json").read_text())
    cfg = llama_weights.config_from_hf(settings["llama"])
    cfg, params = llama_weights.load(golden_lvm / "llama.safetensors", cfg)
    vq_cfg = vqgan_weights.config_from_hf(settings["vqgan"])
    vq_cfg, vq_params = vqgan_weights.load(golden_lvm / "vqgan.safetensors", vq_cfg)
    return cfg, params, image_tokenizer.ImageTokenizer(vq_cfg, vq_params)


@pytest.fixture
def task(parts, monkeypatch):
    monkeypatch.setattr(task_lib, "_tokenizer", lambda *_: parts[2])
    return lvm.LvmTask(
        dataclasses.replace(parts[0], max_tokens=512),
        tokenizer="golden",
        codebook_size=64,
        tokens_per_image=64,
    )


@pytest.fixture
def evaluated(parts, task, tmp_path):
    """evals entry -> (scalars, folder), as the program runs it."""

    def evaluate_entry(**entry):
        (evaluation,) = evaluate.make({"x": {"batch_size": 2, **entry}})
        formatter = lvm.make_formatter(
            max_tokens=320, bos_id=BOS, eos_id=BOS + 1, fields="<|bos|>,{tokens}", vocab_size=66
        )
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=4))
        params = parts[1]
        evaluate.check(evaluation, task, formatter, params)
        everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), params)
        runner = evaluate.Runner(task, formatter, mesh, everywhere, 0)
        scalars = runner(evaluation, params, tmp_path)
        return {key.removeprefix("eval/x/"): x for key, x in scalars.items()}, tmp_path / "x"

    return evaluate_entry


def memory(*rows, **fields):
    return dict(mixture=dict(m=dict(type="memory", records=list(rows))), **fields)


# ---- ids ------------------------------------------------------------------------------------


def test_the_table_of_encode():
    """Two context images and a target of two ids each; the second prompt is shorter."""
    formatter = prompts.Formatter(images=2, targets=1, side=0, size=2, lead_ids=(9,))
    rows = [
        formatter({"prompt_ids": [[1, 1], [2, 2]], "target_ids": [[3, 3]]}),
        formatter({"prompt_ids": [[4, 4]], "target_ids": [[5, 5]], "label": 7, "fold": 1}),
        formatter({"prompt_ids": [[6, 6]]}),
    ]
    hosts = [row.pop("host") for row in rows]
    assert [host.tags for host in hosts] == [
        {"label": -1, "fold": -1},
        {"label": 7, "fold": 1},
        {"label": -1, "fold": -1},
    ]
    stacked = {key: np.stack([r[key] for r in rows]) for key in rows[0]}
    batch, same = formatter.collate(stacked, hosts, truth=True)
    assert same is hosts
    expected = {
        "prompt": [[9, 1, 1, 2, 2], [0, 0, 9, 4, 4], [0, 0, 9, 6, 6]],
        "prompt_valid": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]],
        "tokens": [[9, 1, 1, 2, 2, 3], [9, 4, 4, 5, 5, 0], [9, 6, 6, 0, 0, 0]],
        "targets": [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 0, 0], [6, 6, 0, 0, 0, 0]],
        "weights": [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        "target_ids": [[[3, 3]], [[5, 5]], [[0, 0]]],
        "prompt_images": [[1, 1], [1, 0], [1, 0]],
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value, key)
    assert set(batch) == {*expected, "positions"}


def test_pictures_are_stretched_counted_and_kept_on_the_host():
    formatter = prompts.Formatter(images=2, targets=1, side=2, size=1)
    red, blue = np.full((4, 6, 3), 200, np.uint8), np.full((3, 3, 3), 10, np.uint8)
    example = formatter({"prompt": [red], "target": [blue]})
    assert example["prompt_u8"].shape == (2, 2, 2, 3) and not example["prompt_u8"][1].any()
    host = example.pop("host")
    assert host.size == (4, 6) and len(host.images) == len(host.truth.images) == 1
    np.testing.assert_array_equal(host.images[0], example["prompt_u8"][0])
    np.testing.assert_array_equal(host.truth.images[0], np.float32(10 / 255))
    seen = []

    def to_ids(pictures_u8):
        seen.append(pictures_u8)
        return pictures_u8[:, 0, 0, :1].astype(np.int32)

    batch = prompts.encode({key: np.asarray(x)[None] for key, x in example.items()}, to_ids, 1)
    assert len(seen) == 1 and len(seen[0]) == 2  # once, and only pictures that are there
    np.testing.assert_array_equal(batch["prompt"], [[0, 200]])
    np.testing.assert_array_equal(batch["prompt_valid"], [[False, True]])
    np.testing.assert_array_equal(batch["target_ids"], [[[10]]])
    assert not {"prompt_u8", "target_u8"} & set(batch)  # pictures do not go to the device


def test_bad_prompts(task):
    formatter = prompts.Formatter(images=1, targets=1, side=2, size=1)
    picture = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(records.BadRecordError, match="2 prompt images; formatter.images is 1"):
        formatter({"prompt": [picture, picture]})
    with pytest.raises(records.BadRecordError, match="2 target images; formatter.targets is 1"):
        formatter({"prompt": [picture], "target": [picture] * 2})
    with pytest.raises(records.BadRecordError, match="prompt is empty"):
        formatter({"prompt": []})
    with pytest.raises(records.DataError, match="task.tokenizer"):
        dataclasses.replace(formatter, side=0)({"prompt": [picture]})
    with pytest.raises(ValueError, match="images=0"):
        prompts.Formatter(images=0, targets=1, side=2, size=1)
    run_formatter = lvm.make_formatter(bos_id=BOS, eos_id=BOS + 1, vocab_size=66)
    assert task.prompt_formatter(run_formatter, images=7).lead_ids == (BOS,)
    assert task.prompt_formatter(run_formatter, images=7, lead=False).lead_ids == ()
    with pytest.raises(config_lib.ConfigError, match="model.max_tokens is 512"):
        task.prompt_formatter(run_formatter, images=8)


# ---- perplexity -----------------------------------------------------------------------------


def test_perplexity_of_the_reference(evaluated, golden):
    contexts = golden["ppl.context_ids"].reshape(2, 2, 64)
    targets = golden["ppl.target_ids"].reshape(2, 1, 64)
    rows = [{"prompt_ids": c, "target_ids": t} for c, t in zip(contexts, targets)]
    scores, _ = evaluated(
        type="perplexity", data=memory(*rows), formatter=dict(images=3, lead=False)
    )
    np.testing.assert_allclose(scores["perplexity"], golden["ppl.perplexity"].mean(), rtol=1e-3)
    assert scores["rows"] == 2


def write_pictures(golden, folder):
    for index, picture in enumerate(golden["vq.images_u8"]):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return len(golden["vq.images_u8"])


def test_a_list_of_pictures_equals_the_verb(evaluated, parts, golden, tmp_path):
    write_pictures(golden, tmp_path)
    lines = [
        {"input": ["0.png", "1.png"], "target": ["2.png"]},
        {"input": ["1.png"], "target": ["0.png"]},
        {"input": ["2.png", "1.png", "0.png"], "target": ["1.png"]},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores, _ = evaluated(
        type="perplexity",
        formatter=dict(images=3, lead=False),
        data=dict(mixture=dict(m=dict(type="visual_prompts", path=str(tmp_path / "list.jsonl")))),
    )
    pictures = golden["vq.images_u8"]

    def named(key):
        return [[pictures[int(name[0])] for name in line[key]] for line in lines]

    expected = lvm.Lvm(*parts).perplexity(named("input"), named("target"))
    np.testing.assert_allclose(scores["perplexity"], expected.mean(), rtol=1e-4)


def test_perplexity_in_batches_equals_one_by_one(parts, golden, monkeypatch):
    model = lvm.Lvm(*parts)
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 64, (n, 64)) for n in (1, 2, 1, 3, 1, 2, 1)]
    targets = [rng.integers(0, 64, (1, 64)) for _ in contexts]
    one_by_one = [model.perplexity_ids([c], [t])[0] for c, t in zip(contexts, targets)]
    shapes = []
    score = model._score
    model._generators["score"] = lambda params, ids, *rest: (
        shapes.append(ids.shape),
        score(params, ids, *rest),
    )[1]
    np.testing.assert_allclose(model.perplexity_ids(contexts, targets), one_by_one, rtol=1e-5)
    assert sorted(shapes) == [(4, 128), (4, 256)]  # three images run in the room of four
    shapes.clear()
    monkeypatch.setattr(lvm.model, "MAX_SCORED", 300)  # two rows of 128 ids at once
    np.testing.assert_allclose(model.perplexity_ids(contexts, targets), one_by_one, rtol=1e-5)
    assert sorted(shapes) == [(1, 256), (1, 256), (1, 256), (2, 128), (2, 128)]
    with pytest.raises(ValueError):
        model.perplexity_ids(contexts, targets[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("keep_lead", [False, True])
def test_context_perplexity_equals_the_verb(evaluated, parts, keep_lead):
    rng = np.random.default_rng(1)
    sentences = [rng.integers(0, 64, (4, 64)).astype("<i4") for _ in range(3)]
    scores, folder = evaluated(
        type="context_perplexity",
        tokens_per_image=64,
        max_context=3,
        lead_tokens=1,
        keep_lead=keep_lead,
        data=memory(*[{"tokens": x.tobytes()} for x in sentences]),
    )
    model = lvm.Lvm(*parts)
    for k in (1, 2, 3):
        contexts = [s[3 - k : 3].ravel() for s in sentences]
        if keep_lead:
            contexts = [np.concatenate([[BOS], c]) for c in contexts]
        expected = model.perplexity_ids(contexts, [s[3] for s in sentences]).mean()
        np.testing.assert_allclose(scores[f"context_{k:02d}"], expected, rtol=1e-4)
    assert scores["rows"] == 3
    curve_u8 = images.decode(folder / "context_perplexity.png")
    assert min(curve_u8.shape[:2]) > 100 and len(np.unique(curve_u8.reshape(-1, 3), axis=0)) > 2


# ---- images ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_of_several_lengths_continue_as_one_by_one(parts, task, golden):
    """Padded on the left in one batch, as against alone and without padding."""
    ids = golden["vq.ids"]
    rows = [{"prompt_ids": ids[:1]}, {"prompt_ids": ids[[0, 1, 2]]}, {"prompt_ids": ids[1:3]}]
    formatter = dataclasses.replace(
        task.prompt_formatter(lvm.make_formatter(), images=3, lead=False), side=0
    )
    examples = [formatter(row) for row in rows]
    hosts = [example.pop("host") for example in examples]
    stacked = {key: np.stack([x[key] for x in examples]) for key in examples[0]}
    batch, _ = formatter.collate(stacked, hosts, truth=False)
    made = jax.jit(task.predict["continue"])(parts[1], batch, jax.random.key(0))["ids"]
    greedy = sampling.Sampler(temperature=0.0, suppress_from=64)
    expected = lvm.Lvm(*parts).continue_ids([r["prompt_ids"] for r in rows], 1, sampler=greedy)
    np.testing.assert_array_equal(np.asarray(made), expected[:, 0, 0])


@pytest.mark.slow
def test_colorization_of_pictures(evaluated, parts, golden):
    """The program's scores are those of what the verb makes."""
    pictures = golden["vq.images_u8"]
    rows = [{"image_u8": picture, "id": f"p{i}"} for i, picture in enumerate(pictures)]
    source = dict(
        type="few_shot", answer="colour", shots=1, queries=dict(type="memory", records=rows)
    )
    scores, folder = evaluated(
        type="few_shot",
        kind="colorization",
        data=dict(mixture=dict(p=source)),
        formatter=dict(images=3, lead=False),
    )
    drawn = sources.make_source(**source)
    made = lvm.Lvm(*parts).continue_(
        [drawn[i]["prompt"] for i in range(len(drawn))], temperature=0.0, top_k=0
    )
    made01 = np.stack([images.to01(x[0, 0]) for x in made])
    expected = np.square(made01 - images.to01(pictures)).mean()
    assert scores["mse"] == pytest.approx(expected, rel=0.02)  # bytes as against floats
    grey01 = images.to01(np.stack([images.grey_u8(picture) for picture in pictures]))
    expected = np.square(grey01 - images.to01(pictures)).mean()
    assert scores["copy_input_mse"] == pytest.approx(expected, rel=1e-5)
    assert scores["images"] == len(pictures)
    # Every picture of the data is in it somewhere, as the network sees it.
    sheet_u8 = images.decode(folder / "few_shot.png")
    shown = {tuple(pixel) for pixel in sheet_u8.reshape(-1, 3).tolist()}
    for picture in pictures:
        colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
        assert len(colours & shown) > 0.3 * len(colours)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_pascal5i(evaluated, tmp_path, kind):
    """From a folder as it is unpacked to scores, those of a baseline checked by hand."""
    masks = voc.write_voc(tmp_path)
    queries = dict(type="pascal5i", path=str(tmp_path), fold=1)
    examples = {}
    if kind == "detection":  # one image of the fold is left, which cannot be its own example
        queries, examples = {**queries, "kind": "box"}, dict(examples=queries)
    pairs = dict(type="few_shot", answer="mask", queries=queries, **examples)
    scores, folder = evaluated(
        type="few_shot",
        kind=kind,
        data=dict(mixture=dict(m=pairs)),
        formatter=dict(images=3, lead=False),
    )
    lines = [json.loads(x) for x in (folder / "images.jsonl").read_text().splitlines()]
    names = ["b/cat"] if kind == "detection" else ["a/cat", "b/cat", "d/cat"]
    assert [line["id"] for line in lines] == names
    assert {(line["label"], line["fold"]) for line in lines} == {(8, 1)}
    assert all(0 <= line["iou"] <= 1 for line in lines)
    # Resizing to the tokenizer's side moves borders a little.
    cat = lines[names.index("b/cat")]
    assert cat["all_foreground_iou"] == pytest.approx((masks["b"] == 8).mean(), abs=0.02)
    assert scores["fold_1_iou"] == scores["miou"] == pytest.approx(scores["iou"])
    assert ("box_iou" in scores) == (kind == "detection")


@pytest.mark.slow
def test_generation_from_a_batch_file(evaluated, golden, tmp_path):
    """Lines of different lengths in one batch."""
    write_pictures(golden, tmp_path)
    lines = [
        {"input": ["0.png", "1.png"], "output": "one.png", "target": ["2.png"]},
        {"input": ["1.png"], "output": "sub/two.png", "target": ["2.png"]},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = dict(type="visual_prompts", path=str(tmp_path / "list.jsonl"), output=True)
    scores, folder = evaluated(
        type="generation",
        candidates=2,
        data=dict(mixture=dict(m=source)),
        formatter=dict(images=3, lead=False),
    )
    assert scores["pictures"] == 2 and scores["mse_x3"] == pytest.approx(3 * scores["mse"])
    for name in ("one.png", "sub/two.png"):
        sheet = np.array(Image.open(folder / name))
        assert sheet.shape == (64, 32, 3)
        np.testing.assert_array_equal(sheet[:32], sheet[32:])  # greedy


@pytest.mark.slow
def test_a_batch_file_from_the_command_line(parts, golden, tmp_path, monkeypatch, capsys):
    write_pictures(golden, tmp_path)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "wide.png")
    lines = [
        {"input": ["0.png", "1.png"], "output": "one.png", "target": ["2.png"]},
        {"input": ["wide.png"], "output": "sub/two.png"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    model = lvm.Lvm(*parts)
    monkeypatch.setattr(command_line.loading, "load", lambda *_, **__: model)
    out = tmp_path / "made"
    common = ["lvm", "--checkpoint=x", f"--jsonl={path}", "--candidates=2", "--temperature=0"]
    predict.main([*common, f"--out={out}", "--show_inputs"])
    assert Image.open(out / "one.png").size == (3 * 32, 2 * 32)
    assert Image.open(out / "sub" / "two.png").size == (2 * 32, 2 * 32)
    expected = model.continue_(list(golden["vq.images_u8"][:2]), temperature=0.0)[0, 0]
    sheet = np.array(Image.open(out / "one.png"))
    np.testing.assert_array_equal(sheet[:32, 64:], expected)
    np.testing.assert_array_equal(sheet[32:, 64:], expected)
    error = np.square(expected / 255.0 - golden["vq.images_u8"][2] / 255.0).mean()
    assert f"mse {error:.5f} over 1 lines" in capsys.readouterr().out
    predict.main([*common, f"--out={out}", "--resize_output=original", "--n=2"])
    assert Image.open(out / "sub" / "two.png").size == (2 * 30, 2 * 20)

    def fails(*arguments):
        with pytest.raises(SystemExit):
            predict.main([*common, f"--out={out}", *arguments])
        return capsys.readouterr().err

    assert "WIDTH,HEIGHT" in fails("--resize_output=large")
    path.write_text(json.dumps({"input": ["0.png"], "output": "../up.png"}))
    assert "leaves" in fails() and not (tmp_path / "up.png").exists()
    (tmp_path / "bad.png").write_bytes(b"no image")
    lines = [{"input": [name], "output": f"made_{name}"} for name in ("bad.png", "0.png")]
    path.write_text("\n".join(map(json.dumps, lines)))
    message = fails()
    assert "1 of 2 lines were left out" in message and "bad.png" in message
    assert images.decode(out / "made_0.png").std() > 0


@pytest.mark.parametrize(
    "record",
    [
        {"prompt_ids": None}, {"prompt_ids": [1.5] * 4}, {"prompt_ids": [[1], [1, 2]]},
        {"prompt_ids": [1] * 3}, {"prompt_ids": ["a"] * 4}, {"prompt_ids": [float("inf")] * 4},
        {"prompt": None}, {"prompt": 5}, {"prompt": {"a": 1}}, {"prompt": [None]},
        {"prompt": [[1]]}, {"prompt": [{}]}, {"prompt": ["no such file.png"]},
        {"prompt_ids": [1] * 4, "label": None}, {"prompt_ids": [1] * 4, "label": 1.5},
        {"prompt_ids": [1] * 4, "fold": "3"}, {"prompt_ids": [1] * 4, "fold": 10**30}, {},
    ],
    ids=repr,
)  # fmt: skip
def test_prompts_of_other_types_are_bad_records(record):
    formatter = prompts.Formatter(images=2, targets=1, side=8, size=4)
    with pytest.raises(records.BadRecordError):
        formatter(record)
