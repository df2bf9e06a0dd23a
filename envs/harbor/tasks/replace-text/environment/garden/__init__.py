from .plants import water as water

VERSION = "1.2 (water)"
