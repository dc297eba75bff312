"""A run goes on, is loaded and is evaluated as its checkpoint says; see also test_resume.py."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests import tiny_system
from vlm_jax import checkpoints, main
from vlm_jax.checkpoints import commit_marker
from vlm_jax.program import config as config_lib
from vlm_jax.program import metric_writer, optim, resume, run, scores, train, update

# ---- what a change of the recipe means ----------------------------------------------------------


def test_changes_are_named_by_key_with_both_values():
    old = {"optim": {"lr": 1e-3, "betas": (1, 2)}, "evals": {}, "gone": 1}
    new = {"optim": {"lr": 1e-4, "betas": [1, 2]}, "evals": {"a": {"every": 2}}}
    assert resume.show(resume.changes(old, new)) == [
        "evals.a.every: (not set) -> 2",
        "gone: 1 -> (not set)",
        "optim.lr: 0.001 -> 0.0001",
    ]


@dataclasses.dataclass(frozen=True)
class Task:
    width: int = 8
    dtype: str = "float32"
    tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class Formatter:
    scale: int = 1
    sleep_s: float = 0.0


def meaning(old, new, files=({}, {})):
    """Keys whose change is refused."""

    def make(config):
        return Task(**config["model"], **config.get("task", {})), Formatter(**config["formatter"])

    def rows_of(formatter):
        return [{"x": np.arange(3) * formatter.scale}]

    def meta(config, files):
        config = {"model": {}, "task": {}, "formatter": {}} | config
        return {"config": config, "files": files}

    return list(resume.changed_meaning(meta(old, files[0]), meta(new, files[1]), make, rows_of))


def test_which_changes_are_refused():
    assert meaning({"model": {"width": 8}}, {"model": {"width": 4}}) == ["model.width"]
    assert meaning({"model": {"width": 8}}, {}) == []  # the default, written out
    assert meaning({"model": {"dtype": "float32"}}, {"model": {"dtype": "bfloat16"}}) == []
    both = {"model": {"dtype": "bfloat16", "width": 4}}
    assert meaning({}, both) == ["model.width"]
    assert meaning({"optim": {"lr": 1.0}}, {"optim": {"lr": 2.0}}) == []
    assert meaning({"system": "a"}, {"system": "b"}) == ["system"]
    # A field that this version knows no more: then the words count.
    assert meaning({"model": {"old": 1}}, {}) == ["model.old"]
    assert meaning({"formatter": {"scale": 2}}, {}) == ["formatter.scale"]
    assert meaning({"formatter": {"sleep_s": 2.0}}, {}) == []  # it makes the same rows


def test_files_are_compared_by_their_content(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "words").write_text(content)
    a, b, c = (str(tmp_path / name) for name in "abc")

    def refused(old, new):
        old, new = {"task": {"tokenizer": old}}, {"task": {"tokenizer": new}}
        return meaning(old, new, (resume.files_of(old), resume.files_of(new)))

    assert refused(a, b) == []
    assert refused(a, c) == ["task.tokenizer", "task.tokenizer (content)"]
    before = resume.files_of({"task": {"tokenizer": a}})
    (tmp_path / "a" / "words").write_text("z")
    after = resume.files_of({"task": {"tokenizer": a}})
    same = {"task": {"tokenizer": a}}
    assert meaning(same, same, (before, after)) == ["task.tokenizer (content)"]
    assert resume.files_of({"model": {"preset": a}, "task": {"k": "no/such"}}) == {}


def test_rows_seen_by_older_checkpoints():
    saved = {"config": {"train": {"batch_size": 4}}, "data": {"step": 3}}
    assert resume.rows_seen(saved, 3, batch_size=2) == 12
    saved["data"]["rows"] = 20
    assert resume.rows_seen(saved, 3, batch_size=2) == 20


# ---- the optimizer's state ----------------------------------------------------------------------

PARAMS = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.full(2, 2.0)}}


def _state(**settings):
    """A state after some updates, its abstract form, and what begins a fresh optimizer."""
    config = optim.OptimConfig(**({"weight_decay": 0.0, "clip_norm": 0.0} | settings))
    recipe = run.Recipe("tiny", {}, train.TrainConfig(9, 1), None, optim=config)
    optimizer = optim.make_optimizer(config, 9)

    def begin(params):
        return update.fresh_optimizer(params, optimizer, recipe)

    state = {"step": jnp.int32(4), "params": PARAMS, **begin(PARAMS)}
    numbers = iter(range(1, 100))
    filled = jax.tree.map(
        lambda x: x + next(numbers) if x.ndim else x + 4,
        {key: x for key, x in state.items() if key not in ("step", "params")},
    )
    return {**state, **filled}, begin


def _moments(state):
    """{"mu/a/w": values} without the places in the chain."""
    flat = resume.leaves.flatten(state)
    return {
        resume._meaning(name).removeprefix("opt_state/"): np.asarray(x, np.float32)
        for name, x in flat.items()
        if "/mu/" in name or "/nu/" in name
    }


def _switch(workdir, before, after):
    saved, _ = _state(**before)
    with checkpoints.Checkpointer(workdir) as saver:
        saver.save(4, saved, {})
    fresh, begin = _state(**after)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), fresh)
    with checkpoints.Checkpointer(workdir) as saver:
        state, notes = resume.restore(saver, 4, target, begin)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    counts = [x for name, x in resume.leaves.flatten(state).items() if name.endswith("count")]
    assert [int(x) for x in counts] == [4, 4]
    return saved, state, notes


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, {"clip_norm": 1.0}),
        ({"clip_norm": 1.0}, {}),
        ({}, {"weight_decay": 0.1, "clip_norm": 1.0}),
        ({"weight_decay": 0.1}, {"lr_scale": {"^a/": 0.5}}),
    ],
)
def test_moments_are_found_again_when_the_chain_changes(tmp_path, before, after):
    saved, state, notes = _switch(tmp_path, before, after)
    assert notes == []
    kept, now = _moments(saved), _moments(state)
    assert kept.keys() == now.keys() and len(now) == 4
    for name in now:
        np.testing.assert_array_equal(now[name], kept[name])


def test_averaging_switched_on_and_off(tmp_path):
    _, state, (note,) = _switch(tmp_path / "on", {}, {"ema": 0.9})
    np.testing.assert_array_equal(state["ema"]["b/w"], PARAMS["b"]["w"])
    assert note.startswith("optim.ema: the moving average starts from the parameters of step 4")
    _, state, (note,) = _switch(tmp_path / "off", {"ema": 0.9}, {})
    assert "ema" not in state and "of the checkpoint is dropped: 2 arrays (ema/a/w" in note


def test_other_parameters_learn_and_another_dtype_of_moments(tmp_path):
    saved, state, notes = _switch(tmp_path / "1", {"trainable": "^a/"}, {"trainable": "^b/"})
    assert all(not x.any() for x in _moments(state).values())
    assert "opt_state/0/mu/b/w, opt_state/0/nu/b/w) are not in the checkpoint" in notes[0]
    assert "are not needed" in notes[1]
    saved, state, (note,) = _switch(tmp_path / "2", {}, {"moment_dtype": "bfloat16"})
    assert "2 arrays" in note and "converted to bfloat16" in note
    np.testing.assert_array_equal(_moments(state)["mu/a/w"], _moments(saved)["mu/a/w"])


def test_another_model_is_still_another_model(tmp_path):
    saved, begin = _state()
    with checkpoints.Checkpointer(tmp_path) as saver:
        saver.save(4, saved, {})
        saver.wait()
        target = {**saved, "params": {**PARAMS, "a": {"w": jnp.ones(5)}}}
        with pytest.raises(checkpoints.CheckpointError, match="another model: 1 of 3 leaves"):
            resume.restore(saver, 4, target, begin)


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return tiny_system.write_numbers(tmp_path_factory.mktemp("data") / "numbers.jsonl")


def recipe(numbers, **changes):
    """The tiny recipe, ten updates; `changes` are "section.key" with __ for the dot."""
    c = tiny_system.get_config()
    c.data.mixture.lines.path = c.evals.held_out.data.mixture.lines.path = str(numbers)
    c.mesh = dict(data=8, fsdp=1, tensor=1)
    c.init = dict(run="")
    c.train.steps, c.train.save_every = 10, 5
    for key, value in changes.items():
        section, _, field = key.partition("__")
        c[section][field] = value
    return c


@pytest.fixture(scope="module")
def trained(numbers, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run.run(recipe(numbers, optim__ema=0.5), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def tree(folder):
    """{file: content} of a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_finished_run_and_failed_starts_write_nothing(numbers, workdir, tmp_path, capfd):
    before = tree(workdir)
    assert run.run(recipe(numbers, optim__ema=0.5), workdir) == {}
    assert "nothing to train" in capfd.readouterr().err
    with pytest.raises(config_lib.ConfigError) as refused:
        run.run(recipe(numbers, train__steps=20, task__noise=0.5), workdir)
    message = str(refused.value)
    assert "the recipe is not the one of step 10" in message and "init.insist=True" in message
    assert "task.noise: 0.1 -> 0.5" in message
    with pytest.raises(checkpoints.CheckpointError, match="another model"):
        run.run(recipe(numbers, train__steps=20, model__width=32), workdir)
    broken = recipe(numbers, train__steps=20)
    broken.evals.held_out.predict = "scores"
    with pytest.raises(config_lib.ConfigError, match="scores"):
        run.run(broken, workdir)
    assert tree(workdir) == before
    with pytest.raises(config_lib.ConfigError, match="scores"):
        run.run(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind", [("eval", "file"), ("checkpoints", "file"), ("metrics.jsonl", "folder")]
)
def test_something_else_in_the_place_of_ours(numbers, tmp_path, name, kind):
    if kind == "file":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(config_lib.ConfigError, match=f"{name} is (not )?a folder, and a run"):
        run.run(recipe(numbers), tmp_path)


