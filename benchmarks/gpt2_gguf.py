"""A GPT-2 of gptkern's as a GGUF file, for programs that read no other."""

from __future__ import annotations

from pathlib import Path

from gptkern import GPT
from gptkern.tokenizer.streams import byte_chars


def write_gguf(model: GPT, path: Path, chat_template: str | None = None) -> None:
    """Write a GPT-2 as llama.cpp reads it, in fp32: its tokens are bytes, and beyond them no text's."""
    import gguf

    spec = model.spec
    bytes_of_text = list(byte_chars())
    tokens = bytes_of_text + [f"<{token}>" for token in range(len(bytes_of_text), spec.vocab_size)]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.inner)
    writer.add_block_count(len(spec.layers))
    writer.add_head_count(spec.heads)
    writer.add_layer_norm_eps(spec.norm.eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * spec.vocab_size)
    # The format asks for one: of two bytes that no text holds.
    writer.add_token_merges([f"{tokens[0]} {tokens[0]}"])
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    names = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    tops = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for name, tensor in model.state_dict().items():
        place, _, kind = name.removeprefix("transformer.").rpartition(".")
        if place in tops:
            theirs = tops[place]
        elif place.startswith("h."):
            _, layer, part = place.split(".", 2)
            theirs = f"blk.{layer}.{names[part]}"
        else:
            # The head is the embedding.
            continue
        writer.add_tensor(f"{theirs}.{kind}", tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
