"""Small tokenizers of every kind that models come with, trained on docstrings of Python's library."""

import ast
import json
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_GPT4 = r"""'s|'t|'re|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
#: Letters that no docstring has, marks that nobody trained on, blanks of all sorts.
OTHERS = ("Überraschung: déjà vu — “北京”", "😀 zzzqqq\t\n\n  xyzzy-42", "¿Qué? Ärger über Öl")


@cache
def texts(*modules: str) -> tuple[str, ...]:
    """Docstrings of modules of the library, in order."""
    library = Path(sysconfig.get_path("stdlib"))
    nodes = (node for name in modules for node in ast.walk(ast.parse((library / f"{name}.py").read_bytes())))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
    return tuple(text for text in found if text)


def training() -> tuple[str, ...]:
    """What tokenizers are trained on."""
    return texts("argparse", "pathlib", "statistics", "zipfile", "textwrap")


def kept() -> list[str]:
    """What is to be kept: of one module, with what special tokens look like in a text."""
    return [*texts("textwrap"), "a <|end|> in a text", "two\n\n\nlines", "<s> it </s>"]


def byte_level(size: int = 900, **options: Any) -> tokenizers.Tokenizer:
    """As GPT-2's and SmolLM2's."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>", "<|reserved_7|>"],
        show_progress=False,
        **options,
    )
    made.train_from_iterator(training(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def words_whole() -> tokenizers.Tokenizer:
    """As Llama 3's: a word that is a token is taken whole, and special tokens stand behind the vocabulary."""
    made = byte_level()
    content = json.loads(made.to_str())
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"] = json.loads(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_GPT4), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ).__getstate__()
    )
    # A word that no merges make.
    words = (" ".join(kept())).split()
    unmade = next(word for word in words if len(word) > 7 and word not in content["model"]["vocab"])
    content["model"]["vocab"][unmade] = len(content["model"]["vocab"])
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens(["<|begin|>", "<|reserved_special_token_0|>", "<|end|>"])
    made.add_tokens([tokenizers.AddedToken("\n\n", normalized=False), "lines"])
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A",
                pair=None,
                special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))],
            ),
        ]
    )
    return made


def roberta() -> tokenizers.Tokenizer:
    """Its post-processor is another."""
    made = byte_level()
    made.post_processor = processors.RobertaProcessing(
        ("</s>", made.token_to_id("</s>")), ("<s>", made.token_to_id("<s>"))
    )
    return made


def clip() -> tokenizers.Tokenizer:
    """Words end with a mark."""
    made = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="</s>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(training(), trainer)
    return made


def inside_words() -> tokenizers.Tokenizer:
    """BPE whose tokens say that they are inside of a word."""
    made = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##", unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>"], continuing_subword_prefix="##", show_progress=False
    )
    made.train_from_iterator(training(), trainer)
    return made


def byte_fallback(*, split: bool = True) -> tokenizers.Tokenizer:
    """As Gemma's, and without `split` as Llama 2's, which reads a whole text as one word."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<unused0>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    made.train_from_iterator(training(), trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:5]
    content["decoder"] = json.loads(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        ).__getstate__()
    )
    if not split:
        content["pre_tokenizer"] = None
        content["normalizer"] = json.loads(
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]).__getstate__()
        )
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def unigram() -> tokenizers.Tokenizer:
    """As T5's and XLM-R's."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(training(), trainer)
    made.add_special_tokens(["<extra_id_0>", "<extra_id_1>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    return made


def word_piece() -> tokenizers.Tokenizer:
    """As BERT's."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=names, show_progress=False)
    made.train_from_iterator(training(), trainer)
    made.post_processor = processors.BertProcessing(
        ("[SEP]", made.token_to_id("[SEP]")), ("[CLS]", made.token_to_id("[CLS]"))
    )
    return made


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level,
    "words whole": words_whole,
    "roberta": roberta,
    "clip": clip,
    "inside words": inside_words,
    "byte fallback": byte_fallback,
    "one word": lambda: byte_fallback(split=False),
    "unigram": unigram,
    "word piece": word_piece,
}
