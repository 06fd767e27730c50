"""The run-time type checker that jaxtyping's import hook applies to `pipeline` while tests run."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is welcome where a float is asked for, as for every static checker (PEP 484's numeric tower).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
