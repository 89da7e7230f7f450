"""The lossless suite: does a model decode with drafts what it decodes without them? On any checkpoint, with evidence.

| check | what must hold |
|---|---|
| `no cache` | greedy texts, plain and with drafts, are those of one whole forward per token |
| `greedy` | greedy texts for every N and batch size are those of plain decoding |
| `eos` | a row ends at an EOS inside an accepted draft, nowhere else |
| `full accept` | drafts that are all right are all accepted, and the texts are those of plain decoding |
| `zero accept` | drafts that are all wrong are all refused, and the texts are those of plain decoding |
| `rollback` | after random accepted lengths, cached trunk states are those recomputed from scratch |
| `sampling` | sampled text has the distribution of the trunk: chi-square against exact probabilities |
| `control` | the same test rejects a verifier without the residual; else it has no power, and nothing was shown |

Greedy checks hold in float32 up to near ties (`differences.NEAR_TIE`), which are counted: a forward of one token and
one of several round differently. In bfloat16 that happens often enough to be measured (`bfloat16_divergence`), which is
no check.

subject       what is verified, and the outcome of a check
differences   where two greedy texts differ, and whether the place is a near tie
greedy        texts beside plain decoding, cached and not, ended at EOS; bfloat16
scripted      drafts that are right as often as one wishes: their acceptance, and caches rolled back
sampling      the distribution of sampled text, and the control
suite         all checks in turn
"""

from nextn.lossless.greedy import bfloat16_divergence
from nextn.lossless.subject import Check, Subject
from nextn.lossless.suite import lossless_checks

__all__ = ["Check", "Subject", "bfloat16_divergence", "lossless_checks"]
