"""Files that are no intact images, made from intact ones."""

import io
import random

from PIL import Image


def gif_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("P").save(buffer, "GIF")
    return buffer.getvalue()


# What befalls image files, each as the new content made of the old.
DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "header alone": lambda content: content[:200],
    "empty": lambda content: b"",
    "zero bytes": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>404 Not Found</html>",
    "GIF": gif_of,
}


def fuzzed(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Damaged at random: in the header, anywhere, cut off, shifted, or under another's format."""
    data = bytearray(content)
    kind = dice.choice(["header", "header", "anywhere", "cut", "zeros", "shift", "join", "swap", "damage"])
    if kind in ("header", "anywhere"):
        reach = min(len(data), 200) if kind == "header" else len(data)
        for _ in range(dice.randint(1, 12)):
            data[dice.randrange(reach)] = dice.randrange(256)
    elif kind == "cut":
        del data[dice.randrange(len(data)) :]
    elif kind == "zeros":
        first = dice.randrange(len(data))
        data[first : first + 512] = bytes(len(data[first : first + 512]))
    elif kind == "shift":
        first = dice.randrange(len(data))
        del data[first : first + dice.randint(1, 100)]
    elif kind == "join":
        data[dice.randrange(len(data)) :] = other[dice.randrange(len(other)) :]
    elif kind == "swap":
        return other
    else:
        return dice.choice(list(DAMAGES.values()))(content)
    return bytes(data)
