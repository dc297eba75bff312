"""What the runner of evaluations promises to evaluators and tasks."""

import dataclasses

import jax
import numpy as np
import pytest

from vlm_jax import answer
from vlm_jax.program import config as config_lib
from vlm_jax.program import evaluate, sharding

ROWS = [{"value": i, "id": f"r{i}"} for i in range(5)]


class Formatter:
    def __init__(self, scale=1):
        self._scale = scale

    def __call__(self, record, rng):
        host = answer.Host(truth=answer.Answer(text=str(record["value"])))
        return {"x": np.float32(self._scale * record["value"]), "host": host}

    def collate(self, arrays, hosts, *, truth):
        """The host adds 100 to the numbers of every batch."""
        hosts = [dataclasses.replace(host, caption=f"truth={truth}") for host in hosts]
        return {**arrays, "x": arrays["x"] + 100}, hosts

    def read(self, outputs, hosts):
        return [answer.Answer(text=f"{y:g}") for y in outputs["y"]]


class Task:
    """Doubles numbers."""

    @staticmethod
    def double(params, batch, rng, *, times=2):
        return {
            "y": times * batch["x"] + params["b"],
            "noise": jax.random.normal(rng, batch["x"].shape),
        }

    predict = {"double": double}

    def prompt_formatter(self, formatter, *, scale):
        assert isinstance(formatter, Formatter)
        if scale < 0:
            raise ValueError(f"scale={scale} is negative")
        return Formatter(scale)


class Evaluator:
    """What an evaluator sees, kept."""

    predict = "double"
    needs = ("y",)
    seen: list = []

    def run(self, data):
        for batch in data.batches:
            self.seen.append((batch, data.predict(batch), data.predict(batch)))
        return {"count": len(self.seen)}


def make(**entry):
    data = dict(mixture=dict(m=dict(type="memory", records=ROWS)))
    config = evaluate.EvalConfig(type="own", data=data, batch_size=2, **entry)
    from vlm_jax.data import pipeline

    evaluator = Evaluator()
    evaluator.seen = []
    return evaluate.Evaluation("own", config, evaluator, pipeline.DataConfig(**data))


def run(evaluation, tmp_path, task):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=4))
    params = {"b": np.float32(1)}
    shardings = {"b": sharding.replicated(mesh)}
    evaluate.check(evaluation, task, Formatter(), params)
    results = evaluate.Runner(task, Formatter(), mesh, shardings, 0)(evaluation, params, tmp_path)
    assert results == {"eval/own/count": 3.0}
    return evaluation.evaluator.seen


def test_batches_are_collated_once_before_evaluators_and_predictors(tmp_path):
    seen = run(make(), tmp_path, Task())
    values = [batch.arrays["x"].tolist() for batch, _, _ in seen]
    assert values == [[100, 101], [102, 103], [104, 100]]
    np.testing.assert_array_equal(seen[0][1]["y"], [201, 203])
    np.testing.assert_array_equal(seen[2][0].valid, [True, False])
    assert [host.id for host in seen[0][0].hosts] == ["r0", "r1"]
    assert [host.truth.text for host in seen[1][0].hosts] == ["2", "3"]  # not sent to the device
    assert seen[0][0].hosts[0].caption == "truth=False"
    assert [batch.rows.tolist() for batch, _, _ in seen] == [[0, 1], [2, 3], [4, 5]]


def test_answers_and_their_truth(tmp_path):
    class Compares(Evaluator):
        compares = True

        def run(self, data):
            said = [
                (a.text, h.truth.text, h.caption)
                for batch in data.batches
                for a, h in zip(data.answers(batch), batch.hosts)
            ]
            self.seen.append(said)
            return {"count": 3}

    evaluation = make()
    evaluation.evaluator = Compares()
    evaluation.evaluator.seen = []
    (said,) = run(evaluation, tmp_path, Task())
    assert said[:2] == [("201", "0", "truth=True"), ("203", "1", "truth=True")]


def test_options_go_to_the_predictor(tmp_path):
    seen = run(make(options=dict(times=3)), tmp_path, Task())
    np.testing.assert_array_equal(seen[0][1]["y"], [301, 304])


def test_options_that_cannot_be():
    def fails(match, **options):
        with pytest.raises(config_lib.ConfigError, match=match):
            evaluate.check(make(options=options), Task(), Formatter(), {"b": np.float32(1)})

    fails(r"evals.own.options.tims: predict\['double'\] takes no such thing.*'times'", tims=3)
    fails(r"evals.own.options.times=\[3\] is no number", times=[3])
    evaluation = make(options=dict(times=3))
    evaluation.evaluator.options = {"times": 4}
    with pytest.raises(config_lib.ConfigError, match="options.times follows from"):
        evaluate.check(evaluation, Task(), Formatter(), {"b": np.float32(1)})


