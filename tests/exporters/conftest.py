"""Bundles are exported once a run, and of equal models one trace is taken: tracing takes seconds.

Memory is measured where a test asks for it, by `sharing.measured`, and of the bundles that tests share.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import edgepeft
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import open_bundle

from . import foreign, models, sharing, task_models

# Tiny models: a second thread only waits for the first.
torch.set_num_threads(1)
# What was imported stays: without looking at it again and again, tracing is a fifth faster.
gc.freeze()

LORA_TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
}


@dataclass
class Exported:
    """A bundle with two adapters, and what it was made from."""

    folder: Path
    manifest: Manifest
    adapters: dict[str, Path]
    build: Callable[[], transformers.PreTrainedModel]

    def torch_model(self) -> transformers.PreTrainedModel:
        """The PyTorch model on the bundle's weights."""
        model = self.build()
        models.use_reference(model, models.read_reference(self.folder, self.manifest))
        model.config.use_cache = False
        return model


BUILDERS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], list[str], str | None]] = {
    "bert-classifier": (models.bert_classifier, LORA_TARGETS["bert"], "SEQ_CLS"),
    "bert-encoder": (models.bert_encoder, LORA_TARGETS["bert"], "FEATURE_EXTRACTION"),
    "llama-tied": (lambda: models.llama(tied=True), LORA_TARGETS["llama"], "CAUSAL_LM"),
    "llama-untied": (lambda: models.llama(tied=False), LORA_TARGETS["llama"], "CAUSAL_LM"),
    **task_models.BUILDERS,
}
#: Bundles whose measured memory a test looks at. Of the others outputs, gradients and what they learn are
#: compared, and measuring takes half the time of an export.
MEASURED = {("bert-classifier", 4), ("llama-tied", 4), *task_models.MEASURED}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> sharing.Shared:
    """`shared(name, make)`: a file or folder that is made once a run, by whichever process is first.

    Runs of one state of the code, one after the other as in CI, share those in the folder `TESTS_SHARED`.
    """
    if "TESTS_SHARED" in os.environ:
        return sharing.Shared(Path(os.environ["TESTS_SHARED"]))
    base = tmp_path_factory.getbasetemp()
    return sharing.Shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")


@pytest.fixture(scope="package", autouse=True)
def _quick_exports(shared: sharing.Shared) -> Iterator[None]:
    with sharing.traces_shared(shared), sharing.unmeasured(), sharing.uncalibrated():
        yield


@pytest.fixture
def calibrated() -> Iterator[None]:
    """What the test exports is calibrated as it is by default."""
    with sharing.calibrated():
        yield


@pytest.fixture
def measured() -> Iterator[None]:
    """What the test exports has its memory measured."""
    with sharing.measured():
        yield


@pytest.fixture(scope="session")
def exported(shared: sharing.Shared) -> Callable[[str, int], Exported]:
    """`exported(name, bits)`: a bundle of one of `BUILDERS` with the adapters `plain` and `patterned`."""
    made: dict[tuple[str, int], Exported] = {}

    def make(name: str, bits: int) -> Exported:
        build, targets, task_type = BUILDERS[name]

        def write(root: Path) -> None:
            common: dict[str, Any] = {"task_type": task_type, "target_modules": targets}
            if task_type is None:  # PEFT has no type for it, so it is told of the head
                common["modules_to_save"] = ["classifier"]
            adapters = {
                "plain": models.save_adapter(build(), root / "plain", 1, r=4, lora_alpha=8, **common),
                "patterned": models.save_adapter(
                    build(),
                    root / "patterned",
                    2,
                    r=2,
                    lora_alpha=6,
                    use_rslora=True,
                    rank_pattern={targets[0]: 5},
                    alpha_pattern={targets[1]: 3},
                    **common,
                ),
            }
            with sharing.measured() if (name, bits) in MEASURED else nullcontext():
                edgepeft.export(build(), root / "bundle", bits=bits, adapters=adapters)

        if (name, bits) not in made:
            root = shared(f"exported/{name}-{bits}", write)
            adapters = {adapter: root / adapter for adapter in ("plain", "patterned")}
            made[name, bits] = Exported(
                root / "bundle", open_bundle(root / "bundle").manifest, adapters, build
            )
        return made[name, bits]

    return make


@pytest.fixture(scope="session")
def tied_llama(shared: sharing.Shared) -> Path:
    """A bundle of `models.llama(tied=True)` at 4 bits with a fresh adapter of rank 4; read only."""

    def write(folder: Path) -> None:
        with sharing.measured():
            edgepeft.export(models.llama(tied=True), folder, rank=4, verify=False)

    return shared("tied-llama", write)


@pytest.fixture(scope="session")
def files(shared: sharing.Shared) -> Callable[[str], Path]:
    """`files(name)`: one of the files below, written once."""
    writers: dict[str, Callable[[Path], Path]] = {
        "bert-dynamo": lambda path: foreign.export_dynamo(foreign.bert(), path),
        "llama-dynamo": lambda path: foreign.export_dynamo(models.llama(tied=False), path),
        "llama-script": lambda path: foreign.export_torchscript(models.llama(tied=False), path),
        "llama-q4-symmetric": lambda path: foreign.quantize_nbits(
            files("llama-script"), path, symmetric=True
        ),
        "llama-q4-asymmetric": lambda path: foreign.quantize_nbits(
            files("llama-script"), path, symmetric=False
        ),
    }
    writers |= {
        "llama-positions": lambda path: foreign.export_torchscript(
            models.llama(tied=False), path, with_positions=True
        ),
        "bert-script": lambda path: foreign.export_torchscript(foreign.bert(), path),
        "bert-fused": lambda path: foreign.fuse_bert(files("bert-script"), path),
        "bert-qdq": lambda path: foreign.quantize_qdq(files("bert-dynamo"), path),
        "bert-q8": lambda path: foreign.quantize_whole(files("bert-script"), path),
        "llama-nf4": lambda path: foreign.quantize_bnb4(files("llama-script"), path),
        "llama-cache": lambda path: foreign.with_cache(models.llama(tied=False), path),
    }

    def files(name: str) -> Path:
        def write(folder: Path) -> None:
            folder.mkdir()
            writers[name](folder / "exported.onnx")

        return shared(f"foreign/{name}", write) / "exported.onnx"

    return files


@pytest.fixture(scope="session")
def genai(shared: sharing.Shared) -> Callable[[str, str], Path]:
    """`genai(kind, precision)`: a file of onnxruntime-genai's builder, written once."""
    pytest.importorskip("onnxruntime_genai")

    def build(kind: str, precision: str) -> Path:
        def write(folder: Path) -> None:
            folder.mkdir()
            foreign.build_genai(kind, precision, folder)

        return shared(f"genai/{kind}-{precision}", write) / "onnx" / "model.onnx"

    return build


@pytest.fixture(scope="session")
def switched(shared: sharing.Shared) -> Callable[[str], Path]:
    """`switched(kind)`: a bundle with an adapter of rank 4, at 32 bits: a `classifier` and a `decoder`
    with stages, a `seq2seq` without. The decoder's memory is measured."""
    builders: dict[str, Callable[[], transformers.PreTrainedModel]] = {
        "classifier": models.bert_classifier,
        "decoder": lambda: models.llama(tied=True),
        "seq2seq": task_models.t5,
    }

    def make(kind: str) -> Path:
        def write(folder: Path) -> None:
            with sharing.measured() if kind == "decoder" else nullcontext():
                edgepeft.export(builders[kind](), folder, bits=32, rank=4, verify=False)

        return shared(f"switched/{kind}", write)

    return make
