"""Makes the drafter that the settings name."""

from __future__ import annotations

from nextn.decoding.drafters.draft_model import DraftModelDrafter
from nextn.decoding.drafters.drafter import Drafter
from nextn.decoding.drafters.engine_drafts import SINGLE_CACHE
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.decoding.drafters.prompt_lookup import PromptLookupDrafter
from nextn.decoding.drafters.single_cache import SingleCacheDrafter
from nextn.decoding.request import PROMPT_LOOKUP, DraftSettings
from nextn.decoding.steps import Steps
from nextn.mtp.model import MTPModel


def new_drafter(
    draft: DraftSettings, model: MTPModel, longest: int, num_slots: int, capacity: int, steps: Steps
) -> Drafter | None:
    """The drafter of a batch, None where nothing drafts.

    Args:
        draft: settings that `resolve.resolve_draft` has filled in; its drafter is prepared if it is a model.
        model: the model that verifies, prepared.
        longest: most tokens drafted in a cycle.
        num_slots: rows decoded at a time.
        capacity: most tokens of a row.
        steps: eager or compiled.

    Raises:
        GenerationError: another model drafts, and its vocabulary or context does not do.
    """
    trunk, scheme = model.trunk, model.scheme
    if longest == 0:
        return None
    if isinstance(draft.drafter, MTPModel):
        return DraftModelDrafter(draft.drafter.trunk, trunk.vocab_size, num_slots, capacity, steps)
    if draft.drafter == PROMPT_LOOKUP:
        return PromptLookupDrafter(num_slots)
    if scheme is None:
        return None
    if draft.convention in SINGLE_CACHE:
        convention = SINGLE_CACHE[draft.convention]
        return SingleCacheDrafter(trunk, scheme, num_slots, capacity, convention, steps, draft)
    return MTPDrafter(trunk, scheme, num_slots, capacity, longest, steps, draft)
