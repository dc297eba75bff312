import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests import fuzz
from vlm_jax import answer
from vlm_jax.data import packing as packing_lib
from vlm_jax.data import pipeline, records, sources
from vlm_jax.data import rows as rows_lib
from vlm_jax.systems.lvm import format as lvm_format

BATCH = 8


class Numbers:
    """A formatter without packing: the record's number, and a draw from its generator."""

    def __call__(self, record, rng):
        if record["n"] < 0:
            raise records.BadRecordError(f"n={record['n']} is negative")
        draw = np.float64(rng.random())
        return {"n": np.int32(record["n"]), "draw": draw, "weight": np.float32(1)}


def write(path, numbers):
    """JSONL for both formatters: n, and a few tokens."""
    rng = np.random.default_rng(0)
    lines = []
    for n in numbers:
        tokens = lvm_format.to_base64(rng.integers(0, 50, rng.integers(3, 40)))
        lines.append(json.dumps({"n": int(n), "tokens": tokens}) if n is not None else "{broken")
    path.write_text("".join(line + "\n" for line in lines))
    return {"type": "jsonl", "path": str(path)}


@pytest.fixture
def mixture(tmp_path):
    return {
        "a": write(tmp_path / "a.jsonl", range(23)) | {"weight": 0.7},
        "b": write(tmp_path / "b.jsonl", range(100, 109)) | {"weight": 0.3},
    }


TOKENS = lvm_format.Formatter(max_tokens=32, bos_id=50, eos_id=51, vocab_size=64)


def formatter_for(packing):
    return Numbers() if packing == "none" else TOKENS


def run(mixture, packing, steps, *, rows=None, start=0, seed=5, **options):
    config = pipeline.DataConfig(mixture=mixture, packing=packing, **options)
    with pipeline.make_batches(
        config, formatter_for(packing), batch_size=BATCH, seed=seed, start_step=start, rows=rows
    ) as batches:
        return [next(batches) for _ in range(steps)]


def assert_same(found, expected, rows=slice(None)):
    for one, other in zip(found, expected, strict=True):
        assert one.step == other.step and one.arrays.keys() == other.arrays.keys()
        for key in one.arrays:
            np.testing.assert_array_equal(one.arrays[key], other.arrays[key][rows])
        assert one.record_ids == [other.record_ids[i] for i in np.arange(BATCH)[rows]]


KINDS = pytest.mark.parametrize("packing", ["none", "stream", "documents"])


@KINDS
def test_global_batch_is_the_same_on_any_number_of_hosts_and_threads(mixture, packing):
    expected = run(mixture, packing, 12, num_threads=0)
    for hosts in (1, 2, 4):
        for threads in (1, 5):
            shares = np.split(np.arange(BATCH), hosts)
            for rows in shares:
                found = run(mixture, packing, 12, rows=rows, num_threads=threads)
                assert_same(found, expected, rows)
    odd = np.array([1, 4, 6])  # what a host needs may be scattered
    assert_same(run(mixture, packing, 12, rows=odd), expected, odd)


@KINDS
def test_starting_at_a_step_equals_having_run_there(mixture, packing):
    expected = run(mixture, packing, 40)
    for start in (1, 7, 31):
        assert_same(run(mixture, packing, 9, start=start), expected[start : start + 9])


@KINDS
def test_another_batch_size_goes_on_at_the_next_row(mixture, packing):
    def rows_of(batch_size, number, **start):
        config = pipeline.DataConfig(mixture=mixture, packing=packing)
        with pipeline.make_batches(
            config, formatter_for(packing), batch_size=batch_size, seed=5, **start
        ) as batches:
            return [ids for _ in range(number) for ids in next(batches).record_ids]

    whole = rows_of(4, 11)
    for batch_size, number in ((4, 8), (2, 16), (8, 4), (32, 1)):
        assert rows_of(batch_size, number, start_step=3, start_row=12) == whole[12:]


@KINDS
def test_seed_and_epoch_change_the_order(mixture, packing):
    one, other = run(mixture, packing, 3), run(mixture, packing, 3, seed=6)
    assert [b.record_ids for b in one] != [b.record_ids for b in other]


