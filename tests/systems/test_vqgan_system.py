"""The tokenizer as a system: batches, losses, evaluation, loading and exporting."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from tests.evaluators import fakes
from vlm_jax.data import images, records
from vlm_jax.encoders import image_tokenizer
from vlm_jax.evaluators import reconstruction
from vlm_jax.metrics import image_quality
from vlm_jax.models import vqgan as network
from vlm_jax.ops import losses
from vlm_jax.program import config as config_lib
from vlm_jax.systems import vqgan
from vlm_jax.weights import export

SMALL = dict(
    resolution=16,
    hidden_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    z_channels=8,
    num_embeddings=32,
    quantized_width=4,
    norm_groups=4,
)


@pytest.fixture(scope="module")
def task():
    return vqgan.make_task(
        SMALL, l1_weight=0.5, l2_weight=2.0, entropy_weight=0.05, entropy_temperature=0.1
    )


@pytest.fixture(scope="module")
def params(task):
    return jax.jit(task.init)(jax.random.key(0))


def _photos(count, side=16):
    """Smooth colour gradients: easy to compress, no two alike."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 255, (count, 2, 2, 3)).astype(np.uint8)
    return [images.resize(corner, side) for corner in corners]


def _batch(task, count=4):
    formatter = vqgan.make_formatter(size=task.cfg.resolution)
    rng = np.random.default_rng(0)
    image01 = [formatter({"image_u8": photo}, rng)["image01"] for photo in _photos(count)]
    return {"image01": np.stack(image01), "valid": np.ones(count, bool)}


def test_formatter_crops_resizes_and_scales():
    ramp = np.zeros((4, 8, 3), np.uint8)
    ramp[:, 4:] = 255
    rng = np.random.default_rng(0)
    whole = vqgan.make_formatter(size=4)({"image_u8": ramp}, rng)["image01"]
    assert (whole.shape, whole.dtype) == ((4, 4, 3), np.float32)
    assert whole[:, 0].max() < 0.1 and whole[:, 3].min() > 0.9
    middle = vqgan.make_formatter(size=4, crop="center")({"image_u8": ramp}, rng)["image01"]
    np.testing.assert_array_equal(middle[0, :, 0], [0, 0, 1, 1])
    formatter = vqgan.make_formatter(size=4, crop="random", min_crop=1.0, flip=True)
    seen = {formatter({"image_u8": ramp}, rng)["image01"].tobytes() for _ in range(40)}
    assert len(seen) > 3
    again = [formatter({"image_u8": ramp}, np.random.default_rng(7))["image01"] for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_formatter_decodes_and_names_what_it_cannot_use():
    formatter = vqgan.make_formatter(size=8)
    photo = _photos(1, 8)[0]
    out = formatter({"png": images.encode(photo)}, np.random.default_rng(0))
    np.testing.assert_array_equal(images.to_u8(out["image01"]), photo)
    with pytest.raises(records.DataError, match="keys caption, txt has no picture"):
        formatter({"txt": "", "caption": ""}, None)
    with pytest.raises(records.BadRecordError, match=r"uint8\[8, 8\]"):
        formatter({"image_u8": photo[..., 0]}, None)
    with pytest.raises(images.ImageError):
        formatter({"jpg": b"not a picture"}, None)
    with pytest.raises(ValueError, match="crop='centre'"):
        vqgan.make_formatter(crop="centre")


def test_loss_is_the_weighted_sum_of_its_terms(task, params):
    batch = _batch(task)
    loss, metrics = jax.jit(lambda *args: losses.numbers(task.loss(*args)))(
        params, batch, jax.random.key(0)
    )
    module = task.network.bind(params)
    recon, quantized = module(batch["image01"])
    error = np.asarray(recon) - batch["image01"]
    z = module.encode_latents(batch["image01"])
    codes = module.lookup(module.encode(batch["image01"]))
    # Both placements have the same value: (1 + 0.25) times the squared distance.
    expected = 0.5 * np.abs(error).mean() + 2.0 * np.square(error).mean()
    expected += 1.25 * np.square(z - codes).mean()
    expected += 0.05 * network.entropy_penalty(quantized.distances_bte, temperature=0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], -10 * np.log10(np.square(error).mean()), rtol=1e-4)
    assert 1 <= metrics["batch_code_perplexity"] <= 32


