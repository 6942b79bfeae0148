"""Random models of two layers and their byte tokenizer, made by the tests because nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

BYTE_TOKENIZER = Path(__file__).resolve().parents[1] / "golden" / "byte_tokenizer"
VOCAB_SIZE = 320
MAX_MODEL_LEN = 128


def tiny_causal_lm(seed: int = 0, **overrides):
    """Random Qwen3 with weights large enough that different contexts give clearly different scores."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_MODEL_LEN,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**options, **overrides})).float().eval()


def save_causal_lm(path: Path, seed: int = 0, **overrides) -> Path:
    """Save :func:`tiny_causal_lm` with the byte tokenizer."""
    from transformers import AutoTokenizer

    tiny_causal_lm(seed, **overrides).save_pretrained(path)
    AutoTokenizer.from_pretrained(BYTE_TOKENIZER).save_pretrained(path)
    return path


def tiny_classifier(labels: tuple[str, ...], seed: int = 0, max_len: int = 96):
    """Random BERT sequence classifier whose labels are ``labels`` in this order."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_len,
        initializer_range=0.3,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def pair_tokenizer():
    """The byte tokenizer: pairs are the concatenation of both texts, one token per byte."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BYTE_TOKENIZER)


def teach_self_test(model):
    """Shift the head of a classifier just so far that it passes the NLI self-test."""
    import torch
    from verl.utils.siop.scorer.engines.nli_model import SELF_TEST

    labels = [label.lower() for label in model.config.id2label.values()]
    tokenizer = pair_tokenizer()
    with torch.inference_mode():
        pooled = [model.bert(**tokenizer(a, b, return_tensors="pt")).pooler_output[0] for a, b, _ in SELF_TEST]
    pooled_PD = torch.stack(pooled).clone()
    wanted_PC = torch.zeros(len(SELF_TEST), len(labels))
    for row, (_, _, expected) in zip(wanted_PC, SELF_TEST, strict=True):
        row[[(label == "entailment") == (expected == "entailment") for label in labels].index(True)] = 2.0
    with torch.no_grad():
        missing_PC = wanted_PC - model.classifier(pooled_PD)
        model.classifier.weight += (torch.linalg.pinv(pooled_PD) @ missing_PC).T
    return model


def save_classifier(
    path: Path,
    labels: tuple[str, ...] = ("contradiction", "neutral", "entailment"),
    self_test: bool = True,
    **options,
) -> Path:
    """Save :func:`tiny_classifier`, by default one that passes the self-test, with its tokenizer."""
    model = tiny_classifier(labels, **options)
    (teach_self_test(model) if self_test else model).save_pretrained(path)
    pair_tokenizer().save_pretrained(path)
    return path
