"""Models to take away: saved, moved, loaded again, with equal outputs."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import checkpoints, saving
from vlm_jax.models import clip, llama
from vlm_jax.nn import functional
from vlm_jax.program import starting_point
from vlm_jax.systems import lvm, nxtp
from vlm_jax.systems.nxtp import network
from vlm_jax.weights import errors, safetensors_file

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
LVM_MODEL = dict(
    vocab_size=1124, width=16, depth=2, mlp_width=32, num_heads=2, num_kv_heads=1, max_tokens=64
)
LVM_TASK = dict(
    tokenizer="tiny", image_side=8, codebook_size=1024, tokens_per_image=4, context_images=3
)
LVM_FORMATTER = dict(max_tokens=16, fields="<|bos|>,{tokens}", bos_id=1024, vocab_size=1124)
SIDE = 32


def random_like(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), abstract)


def write_run(workdir, system, module, sections, params, **averaged):
    config = {"system": system, **sections, "optim": dict(ema=0.9 if averaged else 0.0)}
    config |= {"data": {"mixture": {"photos": {"type": "image_folder"}}}}
    config |= {"init": {"upstream": "llama=smollm2"}}
    with checkpoints.Checkpointer(workdir) as saver:
        saver.save(300, {"params": params, **averaged}, {"config": config})
    return workdir


@pytest.fixture
def lvm_run(tmp_path):
    sections = dict(model=LVM_MODEL, task=LVM_TASK, formatter=LVM_FORMATTER)
    task = lvm.make_task(LVM_MODEL, **LVM_TASK)
    params = random_like(jax.eval_shape(task.init, jax.random.key(0)))
    average = functional.flatten(jax.tree.map(lambda x: x * 0.5, params))
    return write_run(tmp_path / "runs" / "my_lvm", "lvm", lvm, sections, params, ema=average)


def lvm_outputs(model):
    return (
        model.continue_([PICTURE, PICTURE[::-1]], n=1, candidates=2, seed=3),
        model.perplexity([PICTURE], [PICTURE[::-1]]),
    )


def write_tokenizer(folder):
    """A byte-level one whose begin and end have names that its configuration alone tells."""
    library = pytest.importorskip("tokenizers")
    folder.mkdir()
    (folder / "text.txt").write_text("The objects in the image are dog, large house, cup\n")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<B>", "<A>", "<s>"],
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(folder / "text.txt")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="<A>", eos_token={"content": "<B>"})
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(params=["clip", "vgg"])
def nxtp_run(request, tmp_path):
    folder = tmp_path / "words"
    write_tokenizer(folder)
    words = nxtp.model.vocabulary.load(str(folder))
    vision = (
        dict(preset="tiny")
        if request.param == "clip"
        else dict(preset="vgg16", image_size=SIDE, stages=3)
    )
    decoder = dict(preset="tiny", vocab_size=words.size)
    sections = dict(
        model=dict(vision=vision, decoder=decoder),
        task=dict(delimiter_id=words.delimiter_id, tokenizer=str(folder), k=4),
        formatter=dict(tokenizer=str(folder), image_size=SIDE, prompts="first"),
    )
    task = nxtp.make_task(sections["model"], **sections["task"])
    params = random_like(jax.eval_shape(task.init, jax.random.key(0)))
    return write_run(tmp_path / "runs" / "my_nxtp", "nxtp", nxtp, sections, params)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def moved(folder, tmp_path):
    """The folder elsewhere, and nothing of what it was made from left."""
    target = tmp_path / "elsewhere" / "model"
    target.parent.mkdir()
    shutil.move(folder, target)
    for name in ("runs", "words"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    nxtp.model.vocabulary.load.cache_clear()
    return target


def test_lvm_with_its_tokenizer(lvm_run, tmp_path):
    model = vlm_jax.load("lvm", str(lvm_run))
    expected = lvm_outputs(model)
    model.save(tmp_path / "saved")
    again = vlm_jax.load("lvm", str(moved(tmp_path / "saved", tmp_path)))
    same(lvm_outputs(again), expected)
    assert (again.context_images, again.lead_ids) == (model.context_images, model.lead_ids)
    assert repr(again) == repr(model)
    assert repr(model).startswith("Lvm(") and "from my_lvm step 300, moving average" in repr(model)


def test_the_average_is_what_is_saved(lvm_run, tmp_path):
    raw = vlm_jax.load("lvm", str(lvm_run), averaged=False)
    vlm_jax.load("lvm", str(lvm_run)).save(tmp_path / "average")
    raw.save(tmp_path / "raw")
    average, raw = (saving.read_params(tmp_path / name) for name in ("average", "raw"))
    same(average, jax.tree.map(lambda x: x * 0.5, raw))
    step = checkpoints.find(lvm_run)
    same(raw, jax.tree.map(np.asarray, checkpoints.load_params(step, averaged=False)))


def test_a_tokenizer(tmp_path):
    model = vlm_jax.load("vqgan", "tiny")
    model.save(tmp_path / "saved")
    again = vlm_jax.load("vqgan", str(tmp_path / "saved"))
    ids = model.encode(PICTURE)
    same(again.encode(PICTURE), ids)
    same(again.decode(ids[None]), model.decode(ids[None]))
    assert repr(again) == repr(model) and "from tiny" in repr(model)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert 'vlm_jax.load("vqgan"' in card and "1,024 codes" in card


def test_nxtp_of_both_towers(nxtp_run, tmp_path):
    model = vlm_jax.load("nxtp", str(nxtp_run))
    expected = model.label([PICTURE], k=6, max_tokens=4, unfinished=True)
    assert expected[0]
    model.save(tmp_path / "saved")
    again = vlm_jax.load("nxtp", str(moved(tmp_path / "saved", tmp_path)))
    assert again.label([PICTURE], k=6, max_tokens=4, unfinished=True) == expected
    assert type(again.cfg.vision) is type(model.cfg.vision)
    same(again.params, jax.tree.map(np.asarray, model.params))


def test_nxtp_with_sentencepiece_from_released_files(golden_nxtp, tmp_path):
    """And a prompt that is not the first."""
    vocabulary = nxtp.model.vocabulary
    words = vocabulary.load(str(golden_nxtp / "tokenizer.model"))
    cfg = network.NxtpConfig(
        clip.VISION_PRESETS["tiny"],
        dataclasses.replace(network.DECODERS["tiny"], vocab_size=words.size),
    )
    params = random_like(network.make(cfg).abstract())
    model = nxtp.Nxtp(cfg, params, words, prompt=vocabulary.PROMPTS[3])
    model.save(tmp_path / "saved")
    again = vlm_jax.load("nxtp", str(tmp_path / "saved"))
    options = dict(k=6, max_tokens=4, unfinished=True)
    assert again.label(PICTURE, **options) == model.label(PICTURE, **options)
    assert again.tokenizer.prompt("a") == words.prompt("a")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scanned", [True, False])
def test_the_training_form_is_the_inverse_of_the_decode_form(tied, scanned):
    cfg = llama.LlamaConfig(
        20, 16, 3, 24, 4, num_kv_heads=2, tie_embeddings=tied, scan_layers=scanned
    )
    network = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))
    params = random_like(network.abstract())
    made, made_cfg = llama.training_form(*llama.decode_form(params, cfg))
    if not scanned:
        layers = [params["layers"][str(i)] for i in range(cfg.depth)]
        params["layers"] = jax.tree.map(lambda *xs: np.stack(xs), *layers)
    same(made, params)
    assert made_cfg == dataclasses.replace(cfg, scan_layers=True)


# ---- the folder --------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path):
    model = vlm_jax.load("vqgan", "tiny")
    model.save(tmp_path / "saved", max_shard_bytes=500_000)
    index = json.loads((tmp_path / "saved" / "params.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(model.params))
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    for name in shards:
        assert set(safetensors_file.read(tmp_path / "saved" / name)) == {
            tensor for tensor, shard in index["weight_map"].items() if shard == name
        }
    same(vlm_jax.load("vqgan", str(tmp_path / "saved")).encode(PICTURE), model.encode(PICTURE))


def test_half_the_size(lvm_run, tmp_path):
    model = vlm_jax.load("lvm", str(lvm_run))
    model.save(tmp_path / "saved", dtype="bfloat16")
    held = jax.tree.leaves(saving.read_params(tmp_path / "saved"))
    assert {x.dtype.name for x in held} == {"bfloat16"}
    again = vlm_jax.load("lvm", str(tmp_path / "saved"))
    again.save(tmp_path / "again")  # the smallest that changes no value
    assert {x.dtype.name for x in jax.tree.leaves(saving.read_params(tmp_path / "again"))} == {
        "bfloat16"
    }
    same(lvm_outputs(vlm_jax.load("lvm", str(tmp_path / "again"))), lvm_outputs(again))


def test_a_dtype_that_changes_no_value_changes_no_output(tmp_path):
    model = vlm_jax.load("vqgan", "tiny")  # shipped in float16
    model.save(tmp_path / "saved", dtype="float16")
    again = vlm_jax.load("vqgan", str(tmp_path / "saved"))
    ids = model.encode(PICTURE)[None]
    same(again.decode(ids), model.decode(ids))


def test_only_what_was_saved_is_replaced(tmp_path):
    model = vlm_jax.load("vqgan", "tiny")
    folder = tmp_path / "saved"
    folder.mkdir()
    model.save(folder)  # empty
    model.save(folder, max_shard_bytes=500_000)  # ours
    assert not (folder / "params.safetensors").exists()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds .*notes.txt"):
        model.save(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds thesis.tex; choose another folder"):
        model.save(tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "saved"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    model = vlm_jax.load("vqgan", "tiny")
    model.save(tmp_path / "saved")
    bad = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))
    with pytest.raises(errors.WeightsError, match="not finite"):
        bad.save(tmp_path / "saved")
    same(vlm_jax.load("vqgan", str(tmp_path / "saved")).encode(PICTURE), model.encode(PICTURE))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    "name", ["params.safetensors", "tokenizer/params.safetensors", "tokenizer/config.json"]
)
def test_what_has_changed_since_is_refused(lvm_run, tmp_path, name):
    vlm_jax.load("lvm", str(lvm_run)).save(tmp_path / "saved")
    content = bytearray((tmp_path / "saved" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "saved" / name).write_bytes(content)
    with pytest.raises(errors.WeightsError, match=f"{name} has changed since it was saved"):
        vlm_jax.load("lvm", str(tmp_path / "saved"))
    (tmp_path / "saved" / name).unlink()
    with pytest.raises(errors.WeightsError, match=f"{name} is missing"):
        vlm_jax.load("lvm", str(tmp_path / "saved"))


def test_a_folder_of_another_system_or_version(tmp_path):
    vlm_jax.load("vqgan", "tiny").save(tmp_path / "saved")
    with pytest.raises(ValueError, match="of the system 'vqgan', not of 'lvm'"):
        vlm_jax.load("lvm", str(tmp_path / "saved"))
    file = tmp_path / "saved" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(errors.WeightsError, match="format 99, this version reads 1"):
        vlm_jax.load("vqgan", str(tmp_path / "saved"))


@pytest.mark.parametrize("change, message", [
    (dict(task=3), "task is no section"), (dict(files=[]), "files is no section"),
    (dict(load={"colour": "red"}), "loaded without 'colour'"),
    (dict(formatter={"sise": 64}), "formatter.sise"), (dict(model={"depth": 2}), "model.depth"),
    (dict(files={"../x": ""}), "names '../x', which is outside"),
])  # fmt: skip
def test_a_config_that_makes_no_model(tmp_path, change, message):
    vlm_jax.load("vqgan", "tiny").save(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        vlm_jax.load("vqgan", str(tmp_path / "saved"))


def test_the_card(lvm_run, tmp_path):
    model = vlm_jax.load("lvm", str(lvm_run))
    model.save(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for text in (
        "my_lvm step 300, moving average",
        "upstream=llama=smollm2",
        "SmolLM2-135M-Instruct (GGUF Q4_1): Apache-2.0",
        "photos (image_folder)",
        f"vlm_jax {vlm_jax.__version__}",
        config["files"]["params.safetensors"],
        "`tokenizer/` has a card of its own",
    ):
        assert text in card
    everything = card + json.dumps(config)
    assert str(tmp_path) not in everything  # nothing of this machine
    assert pathlib.Path(tmp_path / "saved" / "tokenizer" / "README.md").exists()


# ---- training from it --------------------------------------------------------------------------


def laid(system, recipe_init, task, capsys):
    module = {"lvm": lvm, "nxtp": nxtp}[system]
    zero = jax.tree.map(
        lambda x: jax.numpy.zeros(x.shape), jax.eval_shape(task.init, jax.random.key(0))
    )
    made = starting_point.lay_weights(recipe_init, task, zero, module.load_upstream)
    return made, capsys.readouterr().err


@pytest.mark.parametrize("key", ["run", "upstream"])
def test_a_run_starts_from_it(lvm_run, tmp_path, capsys, key):
    model = vlm_jax.load("lvm", str(lvm_run))
    model.save(tmp_path / "saved")
    task = lvm.make_task(LVM_MODEL, **LVM_TASK)
    init = checkpoints.InitConfig(**{key: str(tmp_path / "saved")})
    made, said = laid("lvm", init, task, capsys)
    same(made, saving.read_params(tmp_path / "saved"))
    assert f"from init.{key}={tmp_path / 'saved'}" in said and "random" not in said
    if key == "run":
        assert "(my_lvm step 300, moving average)" in said


@pytest.mark.parametrize("key", ["run", "upstream"])
def test_a_run_of_nxtp_starts_from_it(nxtp_run, tmp_path, capsys, key):
    config = checkpoints.find(nxtp_run).config
    vlm_jax.load("nxtp", str(nxtp_run)).save(tmp_path / "saved")
    task = nxtp.make_task(config["model"], **config["task"])
    init = checkpoints.InitConfig(**{key: str(tmp_path / "saved")})
    made, said = laid("nxtp", init, task, capsys)
    same(made, saving.read_params(tmp_path / "saved"))
    assert "random" not in said
