"""Bundles are exported once a session: tracing takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import edgepeft
from edgepeft.bundle.manifest import Manifest

from . import foreign, models, task_models

# Tiny models: a second thread only waits for the first.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Exported]:
    """`exported(name, bits)`: a bundle of one of `BUILDERS` with the adapters `plain` and `patterned`."""
    made: dict[tuple[str, int], Exported] = {}

    def make(name: str, bits: int) -> Exported:
        if (name, bits) not in made:
            build, targets, task_type = BUILDERS[name]
            root = tmp_path_factory.mktemp(f"{name}-{bits}")
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
            manifest = edgepeft.export(build(), root / "bundle", bits=bits, adapters=adapters)
            made[name, bits] = Exported(root / "bundle", manifest, adapters, build)
        return made[name, bits]

    return make


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `models.llama(tied=True)` at 4 bits with a fresh adapter of rank 4; read only."""
    bundle = tmp_path_factory.mktemp("tied-llama") / "bundle"
    edgepeft.export(models.llama(tied=True), bundle, rank=4, verify=False)
    return bundle


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`files(name)`: one of the files below, written once."""
    folder = tmp_path_factory.mktemp("foreign")
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
        "llama-nf4": lambda path: foreign.quantize_bnb4(files("llama-script"), path),
        "llama-cache": lambda path: foreign.with_cache(models.llama(tied=False), path),
    }
    made: dict[str, Path] = {}

    def files(name: str) -> Path:
        if name not in made:
            (folder / name).mkdir()
            made[name] = writers[name](folder / name / "exported.onnx")
        return made[name]

    return files


@pytest.fixture(scope="session")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`genai(kind, precision)`: a file of onnxruntime-genai's builder, written once."""
    pytest.importorskip("onnxruntime_genai")
    made: dict[tuple[str, str], Path] = {}

    def build(kind: str, precision: str) -> Path:
        if (kind, precision) not in made:
            folder = tmp_path_factory.mktemp(f"genai-{kind}-{precision}")
            made[kind, precision] = foreign.build_genai(kind, precision, folder)
        return made[kind, precision]

    return build


@pytest.fixture(scope="session")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`switched(kind)`: a bundle with an adapter of rank 4, at 32 bits: a `classifier` and a `decoder`
    with stages, a `seq2seq` without."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            model = {
                "classifier": models.bert_classifier,
                "decoder": lambda: models.llama(tied=True),
                "seq2seq": task_models.t5,
            }[kind]()
            folder = tmp_path_factory.mktemp("switched") / kind
            edgepeft.export(model, folder, bits=32, rank=4, verify=False)
            made[kind] = folder
        return made[kind]

    return make
