"""NXTP against the reference: preprocessing, rows, masks, logits, loss, gradients, an update."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models import clip, llama
from vlm_jax.nn import functional
from vlm_jax.ops import losses, masks
from vlm_jax.program import optim
from vlm_jax.systems.nxtp import format as format_lib
from vlm_jax.systems.nxtp import network, task, vocabulary
from vlm_jax.systems.nxtp import weights as nxtp
from vlm_jax.weights import readers


class Golden:
    def __init__(self, folder):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.io = dict(np.load(folder / "io.npz"))
        v, d = self.meta["config"]["vision"], self.meta["config"]["decoder"]
        self.cfg = network.NxtpConfig(
            clip.VisionConfig(v["width"], v["layers"], v["patch"], v["image_size"]),
            llama.LlamaConfig(
                d["vocab_total"],
                d["dim"],
                d["blocks"],
                d["ffn_hidden"],
                d["heads"],
                rms_eps=d["norm_eps"],
                max_tokens=d["max_seq_len"],
            ),
        )
        self.task = task.NxtpTask(self.cfg, delimiter_id=self.meta["config"]["ids"]["delimiter"])
        tensors = readers.read(folder / "checkpoint.safetensors")
        self.params = nxtp.from_tensors(tensors, self.task.network.abstract())
        self.formatter = format_lib.Formatter(
            tokenizer=str(folder / "tokenizer.model"), image_size=42, max_tokens=55
        )

    def batch(self):
        """The reference's training batch: its labels in its order, its prompt."""
        prompt = "The items visible in the image are"
        rows = [
            self.formatter.encode(prompt, text.split(", "))
            for text in self.meta["train_shuffled_objs"]
        ]
        for i, row in enumerate(rows):
            row["image_u8"] = format_lib.crop(self.io[f"raw_image_{i}"], 42)
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def golden(golden_nxtp):
    pytest.importorskip("sentencepiece")
    return Golden(golden_nxtp)


@pytest.fixture(scope="module")
def batch(golden):
    return golden.batch()


