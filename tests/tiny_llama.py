"""A Llama of random weights that vLLM loads in seconds: real in every way but what it says.

Every token it can choose is a word, so each one shows in a stream; the same prompt always continues the
same way at temperature 0.
"""

from pathlib import Path

WORDS = [
    f" {first}{last}" for first in "bcdfghklmnprstvw" for last in ("an", "el", "is", "or", "ust", "ing", "ame", "ock")
]
SPECIAL = ["<s>", "</s>", "<unk>"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def write_llama(folder: Path, layers: int = 2, hidden: int = 128, context: int = 2048) -> Path:
    """A model folder of Hugging Face's; heads are 64 wide, as vLLM's CPU kernels want it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ") for word in WORDS]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=context,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: len(vocabulary) - len(words)] = 0.0  # never the largest: words are, one or another
    model.save_pretrained(folder)
    return folder