@pytest.mark.slow
def test_insisting_and_named_changes(numbers, workdir, capfd):
    changed = recipe(
        numbers,
        train__steps=12,
        task__noise=0.5,
        init__insist=True,
        optim__lr=1e-4,
        optim__ema=0.0,
        optim__clip_norm=0.0,
        optim__weight_decay=0.0,
        train__batch_size=16,
    )
    run.run(changed, workdir)
    said = capfd.readouterr().err
    for line in (
        "changed since step 10: task.noise: 0.1 -> 0.5",
        "changed since step 10: optim.lr: 0.003 -> 0.0001",
        "with this batch size data go on at row 80: none is skipped or read twice",
        "optim.ema: the moving average of the checkpoint is dropped",
    ):
        assert line in said
    # Two updates of sixteen rows from row 80.
    assert checkpoints.find(workdir).meta["data"]["rows"] == 80 + 2 * 16


@pytest.mark.slow
def test_evaluation_leaves_what_training_wrote(numbers, workdir, capfd):
    kept = tree(workdir)
    lines = []

    def evaluate(expected=None, **changes):
        c = recipe(numbers, **({"optim__ema": 0.5} | changes))
        found = run.run(c, workdir, mode="evaluate")
        written = {p: x for p, x in tree(workdir).items() if p.name != "evaluation.jsonl"}
        assert {p: x for p, x in written.items() if p in kept} == kept
        lines[:] = [json.loads(x) for x in (workdir / "evaluation.jsonl").read_text().splitlines()]
        return found["eval/held_out/perplexity"], lines[-1], set(written) - set(kept)

    (trained,) = [
        line["eval/held_out/perplexity"]
        for line in tiny_system.metrics(workdir)
        if line["step"] == 10 and "train/loss" not in line
    ]
    score, line, new = evaluate()
    assert score == pytest.approx(trained) and "settings" not in line and not new
    assert "moving average" in capfd.readouterr().err
    raw, line, _ = evaluate(init__averaged=False)
    assert abs(raw - trained) > 1e-3 and line["settings"] == {"init.averaged": False}
    fewer = recipe(numbers).evals.held_out.to_dict() | {"max_batches": 1}
    score, line, new = evaluate(evals__held_out=fewer)
    assert line["settings"] == {"evals.held_out.max_batches": 1}
    assert line["folder"].startswith("eval/00000010-") and score != pytest.approx(trained)
    # The recipe of an evaluation makes nothing else of the parameters.
    with pytest.raises(config_lib.ConfigError, match="task.noise: 0.1 -> 0.5"):
        evaluate(task__noise=0.5)
    _, line, _ = evaluate(task__noise=0.5, init__insist=True)
    assert line["settings"] == {"task.noise": 0.5}
    assert len(lines) == 4


