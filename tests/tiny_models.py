"""Models of random weights, small enough to make in a test: gibberish, but real files that real engines load."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired

import gguf
import numpy as np

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_gguf(path: Path, *, layers: int = 2, width: int = 64, heads: int = 4, context: int = 32768) -> Path:
    """A llama of random weights as a GGUF file of about 0.6 MB, the same bytes each time.

    Its vocabulary is the 256 bytes and some letters; its chat template writes "role: content" lines.
    """
    random = np.random.default_rng(0)
    words = [bytes([number]).decode() for number in range(32, 127)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "▁", *words[1:]]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(words)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, layers, width, heads, context)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32) * 0.3)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))

    tensor("token_embd", len(tokens), width)
    norm("output_norm")
    tensor("output", len(tokens), width)
    for block in (f"blk.{number}" for number in range(layers)):
        for part in ("attn_norm", "ffn_norm"):
            norm(f"{block}.{part}")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"{block}.{part}", width, width)
        tensor(f"{block}.ffn_gate", 2 * width, width)
        tensor(f"{block}.ffn_up", 2 * width, width)
        tensor(f"{block}.ffn_down", width, 2 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: gguf.GGUFWriter, layers: int, width: int, heads: int, context: int) -> None:
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)


@contextmanager
def serving_gguf(path: Path, log: Path, *, embeds: bool = False) -> Iterator[str]:
    """llama.cpp's own HTTP server over the file, with one slot, in a child process; its URL without /v1."""
    command = [sys.executable, "-m", "tests.tiny_models", str(path), "embeds" if embeds else "writes"]
    with log.open("w") as file, Popen(command, stdin=PIPE, stdout=PIPE, stderr=file, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            url = next((line.strip() for line in child.stdout if line.startswith("http://")), None)
            assert url is not None, log.read_text()
            yield url
        finally:
            child.stdin.close()  # it ends by itself then, its log written
            try:
                child.wait(20)
            except TimeoutExpired:
                child.kill()


def serve(path: str, task: str) -> None:
    """Run the server in this process, say where it is, and go on until standard input ends."""
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = path
    wanted.model_alias = {"tiny"}
    wanted.n_ctx = 32768
    wanted.n_parallel = 1
    wanted.cpuparams.n_threads = 1
    wanted.port = 0
    wanted.endpoint_slots = True
    wanted.embedding = task == "embeds"
    if wanted.embedding:
        wanted.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(wanted)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(*sys.argv[1:])
