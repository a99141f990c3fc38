"""What disks and copies do to a file."""


def flipped(whole: bytes, place: int, bit: int) -> bytes:
    wrong = bytearray(whole)
    wrong[place] ^= 1 << bit
    return bytes(wrong)


def cuts(whole: bytes) -> list[bytes]:
    """Shorter, longer, empty."""
    return [whole[:-1], whole + b"\0", b"", whole[: len(whole) // 2]]