@pytest.mark.slow
def test_a_recorded_recipe_is_a_recipe(trained, tmp_path, capsys):
    config = f"--config={trained / 'config.json'}"
    argv, record = main._take_record(["main", config, "--workdir=w", "--config.train.steps=7"])
    values = main._define_flags(argv, record)
    values(argv)
    assert values.workdir == "w" and values.config.train.steps == 7
    assert values.config.optim.ema == 0.5 and values.config.system == "tests.tiny_system"
    # Alone, an evaluation takes the recipe of the step.
    argv = ["main", "--mode=evaluate", f"--workdir={trained}"]
    assert main._take_record(argv) == (argv, checkpoints.find(trained).config)
    for argv in (
        ["main", "--workdir", "w"],
        ["main", "--config=a.py", "--mode=evaluate"],
        ["main"],
    ):
        assert main._take_record(argv) == (argv, None)
    with pytest.raises(SystemExit):
        main._take_record(["main", "--mode=evaluate", f"--workdir={tmp_path / 'typo'}"])
    assert "no such checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_load_goes_by_what_the_step_says(workdir, monkeypatch):

    def made(task, formatter, params):
        return (task, params)

    monkeypatch.setattr(tiny_system, "from_run", made, raising=False)
    meta = json.loads((workdir / "config.json").read_text())
    meta["config"]["model"]["width"] = 99  # as an evaluation used to leave it
    (workdir / "config.json").write_text(json.dumps(meta))
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "10"):
        task, params = vlm_jax.load("tests.tiny_system", str(path))
        assert task.width == 16
        jax.tree.map(np.testing.assert_array_equal, params, checkpoints.load_params(workdir))
    _, raw = vlm_jax.load("tests.tiny_system", str(workdir), averaged=False)
    assert np.abs(raw["head"]["kernel"] - params["head"]["kernel"]).max() > 0
    (workdir / "config.json").unlink()
    assert vlm_jax.load("tests.tiny_system", str(workdir))[0].width == 16


