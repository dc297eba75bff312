"""CLIP: both towers against transformers, and every layout there and back."""

import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest

from vlm_jax.models import clip as model
from vlm_jax.nn import functional
from vlm_jax.weights import clip, convert, errors, export, lazy, readers, torchscript

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VISION = dict(
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=24,
    patch_size=8,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=60,
    max_position_embeddings=11,
    eos_token_id=59,
    bos_token_id=58,
)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def reference(request, tmp_path_factory):
    """A random CLIP of transformers, saved, and its answers."""
    torch.manual_seed(0)
    act = request.param
    config = transformers.CLIPConfig(
        vision_config=VISION | dict(hidden_act=act),
        text_config=TEXT | dict(hidden_act=act),
        projection_dim=24,
    )
    network = transformers.CLIPModel(config).eval()
    for parameter in network.parameters():  # norms and biases start at constants
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(act)
    network.save_pretrained(folder)
    image = torch.randn(2, 3, 24, 24)
    ids = torch.tensor([[58, 3, 4, 59, 0, 0], [58, 9, 59, 0, 0, 0], [58, 1, 2, 3, 4, 59]])
    with torch.no_grad():
        out = network(input_ids=ids, pixel_values=image, output_hidden_states=True)
    return folder, image.numpy().transpose(0, 2, 3, 1), ids.numpy(), out


def test_towers_equal_transformers(reference):
    folder, image, ids, out = reference
    cfg, params = clip.load(folder)
    assert (cfg.vision.depth, cfg.text.end_id, cfg.vision.projection) == (3, 59, 24)
    made = functional.Functional(lambda rngs: model.Clip(cfg, rngs))
    hidden = out.vision_model_output.hidden_states

    @jax.jit
    def run(params):
        network = made.bind(params)
        vision = network.vision
        tokens = [vision.tokens(image, num_blocks=n, post_norm=False) for n in (0, 1, -1, None)]
        embeds = model.unit(network.vision(image)), model.unit(network.text(ids))
        return network(image, ids), embeds, tokens

    logits, (image_embeds, text_embeds), tokens = run(params)
    np.testing.assert_allclose(logits, out.logits_per_image, atol=1e-4)
    close = dict(atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(text_embeds, out.text_embeds, **close)
    np.testing.assert_allclose(image_embeds, out.image_embeds, **close)
    for mine, theirs in zip(tokens, (hidden[0], hidden[1], hidden[-2], hidden[-1])):
        np.testing.assert_allclose(mine, theirs, atol=3e-5)


def test_a_tower_of_another_activation_is_refused(reference):
    folder, *_ = reference
    cfg, tensors = clip.load_vision(folder)[0], clip.read(folder)
    clip.require_stated(tensors, folder, cfg, "model.vision")
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[cfg.activation]
    with pytest.raises(errors.WeightsError, match=f"Set model.vision.activation={cfg.activation}"):
        wrong = dataclasses.replace(cfg, activation=other)
        clip.require_stated(tensors, folder, wrong, "model.vision")


def test_one_tower_at_a_time(reference):
    folder, image, ids, out = reference
    cfg, params = clip.load_vision(folder)
    network = functional.Functional(lambda rngs: model.VisionTower(cfg, rngs))
    embeds = jax.jit(lambda p: model.unit(network.bind(p)(image)))(params)
    np.testing.assert_allclose(embeds, out.image_embeds, atol=1e-5)
    cfg, params = clip.load_text(folder)
    text = functional.Functional(lambda rngs: model.TextTower(cfg, rngs))
    embeds = jax.jit(lambda p: model.unit(text.bind(p)(ids)))(params)
    np.testing.assert_allclose(embeds, out.text_embeds, atol=1e-5)


def test_there_and_back(reference, tmp_path):
    cfg, params = clip.load(reference[0])
    theirs = {name: load() for name, load in clip.to_openai(params).items()}
    assert theirs["visual.transformer.resblocks.2.attn.in_proj_weight"].shape == (144, 48)
    assert theirs["visual.conv1.weight"].shape == (48, 3, 8, 8)
    assert theirs["text_projection"].shape == (32, 24)
    tensors = lazy.Tensors({name: lambda x=x: x for name, x in theirs.items()}, "memory")
    assert clip.layout_of(tensors) == "openai"
    jax.tree.map(np.testing.assert_array_equal, clip.from_tensors(tensors, cfg), params)
    hf = {name: load() for name, load in clip.to_hf(params, cfg).items()}
    stored = readers.read(reference[0])
    assert set(hf) == {name for name in stored if not name.endswith("position_ids")}
    for name, x in hf.items():
        np.testing.assert_array_equal(x, stored[name])


def tiny_params(cfg):
    rng = np.random.default_rng(0)
    abstract = functional.Functional(lambda rngs: model.Clip(cfg, rngs)).abstract()
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)


def test_missing_and_surplus_tensors_are_named():
    cfg = model.PRESETS["tiny"]
    params = tiny_params(cfg)
    theirs = {name: load() for name, load in clip.to_openai(params).items()}
    del theirs["visual.transformer.resblocks.0.attn.in_proj_bias"]
    theirs["visual.extra"] = np.zeros(3)
    with pytest.raises(convert.ConversionError) as caught:
        clip.from_tensors(theirs, cfg)
    text = str(caught.value)
    assert "visual.extra" in text and "resblocks.0.attn.in_proj_bias#q" in text
    with pytest.raises(errors.WeightsError, match="not a CLIP checkpoint"):
        clip.layout_of({"a": 1})


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).half())

    def forward(self, x):
        return x @ self.weight.float()


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(Inner(), torch.nn.Linear(3, 2))
        self.register_buffer("steps", torch.tensor([3, 4]))
        self.turned = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
        self.scale = torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        return self.blocks(x) * self.scale + self.turned.sum() + self.steps.sum()


def test_torchscript_archives_are_read_without_running_them(tmp_path):
    network = Outer()
    torch.jit.save(torch.jit.script(network), tmp_path / "archive.pt")
    assert torchscript.is_archive(tmp_path / "archive.pt")
    tensors = torchscript.read(tmp_path / "archive.pt")
    state = network.state_dict()
    assert set(tensors) == set(state)
    for name in tensors:
        np.testing.assert_array_equal(tensors[name], state[name].numpy())
        assert tensors[name].shape == tuple(state[name].shape)
    torch.save(state, tmp_path / "state.pt")
    assert not torchscript.is_archive(tmp_path / "state.pt")


def test_a_hostile_archive_is_refused(tmp_path):
    marker = tmp_path / "ran"
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("bad/constants.pkl", b"")
        archive.writestr("bad/data.pkl", f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(errors.WeightsError, match="os.system"):
        clip.read(tmp_path / "bad.pt")
    assert not marker.exists()
    with zipfile.ZipFile(tmp_path / "cut.pt", "w") as archive:
        archive.writestr("cut/constants.pkl", b"")
        archive.writestr("cut/data.pkl", b"(")
    with pytest.raises(errors.WeightsError, match="state_dict"):
        clip.read(tmp_path / "cut.pt")


def test_own_layout(tmp_path):
    cfg = model.PRESETS["tiny"]
    params = tiny_params(cfg)
    export.write(tmp_path, export.native("clip", params, cfg))
    read_cfg, read = clip.load(tmp_path, cfg)
    assert read_cfg == cfg and json.loads((tmp_path / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, read, params)
