"""Seeds of a run: one for each purpose, all from the seed that the user chose."""

import hashlib


def number(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: 32 bits, which is what torch's CPU generator makes use of."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=4).digest(), "big")
