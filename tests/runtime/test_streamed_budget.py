"""Inference inside a budget that is smaller than the weight file, in a memory cgroup of that size."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.memory.inference import STREAMED

from ..memory_cgroup import NoCgroupError, run_limited

pytestmark = pytest.mark.slow
MIB = 2**20
BUDGET_BYTES = 112 * MIB

SCRIPT = """
import json, sys
import edgepeft
from edgepeft.runtime.memory.process import read_memory

with edgepeft.load(sys.argv[1], memory_budget=int(sys.argv[2]) or None, threads=2) as model:
    tokens = model.generate_ids(list(range(5, 69)), max_new_tokens=6)
    roles = list(model._sessions._open)
    print(json.dumps({"tokens": tokens, "roles": roles, "peak_bytes": read_memory().peak_bytes}))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 5.5 million float32 weights each."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=3072,
        vocab_size=2048,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("large") / "b"
    model = transformers.LlamaForCausalLM(config).eval()
    edgepeft.export(model, folder, bits=32, rank=4, train=False, verify=False)
    return folder


def test_generation_inside_a_budget_below_the_weight_file(bundle: Path) -> None:
    """The kernel does not kill it, and the tokens are those of the whole graph."""
    assert open_bundle(bundle).manifest.files["weights.bin"].nbytes > BUDGET_BYTES
    command = [sys.executable, "-c", SCRIPT, str(bundle)]
    try:
        free = run_limited([*command, "0"], 4096 * MIB)
        limited = run_limited([*command, str(BUDGET_BYTES)], BUDGET_BYTES)
    except NoCgroupError as error:
        pytest.skip(f"no memory cgroup: {error}")
    assert free.returncode == limited.returncode == 0, free.stderr + limited.stderr
    whole, streamed = json.loads(free.stdout), json.loads(limited.stdout)
    assert (whole["roles"], streamed["roles"]) == (["inference"], [STREAMED])
    assert streamed["tokens"] == whole["tokens"]
    assert streamed["peak_bytes"] <= BUDGET_BYTES
