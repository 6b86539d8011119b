"""Replies on disk: append-only shards under a name made of what they depend on, so nothing stale is ever read.

`folder/NAME/manifest.json` says what NAME stands for; each process that writes adds a shard of its own beside it, a
line an answer, on the disk before the next. A line without its end was cut off by a kill and is not read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icl_ft_fast.augmentation.strategy import AugmentError
from icl_ft_fast.runtime.durable import Journal, locked, replacing, sync


@dataclass(frozen=True)
class StoredReply:
    """A reply to a prompt, and where it comes from.

    Attributes:
        key: hex digest of the prompt, its id, its sample's number and seed.
        text: of the reply.
        seed: of sampling.
        prompt_tokens, completion_tokens: as the generator counts them.
        logp: natural-log probability of the reply, None where the generator does not tell.
        time: when it was generated, seconds since 1970.
        is_cut: whether it ended at the limit of new tokens.
    """

    key: str
    text: str
    seed: int
    prompt_tokens: int
    completion_tokens: int
    logp: float | None
    time: float
    is_cut: bool = False


def recorded_date(folder: Path) -> str | None:
    """The first day that the chat prompts of the replies in a folder had, None where none had one."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/manifest.json")]
    return min((m["template_date"] for m in manifests if "template_date" in m), default=None)


class Store:
    """The replies of one strategy, template, generator and sampling.

    Args:
        folder: holds any number of such sets; None holds the replies in memory only.
        identity: what they depend on, as JSON.

    Raises:
        AugmentError, DamagedError: a shard that something else has written to.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self.replies: dict[str, StoredReply] = {}
        self.name = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = folder and folder / self.name
        self._shard: Journal | None = None
        for path in sorted(self._folder.glob("*.jsonl")) if self._folder else ():
            for number, row in enumerate(Journal(path).rows, 1):
                try:
                    reply = StoredReply(**row)
                except TypeError as error:
                    raise AugmentError(f"{path}:{number}: not a reply: {error}; move the file away") from error
                before = self.replies.get(reply.key)
                if before is None or not before.text.strip():  # an empty reply may have been generated again
                    self.replies[reply.key] = reply

    def append(self, reply: StoredReply) -> None:
        """Store a reply; it is on the disk when this returns."""
        self.replies[reply.key] = reply
        if self._folder is None:
            return
        if self._shard is None:
            self._shard = self._new_shard(self._folder)
        self._shard.append(asdict(reply))

    def _new_shard(self, folder: Path) -> Journal:
        with locked(folder / ".lock", wait=True):
            with replacing(folder / "manifest.json") as partial:
                partial.write_text(json.dumps(self.identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            shards = (folder / f"{number:05}.jsonl" for number in itertools.count())
            shard = next(path for path in shards if not path.exists())
            shard.touch()
            sync(folder)
        return Journal(shard)
