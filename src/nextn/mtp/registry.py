"""The schemes by name, and what each allows to be set."""

from __future__ import annotations

import dataclasses

from nextn.config import DetachConfig, MTPConfig
from nextn.errors import ConfigError
from nextn.mtp.independent import Independent
from nextn.mtp.parallel import Parallel
from nextn.mtp.routing import NO_DETACH
from nextn.mtp.scheme import Scheme
from nextn.mtp.sequential import Sequential
from nextn.mtp.shared_module import SharedModule

SCHEMES: dict[str, type[Scheme]] = {
    "sequential": Sequential,
    "independent": Independent,
    "shared_module": SharedModule,
    "parallel": Parallel,
}
"""Every scheme by its name in `mtp.scheme`. A scheme is built as `SCHEMES[name](trunk, mtp_config)`."""


def scheme_class(config: MTPConfig) -> type[Scheme]:
    """The class that `mtp.scheme` names. Raises ConfigError for an unknown name."""
    if config.scheme not in SCHEMES:
        raise ConfigError(f"mtp.scheme must be one of {', '.join(SCHEMES)}, got {config.scheme!r}")
    return SCHEMES[config.scheme]


def check_scheme(config: MTPConfig, detach: DetachConfig = NO_DETACH, draft_length: int = 0) -> None:
    """Raise ConfigError for a setting that the scheme would silently ignore, or for drafts that it cannot make.

    Args:
        config: `mtp`.
        detach: `objective.detach`.
        draft_length: N, tokens to draft per cycle.
    """
    scheme = scheme_class(config)
    if config.num_depths == 0:
        return
    read, defaults = scheme.settings_read(config), vars(MTPConfig())
    changed = {name: value for name, value in vars(config).items() if value != defaults[name]}
    given = ", ".join(f"{name} = {value!r}" for name, value in changed.items() if name in read)
    chosen = f"mtp.scheme = {config.scheme!r}" + (f" ({given})" if given else "")
    for name, value in changed.items():
        if name not in read | {"scheme", "num_depths"}:
            raise ConfigError(
                f"mtp.{name} = {value!r} has no effect with {chosen}; leave it out "
                f"(what is read then: {', '.join(sorted(read)) or 'num_depths alone'})"
            )
    effective = {
        "embedding": scheme.embeds_tokens,
        "head": scheme.uses_trunk_head(config),
        "between_depths": scheme.is_chain,
    }
    for name, is_effective in effective.items():
        if getattr(detach, name) and not is_effective:
            raise ConfigError(f"objective.detach.{name} has no effect with {chosen}; leave it out")
    longest = scheme.max_draft_length(config.num_depths)
    if longest is not None and draft_length > longest:
        raise ConfigError(
            f"evaluation.draft_length = {draft_length}, but mtp.scheme = {config.scheme!r} drafts one token per "
            f"trained depth: at most {longest} here. Set evaluation.draft_length={longest}"
        )


assert all(scheme.reads <= {f.name for f in dataclasses.fields(MTPConfig)} for scheme in SCHEMES.values())
