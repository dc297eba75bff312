import pickle

import numpy as np
import pytest

from vlm_jax.data import order, packing, pipeline, records
from vlm_jax.systems.lvm import format as lvm_format

# Three documents: abc, de, fghij.
DOCUMENTS = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8, 9, 10])]


def load(piece):
    ids = DOCUMENTS[piece.index]
    return packing.Document(ids, np.ones(len(ids), np.float32))


def make_plan(kind, lengths=None, *, row_tokens=4, shuffle=False, seed=0):
    lengths = np.array([len(ids) for ids in DOCUMENTS] if lengths is None else lengths)
    where = order.Shuffle(len(lengths), seed, "a", shuffle)
    return packing.PLANS[kind](lengths, where, row_tokens)


def rows(plan, numbers, **options):
    return [plan.fill(plan.pieces(number, **options), load) for number in numbers]


def test_stream_as_drawn():
    first, second, third = rows(make_plan("stream"), range(3))
    assert first["tokens"].tolist() == [1, 2, 3, 4] and first["targets"].tolist() == [2, 3, 4, 5]
    assert second["tokens"].tolist() == [5, 6, 7, 8]
    assert second["targets"].tolist() == [6, 7, 8, 9]
    assert third["tokens"].tolist() == [9, 10, 1, 2] and third["targets"].tolist() == [10, 1, 2, 3]
    for row in (first, second, third):
        assert row["segments"].tolist() == [1] * 4 and row["positions"].tolist() == [0, 1, 2, 3]


def test_stream_one_pass_pads_the_end():
    plan = make_plan("stream")
    assert plan.rows_per_pass == 3
    last = rows(plan, [2], one_pass=True)[0]
    assert last["tokens"].tolist() == [9, 10, 0, 0]
    assert last["targets"].tolist() == [10, 0, 0, 0]
    assert last["weights"].tolist() == [1, 0, 0, 0]
    assert last["segments"].tolist() == [1, 1, 0, 0]


def test_documents_as_drawn():
    plan = make_plan("documents")
    assert plan.rows_per_pass == 2
    first, second = rows(plan, range(2))
    assert first["tokens"].tolist() == [1, 2, 4, 0] and first["targets"].tolist() == [2, 3, 5, 0]
    assert first["segments"].tolist() == [1, 1, 2, 0]
    assert first["positions"].tolist() == [0, 1, 0, 0]
    assert first["weights"].tolist() == [1, 1, 1, 0]
    assert second["tokens"].tolist() == [6, 7, 8, 9]
    assert second["targets"].tolist() == [7, 8, 9, 10]


def test_documents_cut_long_ones_and_pass_over_short_ones():
    plan = make_plan("documents", [0, 1, 12, 3])
    pieces = [piece[1:] for row in range(plan.rows_per_pass) for piece in plan.pieces(row)]
    # 12 ids make 11 predictions, in pieces of 4, 4 and 3; the 2 of the last document do not fit.
    assert pieces == [(2, 0, 5, 0), (2, 4, 9, 0), (2, 8, 12, 0), (3, 0, 3, 0)]


@pytest.mark.parametrize("kind", ["stream", "documents"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_prediction_of_every_epoch_exactly_once(kind, shuffle):
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 30, 57)
    plan = make_plan(kind, lengths, row_tokens=16, shuffle=shuffle)
    seen = {}
    for row in range(4 * plan.rows_per_pass):
        places = np.zeros(17, int)
        for piece in plan.pieces(row):
            places[piece.slot : piece.slot + piece.stop - piece.start - 1] += 1
            for at in range(piece.start + 1, piece.stop):  # ids with a target in this piece
                key = (piece.epoch, piece.index, at)
                seen[key] = seen.get(key, 0) + 1
        assert places.max() <= 1  # pieces do not overlap
    for epoch in (0, 1):
        for index, length in enumerate(lengths):
            found = [seen.get((epoch, index, at), 0) for at in range(1, length)]
            if kind == "documents":
                assert found == [1] * max(0, length - 1)
            else:  # a target at the border of two rows belongs to the first as an overlap
                assert all(1 <= n <= 2 for n in found) or not found


def test_documents_fill_rows_well():
    lengths = np.random.default_rng(0).integers(100, 1000, 2000)
    plan = make_plan("documents", lengths, row_tokens=2048, shuffle=True)
    assert (lengths - 1).sum() / (plan.rows_per_pass * 2048) > 0.95


@pytest.mark.parametrize("kind", ["stream", "documents"])
def test_any_row_is_found_directly(kind):
    lengths = np.random.default_rng(1).integers(2, 40, 25)
    in_order = make_plan(kind, lengths, row_tokens=16, shuffle=True)
    expected = [in_order.pieces(row) for row in range(200)]
    directly = make_plan(kind, lengths, row_tokens=16, shuffle=True)
    assert [directly.pieces(row) for row in (199, 3, 120)] == [expected[i] for i in (199, 3, 120)]
    assert pickle.loads(pickle.dumps(in_order)).pieces(77) == expected[77]


def test_epochs_have_fresh_orders():
    plan = make_plan("documents", [3] * 40, row_tokens=2, shuffle=True)
    epochs = [[plan.pieces(40 * e + i)[0].index for i in range(40)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and epochs[0] != epochs[1]


def test_nothing_to_learn_from():
    with pytest.raises(records.DataError, match="'a': 1 tokens cannot be trained on"):
        make_plan("stream", [0, 1])
    with pytest.raises(records.DataError, match="none of 3 documents has 2 tokens"):
        make_plan("documents", [0, 1, 1])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bos_eos", "<|bos|>,{tokens},<|eos|>"),
        ("bos_eos", "<|64|>,{tokens},<|65|>"),
        ("masked_bos", "[<|bos|>],{tokens},<|eos|>"),
    ],
)
@pytest.mark.parametrize("threads", [0, 3])
def test_stream_is_the_reference_bit_for_bit(golden_lvm, name, fields, threads):
    golden = np.load(golden_lvm / "io.npz")
    path = golden_lvm / "tokens.jsonl"
    formatter = lvm_format.Formatter(
        max_tokens=32, fields=fields, bos_id=64, eos_id=65, vocab_size=100
    )
    config = pipeline.DataConfig(
        mixture={"golden": {"type": "jsonl", "path": str(path)}},
        packing="stream",
        shuffle=False,
        num_threads=threads,
        max_bad_fraction=0.2,  # one of its eight lines is broken
    )
    ends = np.cumsum([len(line) + 1 for line in path.read_bytes().splitlines()])
    with pipeline.make_batches(config, formatter, batch_size=2, seed=0) as batches:
        for step in range(6):
            batch = next(batches)
            for ours, theirs in [("tokens", "input"), ("targets", "target"), ("weights", "mask")]:
                np.testing.assert_array_equal(
                    batch.arrays[ours], golden[f"data.{name}_{theirs}"][step]
                )
            assert batch.arrays["tokens"].dtype == batch.arrays["targets"].dtype == np.int32
            # The line read last (the broken one counts) is what the reference's state points at.
            line = int(batch.record_ids[-1][-1].rpartition(":")[2])
            assert golden[f"data.{name}_example_index"][step] == line - 1
            assert golden[f"data.{name}_file_loc"][step] == ends[line - 1]
        assert list(batches.bad_records.causes) == [f"{path}:4"]