@pytest.mark.slow
def test_nothing_to_evaluate(numbers, trained, tmp_path):
    c = recipe(numbers, init__run=str(trained))
    with pytest.raises(config_lib.ConfigError, match="nothing to evaluate: .*does not exist"):
        run.run(c, tmp_path / "typo", mode="evaluate", given=["train.steps"])
    assert not (tmp_path / "typo").exists()
    run.run(c, tmp_path / "new", mode="evaluate", given=["init.run"])
    (line,) = (tmp_path / "new" / "evaluation.jsonl").read_text().splitlines()
    assert json.loads(line)["settings"] == {"init.run": str(trained)}


@pytest.mark.slow
def test_starting_from_a_run_takes_its_average_and_says_so(numbers, trained, tmp_path, capfd):
    step = checkpoints.find(trained)
    for averaged in (True, False):
        c = recipe(numbers, init__run=str(trained), init__averaged=averaged, train__steps=1)
        c.optim.lr, c.evals = 0.0, {}
        c.optim.weight_decay = 0.0
        run.run(c, tmp_path / str(averaged))
        name = f"init.run={trained} (step 10{', moving average' if averaged else ''})"
        assert f"embed: 1 tensors (512 numbers) from {name}" in capfd.readouterr().err
        start = checkpoints.load_params(tmp_path / str(averaged))
        expected = checkpoints.load_params(step, averaged=averaged)
        jax.tree.map(np.testing.assert_array_equal, start, expected)
    raw = checkpoints.load_params(step, averaged=False)
    assert np.abs(raw["head"]["kernel"] - checkpoints.load_params(step)["head"]["kernel"]).max() > 0


class Failing:
    """Raises while `broken`."""

    predict = "score"
    broken = True

    def run(self, data):
        if self.broken:
            raise ZeroDivisionError("one picture has no covariance")
        means = [data.predict(batch)["logp"].mean() for batch in data.batches]
        return {"mean": float(np.mean(means))}


@pytest.fixture
def failing(monkeypatch):
    """A recipe's second evaluation, which fails; `Failing.broken` mends it."""
    monkeypatch.setattr(Failing, "broken", True)
    made = run.evaluate.make

    def make(evals):
        found = made(evals)
        for evaluation in found:
            if evaluation.name == "late":
                evaluation.evaluator = Failing()
        return found

    monkeypatch.setattr(run.evaluate, "make", make)

    def recipe_of(numbers, **changes):
        c = recipe(numbers, **changes)
        c.evals.late = c.evals.held_out.to_dict() | {"every": 4}
        return c

    return recipe_of


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["continue", "stop", "ignore"])
def test_an_evaluation_that_fails_costs_no_training(numbers, tmp_path, failing, choice, capfd):
    c = failing(numbers, train__failed_evaluation=choice)
    if choice == "ignore":
        run.run(c, tmp_path)
    else:
        with pytest.raises(scores.EvaluationError, match="'late' failed: ZeroDivisionError: one"):
            run.run(c, tmp_path)
    reached = 4 if choice == "stop" else 10
    assert checkpoints.find(tmp_path).number == reached
    failed = [x["step"] for x in tiny_system.metrics(tmp_path) if "eval/late/failed" in x]
    assert failed == ([4] if choice == "stop" else [4, 8, 10])

    Failing.broken = False
    capfd.readouterr()
    run.run(c, tmp_path)
    said = capfd.readouterr().err
    assert f"resuming from step {reached} of 10" in said
    lines = tiny_system.metrics(tmp_path)
    assert [x["step"] for x in lines if "train/loss" in x] == list(range(1, 11))
    mended = [x["step"] for x in lines if "eval/late/mean" in x]
    assert mended == ([4, 8, 10] if choice == "stop" else [10])
    before = tree(tmp_path)
    assert run.run(c, tmp_path) == {} and tree(tmp_path) == before


