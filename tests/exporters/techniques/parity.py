"""PEFT's methods on small models of random weights: an adapter of each that PEFT made, and on the device.

`python -m tests.exporters.techniques.parity` measures what `docs/methods.md` says of them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

import edgepeft
from edgepeft.bundle.manifest import Manifest
from edgepeft.exporters.verify.reference import with_adapter

from .. import models, task_models, zoo

FAMILIES: Mapping[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": lambda: models.llama(tied=True),
    "bert": models.bert_classifier,
    "vit": task_models.vit,
}
TASK_TYPES = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}
BITS = (32, 4)
#: Linears of each family: of attention and of a feed-forward layer.
TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "bert": ["key", "value", "output.dense"],
    "vit": ["k_proj", "v_proj", "fc2"],
}
NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "bert": ["LayerNorm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
}
_EMBEDDINGS = {"llama": "embed_tokens", "bert": "word_embeddings"}
_HEADS = {"bert": ["classifier"], "vit": ["classifier"]}


@dataclass(frozen=True)
class Method:
    """A method of PEFT's.

    Attributes:
        title: in the table.
        config: PEFT's configuration for a family.
        families: those that it applies to.
        noise: deviation of what is added to each of its parameters: it has an effect then.
        asked: what `--method` has to be for fresh ones, where an adapter's slots are not enough.
        finish: what is done to PEFT's model before it is saved.
    """

    title: str
    config: Callable[[str], peft.PeftConfig]
    families: tuple[str, ...] = ("llama", "bert", "vit")
    noise: float = 0.2
    asked: str = "lora"
    finish: Callable[[peft.PeftModel], None] | None = None


def options(family: str, *, heads: bool = True) -> dict[str, Any]:
    """What the configuration of any method on linears has."""
    found = {"target_modules": TARGETS[family], "task_type": TASK_TYPES[family]}
    return found | ({"modules_to_save": _HEADS.get(family)} if heads else {})


def _drawn_vera(family: str) -> peft.PeftConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may be drawn otherwise elsewhere
        return peft.VeraConfig(**options(family), r=6, save_projection=False, projection_prng_key=7)


def _adalora(family: str) -> peft.PeftConfig:
    return peft.AdaLoraConfig(
        **options(family), init_r=6, target_r=3, total_step=20, tinit=4, tfinal=5, deltaT=2, lora_alpha=6
    )


def _allocate(model: peft.PeftModel) -> None:
    """Ranks as at the end of a training: none on the first module, all on the second, others at random."""
    torch.manual_seed(2)
    (config,) = model.peft_config.values()
    values = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    kept = [[False] * config.init_r, [True] * config.init_r]
    kept += [(torch.rand(config.init_r) < 0.5).tolist() for _ in values[2:]]
    config.rank_pattern = dict(zip(values, kept, strict=True))


def _lora_beside(module: str, family: str) -> peft.PeftConfig:
    """On linears, and on another kind of module."""
    return peft.LoraConfig(**options(family) | {"target_modules": [*TARGETS[family], module]}, r=4)


TOKENS = list(range(0, models.SIZES["vocab_size"], 5))

METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA", lambda family: peft.LoraConfig(**options(family), r=4)),
    "lora, bias all": Method(
        "LoRA with all biases", lambda family: peft.LoraConfig(**options(family), r=4, bias="all")
    ),
    "lora, bias of targets": Method(
        "LoRA with the biases of its targets",
        lambda family: peft.LoraConfig(**options(family), r=4, bias="lora_only"),
        ("bert", "vit"),
    ),
    "lora, tokens": Method(
        "LoRA and trainable tokens",
        lambda family: peft.LoraConfig(
            **options(family), r=4, trainable_token_indices={_EMBEDDINGS[family]: TOKENS}
        ),
        ("llama", "bert"),
    ),
    "trainable_tokens": Method(
        "Trainable tokens",
        lambda family: peft.TrainableTokensConfig(
            target_modules=[_EMBEDDINGS[family]],
            token_indices=TOKENS,
            task_type=TASK_TYPES[family],
        ),
        ("llama", "bert"),
    ),
    "lora, embedding": Method(
        "LoRA on the embedding, too",
        lambda family: _lora_beside({"llama": "embed_tokens", "bert": "word_embeddings"}[family], family),
        ("llama", "bert"),
    ),
    "lora, convolution": Method(
        "LoRA on a convolution, too", lambda family: _lora_beside("projection", family), ("vit",)
    ),
    "lora_bias": Method(
        "LoRA with a bias",
        lambda family: peft.LoraConfig(**options(family), r=4, lora_alpha=6, lora_bias=True),
    ),
    "dora": Method(
        "DoRA", lambda family: peft.LoraConfig(**options(family), r=4, lora_alpha=6, use_dora=True)
    ),
    "ia3": Method(
        "IA³",
        lambda family: peft.IA3Config(**options(family), feedforward_modules=TARGETS[family][-1:]),
    ),
    "ln_tuning": Method(
        "Layer-norm tuning",
        lambda family: peft.LNTuningConfig(**options(family) | {"target_modules": NORMS[family]}),
    ),
    "lokr": Method("LoKr", lambda family: peft.LoKrConfig(**options(family), r=4, alpha=6)),
    "lokr, both": Method(
        "LoKr, both matrices as products",
        lambda family: peft.LoKrConfig(
            **options(family),
            r=2,
            decompose_both=True,
            decompose_factor=8,
            rank_pattern={TARGETS[family][0]: 1},
        ),
    ),
    "vera": Method("VeRA", lambda family: peft.VeraConfig(**options(family), r=6)),
    "vera, drawn": Method(
        "VeRA, its matrices not in the file",
        _drawn_vera,
    ),
    "prompt_tuning": Method(
        "Prompt tuning",
        lambda family: peft.PromptTuningConfig(task_type=TASK_TYPES[family], num_virtual_tokens=5),
        ("llama", "bert"),
    ),
    "p_tuning": Method(
        "P-tuning",
        lambda family: peft.PromptEncoderConfig(task_type=TASK_TYPES[family], num_virtual_tokens=5),
        ("llama", "bert"),
        asked="p_tuning",
    ),
    "prefix_tuning": Method(
        "Prefix tuning",
        lambda family: peft.PrefixTuningConfig(task_type=TASK_TYPES[family], num_virtual_tokens=5),
        ("llama",),
    ),
    "loha": Method("LoHa", lambda family: peft.LoHaConfig(**options(family), r=4, alpha=6)),
    "adalora": Method("AdaLoRA", _adalora),
    "adalora, allocated": Method("AdaLoRA, its ranks allocated", _adalora, finish=_allocate),
    "oft": Method("OFT", lambda family: peft.OFTConfig(**options(family), oft_block_size=16)),
    "road": Method("RoAd", lambda family: peft.RoadConfig(**options(family), group_size=16)),
    "road, 2": Method(
        "RoAd, an angle for each output",
        lambda family: peft.RoadConfig(**options(family), variant="road_2", group_size=8),
        ("bert",),
    ),
    "road, 4": Method(
        "RoAd, four angles for each pair",
        lambda family: peft.RoadConfig(**options(family), variant="road_4", group_size=32),
        ("llama",),
    ),
    "miss": Method("MiSS", lambda family: peft.MissConfig(**options(family), r=6)),
    "miss, mini": Method(
        "MiSS, its columns repeated",
        lambda family: peft.MissConfig(**options(family), r=8, mini_r=4, init_weights="mini"),
        ("llama",),
    ),
    "gralora": Method("GraLoRA", lambda family: peft.GraloraConfig(**options(family), r=4, alpha=6)),
    "gralora, hybrid": Method(
        "GraLoRA with a LoRA over all blocks",
        lambda family: peft.GraloraConfig(**options(family), r=8, gralora_k=4, hybrid_r=3, alpha=9),
        ("bert",),
    ),
    "hra": Method("HRA", lambda family: peft.HRAConfig(**options(family), r=6)),
    "oft, shared": Method(
        "OFT, one rotation of all blocks, 7 terms, and biases",
        lambda family: peft.OFTConfig(
            **options(family),
            r=6,
            oft_block_size=0,
            block_share=True,
            num_cayley_neumann_terms=7,
            bias="oft_only",
        ),
    ),
}


def save(method: str, family: str, folder: Path, seed: int = 1) -> Path:
    """An adapter of the method as PEFT writes it, with noise on every parameter of its own."""
    torch.manual_seed(seed)
    # PEFT calls normalizations unsupported, biases incomplete, and wonders at a rank of 0.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(FAMILIES[family](), METHODS[method].config(family))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += METHODS[method].noise * torch.randn_like(parameter)
        if (finish := METHODS[method].finish) is not None:
            finish(wrapped)
        # A copy of the base's embedding would overwrite the one that a bundle has rounded.
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def write(method: str, family: str, bits: int, root: Path) -> Manifest:
    """Export the family with an adapter `a` of the method to `root/b`.

    On the way its outputs and gradients, in one piece, in stages and in the decoder's graph, are compared
    with PEFT's.

    Raises:
        VerificationError: they differ.
    """
    root.mkdir(parents=True, exist_ok=True)
    return edgepeft.export(
        FAMILIES[family](),
        root / "b",
        bits=bits,
        block_size=zoo.BLOCK_SIZE,
        adapters={"a": save(method, family, root / "a")},
        quick=True,
        method=METHODS[method].asked,
    )


def in_torch(family: str, folder: Path, adapter: Path, *, trains: bool = False) -> Any:
    """PEFT's model with the adapter over the weights that the bundle in `folder` holds."""
    model = FAMILIES[family]()
    manifest = edgepeft.bundle.reader.open_bundle(folder).manifest
    models.use_reference(model, models.read_reference(folder, manifest))
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trains:
            return with_adapter(model, adapter)
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What PEFT's model continues a prompt with. Of prompts and prefixes its `generate` of PEFT 0.21 with
    transformers 5 forgets the positions or the prefix itself: there its forward passes say it."""
    ids = torch.tensor([prompt])
    if not model.active_peft_config.is_prompt_learning:
        mask = torch.ones_like(ids)
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    while ids.shape[1] < len(prompt) + count:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    said: list[int] = ids[0, len(prompt) :].tolist()
    return said


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """PEFT's model without the adapter; of prompts its own `disable_adapter` fails with some models."""
    if model.active_peft_config.is_prompt_learning:
        yield model.get_base_model()
        return
    with model.disable_adapter():
        yield model


def batch(family: str) -> models.Batch:
    """Inputs of a family."""
    if family == "vit":
        return models.Batch({"pixel_values": task_models.batch("vit")["pixel_values"]})
    return models.batch()


def difference(device: Any, family: str, adapter: Any, model: Any) -> float:
    """The largest difference of the logits from PyTorch's, relative to their largest magnitude."""
    given = batch(family)
    (got,) = device.forward(given.arrays, adapter=adapter).values()
    with torch.no_grad():
        expected = model(**given.tensors).logits.numpy()
    if expected.ndim == 3:
        expected = expected[:, -got.shape[1] :]  # PEFT's virtual tokens have logits too
    counted = given.arrays["attention_mask"] == 1 if expected.ndim == 3 else slice(None)
    return float(np.abs(got[counted] - expected[counted]).max() / max(1.0, np.abs(expected[counted]).max()))
