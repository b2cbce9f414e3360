"""A toy: a Llama of random weights, a tokenizer trained on the docstrings, and a LoRA adapter over it.

    python samples/tiny_llama.py OUT

writes OUT/model and OUT/adapter, as transformers and PEFT save them, OUT/tiny.edge, the two as a bundle, and
records to learn from: OUT/text.jsonl and, for devices without `tokenizers`, the same as tokens in
OUT/tokenized.jsonl. What the model says means nothing; every command runs on it in seconds.
"""

import json
import sys
from pathlib import Path

import docstrings
import peft
import tokenizers
import torch
import transformers

import edgepeft

VOCABULARY = 1024
RECORDS = 200
END = "<|end|>"


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, which also pads."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model() -> transformers.LlamaForCausalLM:
    """Two layers, four heads of queries for two of keys and values, output layer tied to the embedding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def save_adapter(model: transformers.LlamaForCausalLM, folder: Path) -> None:
    """A LoRA on the attention's projections; its B is random too, so that it changes what the model says."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def main() -> None:
    """Write everything to the folder that the command line names."""
    transformers.logging.disable_progress_bar()
    if len(sys.argv) != 2:
        sys.exit("usage: python samples/tiny_llama.py OUT")
    out = Path(sys.argv[1])
    train, _ = docstrings.write(out / "docstrings")
    texts = [json.loads(line)["text"] for line in train.read_text(encoding="utf-8").splitlines()][:RECORDS]
    tokenizer = train_tokenizer(texts)
    model = make_model()
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    save_adapter(model, out / "adapter")
    rows = [{"text": text} for text in texts]
    tokens = [{"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]} for text in texts]
    for name, records in (("text", rows), ("tokenized", tokens)):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    edgepeft.export(str(out / "model"), out / "tiny.edge", adapters={"docs": str(out / "adapter")})
    print(f"{out}: model, adapter, tiny.edge, text.jsonl, tokenized.jsonl")


if __name__ == "__main__":
    main()