@pytest.mark.slow
def test_the_program_ends_with_status_1_and_no_trace(numbers, tmp_path, failing, capsys):
    data = {"mixture": {"lines": {"type": "jsonl", "path": str(numbers)}}}
    evals = {"late": {"type": "perplexity", "predict": "score", "data": data}}
    arguments = [
        f"--config={tiny_system.__file__}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.mixture.lines.path={numbers}",
        f"--config.evals={evals}",
        "--config.mesh={'data': 8, 'fsdp': 1, 'tensor': 1}",
        "--config.train.steps=2",
    ]
    for mode in ("train", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            main.main(["main", *arguments, f"--mode={mode}"])
        said = capsys.readouterr().err
        assert stopped.value.code == 1 and "Traceback" not in said
        assert "the evaluation 'late' failed: ZeroDivisionError" in said


@pytest.mark.slow
def test_metrics_reach_the_disk_before_the_marker(numbers, tmp_path, monkeypatch):
    events = []
    sync, commit = metric_writer.MetricWriter.sync, commit_marker.commit

    def synced(writer):
        sync(writer)
        events.append(("metrics", tiny_system.metrics(tmp_path)[-1]["step"]))

    def committed(folder):
        events.append(("marker", int(folder.name)))
        commit(folder)

    monkeypatch.setattr(metric_writer.MetricWriter, "sync", synced)
    monkeypatch.setattr(commit_marker, "commit", committed)
    c = recipe(numbers)
    c.evals = {}
    run.run(c, tmp_path)
    assert sorted(events) == [("marker", 5), ("marker", 10), ("metrics", 5), ("metrics", 10)]
    for step in (5, 10):
        assert events.index(("metrics", step)) < events.index(("marker", step))


@pytest.mark.slow
def test_what_is_not_finite_is_neither_saved_nor_continued(numbers, workdir, monkeypatch, capfd):
    # A frozen part or `after_update` can break where loss and norms do not show it.
    def breaks(task, optimizer, recipe):
        update = train.make_train_step(task, optimizer, recipe)

        def step(state, batch, rng):
            new, metrics = update(state, batch, rng)
            table = jnp.where(new["step"] == 15, jnp.nan, new["params"]["embed"]["table"])
            new["params"]["embed"] = {"table": table}
            return new, metrics

        return step

    monkeypatch.setattr(tiny_system, "make_train_step", breaks, raising=False)
    c = recipe(numbers, train__steps=20, optim__ema=0.5)
    with pytest.raises(train.TrainingStopped, match="step 15 is not saved: .*params/embed/table"):
        run.run(c, workdir)
    monkeypatch.delattr(tiny_system, "make_train_step")
    assert checkpoints.find(workdir).number == 10
    run.run(c, workdir)
    assert checkpoints.find(workdir).number == 20


@pytest.mark.slow
def test_the_advice_after_a_loss_that_is_not_finite_works(numbers, tmp_path, capfd):
    settings = dict(optim__clip_norm=0.0, train__save_every=1)
    with pytest.raises(train.TrainingStopped) as stopped:
        run.run(recipe(numbers, optim__lr=1e38, **settings), tmp_path)
    message = str(stopped.value)
    # The first update of a warm-up has rate 0; the second leaves nothing that can be trained.
    assert "optim/param_norm=inf at step 2 (loss=" in message and "numbers.jsonl:" in message
    assert "The newest checkpoint is of step 1, before this; lower optim.lr, set" in message
    run.run(recipe(numbers, optim__lr=1e-3, optim__clip_norm=1.0), tmp_path)
    assert "resuming from step 1 of 10" in capfd.readouterr().err
    assert checkpoints.find(tmp_path).number == 10


@pytest.mark.slow
def test_data_and_metrics_that_have_changed_are_named(numbers, workdir, tmp_path, capfd):
    (workdir / "metrics.jsonl").unlink()
    fewer = tmp_path / "numbers.jsonl"
    fewer.write_text("\n".join(numbers.read_text().splitlines()[:20]) + "\n")
    run.run(recipe(fewer, train__steps=11, optim__ema=0.5), workdir)
    said = capfd.readouterr().err
    assert "there is no metrics.jsonl: it begins after step 10" in said
    assert "data.mixture.lines has 20 records, not 64; they come in another order" in said
    assert f"data.mixture.lines.path: '{numbers}' -> '{fewer}'" in said
    steps = [x["step"] for x in tiny_system.metrics(workdir) if "train/loss" in x]
    assert steps == [11]
