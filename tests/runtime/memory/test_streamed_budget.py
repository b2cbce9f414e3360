"""A budget that is smaller than the weight file, in a memory cgroup of that size: inference and training."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import edgepeft
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import CgroupError
from edgepeft.runtime.memory.cgroup import MemoryCgroup, drop_page_cache
from edgepeft.runtime.memory.inference import STREAMED

from ...other_systems import SYSTEMS, environment

pytestmark = pytest.mark.slow
MIB = 2**20
BUDGET_BYTES = 112 * MIB
# It is predicted to take 117 MiB with what is to spare, and takes 104 to 107.
TRAINING_BYTES = 122 * MIB
# With psutil, and without giving back what malloc keeps.
ELSEWHERE_BYTES = 124 * MIB

SCRIPT = """
import json, sys
import edgepeft
from edgepeft.runtime.memory.process import read_memory

with edgepeft.load(sys.argv[1], memory_budget=int(sys.argv[2]) or None, threads=2) as model:
    prompt = list(range(5, 69))
    tokens = [model.generate_ids(prompt, max_new_tokens=6)]
    tokens += model.generate_ids([prompt[:20], prompt, prompt[:40]], max_new_tokens=6)
    roles = list(model._sessions._open)
    print(json.dumps({"tokens": tokens, "roles": roles, "peak_bytes": read_memory().peak_bytes}))
"""


TRAIN = """
import json, sys
import edgepeft
from edgepeft.errors import UpdateRejectedError

records = [{"input_ids": list(range(5 + i, 37 + i))} for i in range(10)]
with edgepeft.load(sys.argv[1], memory_budget=int(sys.argv[2]) or None, threads=2) as model:
    try:
        report = model.adapt(records, sys.argv[3], steps=3, batch_size=1, seq_len=32).to_dict()
    except UpdateRejectedError as error:
        report = error.report
print(json.dumps({"losses": report["losses"], "strategy": report["strategy"]}))
"""


def run(command: list[str], limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """A command in a cgroup, with a cold page cache where that may be dropped."""
    try:
        group = MemoryCgroup(limit_bytes)
    except CgroupError as error:
        pytest.skip(str(error))
    with group:
        drop_page_cache()
        return subprocess.run(group.command(command), capture_output=True, text=True, check=False)


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
    edgepeft.export(model, folder, bits=32, rank=4, verify=False)
    return folder


def test_generation_inside_a_budget_below_the_weight_file(bundle: Path) -> None:
    """The kernel does not kill it, and the tokens are those of the whole graph; one prompt and three."""
    assert open_bundle(bundle).manifest.files["weights.bin"].nbytes > BUDGET_BYTES
    command = [sys.executable, "-c", SCRIPT, str(bundle)]
    free, limited = run([*command, "0"], 4096 * MIB), run([*command, str(BUDGET_BYTES)], BUDGET_BYTES)
    assert free.returncode == limited.returncode == 0, free.stderr + limited.stderr
    whole, streamed = json.loads(free.stdout), json.loads(limited.stdout)
    assert (whole["roles"], streamed["roles"]) == (["decoder.plain"], [STREAMED])
    assert streamed["tokens"] == whole["tokens"]
    assert streamed["peak_bytes"] <= BUDGET_BYTES


def test_training_inside_a_budget_below_the_weight_file(bundle: Path, tmp_path: Path) -> None:
    """The kernel does not kill it, and the losses are those of the whole graph."""
    command = [sys.executable, "-c", TRAIN, str(bundle)]
    assert open_bundle(bundle).manifest.files["weights.bin"].nbytes > TRAINING_BYTES
    free = run([*command, "0", str(tmp_path / "free")], 4096 * MIB)
    limited = run([*command, str(TRAINING_BYTES), str(tmp_path / "limited")], TRAINING_BYTES)
    assert free.returncode == limited.returncode == 0, free.stderr + limited.stderr
    whole, staged = json.loads(free.stdout), json.loads(limited.stdout)
    assert whole["strategy"] == "resident"
    assert staged["strategy"].startswith("streamed")
    assert staged["losses"] == pytest.approx(whole["losses"], rel=1e-5)


WATCHED = """
import os, sys
print(os.getpid(), flush=True)
sys.stdin.readline()
"""


def run_elsewhere(program: str, arguments: list[str], system: str) -> tuple[dict[str, Any], int]:
    """What a program says on a simulated system, and its process's peak in bytes, which Linux tells this one.

    A shell is between them: a process begins with the peak of the one that it is made from.
    """
    command = ["/bin/sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", program + WATCHED, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(system), text=True, **pipes) as running:
        assert running.stdout is not None
        said, pid = running.stdout.readline(), running.stdout.readline().strip()
        assert pid, running.communicate()[1]
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
        running.communicate("\n")
    return json.loads(said), int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("system", SYSTEMS)
def test_other_systems_keep_the_budget(bundle: Path, tmp_path: Path, system: str) -> None:
    """Without Linux's advice on pages and its account of them, weights come and go, and give the same."""
    assert open_bundle(bundle).manifest.files["weights.bin"].nbytes > ELSEWHERE_BYTES
    for program, result, label in ((SCRIPT, "tokens", "roles"), (TRAIN, "losses", "strategy")):
        whole, _ = run_elsewhere(program, [str(bundle), "0", str(tmp_path / "whole")], system)
        arguments = [str(bundle), str(ELSEWHERE_BYTES), str(tmp_path / "staged")]
        staged, peak_bytes = run_elsewhere(program, arguments, system)
        assert STREAMED in staged[label]
        assert STREAMED not in whole[label]
        expected = whole[result] if program is SCRIPT else pytest.approx(whole[result], rel=1e-5)
        assert staged[result] == expected
        assert peak_bytes <= ELSEWHERE_BYTES
