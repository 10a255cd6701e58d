"""A real GGUF model of 300 KB with random weights, for tests that want the real engine.

`write_tiny_model(path)` writes a one-block llama with a byte-level tokenizer. It loads in 20 ms, makes
thousands of tokens a second, and serves chat, completions, embeddings (`--embedding --pooling mean`)
and rerank (`--reranking`) on llama-server and on the embedded engine. What it says is noise, but noise
with manners, so that tests can count:

- it only ever says ASCII letters and digits, one per token: `max_tokens: 7` is 7 characters, and no parser
  for reasoning or tool calls holds any of them back;
- it never ends by itself: a reply has exactly the number of tokens that was asked for.

The same seed gives the same bytes. `python -m tests.support.tiny_model PATH` writes one by hand.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np

WIDTH = 64
FEED_FORWARD = 128
HEADS = 2

# The three specials, in the order of their ids (they follow the 256 bytes).
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"

# The shortest template that llama.cpp's Jinja engine renders with all roles.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable stand-in for each of the 256 bytes in a GPT-2 vocabulary, by byte.

    Bytes that print (and aren't a blank) stand for themselves; the others take the code points
    from 256 on, in order. The rule is that of GPT-2's byte-level tokenizer.
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(spare)) for byte in range(256)]


def write_tiny_model(
    path: Path, *, context: int = 8192, seed: int = 1, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Write the model to `path` (atomically, so that parallel test runs may share it) and return `path`.

    `context` is the context length in tokens that the file says it was trained with (`n_ctx_train`).
    Another `seed` gives other weights, so other bytes and another hash, of the same size.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    try:
        _add_description(writer, context=context)
        tokens = _add_tokenizer(writer, chat_template)
        _add_weights(writer, np.random.default_rng(seed), tokens)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    os.replace(unfinished, path)
    return path


def _add_description(writer: gguf.GGUFWriter, *, context: int) -> None:
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_tokenizer(writer: gguf.GGUFWriter, chat_template: str | None) -> list[str]:
    """Add a byte-level tokenizer; returns its tokens by id."""
    alphabet = byte_alphabet()
    specials = [BEGIN, END, PAD]
    # llama.cpp refuses a GPT-2 tokenizer without merges: one is enough, and it needs its token.
    tokens = [*alphabet, *specials, "th"]
    kinds = [gguf.TokenType.CONTROL if token in specials else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(tokens.index(BEGIN))
    writer.add_eos_token_id(tokens.index(END))
    # Rerank joins question and document with a separator; a model without one gets a warning.
    writer.add_sep_token_id(tokens.index(END))
    writer.add_pad_token_id(tokens.index(PAD))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    return tokens


def _add_weights(writer: gguf.GGUFWriter, random: np.random.Generator, tokens: list[str]) -> None:
    def add(name: str, *shape: int, scale: float) -> None:
        writer.add_tensor(name, random.normal(0.0, scale, shape).astype(np.float32))

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    add("token_embd.weight", len(tokens), WIDTH, scale=1.0)
    add_norm("blk.0.attn_norm.weight")
    for part in ("q", "k", "v", "output"):
        add(f"blk.0.attn_{part}.weight", WIDTH, WIDTH, scale=WIDTH**-0.5)
    add_norm("blk.0.ffn_norm.weight")
    add("blk.0.ffn_gate.weight", FEED_FORWARD, WIDTH, scale=WIDTH**-0.5)
    add("blk.0.ffn_up.weight", FEED_FORWARD, WIDTH, scale=WIDTH**-0.5)
    add("blk.0.ffn_down.weight", WIDTH, FEED_FORWARD, scale=FEED_FORWARD**-0.5)
    add_norm("output_norm.weight")
    # A row of zeros has the logit 0, and those of letters and digits have a spread of 4: the best
    # of them are so far above that nothing else (the end token included) is ever drawn.
    output = random.normal(0.0, 4.0 * WIDTH**-0.5, (len(tokens), WIDTH)).astype(np.float32)
    for token_id, token in enumerate(tokens):
        if not (len(token) == 1 and token.isascii() and token.isalnum()):
            output[token_id] = 0.0
    writer.add_tensor("output.weight", output)


def main() -> None:
    """Write one model; the path is printed."""
    parser = argparse.ArgumentParser(description="Write the tiny GGUF model that the tests use.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--context", type=int, default=8192, help="n_ctx_train (default 8192)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(write_tiny_model(arguments.path, context=arguments.context, seed=arguments.seed))


if __name__ == "__main__":
    main()
