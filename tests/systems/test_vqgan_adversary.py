"""The adversarial and perceptual terms: literals, gradients, start, and a whole training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models import patch_discriminator
from vlm_jax.models import vqgan as vqgan_model
from vlm_jax.nn import conv, functional
from vlm_jax.ops import losses
from vlm_jax.program import config as config_lib
from vlm_jax.program import optim, run, train
from vlm_jax.systems import vqgan
from vlm_jax.systems.vqgan import adversary

SMALL = dict(
    resolution=16,
    hidden_channels=8,
    channel_mult=(1,),
    num_res_blocks=1,
    z_channels=8,
    num_embeddings=32,
    quantized_width=4,
    norm_groups=4,
)
GAME = dict(disc_width=8, disc_layers=2, disc_groups=4)
TRAINABLE = "^(?!perceptual|codebook_usage)"


def batch_of(count=4, side=16, seed=0):
    image01 = np.random.default_rng(seed).uniform(size=(count, side, side, 3))
    return {"image01": image01.astype(np.float32), "valid": np.ones(count, bool)}


def recipe(**settings):
    settings = dict(lr=1e-3, schedule="constant", trainable=TRAINABLE, clip_norm=0.0) | settings
    return run.Recipe(
        system="vqgan",
        model={},
        data=None,
        train=train.TrainConfig(steps=100, batch_size=4, accumulate=settings.pop("accumulate", 1)),
        optim=optim.OptimConfig(**settings),
    )


def params_of(task, seed=0):
    """Parameters of the shapes of `task.init`, which takes long to compile."""
    rng, made = np.random.default_rng(seed), {}
    for path, x in functional.flatten(jax.eval_shape(task.init, jax.random.key(0))).items():
        name = path.split("/")[-1]
        if name in ("kernel", "embedding"):
            x = rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]))
        else:
            x = np.full(x.shape, name in ("scale", "share", "weight"))
        made[path] = jnp.asarray(x, jnp.float32)
    return functional.unflatten(made)


def start(task, **settings):
    """(update, state): a jitted training step and its first state."""
    plan = recipe(**settings)
    optimizer = optim.make_optimizer(plan.optim, plan.train.steps)
    params = params_of(task)
    learned, _ = optim.split(params, plan.optim.trainable)
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(learned)}
    return jax.jit(train.make_train_step(task, optimizer, plan)), state


def test_losses_by_hand():
    real, fake = jnp.array([[[2.0, 0.5]]]), jnp.array([[[-3.0, 1.0]]])
    # ((0 + 0.5) / 2 + (0 + 2) / 2) / 2
    np.testing.assert_allclose(
        patch_discriminator.discriminator_loss_b(real, fake, "hinge"), [0.625]
    )
    np.testing.assert_allclose(patch_discriminator.generator_loss_b(fake, "hinge"), [1.0])

    def softplus(x):
        return np.log1p(np.exp(x))

    np.testing.assert_allclose(
        patch_discriminator.generator_loss_b(fake, "non_saturating"),
        [(softplus(3.0) + softplus(-1.0)) / 2],
        rtol=1e-6,
    )
    expected = (softplus(-2.0) + softplus(-0.5) + softplus(-3.0) + softplus(1.0)) / 2
    np.testing.assert_allclose(
        patch_discriminator.discriminator_loss_b(real, fake, "non_saturating"),
        [expected],
        rtol=1e-6,
    )


def test_gradient_penalty_by_hand():
    # The logit is 3 times the sum of an image: every pixel's derivative is 3.

    def discriminate(x):
        return 3.0 * x.sum((1, 2, 3))[:, None, None]

    penalty = patch_discriminator.gradient_penalty_b(discriminate, jnp.ones((2, 2, 2, 3)))
    np.testing.assert_allclose(penalty, [0.5 * 9 * 12] * 2)


def test_discriminator_shapes_and_parameters():
    network = patch_discriminator.make(patch_discriminator.DiscriminatorConfig())
    abstract = network.abstract()
    # 4*4*(3*64 + 64*128 + 128*256 + 256*512 + 512) + biases 961 + norms 2*896
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 2_766_529
    logits = jax.eval_shape(
        lambda p, x: network.bind(p)(x), abstract, jax.ShapeDtypeStruct((2, 256, 256, 3), "float32")
    )
    assert logits.shape == (2, 30, 30)
    assert patch_discriminator.DiscriminatorConfig().min_side == 24
    with pytest.raises(ValueError, match="norm_groups=5"):
        patch_discriminator.DiscriminatorConfig(width=8, norm_groups=5)


def test_adaptive_weight_by_hand():
    """One pixel, one channel, a 1x1 kernel: recon = 2 k; the losses 3 recon and recon / 2."""
    features = jnp.full((1, 1, 1, 1), 2.0)

    def last_conv(k):
        return conv.conv2d(features, k, jnp.zeros(1), padding=((0, 0), (0, 0)))

    to_recon, to_gan = jnp.full((1, 1, 1, 1), 3.0), jnp.full((1, 1, 1, 1), 0.5)
    kernel = jnp.ones((1, 1, 1, 1))
    weight = adversary.adaptive_weight(last_conv, kernel, to_recon, to_gan)
    # d rec / dk = 3 * 2, d gan / dk = 0.5 * 2.
    np.testing.assert_allclose(weight, 6.0 / (1.0 + 1e-4), rtol=1e-6)
    assert adversary.adaptive_weight(last_conv, kernel, to_recon, 0 * to_gan) == 1e4


@pytest.mark.slow
def test_adaptive_weight_is_the_ratio_of_two_gradients():
    task = vqgan.make_task(SMALL, gan_weight=0.8, **GAME)
    params, batch = params_of(task), batch_of()
    loss, metrics = jax.jit(lambda *args: losses.numbers(task.loss(*args)))(params, batch, None)

    def last_gradient(function):
        def of_kernel(kernel):
            module = task.network.bind(
                functional.unflatten(
                    functional.flatten(params) | {"decoder/conv_out/kernel": kernel}
                )
            )
            return function(module(batch["image01"])[0])

        return jax.grad(of_kernel)(params["decoder"]["conv_out"]["kernel"])

    judge = task.discriminator.bind(params["discriminator"])
    rec = last_gradient(lambda recon: jnp.abs(recon - batch["image01"]).mean())
    gan = last_gradient(lambda recon: -judge(recon).mean())
    expected = jnp.linalg.norm(rec) / (jnp.linalg.norm(gan) + 1e-4)
    np.testing.assert_allclose(metrics["gan/weight"], 0.8 * expected, rtol=1e-4)
    np.testing.assert_allclose(
        loss, sum(x for name, x in metrics.items() if name.startswith("loss/")), rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_both_players_get_their_own_gradient(adaptive):
    task = vqgan.make_task(
        SMALL, gan_weight=0.5, gan_adaptive=adaptive, r1_weight=0.1, l1_weight=0.7, **GAME
    )
    params, batch = params_of(task), batch_of()
    grads, metrics = jax.jit(
        jax.grad(lambda *args: losses.numbers(task.loss(*args)), has_aux=True)
    )(params, batch, None)
    weight = metrics["gan/weight"]
    assert adaptive or weight == 0.5
    judge = task.discriminator

    def decoder_pays(params):
        recon, quantized = task.network.bind(params)(batch["image01"])
        gan = -judge.bind(params["discriminator"])(recon).mean()
        l1 = 0.7 * jnp.abs(recon - batch["image01"]).mean()
        return l1 + weight * gan + quantized.loss

    def discriminator_pays(params):
        recon, _ = task.network.bind(params)(batch["image01"])
        module = judge.bind(params["discriminator"])
        real, fake = module(batch["image01"]), module(recon)
        hinge = 0.5 * (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)).mean()
        penalty = patch_discriminator.gradient_penalty_b(module, batch["image01"]).mean()
        return hinge + 0.1 * penalty

    decoder, game = (
        jax.jit(jax.grad(decoder_pays))(params),
        jax.jit(jax.grad(discriminator_pays))(params),
    )
    for part, expected in (("discriminator", game), ("decoder", decoder), ("encoder", decoder)):
        flat, wanted = functional.flatten(grads[part]), functional.flatten(expected[part])
        for path, x in wanted.items():
            scale = max(float(jnp.abs(x).max()), 1e-6)
            np.testing.assert_allclose(flat[path], x, atol=2e-4 * scale, err_msg=f"{part}/{path}")


@pytest.mark.slow
@pytest.mark.parametrize("branches", [False, True])
def test_the_game_starts_late(branches, monkeypatch):
    monkeypatch.setattr(adversary, "_branches_are_cheap", lambda: branches)
    task = vqgan.make_task(SMALL, gan_weight=0.8, gan_start=2, **GAME)
    update, state = start(task)
    batch, history = batch_of(), []
    for _ in range(3):
        before = state["params"]["discriminator"]
        state, metrics = update(state, batch, jax.random.key(1))
        moved = [
            float(jnp.abs(a - b).max())
            for a, b in zip(
                jax.tree.leaves(before), jax.tree.leaves(state["params"]["discriminator"])
            )
        ]
        history.append((max(moved), metrics))
    for moved, metrics in history[:2]:
        assert moved == 0
        assert metrics["loss/gan"] == metrics["loss/discriminator"] == metrics["gan/weight"] == 0
        assert metrics["loss"] == pytest.approx(metrics["loss/l1"] + metrics["loss/quantizer"])
    moved, metrics = history[2]
    assert moved > 0 and metrics["gan/weight"] > 0 and metrics["loss/discriminator"] > 0


@pytest.mark.slow
def test_parts_of_a_batch_give_the_update_of_the_whole():
    task = vqgan.make_task(SMALL, gan_weight=0.8, gan_adaptive=False, **GAME)
    ends = []
    for parts in (1, 2):
        update, state = start(task, accumulate=parts)
        state, metrics = update(state, batch_of(), jax.random.key(1))
        ends.append(metrics)
    for name, value in ends[0].items():
        if name not in ("batch_code_perplexity", "latent_rms", "psnr"):  # not means of means
            np.testing.assert_allclose(value, ends[1][name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_unreadable_rows_change_nothing():
    task = vqgan.make_task(SMALL, gan_weight=0.8, r1_weight=1.0, **GAME)
    params, batch = params_of(task), batch_of()
    padded = {
        "image01": np.concatenate([batch["image01"], np.ones((2, 16, 16, 3), np.float32)]),
        "valid": np.array([True] * 4 + [False] * 2),
    }
    function = jax.jit(lambda p, b: losses.numbers(task.loss(p, b, None)))
    (loss, metrics), (same, more) = function(params, batch), function(params, padded)
    np.testing.assert_allclose(loss, same, rtol=1e-4)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, more[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_perceptual_weights_are_frozen_and_must_be():
    task = vqgan.make_task(SMALL, perceptual_weight=1.0, perceptual_stages=1)
    update, state = start(task)
    before = jax.tree.map(np.asarray, state["params"]["perceptual"])
    state, metrics = update(state, batch_of(), jax.random.key(1))
    assert metrics["loss/perceptual"] == metrics["lpips"] > 0
    jax.tree.map(np.testing.assert_array_equal, before, state["params"]["perceptual"])
    update, state = start(task, trainable=".*")
    with pytest.raises(config_lib.ConfigError, match="must not learn"):
        update(state, batch_of(), jax.random.key(1))


def test_bad_settings_are_named():
    with pytest.raises(config_lib.ConfigError, match="gan_loss='wasserstein'"):
        vqgan.make_task(SMALL, gan_loss="wasserstein")
    with pytest.raises(config_lib.ConfigError, match="stages=6"):
        vqgan.make_task(SMALL, perceptual_stages=6)
    with pytest.raises(config_lib.ConfigError, match="norm_groups=32"):
        vqgan.make_task(SMALL, disc_width=8)
    task = vqgan.make_task(SMALL, gan_weight=1.0)
    with pytest.raises(config_lib.ConfigError, match="need 24 pixels"):
        task.check_batch(batch_of())


def test_every_parameter_has_a_sharding_rule():
    task = vqgan.make_task(
        SMALL, gan_weight=1.0, perceptual_weight=1.0, perceptual_stages=2, revive_every=5, **GAME
    )
    from vlm_jax.program import sharding

    specs = sharding.match(task.sharding_rules, jax.eval_shape(task.init, jax.random.key(0)))
    assert specs["discriminator/conv/1/kernel"][-1] == "fsdp"
    assert not any(specs["perceptual/vgg/conv/1/kernel"])
    assert {path.split("/")[0] for path in specs} > {"encoder", "codebook_usage", "perceptual"}


def test_a_run_gives_its_tokenizer_alone():
    task = vqgan.make_task(SMALL, gan_weight=1.0, revive_every=5, **GAME)
    params = params_of(task)
    tokenizer = vqgan.from_run(task, None, params)
    expected = vqgan.make_task(SMALL).network.abstract()
    assert jax.tree.structure(tokenizer.params) == jax.tree.structure(expected)


@pytest.mark.slow
def test_decoder_training_leaves_every_id(tmp_path):
    task = vqgan.make_task(SMALL, gan_weight=0.8, quantizer_weight=0.0, **GAME)
    update, state = start(task, trainable=r"^(decoder|post_quant_conv|discriminator)/")
    before = jax.tree.map(np.asarray, state["params"])
    batch, encode = batch_of(), jax.jit(task.predict["encode"])
    for _ in range(3):
        state, _ = update(state, batch, jax.random.key(1))
    for part in ("encoder", "quant_conv", "quantize"):
        jax.tree.map(np.testing.assert_array_equal, before[part], state["params"][part])
    kernel = state["params"]["decoder"]["conv_out"]["kernel"]
    assert np.abs(before["decoder"]["conv_out"]["kernel"] - kernel).max() > 0
    ids = [encode(params, batch, None)["ids"] for params in (before, state["params"])]
    np.testing.assert_array_equal(*ids)
    # What is exported is the tokenizer, without the discriminator.
    from vlm_jax.weights import export

    tokenizer = vqgan_model.tokenizer_part(state["params"])
    export.write(tmp_path, export.native("vqgan", tokenizer, task.cfg))
    loaded = vqgan.load_upstream(str(tmp_path), task)
    np.testing.assert_array_equal(loaded["decoder"]["conv_out"]["kernel"], kernel)
    assert "discriminator" not in loaded


@pytest.mark.slow
def test_a_fresh_run_starts_from_pretrained_parts_and_a_tokenizer(tmp_path):
    """VGG16 from files, the shipped tokenizer, a random discriminator; nothing else."""
    from safetensors.numpy import save_file

    from tests.weights import test_lpips_weights as files
    from vlm_jax import checkpoints
    from vlm_jax.program import starting_point

    tensors, heads = files.torchvision_tensors(stages=2), files.head_tensors()
    save_file(tensors, tmp_path / "vgg.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    task = vqgan.make_task(
        dict(preset="tiny"),
        perceptual_weight=1.0,
        perceptual_stages=2,
        perceptual_vgg=str(tmp_path / "vgg.safetensors"),
        perceptual_heads=str(tmp_path / "heads.safetensors"),
        gan_weight=1.0,
        **GAME,
    )
    params = params_of(task)

    def lay(**init):
        return starting_point.lay_weights(
            checkpoints.InitConfig(**init), task, params, vqgan.load_upstream
        )

    laid = lay()
    kernel = tensors["features.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(laid["perceptual"]["vgg"]["conv"]["0"]["kernel"], kernel)
    assert laid["decoder"] == params["decoder"]
    laid = lay(upstream="tiny", random="^discriminator/")
    shipped = vqgan.load_upstream("tiny", task)
    jax.tree.map(np.testing.assert_array_equal, laid["decoder"], shipped["decoder"])
    assert laid["discriminator"] == params["discriminator"]
    with pytest.raises(config_lib.ConfigError, match="would stay random: discriminator/"):
        lay(upstream="tiny")
