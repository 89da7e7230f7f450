"""One run as a page: what a report holds (`schema`), where it came from (`provenance`), its plots and its HTML."""
