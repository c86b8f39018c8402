"""One model's attention in the forms that there are, made when they are first asked for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipemoe.errors import ConfigError
from pipemoe.models.fused_decoder import FusedDecoder, lack
from pipemoe.models.graph_store import GraphStore

if TYPE_CHECKING:
    from pipemoe.config import Config
    from pipemoe.models.decoder import Decoder

_log = logging.getLogger("pipemoe")


class AttentionChoice:
    """The decoder by transformers' modules and the fused one, of the same weights, and the graphs of each."""

    def __init__(self, decoder: Decoder) -> None:
        """decoder: by transformers' modules."""
        self._plain = decoder
        self._made: dict[bool, tuple[Decoder, GraphStore]] = {}
        self._has_said = False

    def of(self, config: Config, rank: str) -> tuple[Decoder, GraphStore]:
        """What `config.attention` asks for. rank: "rank 0: ", for messages. Raises ConfigError if it cannot be."""
        reason = lack(self._plain) if config.attention != "transformers" else None
        if reason and config.attention == "fused":
            raise ConfigError(
                f"{rank}attention='fused' is not to be had: {reason}; use attention='transformers', or 'auto'"
            )
        if reason and not self._has_said:
            self._has_said = True
            _log.info("%sattention runs by transformers' modules, not fused: %s", rank, reason)
        fused = config.attention != "transformers" and not reason
        if fused not in self._made:
            decoder = FusedDecoder(self._plain) if fused else self._plain
            self._made[fused] = decoder, GraphStore(decoder)
        return self._made[fused]
