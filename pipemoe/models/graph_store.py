"""The captured attention of one decoder: graphs per slot and size, and the keys and values that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipemoe.models.microbatch import AttendGraphs
from pipemoe.models.step_keys import StepKeys
from pipemoe.plan.cost.model import GRAPH_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipemoe.config import Config
    from pipemoe.models.cache import StepCache
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.step_keys import StepOfKeys


class GraphStore:
    """Shared by all configurations of one decoder; captures only what is not there yet."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._graphs: dict[tuple[int, torch.dtype, int, int], AttendGraphs] = {}  # see _key
        self._keys: dict[int, StepKeys] = {}  # by most tokens of a rank

    def most_rows(self, config: Config) -> int:
        """Rows of the largest graph; 0 if there are no graphs."""
        most = min(config.graph_tokens, config.max_tokens_per_rank)
        if not most or not self._decoder.can_be_captured:
            return 0
        return next((rows for rows in GRAPH_ROWS if rows >= most), GRAPH_ROWS[-1])

    def serves_cuts(self, config: Config) -> bool:
        """Do graphs serve sequences that are cut over several microbatches?"""
        return bool(self.most_rows(config)) and self._decoder.caches_keys

    def _key(self, config: Config, slot: int, results_dtype: torch.dtype) -> tuple[int, torch.dtype, int, int]:
        return slot, results_dtype, self.most_rows(config), config.max_tokens_per_rank

    def capture(self, config: Config, slot: int, results_dtype: torch.dtype) -> None:
        """Capture for a slot whose lane is the current stream."""
        key = self._key(config, slot, results_dtype)
        if key in self._graphs or not self.most_rows(config):
            return
        self._graphs[key] = AttendGraphs(self._decoder, results_dtype, self.most_rows(config), self._keys_for(config))

    def has_places(self, config: Config) -> bool:
        """Do keys and values of a step have places of their own?"""
        return self._decoder.keys_in_places or self.serves_cuts(config)

    def prepare(self, config: Config) -> None:
        """Reserve memory for keys and values, unless that is done; to be called before steps and captures."""
        if self._keys_for(config) is not None:
            torch.cuda.synchronize(self._decoder.device)  # other streams use it

    def keys(self, config: Config) -> StepKeys | None:
        """Where steps keep keys and values, if those have places."""
        return self._keys_for(config)

    def _keys_for(self, config: Config) -> StepKeys | None:
        """On the current stream, the first time."""
        if not self.has_places(config):
            return None
        most = config.max_tokens_per_rank
        if most not in self._keys:
            self._keys[most] = StepKeys(self._decoder, most)
        return self._keys[most]

    def keep(self, config: Config, num_tokens: int, longest: int) -> StepKeys | None:
        """Room for the keys and values of so many tokens, for steps as well as for rounds; None if keys have no places.
        longest: of them of one sequence, at most. Graphs that do not know it are dropped, to be captured again. Waits
        for the device.
        """
        known = self._keys_for(config)
        if known is None or (known.padding_row >= num_tokens and known.longest >= longest):
            return known
        # What earlier steps and engines had room for, later ones may have again.
        num_tokens, longest = max(num_tokens, known.padding_row), max(longest, known.longest)
        del known  # its memory is to be there again
        self._drop(config)
        found = self._keys[config.max_tokens_per_rank] = StepKeys(self._decoder, num_tokens, longest=longest)
        torch.cuda.synchronize(self._decoder.device)
        return found

    def forget(self, config: Config) -> None:
        """Keep room for a step again, and no graphs: for when `keep`, or a capture after it, has failed. Waits for the
        device.
        """
        if self.has_places(config):
            self._drop(config)
            self.prepare(config)

    def _drop(self, config: Config) -> None:
        """Graphs hold the address of keys and values, so they go, too."""
        torch.cuda.synchronize(self._decoder.device)
        most = config.max_tokens_per_rank
        self._keys.pop(most, None)
        self._graphs = {key: graphs for key, graphs in self._graphs.items() if key[-1] != most}

    def graphs(self, config: Config, slot: int, results_dtype: torch.dtype) -> AttendGraphs | None:
        """What was captured for a slot, if anything."""
        return self._graphs.get(self._key(config, slot, results_dtype))

    def new_step(self, config: Config, begins: Sequence[int]) -> StepCache | StepOfKeys:
        """Where a step keeps keys and values: at fixed addresses if graphs or the fused path read them. begins: for
        each sequence, the number of its first token among the rank's.
        """
        keys = self._keys_for(config)
        return self._decoder.new_step() if keys is None else keys.step(begins)
