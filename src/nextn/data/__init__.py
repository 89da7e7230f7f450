"""Corpora, tokenizers and packing: from a name to rows of tokens.

load_corpus(config) -> Corpus        documents to train on and documents held out
build_tokenizer(spec, corpus)        bytes, byte-level BPE, or a saved tokenizer
pack(documents, tokenizer)           one stream of tokens with document ids
RowSampler(...).next_batch()         training rows, resumable bit for bit
validation_rows, validation_prompts  the same held-out rows and prompts every time
token_importance(...)                how much each token of a batch weighs as a label of an MTP depth
"""

from nextn.data.corpora import Corpus, Document, FileRecord, load_corpus
from nextn.data.importance import TokenImportance, token_importance
from nextn.data.packing import Batch, PackedTokens, RowSampler, pack, require_row, validation_prompts, validation_rows
from nextn.data.sources import DroppedFile
from nextn.data.tokenizers import ByteTokenizer, SavedTokenizer, Tokenizer, build_tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "DroppedFile",
    "FileRecord",
    "PackedTokens",
    "RowSampler",
    "SavedTokenizer",
    "TokenImportance",
    "Tokenizer",
    "build_tokenizer",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "require_row",
    "token_importance",
    "validation_prompts",
    "validation_rows",
]
