"""One decoder for many prompts: a batch, a stream, and a text that is cancelled under way.

python examples/decoder.py [CHECKPOINT, default runs/demo]
"""

import sys

import nextn

model = nextn.load(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
decoder = nextn.Decoder(model, batch_size=2, draft_length="adaptive")

print("-- three prompts through two places")
prompts = ["import ", "class ", "def read("]
result = decoder.generate(prompts, max_new_tokens=32, stop=["\n"])
for prompt, text, reason in zip(prompts, result.texts, result.finish_reasons, strict=True):
    print(f"{prompt + text!r} ended by {reason}")
print(f"{result.stats.mean_acceptance_length:.2f} tokens per cycle and row")

print("-- a stream")
for piece in decoder.stream(["import "], max_new_tokens=32, temperature=0.8, seed=1):
    print(piece.text, end="", flush=True)
print()

print("-- of two texts the first is cancelled after ten characters, and the second goes on")
texts = ["", ""]
stream = decoder.stream(["class ", "def read("], max_new_tokens=32)
for piece in stream:
    texts[piece.number] += piece.text
    if len(texts[0]) >= 10:
        stream.cancel(0)
    if piece.finish_reason is not None:
        print(f"{texts[piece.number]!r} ended by {piece.finish_reason}")
