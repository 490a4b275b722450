"""Models of a few kilobytes with random weights, in the form that the libraries save."""

import shutil
from pathlib import Path

from nexus.models import sentence_transformer

VOCABULARY = sentence_transformer.find_model("sentence-transformer:all-MiniLM-L6-v2")[1]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def write_cross_encoder(path: Path, labels: int = 1, **settings: object) -> Path:
    """A BERT that classifies pairs of at most 64 tokens, with scores far enough apart to be told from noise."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, num_labels=labels, initializer_range=0.3, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertForSequenceClassification(config).save_pretrained(path)
    for file in TOKENIZER:
        shutil.copy(VOCABULARY / file, path)
    return path


def save_tiny(folder: Path, kind: type, config: object, pooling: str) -> Path:
    """A random model in the form that sentence-transformers saves today, with the tokenizer of MiniLM."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    source = folder.with_name("source")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        kind(config).save_pretrained(source)
    for file in TOKENIZER:
        shutil.copy(VOCABULARY / file, source)
    SentenceTransformer(modules=[Transformer(str(source)), Pooling(32, pooling)], device="cpu").save(
        str(folder), create_model_card=False
    )
    return folder
