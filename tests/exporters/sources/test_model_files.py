"""The JSON files beside a model's weights, damaged: refused by name, never a traceback."""

from pathlib import Path

import pytest

from edgepeft.errors import ExportError
from edgepeft.exporters.sources.loading import read_max_length
from edgepeft.exporters.sources.model_files import read_json, read_pooling
from edgepeft.exporters.sources.tasks import infer_task

DAMAGED = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "text": b'"x"',
    "latin1": b"\xff",
    "cut": b'{"a": ',
}


NAMES = (
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", NAMES)
def test_settings_of_sentence_transformers(name: str, damage: str, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    modules = b'[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"}]'
    (tmp_path / "modules.json").write_bytes(modules)
    (tmp_path / "1_Pooling/config.json").write_bytes(b'{"pooling_mode_mean_tokens": true}')
    assert read_pooling(str(tmp_path)).mode == "mean"
    (tmp_path / name).write_bytes(DAMAGED[damage])
    with pytest.raises(ExportError, match=name):
        read_pooling(str(tmp_path))


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_tokenizers_settings(damage: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(DAMAGED[damage])
    with pytest.raises(ExportError, match="tokenizer_config"):
        read_max_length("text-classification", object(), str(tmp_path))


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_configuration(damage: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(DAMAGED[damage])
    with pytest.raises(ExportError, match=r"config\.json"):
        infer_task(str(tmp_path))


@pytest.mark.parametrize("architectures", ["3", '"Bert"', '{"a": 1}', "[3, null]", "null"])
def test_architectures_that_are_none(architectures: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"architectures": {architectures}}}')
    with pytest.raises(ExportError, match="pass --task"):
        infer_task(str(tmp_path))


def test_a_list_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert read_json(str(tmp_path), "a.json", list) == []
    with pytest.raises(ExportError, match="holds a list, expected an object"):
        read_json(str(tmp_path), "a.json")