def test_preprocessing(golden, batch):
    theirs = golden.io["image"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(clip.normalize(batch["image_u8"]), theirs, atol=1e-6)


def test_ids_and_targets(golden, batch):
    ids = golden.meta["config"]["ids"]
    words = golden.formatter.vocabulary
    assert (words.image_id, words.empty_id) == (ids["image"], ids["empty"])
    assert (words.bos_id, words.eos_id, words.delimiter_id) == (1, 2, ids["delimiter"])
    assert words.prompt()[-1] == ids["are"]
    np.testing.assert_array_equal(words.prompt(), golden.io["prompt_tokens"])
    theirs = golden.io["train_tokens_objs"]
    np.testing.assert_array_equal(batch["tokens"], np.where(theirs < 0, ids["empty"], theirs))
    # Their array has the target of place t at t + 1, the image's places first.
    targets = golden.io["train_target_objs"][:, 10:]
    np.testing.assert_array_equal(batch["weights"][:, :-1] > 0, targets >= 0)
    scored = targets >= 0
    np.testing.assert_array_equal(batch["targets"][:, :-1][scored], targets[scored])


def test_masks(golden, batch):
    segments = np.pad(batch["segments"], ((0, 0), (9, 0)), constant_values=1)
    made = masks.labels(jnp.array(segments), 9)
    np.testing.assert_array_equal(made, golden.io["train_mask_objs"][:, 0].astype(bool))
    inference = masks.prefix(17, 9)
    np.testing.assert_array_equal(inference, golden.io["prefill_mask"][0, 0].astype(bool))
    np.testing.assert_array_equal(
        np.pad(batch["label_positions"] + 9, ((0, 0), (9, 0)))[:, 9:],
        golden.io["train_positions_decoupled_rotary"][:, 9:],
    )


def test_mask_of_the_worked_examples(golden):
    def segments(ids):
        number, made = 1, []
        for token in ids:
            made.append(number)
            number += token in (268, 335)
        return jnp.array([made])

    for name, closed in (("example", 2), ("example3", 3)):
        made = masks.sequential_labels(segments(golden.io[f"{name}_ids"]), jnp.array([closed]), 2)
        np.testing.assert_array_equal(made[0], golden.io[f"{name}_mask_infer"].astype(bool))
    drawn = np.array(segments(golden.io["example_ids"]))
    drawn[drawn > 3] = 0
    made = masks.labels(jnp.array(drawn), 2)
    np.testing.assert_array_equal(made[0], golden.io["example_mask_train"].astype(bool))


def test_tower_and_projection(golden, batch):
    @jax.jit
    def run(params):
        module = golden.task.network.bind(params)
        image = clip.normalize(jnp.asarray(batch["image_u8"]))
        inputs = module.inputs(image, jnp.asarray(batch["tokens"]))
        return module.vision.tokens(image), module.image_vectors(image), inputs

    tokens, vectors, inputs = run(golden.params)
    np.testing.assert_allclose(tokens, golden.io["vision_pre_projection"], atol=1e-4)
    np.testing.assert_allclose(vectors, golden.io["image_tokens_with_cls"][:, 1:], atol=1e-4)
    np.testing.assert_allclose(inputs, golden.io["train_input_embeds"], atol=1e-4)


@pytest.mark.parametrize("positions, name", [
    ("absolute", "train_logits"), ("labels", "train_logits_decoupled_rotary"),
])  # fmt: skip
def test_logits(golden, batch, positions, name):
    other = task.NxtpTask(golden.cfg, positions=positions, delimiter_id=335)

    @jax.jit
    def run(params):
        module = other.network.bind(params)
        logits = module.decoder.logits(other.hidden(module, batch))
        return logits, losses.token_logp(logits, batch["targets"])

    logits, logp = run(golden.params)
    np.testing.assert_allclose(logits, golden.io[name][:, 9:], atol=1e-4)
    if positions == "absolute":
        nll = golden.io["train_token_nll"][:, 9:]
        np.testing.assert_allclose(-logp[:, :-1] * (batch["weights"][:, :-1] > 0), nll, atol=1e-4)


def test_captions_see_the_image_and_what_came_before(golden, batch):
    """The reference's other branch, whose weight is 0: our ablation "image_prefix"."""
    np.testing.assert_array_equal(
        masks.prefix(64, 9), golden.io["train_mask_caps"][0, 0].astype(bool)
    )
    plain = task.NxtpTask(golden.cfg, mask="image_prefix", delimiter_id=335)
    ids, targets = golden.io["train_tokens_caps"], golden.io["train_target_caps"][:, 10:]
    targets = np.pad(targets, ((0, 0), (0, 1)), constant_values=-1)
    captions = {
        **batch,
        "tokens": np.where(ids < 0, 353, ids),
        "targets": targets,
        "weights": (targets >= 0).astype(np.float32),
    }

    @jax.jit
    def run(params):
        module = plain.network.bind(params)
        logits = module.decoder.logits(plain.hidden(module, captions))
        return logits, losses.cross_entropy(logits, captions["targets"], captions["weights"])[0]

    logits, loss = run(golden.params)
    np.testing.assert_allclose(logits, golden.io["train_logits_caps"][:, 9:], atol=1e-4)
    assert float(loss) == pytest.approx(float(golden.io["train_loss_caps"]), abs=1e-5)


@pytest.fixture(scope="module")
def gradients(golden, batch):
    learned, frozen = optim.split(golden.params, TRAINED)

    def loss(learned, task):
        return losses.value(task.loss(optim.merge(learned, frozen), batch, None)[0])

    chunked = task.NxtpTask(golden.cfg, loss_chunk=16, delimiter_id=335)
    both = [
        jax.jit(jax.value_and_grad(lambda x, t=t: loss(x, t)))(learned)
        for t in (golden.task, chunked)
    ]
    return learned, both


# Of a tower of two blocks the reference trained the second.
TRAINED = nxtp.trained(2)
THEIRS = {
    "vision_encoder.proj.weight": "projection/kernel",
    "language_decoder.norm.weight": "decoder/final_norm/scale",
    "language_decoder.layers.0.attention.wq.weight": "decoder/layers/attn/q/kernel",
    "language_decoder.layers.1.feed_forward.w2.weight": "decoder/layers/mlp/down/kernel",
    "vision_encoder.ln_post.weight": "vision/post_norm/scale",
}


def in_their_form(learned, golden):
    """Trained parameters or their gradients under the reference's names; the others are zero."""
    tree = jax.tree.map(np.zeros_like, functional.flatten(golden.params))
    tree |= {path: np.asarray(x) for path, x in learned.items()}
    return {name: load() for name, load in nxtp.to_upstream(functional.unflatten(tree)).items()}


@pytest.mark.parametrize("chunked", [False, True])
def test_loss_and_gradients(golden, gradients, chunked):
    loss, made = gradients[1][chunked]
    assert float(loss) == pytest.approx(float(golden.io["train_loss"]), abs=1e-5)
    theirs = in_their_form(made, golden)
    compared = [key for key in golden.io if key.startswith("grad_")]
    assert len(compared) == 7
    for key in compared:
        name = key.removeprefix("grad_").removesuffix("_masked")
        np.testing.assert_allclose(theirs[name], golden.io[key], atol=1e-4, rtol=1e-3)
    norms = golden.meta["grad_norms"]
    nonzero = {name for name, x in theirs.items() if np.any(x)}
    assert nonzero - {"vision_encoder.logit_scale"} == set(norms)
    for name, norm in norms.items():
        assert np.linalg.norm(theirs[name]) == pytest.approx(norm, rel=1e-3, abs=1e-5)


def test_one_update(golden, gradients):
    learned, ((_, made), _) = gradients
    config = optim.OptimConfig(
        lr=1e-3,
        schedule="constant",
        b1=0.9,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.1,
        decay=r"(kernel|final_norm/scale)$",
        clip_norm=0.0,
    )
    optimizer = optim.make_optimizer(config, 10)
    import optax

    @jax.jit
    def update(learned, made):
        updates, state = optimizer.update(made, optimizer.init(learned), learned)
        return optax.apply_updates(learned, updates), state

    new, state = update(learned, made)
    assert all(re.search(TRAINED, path) for path in state[0].mu)
    full = functional.flatten(golden.params) | {path: np.asarray(x) for path, x in new.items()}
    theirs = nxtp.to_upstream(functional.unflatten(full))
    for key in [k for k in golden.io if k.startswith("adamw1_") and "rows" not in k]:
        name = key.removeprefix("adamw1_")
        np.testing.assert_allclose(theirs[name](), golden.io[key], atol=2e-6)
    before = readers.read(golden.folder / "checkpoint.safetensors")
    table = "language_decoder.tok_embeddings.weight"
    changed = np.flatnonzero((theirs[table]() != before[table]).any(axis=1))
    np.testing.assert_array_equal(changed, golden.io["adamw1_tok_embeddings_changed_rows"])


def test_one_shot_of_the_task(golden, batch):
    found = jax.jit(golden.task.predict["one_shot"])(
        golden.params,
        {**batch, "prompt": np.tile(golden.formatter.vocabulary.prompt(), (4, 1))},
        jax.random.key(0),
    )
    raw = golden.io["oneshot_k10_tokens_raw"].reshape(4, 10, -1)[:, :, 8:]
    ids = np.asarray(found["ids"])
    for i in range(4):
        for j in range(10):
            n = int(found["lengths"][i, j])
            np.testing.assert_array_equal(ids[i, j, :n], raw[i, j, :n])
    probs = golden.io["oneshot_k10_step_probs"].reshape(4, 10, -1)
    steps = min(probs.shape[2], ids.shape[2])
    valid = np.arange(steps) < np.asarray(found["lengths"])[..., None]
    np.testing.assert_allclose(
        np.asarray(found["probs"])[..., :steps][valid], probs[..., :steps][valid], atol=1e-5
    )


def test_prefill_logits(golden, batch):
    @jax.jit
    def run(params):
        module = golden.task.network.bind(params)
        prompt = jnp.tile(jnp.array(golden.formatter.vocabulary.prompt()), (4, 1))
        x = module.inputs(clip.normalize(jnp.asarray(batch["image_u8"])), prompt)
        cache = module.decoder.make_cache(*x.shape[:2])
        return x, module.decoder.step(x, cache, prefix_block=9).logits

    inputs, logits = run(golden.params)
    np.testing.assert_allclose(inputs, golden.io["prefill_input_embeds"], atol=1e-4)
    np.testing.assert_allclose(logits, golden.io["prefill_logits_last"], atol=1e-4)


def test_all_prompts_end_alike(golden):
    words = golden.formatter.vocabulary
    assert len({words.prompt(text)[-1] for text in vocabulary.PROMPTS}) == 1
