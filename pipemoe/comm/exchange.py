"""What the ranks tell one another before a step, and how disagreement becomes the same error on every rank."""

from __future__ import annotations

import json
import struct

from pipemoe import errors
from pipemoe.errors import MismatchError, PipemoeError, describe
from pipemoe.plan.schedule import Facts

# Fingerprint, bytes of the error text, whether this rank's caller has been told of it, which sides of the run are left
# out.
_HEADER = struct.Struct("<16sq?B")
_SIDES = ("nothing", "computation", "communication", "computation and communication")
_SHAREABLE = ("ConfigError", "InputError", "CheckpointError", "MismatchError", "ModelError", "PlanError")


def shared(error: PipemoeError) -> PipemoeError:
    """The same error, marked as one that all ranks raise."""
    error.is_shared = True
    return error


def encode_error(error: PipemoeError | None) -> bytes:
    if error is None:
        return b""
    name = type(error).__name__
    return json.dumps([name, describe(error).removeprefix(f"{name}: ")]).encode()


def raise_first(texts: list[bytes]) -> None:
    """Raise the error of the lowest rank that has one, as the same class with the same words on every rank."""
    for rank, text in enumerate(texts):
        if text:
            name, message = json.loads(text)
            cls = getattr(errors, name) if name in _SHAREABLE else errors.ModelError
            raise shared(cls(message if message.startswith("rank ") else f"rank {rank}: {message}"))


def pack_shared(payload: bytes, error: PipemoeError | None) -> bytes:
    """A rank's payload, or the error that keeps it from giving one."""
    return b"\0" + payload if error is None else b"\1" + encode_error(error)


def has_error(packed: bytes) -> bool:
    """Does a rank say why it cannot share anything?"""
    return packed[:1] == b"\1"


def words_of_error(packed: bytes) -> str:
    """What such a rank says."""
    return ": ".join(json.loads(packed[1:]))


def unpack_shared(texts: list[bytes]) -> list[bytes]:
    """All ranks' payloads. Raises the error of the first rank that has one."""
    raise_first([text[1:] if has_error(text) else b"" for text in texts])
    return [text[1:] for text in texts]


def encode_step(
    fingerprint: bytes,
    lengths: tuple[int, ...],
    error: PipemoeError | None,
    *,
    is_known: bool = False,
    left_out: int = 0,
) -> bytes:
    """One rank's message of a step: fingerprint (16 bytes), sequence lengths, or what went wrong on this rank.

    is_known: this rank's caller has already seen the error, by misuse in the last step. If that is so on all ranks,
    nobody needs to hear of it again. left_out: which sides of the run do no work (0: none), the same on all ranks.
    """
    text = encode_error(error)
    return _HEADER.pack(fingerprint, len(text), is_known, left_out) + text + struct.pack(f"<{len(lengths)}q", *lengths)


def decode_step(payloads: list[bytes]) -> Facts:
    """Facts from all ranks' messages.

    Raises the same on every rank: the first rank's error, unless all ranks know theirs; MismatchError if fingerprints
    differ, or what the ranks leave out.
    """
    headers = [_HEADER.unpack_from(p) for p in payloads]
    if not all(is_known for _, _, is_known, _ in headers):
        raise_first([p[_HEADER.size : _HEADER.size + n] for p, (_, n, *_) in zip(payloads, headers)])
    values = [fingerprint.hex()[:8] for fingerprint, *_ in headers]
    if len(set(values)) > 1:
        found = ", ".join(f"rank {r} has {v}" for r, v in enumerate(values))
        raise shared(MismatchError(f"the ranks differ in configuration, model or checkpoint: {found}"))
    check_equal([{"what a step leaves out (only)": _SIDES[left_out]} for *_, left_out in headers])
    lengths = []
    for payload, (_, num_bytes, *_) in zip(payloads, headers):
        begin = _HEADER.size + num_bytes
        lengths.append(struct.unpack_from(f"<{(len(payload) - begin) // 8}q", payload, begin))
    return Facts(tuple(lengths))


def check_equal(facts_of: list[dict[str, str]]) -> None:
    """Raise MismatchError naming the first key whose value is not the same on all ranks."""
    for key in dict.fromkeys(key for facts in facts_of for key in facts):
        values = [facts.get(key, "missing") for facts in facts_of]
        if len(set(values)) > 1:
            odd = next(r for r, v in enumerate(values) if v != values[0])
            text = f"rank {odd}: {key} is {values[odd]}, but rank 0 has {values[0]}; it must be the same on all ranks"
            raise shared(MismatchError(text))
