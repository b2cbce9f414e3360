"""The samples' data: deterministic, balanced, and nothing of the test side seen in training."""

import importlib.util
import json
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"


def load_sample(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings = load_sample("docstrings")


@pytest.fixture(scope="module")
def gathered():
    return docstrings.gather(Path(sysconfig.get_path("stdlib")))


def test_every_area_has_enough_on_both_sides(gathered):
    train, test = (Counter(d.label for d in side) for side in docstrings.split(gathered))
    assert set(train) == set(test) == set(docstrings.AREAS)
    assert min(train.values()) >= 100
    assert min(test.values()) >= 20
    assert max(train.values()) < 3 * min(train.values())


def test_no_definition_and_no_text_on_both_sides(gathered):
    train, test = docstrings.split(gathered)
    assert not {d.origin for d in train} & {d.origin for d in test}
    everything = [" ".join(d.text.lower().split()) for d in train + test]
    assert len(set(everything)) == len(everything)


def test_a_near_copy_of_a_training_text_is_not_asked_about():
    words = " ".join(f"word{i}" for i in range(20))
    by_side = {bool(docstrings._digest(f"m:{i}") % docstrings.TEST_SHARE): f"m:{i}" for i in range(50)}
    training = docstrings.Docstring(words, "text", by_side[True])
    near = docstrings.Docstring(words + " more", "text", by_side[False])
    far = docstrings.Docstring(words.replace("word1", "other"), "text", by_side[False])
    assert docstrings.split([training, near, far]) == ([training], [far])


def test_a_text_under_two_labels_is_dropped(tmp_path):
    shared = '"""One two three four five six seven eight nine ten eleven twelve."""\n'
    (tmp_path / "queue.py").write_text(shared)
    (tmp_path / "json.py").write_text(shared)
    (tmp_path / "csv.py").write_text(shared.replace("twelve", "thirteen"))
    (tmp_path / "re.py").write_text("class A:\n    " + shared.replace("twelve", "thirteen"))
    assert [d.origin for d in docstrings.gather(tmp_path)] == ["csv:"]


def test_sources_are_parsed_not_imported(tmp_path):
    text = "One two three four five six seven eight nine ten eleven twelve."
    (tmp_path / "queue.py").write_text(f'"""{text}"""\nraise SystemExit("imported")\n')
    assert docstrings.gather(tmp_path) == [docstrings.Docstring(text, "concurrency", "queue:")]


def test_writes_jsonl_of_this_python_the_same_each_time(tmp_path, gathered):
    for path, side in zip(docstrings.write(tmp_path), docstrings.split(gathered), strict=True):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert records == [{"text": d.text, "label": d.label} for d in side]


def test_writes_as_many_of_an_area_as_are_asked_for(tmp_path):
    paths = docstrings.write(tmp_path, 20, ["email", "files"])
    counts = [
        Counter(json.loads(line)["label"] for line in path.read_text(encoding="utf-8").splitlines())
        for path in paths
    ]
    assert counts == [{"email": 20, "files": 20}, {"email": 10, "files": 10}]
