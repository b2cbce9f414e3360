"""Weights pass through an export in scratch files: what memory holds, and what is left behind."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from edgepeft.errors import ExportError
from edgepeft.exporters.scratch import converted, spooled
from edgepeft.exporters.sources.parameters import stored_dtype

MIB = 2**20


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("rows", [3, 3000])
def test_a_spooled_tensor_is_its_parts_and_leaves_no_file(scratch: Path, rows: int) -> None:
    whole = torch.randn(rows, 128)

    def parts() -> Iterator[torch.Tensor]:
        for part in whole.split(1000):
            yield part
            assert not list(scratch.iterdir())  # or a process that is killed here would leave it

    found = spooled(whole.shape, torch.float32, parts())
    assert torch.equal(found, whole)
    assert not list(scratch.iterdir())
    found[1] = 0  # stays in memory
    assert not torch.equal(found, whole)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_pytorchs(dtype: torch.dtype) -> None:
    half = torch.randn(3000, 128).to(dtype)
    for tensor in (half, half.T, half[0], half[0, 0]):
        assert torch.equal(converted(tensor, torch.float32), tensor.float())
    whole = half.float()
    assert converted(whole, torch.float32) is whole


def test_no_room_is_said_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ExportError, match=r"gone: no room for weights .*TMPDIR"):
        spooled((2**19,), torch.float32, [torch.zeros(2**19)])


def test_a_full_disk_is_said_and_leaves_no_file(scratch: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(ExportError, match="no room for weights"):
            spooled((2**19,), torch.float32, [torch.ones(2**19)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(scratch.iterdir())


_LOAD = """
import sys
from edgepeft.exporters.quantize.blockwise import quantize
from edgepeft.exporters.sources.loading import load_source

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

before = anonymous()
source = load_source(sys.argv[1])
kept = [quantize(p.data, 4, 32) for p in source.model.parameters() if p.ndim == 2]
print(anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_16_bit_checkpoint_is_not_held_in_memory(tmp_path: Path) -> None:
    """100 million parameters: 200 MB as stored, 400 MB as float32, 56 MB at 4 bits."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=5,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    ran = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout.split()[-1]) < 110


def test_the_stored_type_is_the_one_of_all_weights(tmp_path: Path) -> None:
    """A checkpoint with some float32 is read as float32: nothing of it is rounded."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(tmp_path / "half")
    assert stored_dtype(str(tmp_path / "half")) == torch.float16
    model.model.norm.float()
    model.save_pretrained(tmp_path / "mixed")
    assert stored_dtype(str(tmp_path / "mixed")) == torch.float32
    assert stored_dtype("somebody/model") == torch.float32
