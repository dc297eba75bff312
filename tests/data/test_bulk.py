"""Many inputs: finding them, streaming them, keeping their results."""

import io
import os
import threading

import pytest

from vlm_jax.data import folders, inputs, records, results, streaming


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_inputs_of_every_kind(tmp_path, monkeypatch):
    fill(tmp_path, "d/b/10.jpg", "d/b/9.png", "d/a.txt", "d/v.mp4", "[x].jpg", "@y.jpg")
    monkeypatch.chdir(tmp_path)
    assert inputs.find(["d"]) == ["d/b/9.png", "d/b/10.jpg"]
    assert inputs.find(["d"], folders.VIDEOS) == ["d/v.mp4"]
    assert inputs.find(["d/**/*.png", "d/b/*", "[x].jpg", "@y.jpg"]) == [
        "d/b/9.png",
        "d/b/10.jpg",
        "[x].jpg",
        "@y.jpg",
    ]
    assert inputs.find(["gone.jpg", "http://127.0.0.1/a?b=*"]) == [
        "gone.jpg",
        "http://127.0.0.1/a?b=*",
    ]
    (tmp_path / "d" / "list").write_bytes(b"b/9.png\n\n\xff.jpg\r\nhttp://x/y.png\n")
    odd = os.fsdecode(b"d/\xff.jpg")
    assert inputs.find(["@d/list"]) == ["d/b/9.png", odd, "http://x/y.png"]
    assert inputs.find(["-"], stdin=io.BytesIO(b"q.png\n")) == ["q.png"]
    for wrong, message in (("*.gif", "no file matches"), ("@gone", "cannot read: No such file")):
        with pytest.raises(records.DataError, match=message):
            inputs.find([wrong])
    with pytest.raises(records.DataError, match="names no file"):
        inputs.find(["-"], stdin=io.BytesIO(b"\n"))


def test_names_of_outputs_never_collide(tmp_path):
    names = ["a/1.jpg", "a/1.png", "b/1.jpg", "b/c/2.jpg", "http://h/i/3.jpg?x=../../4"]
    made = inputs.output_names(names[:4])
    assert made == {
        "a/1.jpg": "a/1.jpg",
        "a/1.png": "a/1.png",
        "b/1.jpg": "b/1",
        "b/c/2.jpg": "b/c/2",
    }
    assert inputs.output_names(["x/y/1.jpg"]) == {"x/y/1.jpg": "1"}
    everything = inputs.output_names(names)
    assert len(set(everything.values())) == 5
    assert not any(name.startswith(("/", "..")) for name in everything.values())


def test_names_of_outputs_that_would_be_one_file():
    names = ["http://h/a.png", "https://h/a.png", "/h/b.png", "/h/./b.png", "/h/b-2.png"]
    assert list(inputs.output_names(names).values()) == [
        "a.png",
        "a.png-2",
        "b.png",
        "b.png-2",
        "b-2",
    ]


@pytest.mark.parametrize("name", ["http://h/a?" + "x" * 500, "é" * 300, "a\0b", "a\ud800b"])
def test_names_of_outputs_that_no_file_may_have(tmp_path, name):
    made = inputs.output_names([name, "other" + name])
    assert len(set(made.values())) == 2
    for short in made.values():
        path = tmp_path / f"{short}_attention_layer_11.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")


def test_lists_with_a_byte_order_mark(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffa.png\nb.png\n", encoding="utf-8")
    assert inputs.find([f"@{tmp_path / 'list.txt'}"]) == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    (tmp_path / "list.txt").write_text("a.png\nb.png\n", encoding="utf-16")
    with pytest.raises(records.DataError, match="is UTF-16, not UTF-8"):
        inputs.find([f"@{tmp_path / 'list.txt'}"])


def test_streams_are_in_order_bounded_and_end(tmp_path):
    taken, most, running = [], [0], threading.Semaphore(0)

    def source():
        for number in range(100):
            taken.append(number)
            yield number

    def prepare(number):
        running.release()
        if number == 3:
            raise records.BadRecordError("three")
        return number

    made = []
    stream = streaming.apply(
        streaming.prepared(source(), prepare, threads=3, ahead=5),
        lambda batch: [10 * x for x in batch],
        4,
        on_error="yield",
    )
    for result in stream:
        made.append(result)
        most[0] = max(most[0], len(taken) - len(made))
    assert [x for x in made if isinstance(x, int)] == [10 * x for x in range(100) if x != 3]
    assert str(made[3]) == "three" and most[0] <= 5 + 4 + 1
    with pytest.raises(ZeroDivisionError):  # a fault of the program is no bad record
        list(streaming.prepared([1], lambda x: x / 0))


def test_results_go_on_after_any_cut(tmp_path):
    path = tmp_path / "x" / "out.jsonl"
    odd = os.fsdecode(b"\xff.jpg") + "☕"
    first = results.Results(path, {"k": 3})
    first.write([{"id": "a", "v": [1]}, {"id": odd, "v": "☕"}])
    first.close()
    whole = path.read_bytes()
    with open(path, "ab") as stream:
        stream.write(b'{"id": "b", "v"')
    again = results.Results(path, {"k": 3})
    assert again.done == {"a", odd} and path.read_bytes() == whole
    assert [row["v"] for row in again.rows()] == [[1], "☕"]
    again.close()
    with pytest.raises(records.DataError, match="other settings: k=3 there, 4 now"):
        results.Results(path, {"k": 4})
    path.write_bytes(whole[:-3])
    with pytest.raises(records.DataError, match="shorter than it was"):
        results.Results(path, {"k": 3})
    (tmp_path / "theirs.jsonl").write_text("precious\n")
    with pytest.raises(records.DataError, match="is there, and no theirs.jsonl.state says"):
        results.Results(tmp_path / "theirs.jsonl", {})
    assert (tmp_path / "theirs.jsonl").read_text() == "precious\n"
    with pytest.raises(records.DataError, match="ends with .jsonl, or is a folder"):
        results.Results(tmp_path / "out.csv", {})


def test_flat_results_are_a_table(tmp_path):
    path, odd = tmp_path / "out.csv", os.fsdecode(b"\xff,.jpg")
    for names in (["a"], ["a", odd], ["a", odd, "b"]):
        table = results.Results(path, {}, ("id", "n"))
        status = results.run(
            names,
            table,
            lambda todo: iter(range(len(todo))),
            lambda name, n: [{"id": name, "n": n}, {"id": name, "n": 7}],
            batch_size=2,
        )
        assert status == 0
    rows = list(results.Results(path, {}, ("id", "n")).rows())
    assert [row["id"] for row in rows] == ["a", "a", odd, odd, "b", "b"]


def test_status_and_failures(tmp_path, capsys):
    def run(names, made):
        file = results.Results(tmp_path / "out.jsonl", {})
        return results.run(
            names, file, lambda todo: iter(made), lambda name, _: [{"id": name}], batch_size=9
        )

    bad = records.BadRecordError("a: broken")
    assert run(["a"], [bad]) == 1
    assert (tmp_path / "out.jsonl.failed").read_text() == "a\ta: broken\n"
    assert run(["a", "b"], [bad, 1]) == 0
    assert "1 inputs done, 0 were there, 1 unreadable" in capsys.readouterr().err
    assert run(["a", "b"], [1]) == 0  # tried again
    assert not (tmp_path / "out.jsonl.failed").exists()
    assert results.of_process("o/x.jsonl", 4, 2).name == "x-00002-of-00004.jsonl"
