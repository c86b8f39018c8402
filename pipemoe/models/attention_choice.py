"""One model's attention in the forms that there are, made when they are first asked for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipemoe.errors import ConfigError
from pipemoe.models.fused_decoder import FusedDecoder, lack
from pipemoe.models.graph_store import GraphStore
from pipemoe.models.host_decoder import HostDecoder, lack_on_host
from pipemoe.models.lone_sequence import attend_alone
from pipemoe.models.measured_attention import MeasuredAttention

if TYPE_CHECKING:
    from pipemoe.config import Config
    from pipemoe.models.decoder import Decoder

_log = logging.getLogger("pipemoe")
_MEASURED_LAYERS = 9  # the first is left out; families repeat their kinds of layers after 2, 4 or 8


class AttentionChoice:
    """The decoder by transformers' modules and the fused one, of the same weights, and the graphs of each."""

    def __init__(self, decoder: Decoder) -> None:
        """decoder: by transformers' modules."""
        self._plain = decoder
        self._reason: str | None = None  # why there is no fused one
        self._fused: FusedDecoder | HostDecoder | None = None
        self._graphs: dict[bool, GraphStore] = {}  # by whether it is fused
        self._has_said = False
        self.measured = MeasuredAttention(lambda count: attend_alone(decoder, count, _MEASURED_LAYERS))

    def of(self, config: Config, rank: str) -> tuple[Decoder, GraphStore]:
        """What `config.attention` asks for. rank: "rank 0: ", for messages. Raises ConfigError if it cannot be."""
        if self._fused is None and self._reason is None:
            # Also if nobody asks for it: it puts weights together, and graphs know weights by their addresses.
            on_host = self._plain.device.type == "cpu"
            self._reason = (lack_on_host if on_host else lack)(self._plain)
            if not self._reason:
                self._fused = (HostDecoder if on_host else FusedDecoder)(self._plain)
        if self._reason and config.attention == "fused":
            raise ConfigError(
                f"{rank}attention='fused' is not to be had: {self._reason}; use attention='transformers', or 'auto'"
            )
        if self._reason and config.attention == "auto" and not self._has_said:
            self._has_said = True
            _log.info("%sattention runs by transformers' modules, not fused: %s", rank, self._reason)
        fused = self._fused if config.attention != "transformers" else None
        decoder = fused or self._plain
        return decoder, self._graphs.setdefault(fused is not None, GraphStore(decoder))
