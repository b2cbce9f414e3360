"""What happens to a process: it is forked, a file that it has mapped is cut off, one changes on the disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import edgepeft
from edgepeft.errors import BundleError
from edgepeft.runtime.training.trainer import Step

from . import tiny

ROOT = Path(__file__).parents[2]

FORKED = """
import os, sys
import edgepeft
from tests.runtime import tiny

model = edgepeft.load(sys.argv[1], threads=2)
model.predict([{"input_ids": [1]}])

def adapt():
    options = {"steps": 12, "batch_size": 4, "learning_rate": 0.02}
    return model.adapt(tiny.records(120), sys.argv[2], **options).decision

for use in (
    lambda: model.predict([{"input_ids": [1]}]),
    lambda: edgepeft.load(sys.argv[1], threads=2).predict([{"input_ids": [1]}])[0]["score"] > 0,
    adapt,
):
    child = os.fork()
    if child == 0:
        try:
            print(use(), flush=True)
        except edgepeft.errors.EdgePeftError as error:
            print(error, flush=True)
        sys.exit()
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_after_loading_never_waits_for_ever(classifier: Path, tmp_path: Path) -> None:
    """What is open says so; what is opened anew works; and the copy ends."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(classifier), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = done.stdout.splitlines()
    assert "forked after the model was loaded" in told[0], done.stderr
    assert told[1:] == ["True", "kept"]


CUT_OFF = """
import ctypes, mmap, os, sys, threading
import click
import numpy as np
from edgepeft import cli

@click.command("cut")
@click.option("--json", is_flag=True)
@click.pass_obj
def cut(console, json):
    console.as_json = json
    with open(sys.argv[1], "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        os.truncate(sys.argv[1], 0)
        room = ctypes.create_string_buffer(mapped.size)
        def read():  # as onnxruntime does: without Python's lock
            address = ctypes.c_void_p(mapped.ctypes.data)
            ctypes.CDLL(None).memcpy(room, address, ctypes.c_size_t(mapped.size))
        if sys.argv[2] == "thread":
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
        else:
            (read if sys.argv[2] == "main" else mapped.sum)()

cli.COMMANDS = (*cli.COMMANDS, "cut")
cli._Commands.get_command = lambda *_: cut
cli.main(["cut", *sys.argv[3:]])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="there is no SIGBUS")
@pytest.mark.parametrize("reader", ["numpy", "main", "thread"])
def test_a_mapped_file_that_is_cut_off_ends_in_one_line(tmp_path: Path, reader: str) -> None:
    """And exit code 1, whichever thread reads it; with --json in the document."""
    for options in ([], ["--json"]):
        (tmp_path / "file").write_bytes(bytes(2**20))
        done = subprocess.run(
            [sys.executable, "-c", CUT_OFF, str(tmp_path / "file"), reader, *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        told, other = (done.stdout, done.stderr) if options else (done.stderr, done.stdout)
        assert "was cut off or its disk is gone (SIGBUS)" in told
        assert other == ""
        assert options or told.count("\n") == 1


def test_weights_that_change_while_they_teach_give_no_adapter(tmp_path: Path) -> None:
    """Nor a checkpoint to go on from: what it holds was learned from the changed ones."""
    bundle = tiny.write_bundle(tmp_path / "b")

    def zero(step: Step) -> None:
        if step.number == 20:
            path = bundle / "weights.bin"
            path.write_bytes(bytes(path.stat().st_size))

    with (
        edgepeft.load(bundle) as model,
        pytest.raises(BundleError, match=r"weights\.bin: its sha256 is .*copy the bundle again"),
    ):
        model.adapt(tiny.records(120), tmp_path / "out", on_step=zero, steps=30, batch_size=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
