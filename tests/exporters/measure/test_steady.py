"""Thousands of tokens and swaps in one process, by the kernel's account of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import edgepeft

from .. import models

ROOT = Path(__file__).parents[3]
MIB = 2**20
LENGTH, TOKENS, SWAPS = 400, 10_000, 1000
RANK = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build() -> transformers.PreTrainedModel:
    """A small Llama whose keys and values are 16 KiB a token; no token ends a text."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **models.SIZES,
        head_dim=256,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.slow
def test_ten_thousand_tokens_and_a_thousand_swaps_leave_nothing_behind(tmp_path: Path) -> None:
    """A text's keys and values are 6 MiB, an adapter 2.5: a leak of them in every tenth text, or in one of a
    hundred swaps, would be seen."""
    folders = [
        models.save_adapter(
            build(), tmp_path / name, seed, r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        for seed, name in enumerate("ab")
    ]
    bundle = tmp_path / "bundle"
    edgepeft.export(build(), bundle, bits=32, rank=2, train=False, verify=False)
    command = [sys.executable, "-m", "benchmarks.steady", str(bundle), *map(str, folders)]
    command += ["--tokens", str(TOKENS), "--length", str(LENGTH), "--swaps", str(SWAPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for phase, count in (("tokens", TOKENS), ("swaps", SWAPS)):
        assert report[phase]["done"] >= count
        for figure in ("resident_bytes", "anonymous_bytes"):
            assert report[phase][figure]["grown"] < 4 * MIB, (phase, report)