def test_unreadable_rows_change_nothing(task, params):
    batch = _batch(task)
    padded = {
        "image01": np.concatenate([batch["image01"], np.zeros((2, 16, 16, 3), np.float32)]),
        "valid": np.array([True] * 4 + [False] * 2),
    }
    function = jax.jit(lambda p, b: losses.numbers(task.loss(p, b, None)))
    loss, metrics = function(params, batch)
    with_rows, more = function(params, padded)
    np.testing.assert_allclose(loss, with_rows, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, more[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_overfits_two_pictures_without_collapse(task, params):
    batch = _batch(task, 2)
    optimizer = optax.adam(3e-3)
    state = params, optimizer.init(params)

    @jax.jit
    def update(state):
        params, opt_state = state
        (_, metrics), grads = jax.value_and_grad(
            lambda *args: losses.numbers(task.loss(*args)), has_aux=True
        )(params, batch, None)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), metrics

    state, first = update(state)
    for _ in range(250):
        state, last = update(state)
    assert last["l2"] < 0.1 * first["l2"]
    assert last["batch_code_perplexity"] > 8
    out = jax.jit(task.predict["reconstruct"])(state[0], batch, jax.random.key(0))
    assert image_quality.psnr(np.asarray(out["image01"]), np.asarray(out["recon01"])).min() > 20


def test_bad_settings_are_named(task):
    with pytest.raises(config_lib.ConfigError, match="did you mean 'tiny'"):
        vqgan.make_task(dict(preset="tinny"))
    with pytest.raises(config_lib.ConfigError, match="unknown key task.l3_weight"):
        vqgan.make_task(SMALL, l3_weight=1.0)
    with pytest.raises(config_lib.ConfigError, match="unknown key model.codes"):
        vqgan.make_task(SMALL | dict(codes=3))
    batch = _batch(task)
    with pytest.raises(config_lib.ConfigError, match="pictures of 15x16x3"):
        task.check_batch({"image01": batch["image01"][:, :15]})
    assert task.units_per_step(batch) == ("images", 4.0)


def test_model_fields_survive_json(task):
    fields = json.loads(json.dumps(dataclasses.asdict(task.cfg)))
    assert vqgan.make_task(fields).cfg == task.cfg


def test_psnr_by_hand():
    a = np.zeros((2, 2, 2, 3))
    b = a + 0.1
    b[1] = 0.0
    np.testing.assert_allclose(image_quality.psnr(a, b), [20.0, 100.0], rtol=1e-6)
    with pytest.raises(ValueError, match="cannot be compared"):
        image_quality.psnr(a, b[:1])


def test_evaluator_counts_codes_and_draws(tmp_path):
    image01 = np.zeros((3, 8, 8, 3), np.float32)
    recon01 = image01 + 0.1
    ids = np.array([[0, 0], [1, 1], [3, 3]], np.int32)
    batch = fakes.batch_of({"image01": image01}, valid=[True, True, False])
    scalars = fakes.run(
        reconstruction.Evaluator(codes=4, columns=2),
        [batch],
        predict=lambda batch: dict(image01=image01, recon01=recon01, ids=ids),
        out_dir=tmp_path,
    )
    # The row that is not valid does not count: codes 0 and 1 of four, equally often.
    assert scalars["code_usage"] == 0.5
    assert scalars["code_perplexity"] == pytest.approx(2.0)
    assert scalars["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert scalars["images"] == 2
    picture = images.decode(tmp_path / "reconstructions.png")
    assert picture.shape[0] > 2 * 96
    with pytest.raises(ValueError, match="layer='relu6_1' is none of relu1_2, relu2_2"):
        reconstruction.Evaluator(layer="relu6_1")
    with pytest.raises(ValueError, match="no readable image"):
        fakes.run(reconstruction.Evaluator(codes=4), [])


def test_exported_tokenizer_loads_and_is_checked(task, params, tmp_path):
    export.write(tmp_path, export.native("vqgan", params, task.cfg, "float32"))
    load = image_tokenizer.ImageTokenizer.load
    tokenizer = load(str(tmp_path), codebook_size=32, tokens_per_image=64)
    assert tokenizer.cfg == task.cfg
    jax.tree.map(np.testing.assert_array_equal, dict(params), tokenizer.params)
    with pytest.raises(ValueError, match="has 32 codes, the language model needs 8192"):
        load(str(tmp_path), codebook_size=8192)
    loaded = vqgan.load_upstream(str(tmp_path), task)
    jax.tree.map(np.testing.assert_array_equal, dict(params), loaded)
    other = vqgan.make_task(SMALL | dict(num_embeddings=64))
    with pytest.raises(ValueError, match="num_embeddings=32, the model 64"):
        vqgan.load_upstream(str(tmp_path), other)


def test_released_layout_loads(golden_lvm, tmp_path):
    fields = json.loads((golden_lvm / "config.json").read_text())["vqgan"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    weights = (golden_lvm / "vqgan.safetensors").read_bytes()
    (tmp_path / "pytorch_model.safetensors").write_bytes(weights)
    tokenizer = vqgan.from_upstream(str(tmp_path))
    io = np.load(golden_lvm / "io.npz")
    ids = tokenizer.encode(io["vq.images_u8"] / np.float32(255))
    np.testing.assert_array_equal(ids, io["vq.ids"])
    expected = np.clip(io["vq.recon"].transpose(0, 2, 3, 1), 0, 1)
    np.testing.assert_allclose(tokenizer.decode(ids), expected, atol=1e-4)
    with pytest.raises(ValueError, match="not all in the codebook of 64"):
        tokenizer.decode(ids + 60)
    for wrong in (ids[0], ids + 0.5, ids > 3, ids.astype(str), ids.astype(object)):
        with pytest.raises(ValueError, match="are no ids: int32.N, "):
            tokenizer.decode(wrong)
    assert tokenizer.decode(ids[:0]).shape == (0, *expected.shape[1:])
    wrong = [ids[0] + 0.5, ids[0] > 3, ["a"] * len(ids[0]), [[1], [2, 3]], None]
    found = list(tokenizer.decode_stream(wrong, on_error="yield"))
    assert all(isinstance(x, records.BadRecordError) for x in found)


def test_shipped_tokenizer():
    tokenizer = image_tokenizer.ImageTokenizer.load("tiny", tokens_per_image=256)
    assert tokenizer.cfg == network.PRESETS["tiny"]
    flat = np.broadcast_to(np.array([0.9, 0.1, 0.1], np.float32), (1, 64, 64, 3))
    decoded = tokenizer.decode(tokenizer.encode(flat))
    # Trained: a red picture comes back reddish.
    red, green, blue = decoded[0].mean((0, 1))
    assert red > green + 0.2 and red > blue + 0.2


@pytest.mark.slow
def test_evaluator_measures_what_it_is_asked_for(tmp_path, capsys):
    from safetensors.numpy import save_file

    from tests.weights import test_lpips_weights as files

    save_file(files.torchvision_tensors(), tmp_path / "vgg.safetensors")
    save_file(files.head_tensors(), tmp_path / "heads.safetensors")
    image01 = np.random.default_rng(0).uniform(size=(3, 16, 16, 3)).astype(np.float32)
    outputs = dict(image01=image01, recon01=image01, ids=np.zeros((3, 4), np.int32))
    evaluator = reconstruction.Evaluator(
        codes=4,
        ssim=True,
        lpips=True,
        frechet=True,
        layer="relu1_2",
        vgg=str(tmp_path / "vgg.safetensors"),
        heads=str(tmp_path / "heads.safetensors"),
    )
    valid = [True, True, False]
    batches = [fakes.batch_of({"image01": image01}, valid=valid, first=n) for n in (0, 3)]
    scalars = fakes.run(evaluator, batches, predict=lambda batch: outputs, out_dir=tmp_path)
    assert scalars["images"] == 4
    assert scalars["ssim"] == 1.0
    assert scalars["lpips"] == pytest.approx(0, abs=1e-6)
    assert scalars["frechet_vgg16_relu1_2"] == pytest.approx(0, abs=1e-6)
    assert "of 4 images and 64 features is biased upwards" in capsys.readouterr().err
