"""A small Llama with ReLU, trained for a moment on English bytes so that which neurons are 0 depends on the text: what
predictors and exact skipping are tried on. A penalty on active neurons makes it as sparse as published ReLU models are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

N_VOCAB = 320
SHAPE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}


def train(torch: Any, text: str, *, steps: int = 220, batch: int = 12, length: int = 96, penalty: float = 0.03) -> Any:
    """A transformers model that has seen steps * batch * length bytes of the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="relu"))
    ids = torch.tensor(list(text.encode("utf-8")), dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    gates: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _module, _inputs, out: gates.append(out))
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=8e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        at = torch.randint(0, len(ids) - length, (batch,), generator=generator)
        rows = torch.stack([ids[i : i + length] for i in at.tolist()])
        gates.clear()
        loss = model(rows, labels=rows).loss
        active = sum(torch.relu(g + 0.05).mean() for g in gates) / len(gates)
        optimiser.zero_grad()
        (loss + penalty * active).backward()
        optimiser.step()
        schedule.step()
    model.eval()
    return model


def save(model: Any, folder: Path) -> Path:
    """As a checkpoint would be published, with a byte-level tokenizer: token i is byte i."""
    from hf_models import write_tokenizer

    model.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder, N_VOCAB)
    return folder
