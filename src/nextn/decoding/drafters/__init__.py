"""Who drafts: one file each, made from `DraftSettings` by `new_drafter`.

drafter         the protocol, and what goes in and out
mtp             the MTP depths, as they were trained
single_cache    one MTP module and one cache, recycled
engine_drafts   conventions of drafting, by name: as trained, recycled, or as an engine drafts
prompt_lookup   the row's own text
draft_model     another language model
"""
