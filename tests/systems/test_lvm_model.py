"""The verbs of LVM against the reference's end-to-end outputs, and their bad inputs."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import images
from vlm_jax.decoding import generate, sampling
from vlm_jax.encoders import image_tokenizer
from vlm_jax.systems import lvm
from vlm_jax.weights import llama as llama_weights
from vlm_jax.weights import vqgan as vqgan_weights

GREEDY = sampling.Sampler(temperature=0.0, suppress_from=64)


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


@pytest.fixture(scope="module")
def model(parts):
    return lvm.Lvm(*parts)


def test_tokens_of_the_reference(model, golden):
    ids = model.tokenizer.encode(golden["vq.images_u8"].astype(np.float32) / 255)
    np.testing.assert_array_equal(ids, golden["vq.ids"])


def test_one_new_image(model, golden):
    prompt = golden["e2e.prompt_ids"].reshape(3, 64)
    ids = model.continue_ids([prompt], 1, sampler=GREEDY)
    np.testing.assert_array_equal(ids[0, 0], golden["e2e.new_ids"])
    image = model.tokenizer.decode(ids[0, 0])
    np.testing.assert_allclose(image, golden["e2e.image_float"], atol=1e-4)
    images_u8 = golden["vq.images_u8"][golden["e2e.prompt_image_index"]]
    made = model.continue_(list(images_u8), temperature=0.0, top_k=0)
    truncated = golden["e2e.image_u8_trunc"].astype(int)
    assert np.abs(made[0].astype(int) - truncated).max() <= 1


def test_two_images_in_one_go(model, golden):
    prompt = golden["e2e.grow_prompt_ids"].reshape(1, 64)
    ids = model.continue_ids([prompt], 2, sampler=GREEDY)
    np.testing.assert_array_equal(ids[0, 0], golden["e2e.grow_new_ids"])


def test_sliding_window(parts, golden):
    model = lvm.Lvm(*parts, context_images=int(golden["e2e.window_context_frames"][0]))
    prompt = golden["e2e.window_prompt_ids"].reshape(5, 64)
    with pytest.warns(UserWarning, match="first 2 of 5 images are not used"):
        ids = model.continue_ids([prompt], 2, sampler=GREEDY)
    np.testing.assert_array_equal(ids[0, 0], golden["e2e.window_new_ids"])
    images = model.tokenizer.decode(ids[0, 0])
    np.testing.assert_allclose(images, golden["e2e.window_images_float"], atol=1e-4)


def test_perplexity(model, golden):
    contexts = list(golden["ppl.context_ids"].reshape(2, 2, 64))
    targets = list(golden["ppl.target_ids"].reshape(2, 1, 64))
    got = model.perplexity_ids(contexts, targets)
    np.testing.assert_allclose(got, golden["ppl.perplexity"], rtol=1e-3)


def test_a_batch_equals_its_prompts_one_by_one(model, golden):
    ids = golden["vq.ids"]
    prompts = [ids[:1], ids[:2], ids[1:2]]
    together = model.continue_ids(prompts, 1, sampler=GREEDY)
    for prompt, batched in zip(prompts, together):
        np.testing.assert_array_equal(model.continue_ids([prompt], 1, sampler=GREEDY)[0], batched)


SAMPLED = sampling.Sampler(temperature=1.0, top_k=20, suppress_from=64)


def unfilled(model, prompt, n, sampler, seed):
    """What a program of the very shape makes."""
    run = generate.compile(model._network.bind, n * 64, sampler=sampler)
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)
    made = run(model.params, prompt.reshape(1, -1), rng)
    return np.asarray(made.tokens_bst).reshape(n, 64)


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_that_are_filled_up_continue_as_they_are(model, golden, sampler):
    ids = golden["e2e.window_prompt_ids"].reshape(5, 64)
    for prompt, n in ((ids[:3], 1), (ids[:1], 3)):
        got = model.continue_ids([prompt], n, sampler=sampler, seed=5)[0, 0]
        np.testing.assert_array_equal(got, unfilled(model, prompt, n, sampler, 5))


def test_few_shapes_are_compiled(parts, golden):
    model = lvm.Lvm(*parts)
    ids = np.tile(golden["vq.ids"][:1], (7, 1))
    for images_ in range(1, 8):  # one after another seven programs, now those of 1, 2, 4, 8
        model.continue_ids([ids[:images_]], 1, sampler=GREEDY)
        model.perplexity_ids([ids[:images_]], [ids[:1]])
    (made,) = (run for key, run in model._generators.items() if key != "score")
    assert made._cache_size() == 4
    assert model._generators["score"]._cache_size() == 3  # 2, 4, 8 images in all


def test_perplexity_does_not_depend_on_the_others(model, golden):
    ids = golden["e2e.window_prompt_ids"].reshape(5, 64)
    contexts, targets = [ids[:1], ids[:2], ids[1:2], ids[:3]], [ids[2:3], ids[:1], ids[:2], ids[:2]]
    together = model.perplexity_ids(contexts, targets)
    score = jax.jit(lambda params, ids: model._network.bind(params)(ids).logits)
    for i in (1, 3):  # of 3 and 5 images, among 4 and 8
        context, target, value = contexts[i], targets[i], together[i]
        both = np.concatenate([context, target]).ravel()
        logits = score(model.params, both[None, :-1])[0, context.size - 1 :]
        logp = jax.nn.log_softmax(logits)[np.arange(target.size), target.ravel()]
        np.testing.assert_allclose(value, np.exp(-np.asarray(logp).mean()), rtol=1e-5)
    with pytest.raises(ValueError, match="prompt 1 has no context"):
        model.perplexity_ids([ids[:1], ids[:0]], targets[:2])


def test_candidates_and_seeds(model, golden):
    frames = list(golden["vq.images_u8"][:2])
    first = model.continue_(frames, candidates=3, seed=1)
    assert first.shape == (3, 1, 32, 32, 3) and first.dtype == np.uint8
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(first, model.continue_(frames, candidates=3, seed=1))
    assert (first != model.continue_(frames, candidates=3, seed=2)).any()


def test_analogy_is_a_prompt_of_pairs(model, golden):
    a, b, c = golden["vq.images_u8"][:3]
    options = dict(temperature=0.0, top_k=0)
    one = model.analogy([(a, b)], c, **options)
    np.testing.assert_array_equal(one, model.continue_([a, b, c], **options))
    batch = model.analogy([[(a, b)], [(b, a)]], [c, c], **options)
    np.testing.assert_array_equal(batch[0], one)
    assert len(batch) == 2


def test_bad_input(model, golden):
    image = golden["vq.images_u8"][0]
    with pytest.raises(ValueError, match="list of images"):
        model.continue_(image)
    with pytest.raises(ValueError, match="empty"):
        model.continue_([])
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        model.continue_([image[..., :2]])
    with pytest.raises(ValueError, match=r"is \[C, H, W\]"):
        model.continue_([image.transpose(2, 0, 1)])
    with pytest.raises(ValueError, match="values from 0 to 255; a picture is .* float in"):
        model.continue_([image.astype(np.float32)])
    with pytest.raises(ValueError, match="n=0"):
        model.continue_([image], 0)
    with pytest.raises(ValueError, match="n=1.5 must be a whole number"):
        model.continue_([image], 1.5)
    with pytest.raises(ValueError, match="candidates=True must be a whole number"):
        model.continue_([image], 1, candidates=True)
    with pytest.raises(ValueError, match="2 lists of pairs for 1 queries"):
        model.analogy([[(image, image)], [(image, image)]], [image])
    with pytest.raises(ValueError, match="codebook"):
        model.tokenizer.decode(np.full((1, 64), 64))


def test_pictures_of_every_kind_are_one_prompt(model, golden, tmp_path):
    image = golden["vq.images_u8"][0]
    path = tmp_path / "a.png"
    path.write_bytes(images.encode(image))
    kinds = [image, Image.fromarray(image), str(path), path.read_bytes(), image / np.float32(255)]
    ids = model.tokenizer.encode_u8(kinds)
    np.testing.assert_array_equal(ids, np.tile(ids[:1], (5, 1)))
    made = model.continue_(kinds[1:4], temperature=0.0)
    np.testing.assert_array_equal(made, model.continue_(np.stack([image] * 3), temperature=0.0))
    pairs = [(path, kinds[1])]
    np.testing.assert_array_equal(model.analogy(pairs, path, temperature=0.0), made)
    several = model.analogy([pairs, pairs], [path, image], temperature=0.0)
    np.testing.assert_array_equal(np.stack(several), np.stack([made, made]))


def test_a_stream_of_prompts(model, golden):
    images_u8 = list(golden["vq.images_u8"][:2])
    prompts = [images_u8[:1], [images_u8[0], b"no image"], images_u8[1:], images_u8[:1]]
    stream = model.continue_stream(iter(prompts), batch_size=2, on_error="yield", temperature=0.0)
    first, error, *rest = stream
    assert isinstance(error, images.ImageError)
    expected = model.continue_([prompts[i] for i in (0, 2, 3)], temperature=0.0)
    np.testing.assert_array_equal([first, *rest], expected)


def test_what_does_not_fit_is_said_and_whole_pairs_go(parts, golden):
    model = lvm.Lvm(*parts, context_images=4)
    assert [model.dropped(n) for n in (1, 3, 4, 9)] == [0, 0, 1, 6]
    assert [model.dropped(n, pairs=True) for n in (3, 5, 7)] == [0, 2, 4]
    assert lvm.Lvm(*parts, context_images=5).dropped(7, pairs=True) == 4  # 3 would split a pair
    images_u8 = golden["vq.images_u8"][[0, 1, 0, 1, 1]]
    with pytest.warns(UserWarning, match="first 2 of 5 images are not used: the context holds 4"):
        made = model.continue_(list(images_u8), temperature=0.0)
    np.testing.assert_array_equal(made, model.continue_(list(images_u8[2:]), temperature=0.0))
    with pytest.warns(UserWarning) as caught:
        model.continue_([list(images_u8)] * 3, temperature=0.0)
    assert [str(w.message).partition(" are")[0] for w in caught] == [
        "the first 2 of 5 images (and those of 2 more prompts)"
    ]
    assert caught[0].filename == __file__  # the line that called
    with pytest.warns(UserWarning) as caught:
        list(model.continue_stream([list(images_u8)] * 3, temperature=0.0))
    assert len(caught) == 1
    pairs = [tuple(images_u8[:2]), tuple(images_u8[2:4])]
    with pytest.warns(UserWarning, match="first 2 of 5"):
        np.testing.assert_array_equal(model.analogy(pairs, images_u8[4], temperature=0.0), made)


def test_a_tokenizer_of_another_size_is_refused():
    with pytest.raises(ValueError, match="1024 codes, the language model needs 8192"):
        image_tokenizer.ImageTokenizer.load("tiny", codebook_size=8192)
