"""What a user can get wrong, through the command line: one message, exit status 2, no trace."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest

from vlm_jax import main, predict
from vlm_jax.datasets import visual_sentences
from vlm_jax.encoders import image_tokenizer
from vlm_jax.program import recipes
from vlm_jax.program import run as run_lib
from vlm_jax.systems.lvm import token_files

RECIPE = str(pathlib.Path(__file__).parents[1] / "configs" / "lvm_3b.py")


def fails(capsys, arguments, *words, status=2, run=main.main):
    """Runs the command line in this process; returns stderr."""
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == status, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} not in:\n{err}"
    return err


@pytest.fixture
def train(tmp_path, capsys):
    """Runs the tiny recipe on a small token file, with overrides; returns stderr on failure."""

    def run(*overrides, sentences=None, words=(), path=None, expect_failure=True):
        if path is None:
            path = tmp_path / "sentences.array_record"
            if sentences is None:
                sentences = [np.arange(512)] * 8
            write(path, sentences)
        arguments = [
            "main",
            f"--config={RECIPE}:tiny",
            f"--workdir={tmp_path / 'run'}",
            "--config.prepare={}",
            "--config.evals={}",
            f"--config.data.mixture={{'own': {{'type': 'array_record', 'path': '{path}'}}}}",
            "--config.model.depth=1",
            "--config.model.width=32",
            "--config.model.mlp_width=32",
            "--config.train.steps=2",
            "--config.optim.warmup_steps=0",
            "--config.train.tensorboard=False",
            *overrides,
        ]
        if not expect_failure:
            return main.main(arguments)
        return fails(capsys, arguments, *words)

    return run


def write(path, sentences):
    visual_sentences.write(
        path,
        (visual_sentences.Sentence(ids, 8, f"s{i}") for i, ids in enumerate(sentences)),
    )


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.train.stpes=5", ["unknown key train.stpes", "did you mean 'steps'"]),
        ("--config.trian.steps=5", ["unknown key", "trian", 'Did you mean "train"']),
        ("--config.model.widht=5", ["unknown key model.widht", "did you mean 'width'"]),
        ("--config.task.loss_maen='row'", ["unknown key task.loss_maen", "'loss_mean'"]),
        ("--config.formatter.max_token=5", ["formatter.max_token", "'max_tokens'"]),
        ("--config.optim.lr=fast", ["optim.lr", "fast"]),
        ("--config.train.batch_size=8.5", ["train.batch_size", "8.5"]),
        ("--config.model.width=31", ["width", "31", "num_heads 2"]),
        ("--config.train.batch_size=6", ["train.batch_size=6", "mesh.data*mesh.fsdp"]),
        ("--config.mesh.data=3", ["mesh.data=3", "8"]),
        ("--config.formatter.max_tokens=4096", ["4096", "max_tokens=2048"]),
        ("--config.system=lmv", ["no system called 'lmv'", "did you mean 'lvm'"]),
        ("--config.optim.trainable=^nothing", ["'^nothing' matches none"]),
        ("--config.optim.warmup_steps=50", ["warmup_steps=50 is longer", "train.steps=2"]),
        ("--config.optim.lr=-1e-3", ["optim: lr=-0.001 must be at least 0"]),
        ("--config.optim.lr=nan", ["optim: lr=nan"]),
        ("--config.train.seed=-1", ["train: seed=-1 must be between 0 and"]),
        ("--config.train.save_every=-5", ["train: save_every=-5"]),
        ("--config.train.steps=9999999999", ["train: steps=9999999999"]),
        ("--config.train.batch_size=9999999999", ["train: batch_size=9999999999"]),
        ("--config.optim.eps=1" + "0" * 400, ["optim"]),
        ("--config.model.depth=-1", ["model.depth=-1 must be between 1 and"]),
        ("--config.model.num_heads=0", ["model.num_heads=0 must be between 1 and"]),
        ("--config.formatter.bos_id=99999999999", ["bos_id=99999999999"]),
        ("--config.formatter.max_tokens=99999999999", ["max_tokens=99999999999"]),
        ("--config.model.num_kv_heads=-1", ["model.num_kv_heads=-1"]),
        ("--config.model.mlp_width=99999999999", ["model.mlp_width=99999999999"]),
        ("--config.model.rms_eps=-1.0", ["model.rms_eps=-1.0 must be"]),
        ("--config.model.dtype=fp32", ["model.dtype='fp32'", "float32"]),
        ("--config.task.codebook_size=-1", ["task: codebook_size=-1 must be between 1"]),
        ("--config.task.tokens_per_image=0", ["task: tokens_per_image=0"]),
        ("--config.task.top_p=1.5", ["task: top_p=1.5 must be between 0 and 1"]),
        ("--config.formatter.max_tokens=many", ["formatter.max_tokens"]),
        ("--config.formatter.fields=7", ["formatter.fields"]),
        ("--config.formatter.bos_id=None", ["formatter.bos_id"]),
        ("--config.system=os.path", ["'os.path' is no system", "make_task and no make_formatter"]),
        ("--config.data.num_workers=-1", ["data: num_workers=-1"]),
        ("--config.task.codebook_size=5000", ["codebook_size=5000", "vocab_size=1124"]),
        ("--config.data.packing=tight", ["packing='tight'", "stream"]),
        ("--config.init.upstream=/nowhere/x.safetensors", ["/nowhere/x.safetensors"]),
        (
            "--config.evals={'e': {'type': 'perplexty', 'data': {}}}",
            ["no evaluator called 'perplexty'", "did you mean 'perplexity'"],
        ),
    ],
)
def test_recipe(train, override, words):
    train(override, words=words)


def test_missing_recipe_and_flags(capsys, tmp_path):
    fails(capsys, ["main", "--config=configs/lvm_4b.py", f"--workdir={tmp_path}"], "lvm_4b.py")
    fails(capsys, ["main", f"--config={RECIPE}:tiny"], "--workdir")
    fails(capsys, ["main", f"--confg={RECIPE}"], "confg")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train.steps=2"], ["'train.steps=2' would be ignored", "--config.train.steps=2"]),
        (["config.train.steps=2"], ["did you mean --config.train.steps=2"]),
        (["mode=evaluate"], ["did you mean --mode=evaluate"]),
        (["train"], ["argument 'train' is not understood"]),
        (["--", "--config.train.steps=2"], ["'--config.train.steps=2'", "behind a bare '--'"]),
        (["--config.train.steps=1e1"], ["train.steps=1e1"]),
        (["--config.train.steps.x=1"], ["train.steps"]),
        (["--lr=1"], ["lr"]),
        (["--mode=eval"], ["eval"]),
    ],
)
def test_arguments_that_would_be_ignored(capsys, tmp_path, arguments, words):
    given = ["main", f"--config={RECIPE}:tiny", f"--workdir={tmp_path / 'run'}", *arguments]
    err = fails(capsys, given, *words)
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("config.json", ["is no recipe but the record of one"]),
        ("typo.py", ["SyntaxError", "typo.py"]),
        ("raises.py", ["ZeroDivisionError", "raises.py:2"]),
        ("no_function.py", ["get_config"]),
        ("returns.py", ["get_config() returned 3, not"]),
        ("returns.py:text", ["get_config() returned 'text'"]),
        ("exits.py", ["ends the program, by sys.exit(0)"]),
        ("lacks.py", ["lacks.py: KeyError: 'a'"]),
        ("own.py:tinyy", ["own.py:tinyy"]),
        ("", ["no recipe"]),
    ],
)
def test_recipes_that_cannot_be_read(capsys, tmp_path, name, words):
    sys.modules.pop("config_config", None)  # where the recipe before this one is loaded into
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "typo.py").write_text("def get_config(:\n")
    (tmp_path / "raises.py").write_text("def get_config(arg=''):\n    return 1 / 0\n")
    (tmp_path / "no_function.py").write_text("x = 1\n")
    (tmp_path / "returns.py").write_text("def get_config(arg=3):\n    return arg\n")
    (tmp_path / "exits.py").write_text("def get_config():\n    raise SystemExit(0)\n")
    (tmp_path / "lacks.py").write_text("def get_config():\n    return {}['a']\n")
    (tmp_path / "own.py").write_text("def get_config():\n    return {}\n")
    given = ["main", f"--config={tmp_path}/{name}", f"--workdir={tmp_path / 'run'}"]
    err = fails(capsys, given, *words)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("scheme", ["gs", "s3", "file", "https"])
def test_buckets_are_not_folders(capsys, tmp_path, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    given = ["main", f"--config={RECIPE}:tiny", f"--workdir={scheme}://bucket/run"]
    fails(capsys, given, f"--workdir={scheme}://bucket/run is not a folder", "Mount it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, words",
    [
        ("a**b", ["--workdir=", "a**b", "does not take '*'"]),
        ("file", ["is a file, not a folder"]),
        ("file/below", ["cannot be written to", "file/below", "choose another"]),
    ],
)
def test_workdirs_that_cannot_be(train, tmp_path, name, words):
    (tmp_path / "file").touch()
    train(f"--workdir={tmp_path / name}", words=words)
    assert not (tmp_path / "a**b").exists()


def test_missing_file(train, tmp_path):
    train(path=tmp_path / "absent.array_record", words=["no such file", "absent.array_record"])


def test_empty_data_set(train):
    train(sentences=[], words=["data.mixture.own is empty"])


def test_token_ids_out_of_range(train):
    ids = np.arange(512)
    ids[7] = 1124
    train(sentences=[ids] * 4, words=["token id 1124", "outside [0, 1124)", "array_record:0"])


def test_token_files_of_another_tokenizer(train, tmp_path):
    """As `tokenize_images` leaves them: a manifest beside the files."""
    token_files.write_manifest(tmp_path, image_tokenizer.ImageTokenizer.load("tiny", side=16))
    words = ["data.mixture.own", "made with tokens_per_image=16", "task.tokens_per_image is 64"]
    train(words=words)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"resolution": 16', '"resolution": 32'))
    train(words=["data.mixture.own", "task.tokenizer is", "tokenize the images again"])


def test_token_files_of_images_of_another_size(train):
    train(sentences=[np.arange(504)] * 4, words=["has 8 images of 63 ids", "is 64"])


def test_a_checkpoint_of_another_size(train):
    train(expect_failure=False)
    err = train(
        "--config.model.width=64",
        "--config.train.steps=4",
        words=[
            "is of another model",
            "embed/table",
            "[1124, 32]",
            "[1124, 64]",
            "In the recipe (there -> here): model.width: 32 -> 64",
        ],
    )
    assert "another workdir" in err


def test_a_loss_that_is_not_finite_names_and_saves_the_batch(train, tmp_path):
    err = train(
        "--config.optim.lr=1e30",
        "--config.optim.clip_norm=0.0",
        "--config.train.steps=20",
        words=["at step", "Records of the batch", "sentences.array_record:", "lower optim.lr"],
    )
    (saved,) = (tmp_path / "run").glob("nonfinite_batch_*.npz")
    assert saved.name in err
    with np.load(saved) as batch:
        assert batch["tokens"].shape == (8, 512)
    # Nothing of the broken state was kept.
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.parametrize("kind", ["truncated", "text", "bomb", "absent"])
def test_images_given_to_predict(capsys, tmp_path, kind):
    import io

    from PIL import Image

    path = tmp_path / f"{kind}.png"
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        buffer, "PNG"
    )
    if kind == "truncated":
        path.write_bytes(buffer.getvalue()[:2000])
    elif kind == "text":
        path.write_text("this is not an image")
    elif kind == "bomb":
        Image.new("1", (20_000, 10_000)).save(path)
    # The checkpoint does not exist either: both are said at once, before anything is loaded.
    arguments = ["lvm", "--checkpoint=/nowhere", "--continue", str(path)]
    fails(capsys, arguments, "no such checkpoint: /nowhere; also: ", path.name, run=predict.main)


def test_unknown_system_and_checkpoint(capsys, tmp_path):
    fails(capsys, ["lmv"], "no system 'lmv'", "lvm", run=predict.main)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["lvm", "--checkpoint=/nowhere", "--tokenizer=/nowhere", "--continue"]
    fails(capsys, [*arguments, str(tmp_path / "a.png")], "/nowhere", run=predict.main)


def test_a_run_of_another_system_is_refused(tmp_path):
    import vlm_jax

    (tmp_path / "checkpoints").mkdir()
    config = {"config": {"system": "vqgan", "model": {}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="run of the system 'vqgan', not of 'lvm'"):
        vlm_jax.load("lvm", str(tmp_path))


def test_overrides_reach_into_sections_that_a_recipe_leaves_out(tmp_path):
    recipe = tmp_path / "short.py"
    recipe.write_text("def get_config():\n    return {'system': 'lvm'}\n")
    sys.modules.pop("config_config", None)
    given = [f"--config={recipe}", f"--workdir={tmp_path}", "--config.init.insist=True"]
    config = main._parse(["main", *given, "--config.mesh.fsdp=2"]).config
    assert config.init.to_dict() == {"insist": True} and config.mesh.fsdp == 2
    fields = {field.name: field for field in dataclasses.fields(run_lib.Recipe)}
    sections = {name for name in fields if name not in ("system", "model", "train", "data", "path")}
    assert set(recipes.OPTIONAL) == sections


@pytest.mark.parametrize(
    "recipe, override, word",
    [
        ("vqgan_f16.py:tiny", "task.l1_weight=-1.0", "task: l1_weight=-1.0 must be at least 0"),
        ("vqgan_f16.py:tiny", "task.entropy_temperature=-1.0", "entropy_temperature=-1.0"),
        ("vqgan_f16.py:tiny", "formatter.size=None", "formatter.size"),
        ("vqgan_f16.py:tiny", "model.preset=3", "model.preset"),
        ("nxtp_g3m.py:tiny", "task.loss_chunk=-1", "task: loss_chunk=-1 must be at least 0"),
        ("nxtp_g3m.py:tiny", "model.decoder.depth=-1", "depth=-1 must be between 1"),
    ],
)
def test_settings_of_other_systems(capsys, tmp_path, recipe, override, word):
    sys.modules.pop("config_config", None)
    path = pathlib.Path(RECIPE).parent / recipe
    given = ["main", f"--config={path}", f"--workdir={tmp_path / 'run'}", f"--config.{override}"]
    fails(capsys, given, word)
    assert not (tmp_path / "run").exists()