@pytest.mark.slow
def test_worker_processes_change_nothing(mixture):
    expected = run(mixture, "documents", 5, num_threads=0)
    assert_same(run(mixture, "documents", 5, num_workers=2), expected)


@pytest.mark.slow
def test_errors_of_worker_processes_arrive(tmp_path):
    mixture = {"a": write(tmp_path / "a.jsonl", [1, -2, *range(3, 30)])}
    options = {"shuffle": False, "num_workers": 1}
    with pytest.raises(records.DataError, match=r"a\.jsonl:2: n=-2 is negative"):
        run(mixture, "none", 9, max_bad_fraction=0.0, **options)
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"tokens": lvm_format.to_base64(np.array([1, 99]))}) + "\n")
    config = pipeline.DataConfig(mixture={"b": {"type": "jsonl", "path": str(path)}}, num_workers=1)
    with pipeline.make_batches(config, TOKENS, batch_size=2, seed=0) as batches:
        with pytest.raises(records.DataError, match=r"b\.jsonl:1: token id 99"):
            next(batches)


TRAINER = """
import multiprocessing, sys, time
import numpy as np
from vlm_jax.data import pipeline

class Formatter:
    def __call__(self, record, rng):
        return {"x": np.ones(100_000, np.float32)}  # large enough for shared memory

if __name__ == "__main__":
    mixture = {"a": {"type": "jsonl", "path": sys.argv[1]}}
    config = pipeline.DataConfig(mixture=mixture, num_workers=2)
    batches = pipeline.make_batches(config, Formatter(), batch_size=4, seed=0)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_workers_and_shared_memory_end_with_a_killed_trainer(tmp_path):
    source = write(tmp_path / "a.jsonl", range(8))["path"]
    (tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(source)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        workers = list(map(int, trainer.stdout.readline().split()))
        assert len(workers) == 2
        maps = [pathlib.Path(f"/proc/{pid}/maps").read_text() for pid in (trainer.pid, *workers)]
        shared = set(re.findall(r"/dev/shm/psm_\S+", "".join(maps)))
        assert shared
    finally:
        trainer.kill()
    deadline = time.monotonic() + 60
    left = [f"/proc/{pid}" for pid in workers] + sorted(shared)
    while any(map(os.path.exists, left)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in left if os.path.exists(path)]


def test_epochs_mixtures_and_augmentation(mixture):
    batches = run({"a": mixture["a"]}, "none", 23)  # 8 epochs of 23 records
    numbers = np.concatenate([batch.arrays["n"] for batch in batches]).reshape(8, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in numbers.tolist())
    assert len({tuple(epoch) for epoch in numbers.tolist()}) == 8
    draws = np.concatenate([batch.arrays["draw"] for batch in batches])
    assert len(set(draws.tolist())) == 184  # a record is augmented anew in every epoch
    both = np.concatenate([batch.arrays["n"] for batch in run(mixture, "none", 50)])
    assert (both >= 100).mean() == pytest.approx(0.3, abs=0.01)


def test_file_order_without_shuffling(mixture):
    batches = run({"a": mixture["a"]}, "none", 4, shuffle=False)
    numbers = np.concatenate([batch.arrays["n"] for batch in batches])
    assert numbers.tolist() == [*range(23), *range(9)]


def test_one_pass_reads_everything_once(mixture):
    config = pipeline.DataConfig(mixture=mixture)
    batches = list(pipeline.one_pass(config, Numbers(), batch_size=BATCH))
    assert len(batches) == 4
    valid = np.concatenate([batch.arrays["valid"] for batch in batches])
    numbers = np.concatenate([batch.arrays["n"] for batch in batches])
    assert numbers.tolist() == [*range(23), *range(100, 109)] and valid.all()
    padded = list(pipeline.one_pass(config, Numbers(), batch_size=20))
    assert padded[1].arrays["valid"].tolist() == [True] * 12 + [False] * 8
    assert padded[1].arrays["weight"].sum() == 12 and padded[1].arrays["n"].shape == (20,)
    assert len(list(pipeline.one_pass(config, Numbers(), batch_size=BATCH, max_batches=2))) == 2


class Showing(Numbers):
    def __call__(self, record, rng):
        host = answer.Host(truth=answer.Answer(text=str(record["n"])))
        return {**super().__call__(record, rng), "host": host}


def test_hosts_stay_beside_the_arrays_of_a_pass_and_training_drops_them(mixture):
    config = pipeline.DataConfig(mixture=mixture, num_threads=2)
    batches = list(pipeline.one_pass(config, Showing(), batch_size=20))
    assert [host.truth.text for host in batches[0].hosts] == [str(n) for n in range(20)]
    assert [[host.id] for host in batches[0].hosts] == batches[0].record_ids
    assert [host.id for host in batches[1].hosts[12:]] == [""] * 8  # rows that fill the batch
    assert "host" not in batches[0].arrays
    with pipeline.make_batches(config, Showing(), batch_size=4, seed=0) as endless:
        batch = next(endless)
        assert batch.hosts == [] and "host" not in batch.arrays


def test_rows_of_a_process_in_one_pass(mixture):
    config = pipeline.DataConfig(mixture=mixture)
    whole = list(pipeline.one_pass(config, Showing(), batch_size=10))
    parts = [
        list(pipeline.one_pass(config, Showing(), batch_size=10, rows=rows))
        for rows in (np.arange(4), np.arange(4, 10))
    ]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for one, first, second in zip(whole, *parts):
        both = np.concatenate([first.arrays["n"], second.arrays["n"]])
        np.testing.assert_array_equal(one.arrays["n"], both)
        assert [h.id for h in one.hosts] == [h.id for h in (*first.hosts, *second.hosts)]


def test_one_pass_of_packed_rows(mixture):
    for packing in ("stream", "documents"):
        config = pipeline.DataConfig(mixture=mixture, packing=packing)
        batches = list(pipeline.one_pass(config, TOKENS, batch_size=3))
        predictions = sum(batch.arrays["weights"].sum() for batch in batches)
        sizes = [
            len(TOKENS.encode(json.loads(line))[0])
            for entry in mixture.values()
            for line in open(entry["path"])
        ]
        borders = 2 if packing == "stream" else len(sizes)  # first ids are never targets
        assert predictions == sum(sizes) - borders


def test_bad_records_weigh_nothing_and_are_named(tmp_path, capsys):
    numbers = list(range(40))
    numbers[17] = -17
    mixture = {"a": write(tmp_path / "a.jsonl", numbers)}
    config = pipeline.DataConfig(mixture=mixture, shuffle=False, max_bad_fraction=0.05)
    with pipeline.make_batches(config, Numbers(), batch_size=BATCH, seed=0) as batches:
        seen = [next(batches) for _ in range(10)]  # two epochs
        bad = batches.bad_records
        assert (bad.seen, bad.count) == (80, 2)
        assert bad.causes == {f"{tmp_path}/a.jsonl:18": "n=-17 is negative"}
    assert seen[2].arrays["n"].tolist() == [16, 0, 18, 19, 20, 21, 22, 23]
    assert seen[2].arrays["weight"].tolist() == [1, 0, 1, 1, 1, 1, 1, 1]
    assert seen[2].arrays["valid"].tolist() == [True, False] + [True] * 6
    assert capsys.readouterr().err.count("a.jsonl:18: n=-17 is negative") == 1  # said once


def test_too_many_bad_records_stop_the_run(tmp_path):
    numbers = [-n if n % 4 == 1 else n for n in range(1, 101)]
    mixture = {"a": write(tmp_path / "a.jsonl", numbers)}
    config = pipeline.DataConfig(mixture=mixture, shuffle=False, max_bad_fraction=0.1)
    with pipeline.make_batches(config, Numbers(), batch_size=BATCH, seed=0) as batches:
        with pytest.raises(records.DataError) as caught:
            for _ in range(20):
                next(batches)
    message = str(caught.value)
    assert "11 of 41 records cannot be used" in message and "max_bad_fraction=0.1" in message
    assert f"{tmp_path}/a.jsonl:5: n=-5 is negative" in message and "and 3 more" in message


def test_few_records_are_judged_after_an_epoch_and_zero_tolerance_at_once(tmp_path):
    mixture = {"a": write(tmp_path / "a.jsonl", [1, 2, -3, *range(4, 33)])}
    for fraction, good_steps in [(0.01, 3), (0.0, 0)]:
        config = pipeline.DataConfig(mixture=mixture, shuffle=False, max_bad_fraction=fraction)
        with pipeline.make_batches(config, Numbers(), batch_size=BATCH, seed=0) as batches:
            for _ in range(good_steps):
                next(batches)
            with pytest.raises(records.DataError, match=r"a\.jsonl:3: n=-3"):
                for _ in range(2):
                    next(batches)


def test_broken_lines_count_before_the_first_step(tmp_path):
    mixture = {"a": write(tmp_path / "a.jsonl", [1, 2, None, 3])}
    config = pipeline.DataConfig(mixture=mixture, max_bad_fraction=0.1)
    with pytest.raises(records.DataError, match=r"1 of 4 records(.|\n)*a\.jsonl:3: JSONDecode"):
        pipeline.make_batches(config, Numbers(), batch_size=BATCH, seed=0)


def test_unreadable_document_leaves_a_gap_in_the_packing(tmp_path):
    """A file that changes under a running job: its tokens weigh nothing, the order stays."""
    path = tmp_path / "a.jsonl"
    mixture = {"a": write(path, range(20))}
    options = {"shuffle": False, "num_threads": 0, "max_bad_fraction": 0.5}
    expected = run(mixture, "stream", 4, **options)
    config = pipeline.DataConfig(mixture=mixture, packing="stream", **options)
    batches = pipeline.make_batches(config, TOKENS, batch_size=BATCH, seed=5)
    lines = path.read_bytes().splitlines(keepends=True)
    start = sum(map(len, lines[:3]))
    with path.open("r+b") as stream:  # in place, so the index still fits
        stream.seek(start)
        stream.write(b"#" * (len(lines[3]) - 1))
    found = [next(batches) for _ in range(4)]
    assert list(batches.bad_records.causes) == [f"{path}:4"]
    batches.close()
    for one, other in zip(found, expected):
        good = one.arrays["weights"] > 0
        np.testing.assert_array_equal(one.arrays["targets"][good], other.arrays["targets"][good])
        assert one.record_ids == other.record_ids
    lost = sum((o.arrays["weights"] - f.arrays["weights"]).sum() for f, o in zip(found, expected))
    assert lost > 0


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
@pytest.mark.parametrize("packing", ["none", "stream", "documents"])
def test_odd_records_count_as_bad_ones(tmp_path, kind, packing):
    """As many kinds of them as the limit allows; they weigh nothing and nothing is made of them."""
    odd = [5, [1e999], [None], [1.7], [[1]], "no base64", {"a": 1}, [10**30], None]
    lines = [{"tokens": tokens} for tokens in odd] + [{"tokens": [1, 2, 3]}] * 40
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for line in lines:
            fits = line["tokens"] != [10**30]  # no number of msgpack
            writer.write(records.pack(line) if fits else b"\xc1")
        writer.close()
    mixture = {"a": {"type": kind, "path": str(path)}}
    config = pipeline.DataConfig(
        mixture=mixture, packing=packing, shuffle=False, max_bad_fraction=0.2
    )
    batches = list(pipeline.one_pass(config, TOKENS, batch_size=7))
    weight = sum(batch.arrays["weights"].sum() for batch in batches)
    assert weight == {"none": 160, "documents": 160, "stream": 199}[packing]
    assert max(batch.arrays["targets"].max() for batch in batches) == 51  # EOS
    strict = pipeline.DataConfig(mixture=mixture, packing=packing, max_bad_fraction=0.1)
    with pytest.raises(records.DataError, match="records cannot be used"):
        list(pipeline.one_pass(strict, TOKENS, batch_size=7))


def test_when_nothing_can_be_formatted_the_first_cause_is_said(tmp_path):
    mixture = {"a": write(tmp_path / "a.jsonl", [-1, -2, -3])}
    config = pipeline.DataConfig(mixture=mixture, max_bad_fraction=1.0)
    with pytest.raises(records.DataError, match=r"the first: .*a\.jsonl:1: n=-1 is negative"):
        list(pipeline.one_pass(config, Numbers(), batch_size=2))


def test_huge_causes_are_cut(tmp_path, capsys):
    class Talkative(Numbers):
        def __call__(self, record, rng):
            if record["n"] == 3:
                raise records.BadRecordError("x" * 10**6)
            return super().__call__(record, rng)

    mixture = {"a": write(tmp_path / "a.jsonl", range(20))}
    config = pipeline.DataConfig(mixture=mixture, max_bad_fraction=0.5)
    assert len(list(pipeline.one_pass(config, Talkative(), batch_size=5))) == 4
    assert len(capsys.readouterr().err) < 1000


def test_token_ids_out_of_range_stop_with_the_record(tmp_path):
    path = tmp_path / "a.jsonl"
    good, bad = (lvm_format.to_base64(np.array(ids)) for ids in ([1, 2, 3], [1, 9000, 3]))
    path.write_text("".join(json.dumps({"tokens": t}) + "\n" for t in (good, bad)))
    mixture = {"a": {"type": "jsonl", "path": str(path)}}
    for packing in ("stream", "none"):
        with pytest.raises(records.DataError, match=r"a\.jsonl:2: token id 9000 .*\[0, 64\)"):
            config = pipeline.DataConfig(mixture=mixture, packing=packing, shuffle=False)
            with pipeline.make_batches(config, TOKENS, batch_size=2, seed=0) as batches:
                next(batches)


def test_empty_and_impossible_configs(tmp_path, mixture):
    empty = {"e": write(tmp_path / "e.jsonl", [])}
    for packing in ("none", "stream"):
        with pytest.raises(records.DataError, match="data.mixture.e is empty"):
            run(empty, packing, 1)
    with pytest.raises(records.DataError, match="no such file"):
        run({"x": {"type": "jsonl", "path": str(tmp_path / "x.jsonl")}}, "none", 1)
    with pytest.raises(records.DataError, match="needs a formatter with `encode`"):
        config = pipeline.DataConfig(mixture=mixture, packing="stream")
        pipeline.make_batches(config, Numbers(), batch_size=2, seed=0)
    for fields, message in [
        ({"packing": "streams"}, "packing='streams' is not one of none, stream, documents"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction=2.0"),
        ({"mixture": {}}, "mixture is empty"),
        ({"mixture": {"a": {"path": "x"}}}, "mixture.a has no 'type'"),
        ({"mixture": {"a": {"type": "jsonl", "weight": 0}}}, "mixture.a.weight=0"),
        ({"mixture": {"a": {"type": "jsonl", "weight": float("inf")}}}, "mixture.a.weight=inf"),
        ({"mixture": {"a": {"type": "jsonl", "weight": float("nan")}}}, "mixture.a.weight=nan"),
        ({"mixture": {"a": {"type": "jsonl", "weight": "1"}}}, "mixture.a.weight='1'"),
        ({"mixture": {"a": "x.jsonl"}}, "mixture.a='x.jsonl' is not a dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline.DataConfig(**({"mixture": mixture} | fields))


def test_memory_is_bounded_and_threads_end(mixture):
    made = []

    class Counting(Numbers):
        def __call__(self, record, rng):
            made.append(1)
            return super().__call__(record, rng)

    config = pipeline.DataConfig(mixture=mixture, num_threads=3, prefetch_batches=2)
    before = set(threading.enumerate())
    batches = pipeline.make_batches(config, Counting(), batch_size=BATCH, seed=0)
    next(batches)
    time.sleep(0.3)
    assert len(made) <= BATCH + 2 * BATCH  # one given out, two ahead
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    for thread in set(threading.enumerate()) - before:
        if "grain" in thread.name:
            thread.join(5)
            assert not thread.is_alive()


def test_rows_of_ids_are_made_by_one_thread_and_whole_batches_at_once(mixture):
    made = []

    @dataclasses.dataclass(frozen=True)
    class Counting(lvm_format.Formatter):
        def format_many(self, found, count):
            made.append((count, threading.current_thread().name))
            return super().format_many(found, count)

    formatter = Counting(max_tokens=32, bos_id=50, eos_id=51, vocab_size=64)
    config = pipeline.DataConfig(mixture=mixture, num_threads=6)
    with pipeline.make_batches(config, formatter, batch_size=BATCH, seed=0) as batches:
        for _ in range(20):
            next(batches)
    sizes, threads = map(set, zip(*made))
    assert sizes == {BATCH} and len(threads) == 1


def test_records_are_named_and_generators_seeded_only_when_asked(mixture, monkeypatch):
    asked = []
    for kind in (sources.JsonLines, np.random):
        name = "record_id" if kind is sources.JsonLines else "default_rng"
        whole = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda *args, whole=whole, name=name: asked.append(name) or whole(*args)
        )

    class Plain(Numbers):
        def __call__(self, record, rng):
            return {"n": np.int32(record["n"])}

    config = pipeline.DataConfig(mixture=mixture, num_threads=0)
    with pipeline.make_batches(config, Plain(), batch_size=BATCH, seed=0) as batches:
        batch = next(batches)
    assert not asked
    assert len(batch.record_ids) == len(asked) == BATCH
    with pipeline.make_batches(config, Numbers(), batch_size=BATCH, seed=0) as batches:
        next(batches)
    assert asked.count("default_rng") == BATCH


def test_sources_that_read_many_give_errors_in_place(monkeypatch):
    class Blocks(sources.Memory):
        def read_many(self, indices):
            return [
                records.BadRecordError("odd") if i % 10 == 3 else self._records[i] for i in indices
            ]

    whole = Blocks([{"tokens": [i, i + 1]} for i in range(20)])
    monkeypatch.setitem(sources.TYPES, "blocks", lambda: whole)
    config = pipeline.DataConfig({"a": {"type": "blocks"}}, shuffle=False, max_bad_fraction=0.1)
    with pipeline.make_batches(config, TOKENS, batch_size=10, seed=0) as batches:
        arrays = next(batches).arrays
        assert batches.bad_records.causes == {"memory:3": "odd"}
    assert arrays["valid"].tolist() == [True] * 3 + [False] + [True] * 6
    assert arrays["tokens"][:, 1].tolist() == [0, 1, 2, 0, 4, 5, 6, 7, 8, 9]


def test_a_mistake_in_the_formatter_names_the_record(mixture):
    class Broken(Numbers):
        def __call__(self, record, rng):
            return {"n": record["missing"]}

    config = pipeline.DataConfig(mixture={"a": mixture["a"]}, shuffle=False)
    with pipeline.make_batches(config, Broken(), batch_size=2, seed=0) as batches:
        with pytest.raises(KeyError) as caught:
            next(batches)
    assert any("a.jsonl:1" in note for note in caught.value.__notes__)


def test_long_documents_do_not_fill_the_memory():
    class Table:
        def load_document(self, name, index):
            loaded.append(index)
            return packing_lib.Document(np.zeros(100, np.int32), np.zeros(100, np.float32))

    loaded: list[int] = []
    cache = rows_lib._DocumentCache(Table(), size=50, most_ids=1000)
    for index in (*range(40), *range(30, 40), 0):
        assert len(cache("a", index).ids) == 100
    assert loaded == [*range(40), 0]


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
def test_damaged_token_files_give_an_error_or_right_rows(tmp_path, kind):
    """Through the formatter: what comes out is a row of the file as it was, or is counted."""
    from vlm_jax.datasets import visual_sentences

    whole = tmp_path / f"whole.{kind}"
    sentences = [visual_sentences.Sentence(np.arange(9) + i, 1, f"s{i}") for i in range(6)]
    visual_sentences.write(whole, sentences)
    config = {"packing": "none", "max_bad_fraction": 1.0, "num_threads": 0}
    for number, content in enumerate(fuzz.mutations(whole.read_bytes(), 60)):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(content)
        data = pipeline.DataConfig(mixture={"a": {"type": kind, "path": str(path)}}, **config)
        try:
            for batch in pipeline.one_pass(data, TOKENS, batch_size=3):
                tokens = batch.arrays["tokens"]
                assert tokens.dtype == np.int32 and tokens.shape == (3, 32)
                assert (tokens >= 0).all() and (tokens < 64).all()
        except records.DataError:
            pass
