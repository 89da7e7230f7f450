"""Ways to draft with MTP depths, by name: as trained (`mtp`), recycled, or as serving engines do it.

What is drafted changes acceptance, never the output. Read in the engines' sources; "position i" is the pair of the
trunk's state h[i] and the token t[i+1], as in `nextn.alignment` at depth 1:

- `recycled`: one cache layer for one module, used again and again (below), without an engine's peculiarities. The
  first draft reads what is new, every further one a single position: cheaper than as trained, where every depth reads
  what is new.
- `transformers` (5.23, MTPCandidateGenerator): one draft per stored module, each with a cache layer of its own. That is
  as trained, with N fixed.
- `vllm` (0.32, v1/spec_decode/llm_base_proposer.py, models/deepseek_mtp.py) has one cache layer, and runs the *first*
  module for every draft. Draft 1 reads the positions that are new since the last cycle, true states and true tokens.
  Draft n >= 2 reads one position more: the normed state that draft n-1 came from, and the token that it drafted. It
  attends to what draft 1 left at the earlier positions, where training has keys of depth n. The next cycle overwrites
  the entries of drafts. At position 0 the embedding is zeroed.
- `llamacpp` (b11434, common/speculative.cpp, src/models/deepseek2.cpp) does the same, without zeroing anything, and
  reads one pair more before position 0: a state of zeros, and t[0].

Worked example, tokens A..E known, N = 3 (small letters are drafts, h the trunk's states, r recycled ones):

    vllm       entry    0      1     2     3     4     5
               state    h0     h1    h2    h3    r     r'
               embeds   zeros  C     D     E     f     g    ->  f at entry 3, g at 4, the third draft at 5
    llamacpp   entry    0      1     2     3     4     5     6
               state    zeros  h0    h1    h2    h3    r     r'
               embeds   A      B     C     D     E     f     g

vllm and llamacpp draft the most likely token at every temperature (their default, `draft_sample_method = "greedy"` and
no `probabilistic`): the distribution returned is then one-hot, and a draft x is accepted with probability target(x).

Not emulated: an engine's rounding, and that llama.cpp's server pairs the first token of a later request in the same
slot with a state left over from the request before it instead of zeros.
"""

from __future__ import annotations

from nextn.decoding.drafters.single_cache import SingleCacheConvention
from nextn.errors import GenerationError
from nextn.mtp.scheme import Scheme
from nextn.mtp.sequential import Sequential

AS_TRAINED = "as_trained"


RECYCLED = "recycled"
SINGLE_CACHE = {
    RECYCLED: SingleCacheConvention(first_position=0, zeroes_first_embedding=False, samples=True),
    "vllm": SingleCacheConvention(first_position=0, zeroes_first_embedding=True),
    "llamacpp": SingleCacheConvention(first_position=-1, zeroes_first_embedding=False),
}
ENGINES = ("transformers", "vllm", "llamacpp")
DRAFTING = (AS_TRAINED, RECYCLED, *ENGINES)
"""Ways to draft, by the name a user gives."""


def fixed_draft_length(scheme: Scheme, drafting: str) -> int | None:
    """The only N above 0 that an engine drafts with, None if there is a choice: transformers drafts one per module."""
    return len(scheme.layers) if drafting == "transformers" and isinstance(scheme, Sequential) else None


def usual_drafting(scheme: Scheme | None) -> str:
    """How to draft where nothing is asked for: recycled where one module serves all depths, else as trained."""
    return RECYCLED if isinstance(scheme, Sequential) and len(scheme.layers) == 1 else AS_TRAINED


def check_drafting(scheme: Scheme | None, drafting: str, draft_length: int) -> None:
    """Raise GenerationError for an unknown way to draft, or N drafts that the engine does not make of this model."""
    if drafting not in DRAFTING:
        raise GenerationError(f"unknown drafting {drafting!r}; there are: {', '.join(DRAFTING)}")
    if scheme is None or drafting == AS_TRAINED or draft_length == 0:
        return
    if not isinstance(scheme, Sequential):
        raise GenerationError(
            f"drafting = {drafting!r} needs the sequential scheme, which is what engines serve; this model's is "
            f"{scheme.config.scheme!r}; use drafting = {AS_TRAINED!r}"
        )
    num_modules = len(scheme.layers)
    reason = None
    if drafting == RECYCLED:
        if num_modules > 1:
            reason = f"of one module recycles that module's states, and this model has {num_modules} modules"
    elif scheme.config.trunk_hidden != "post_norm" or (scheme.config.carry != "post_norm" and draft_length > 1):
        reason = (
            "reads and recycles states after their norm, and this model was trained with trunk_hidden = "
            f"{scheme.config.trunk_hidden}, carry = {scheme.config.carry}"
        )
    elif drafting == "transformers" and draft_length != num_modules:
        reason = (
            f"drafts one token per stored module, here {num_modules}; draft_length = {draft_length} is not possible"
        )
    elif drafting == "llamacpp" and num_modules > 1:
        reason = (
            f"runs exactly one MTP module, and this model has {num_modules}; share_weights trains one for all depths"
        )
    elif drafting == "vllm" and draft_length > num_modules and draft_length % num_modules:
        reason = f"wants a multiple of the {num_modules} stored modules beyond them, got draft_length = {draft_length}"
    if reason is not None:
        who = "a drafter" if drafting == RECYCLED else "that engine"
        raise GenerationError(f"drafting = {drafting!r}: {who} {reason}; or use drafting = {AS_TRAINED!r}")