def test_every_prediction_has_its_own_noise_and_a_second_pass_the_same(tmp_path):
    noise = [x["noise"].tolist() for _, *two in run(make(), tmp_path, Task()) for x in two]
    assert len({tuple(x) for x in noise}) == 6
    again = [x["noise"].tolist() for _, *two in run(make(), tmp_path, Task()) for x in two]
    assert noise == again


def test_a_formatter_of_its_own(tmp_path):
    seen = run(make(formatter=dict(scale=10)), tmp_path, Task())
    assert seen[1][0].arrays["x"].tolist() == [120, 130]


def test_formatters_that_cannot_be(tmp_path):
    def fails(match, task, **fields):
        with pytest.raises(config_lib.ConfigError, match=match):
            evaluate.check(make(formatter=fields), task, Formatter(), {"b": np.float32(1)})

    fails("evals.own.formatter: object makes no prompts", object(), scale=1)
    fails("unknown key evals.own.formatter.scal; did you mean 'scale'", Task(), scal=1)
    fails("evals.own.formatter: scale=-1 is negative", Task(), scale=-1)


def test_an_evaluator_may_look_at_the_first_batch():
    def refuse(batch):
        raise ValueError(f"{batch.arrays['x'].tolist()} is too much")

    evaluation = make()
    evaluation.evaluator.check = refuse
    with pytest.raises(config_lib.ConfigError, match=r"evals.own: \[100.0, 101.0\] is too much"):
        evaluate.check(evaluation, Task(), Formatter(), {"b": np.float32(1)})


def test_what_reading_answers_needs_is_compared_before_anything_runs():
    class Reads(Formatter):
        needs = ("y", "probs")

    evaluation = make()
    evaluate.check(evaluation, Task(), Reads(), {"b": np.float32(1)})  # compares no answers
    evaluation.evaluator.compares = True
    with pytest.raises(config_lib.ConfigError, match="evals.own: .*reading its answers also needs"):
        evaluate.check(evaluation, Task(), Reads(), {"b": np.float32(1)})


def test_data_that_a_predictor_cannot_take_name_the_evaluation():
    class Other(Task):
        @staticmethod
        def double(params, batch, rng, *, times=2):
            return {"y": batch["x"].reshape(7)}

        predict = {"double": double}

    with pytest.raises(config_lib.ConfigError, match=r"evals.own: predict\['double'\] cannot"):
        evaluate.check(make(), Other(), Formatter(), {"b": np.float32(1)})


def test_an_empty_path_makes_an_evaluation_inactive(capsys):
    evaluate._say_once.cache_clear()
    inner = dict(type="few_shot", answer="mask", queries=dict(type="pascal5i", path=""))
    evals = {
        "masks": dict(type="perplexity", data=dict(mixture=dict(pairs=inner))),
        "text": dict(type="perplexity", data=dict(mixture=dict(a=dict(type="jsonl", path="a")))),
    }
    assert [evaluation.name for evaluation in evaluate.make(evals)] == ["text"]
    assert [evaluation.name for evaluation in evaluate.make(evals)] == ["text"]
    said = capsys.readouterr().err
    # Once, although it is made twice.
    assert said.count("path is empty: evals.masks.data.mixture.pairs.queries.path") == 1
    # Mistakes are found in inactive entries too.
    evals["masks"]["typ"] = 1
    with pytest.raises(config_lib.ConfigError, match="typ"):
        evaluate.make(evals)


@pytest.mark.parametrize("field", ["batch_size", "every", "max_batches"])
def test_counts_that_cannot_be(field):
    for value in (-1, -(10**30)):
        entry = {"type": "perplexity", "data": dict(mixture=dict(a=dict(type="jsonl", path="a")))}
        with pytest.raises(config_lib.ConfigError, match=f"evals.e: {field}={value} must be"):
            evaluate.make({"e": {**entry, field: value}})
    with pytest.raises(config_lib.ConfigError, match="evals.e: batch_size=0 must be"):
        evaluate.make({"e": {**entry, "batch_size": 0}})


def test_what_is_no_evaluation():
    with pytest.raises(config_lib.ConfigError, match="evals.e=1 is not a dict with a 'type'"):
        evaluate.make({"e": 1})
    with pytest.raises(config_lib.ConfigError, match="'os.path' is no evaluator: it has no Eval"):
        evaluate.make({"e": dict(type="os.path", data={})})
    with pytest.raises(config_lib.ConfigError, match="no evaluator called '.perplexity'"):
        evaluate.make({"e": dict(type=".perplexity", data={})})


def test_an_evaluator_that_ends_the_program_has_failed(tmp_path):
    class Ends(Evaluator):
        def run(self, data):
            raise SystemExit(0)

    evaluation = make()
    evaluation.evaluator = Ends()
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=4))
    shardings = {"b": sharding.replicated(mesh)}
    runner = evaluate.Runner(Task(), Formatter(), mesh, shardings, 0)
    scores, why = runner.attempt(evaluation, {"b": np.float32(1)}, tmp_path)
    assert scores == {"eval/own/failed": 1.0} and "'own' failed: SystemExit: 0" in why
