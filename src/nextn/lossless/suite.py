"""All checks of the lossless suite in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nextn.lossless.greedy import check_eos, check_greedy, check_no_cache
from nextn.lossless.sampling import check_sampling
from nextn.lossless.scripted import check_rollback, check_scripted
from nextn.lossless.subject import BATCH_SIZES, Check, Subject


def lossless_checks(subject: Subject, say: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """All checks in turn, each as soon as it is done.

    Args:
        subject: what is verified.
        say: told what begins.
    """
    say("decoding plainly")
    plain = [list(ids) for ids in subject.greedy(0, 1).token_ids]
    results = {}
    for draft_length in subject.draft_lengths:
        for batch_size in BATCH_SIZES:
            say(f"decoding with N = {draft_length}, batch {batch_size}")
            results[draft_length, batch_size] = subject.greedy(draft_length, batch_size)
    say("decoding without a cache")
    yield check_no_cache(subject, plain, results)
    yield check_greedy(subject, plain, results)
    say("ending rows inside drafts")
    yield check_eos(subject, plain, results)
    say("drafting what comes, and what does not")
    yield check_scripted(subject, plain, are_right=True)
    yield check_scripted(subject, plain, are_right=False)
    say("rolling caches back")
    yield check_rollback(subject, plain)
    say("sampling")
    yield from check_sampling(subject, say)
