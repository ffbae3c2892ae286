"""Sentences behind the gradient of a small language model, word by word."""

import torch

import gradinvbench as gib

try:
    from transformers import GPT2Config, GPT2LMHeadModel

    data = gib.text_data("pydoc-topics", 12)
except (ImportError, gib.InputError):
    print("This example needs transformers: pip install 'gradinvbench[text]'")
    raise SystemExit from None

torch.manual_seed(0)
config = GPT2Config(vocab_size=data.n_tokens, n_embd=64, n_layer=1, n_head=4, use_cache=False)
model = GPT2LMHeadModel(config).eval()
ids = torch.as_tensor(data.train[0])[:3]

target, truth = gib.share(model, ids, ids, loss="next-token", tokens=data.tokens)
found = gib.invert(target, attack="dager", progress=False)
print("\n".join(found.texts))
exact = gib.evaluate(found, truth).summary()["sentence_exact"]["mean"]
print(f"{exact:.0%} of the sentences are exact")
