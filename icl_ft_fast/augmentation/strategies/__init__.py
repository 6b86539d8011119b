"""The augmentation strategies, each in a file of its own with its prompts beside it.

A strategy is added by its file, its prompts NAME.base.jinja and NAME.chat.jinja, and a line in the tuple below.
"""

from __future__ import annotations

from icl_ft_fast.augmentation.strategies import (
    active_reading,
    document,
    entigraph,
    global_documents,
    local,
    reverse,
    rules,
    self_ask,
    self_qa,
    spa,
)
from icl_ft_fast.augmentation.strategy import AugmentError, Strategy

STRATEGIES: dict[str, Strategy] = {
    module.STRATEGY.name: module.STRATEGY
    for module in (
        *(local, document, global_documents, self_qa, self_ask, spa, entigraph, active_reading),
        *(rules, reverse),
    )
}
BY_MODEL = tuple(name for name, strategy in STRATEGIES.items() if strategy.infer is None)


def find(name: str) -> Strategy:
    """The strategy of this name.

    Raises:
        AugmentError: there is none.
    """
    if name not in STRATEGIES:
        raise AugmentError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name]
