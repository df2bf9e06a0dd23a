"""Text to token ids when part of the text comes from outside and must not become control tokens.

A tokenizer finds its added tokens anywhere in a string, so `<|im_end|>` in a tool result would end
the turn. Here text from outside is hidden from the chat template behind private-use stand-ins
(`Literals`); what then still looks like a control token was written by the template. Those are
encoded with a copy of the tokenizer that knows its control tokens under other names only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

from envs.types import Message
from errors import DataError, TemplateError

_PRIVATE_USE = tuple(chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
ORDINARY_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_COPIES = 4  # one copy is the rule; more only if a text holds the private-use character it is built on


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Every added token by id, special or not."""
    return {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of what decides text to ids: vocabulary, added tokens, merges, pre-tokenizer. Not of the
    folder's name, nor of the padding and truncation that a call may have left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unused_character(text: str) -> str:
    for code in _PRIVATE_USE:
        character = chr(code)
        if character not in text and json.dumps(character)[1:-1] not in text:
            return character
    raise DataError("a message uses every private-use character, which no text does; clean the row")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class Literals:
    """Stand-ins for pieces of text that a template must carry through without reading them.

    A stand-in is `mark index mark`: no whitespace, so `strip`, `trim` and `split` leave it whole.
    `mark` occurs nowhere in the texts that are rendered.
    """

    def __init__(self, *rendered: Any) -> None:
        self._mark = _unused_character("".join(_strings(rendered)))
        self._texts: list[str] = []
        # `tojson(ensure_ascii=True)` writes the mark as an escape
        escape = re.escape(json.dumps(self._mark)[1:-1])
        self._pattern = re.compile(f"(?:{self._mark}([0-9]+){self._mark}|{escape}([0-9]+){escape})")

    def hide(self, text: str) -> str:
        self._texts.append(text)
        return f"{self._mark}{len(self._texts) - 1}{self._mark}"

    def present(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def torn(self, text: str) -> bool:
        return self._mark in self._pattern.sub("", text)

    def restore(self, text: str) -> str:
        return self._pattern.sub(self._text_of, text)

    def _text_of(self, match: re.Match[str]) -> str:
        if match.group(1) is not None:
            return self._texts[int(match.group(1))]
        return json.dumps(self._texts[int(match.group(2))])[1:-1]


class TextEncoder:
    """Encodes rendered text with one tokenizer; only the template's own control tokens get control ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # "\n\n" or "▁▁" as an added token (Gemma, GPT-NeoX) is layout: it forges nothing, and escaping
        # it would change the ids of ordinary text
        added = tokenizer.added_tokens_decoder
        self.controls = {i: t for i, t in control_tokens(tokenizer).items() if t.replace("▁", " ").strip()}
        self._id_of = {text: i for i, text in self.controls.items()}
        self._all = _Scanner(self.controls.values())
        self._special = _Scanner(text for i, text in self.controls.items() if added[i].special)
        self._copies: dict[str, Tokenizer] = {}

    def hide_messages(self, messages: Sequence[Message], literals: Literals) -> list[Message]:
        """The messages with control tokens' text behind stand-ins. The assistant keeps its non-special
        ones (`<think>`, `<tool_call>`): they are how it writes."""
        return [self._hide(m, literals, self._special if m["role"] == "assistant" else self._all) for m in messages]

    def hide_all(self, values: Sequence[dict], literals: Literals) -> list[dict]:
        """Tool schemas or calls with every control token's text behind stand-ins."""
        return [self._hide(value, literals, self._all) for value in values]

    def _hide(self, value: Any, literals: Literals, scanner: _Scanner, *, tail: bool = True) -> Any:
        if isinstance(value, str):
            return scanner.hide(_without_surrogates(value), literals, tail=tail)
        if isinstance(value, Mapping):
            return {
                self._hide(key, literals, scanner, tail=False): self._hide(
                    item, literals, scanner, tail=key not in ("role", "type")
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._hide(item, literals, scanner) for item in value]
        return value

    def find_controls(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each control token's text, leftmost and longest first."""
        for match in self._all.pattern.finditer(text):
            yield match.start(), match.end(), self._id_of[match.group()]

    def has_controls(self, text: str) -> bool:
        return self._all.pattern.search(text) is not None

    def forges_control(self, role: str) -> bool:
        """Whether a template that writes the role, alone or as `<|role|>`, could write a control token
        that no ordinary role has."""
        if role in ORDINARY_ROLES:
            return False
        return self.has_controls(role) or any(role in text for text in self.controls.values())

    def encode(self, text: str, literals: Literals) -> list[int]:
        """Ids of rendered text, its stand-ins restored and encoded as plain text.

        Raises TemplateError if the template cut a stand-in apart, or the tokenizer cannot write the
        text without a control token.
        """
        if literals.torn(text):
            raise TemplateError(
                f"tokenizer {self.tokenizer.name_or_path!r}: its chat template cuts message text that holds "
                "a control token. Use a chat_template that writes messages whole."
            )
        written = self._visible([i for _, _, i in self.find_controls(text)])
        if not literals.present(text):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            # unequal: text became a control token by normalisation, or the vocabulary holds one as a word
            if self._visible(ids) == written:
                return ids
        ids = self._encode_apart(text, literals)
        if self._visible(ids) != written:
            raise TemplateError(
                f"tokenizer {self.tokenizer.name_or_path!r}: its normalizer turns text into control tokens "
                f"(expected ids {written}, got {self._visible(ids)}). Use a tokenizer without it."
            )
        return ids

    def encode_after(self, control_id: int, text: str, literals: Literals) -> list[int]:
        """Ids of text as they come after a control token, which is not among them."""
        if control_id not in self.controls:
            return self.encode(text, literals)
        ids = self.encode(self.controls[control_id] + text, literals)
        return ids[ids.index(control_id) + 1 :]

    def _visible(self, ids: Sequence[int]) -> list[int]:
        # <unk> is what a lossy vocabulary makes of a character it lacks
        return [i for i in ids if i in self.controls and i != self.tokenizer.unk_token_id]

    def _encode_apart(self, text: str, literals: Literals) -> list[int]:
        pieces: list[str | int] = []
        end = 0
        for start, stop, control in self.find_controls(text):
            pieces += [literals.restore(text[end:start]), control]
            end = stop
        pieces.append(literals.restore(text[end:]))
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return self._encode_pieces(pieces)
        mark = _unused_character("".join(piece for piece in pieces if isinstance(piece, str)))
        # one string, not one per piece: a tokenizer may treat the first word of a string differently
        joined = "".join(_renamed(piece, mark) if isinstance(piece, int) else piece for piece in pieces)
        return self._copy(mark).encode(joined, add_special_tokens=False).ids

    def _encode_pieces(self, pieces: list[str | int]) -> list[int]:
        """Ids by a tokenizer without a backend to copy. Texts and control ids alternate in `pieces`."""
        added = self.tokenizer.added_tokens_decoder
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            if at > 0 and added[pieces[at - 1]].rstrip:
                piece = piece.lstrip()
            if at + 1 < len(pieces) and added[pieces[at + 1]].lstrip:
                piece = piece.rstrip()
            ids += self._slow(piece)
        return ids

    def _slow(self, text: str) -> list[int]:
        if not text:
            return []
        # tokens apart from ids: `encode` of some Python tokenizers loses split_special_tokens
        tokens = self.tokenizer.tokenize(text, split_special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        found = self._all.pattern.search(text)
        if found is None or not self._visible(ids):
            return ids
        cut = found.start() + 1  # inside the token's text
        return self._slow(text[:cut]) + self._slow(text[cut:])

    def _copy(self, mark: str) -> Tokenizer:
        """The backend with each control token renamed to something only we write; ids stay.

        Renamed in the vocabulary too: a token that the model knows as a word (Unigram, or BPE that
        ignores merges) would otherwise come out of plain text.
        """
        if mark not in self._copies:
            spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
            new_name = {text: _renamed(i, mark) for i, text in self.controls.items()}
            _rename_in_model(spec["model"], new_name)
            for token in spec["added_tokens"]:
                token["content"] = new_name.get(token["content"], token["content"])
                token["single_word"] = False
            spec |= {"padding": None, "truncation": None, "post_processor": None}
            copy = Tokenizer.from_str(json.dumps(spec))
            if len(self._copies) == _MAX_COPIES:
                self._copies.pop(next(iter(self._copies)))
            self._copies[mark] = copy
        return self._copies[mark]


class _Scanner:
    """Finds the texts of some control tokens."""

    def __init__(self, texts: Any) -> None:
        longest_first = sorted(texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) if longest_first else "(?!)")
        self._beginnings = {text[:n] for text in longest_first for n in range(1, len(text))}
        self._longest = len(longest_first[0]) if longest_first else 0

    def hide(self, text: str, literals: Literals, *, tail: bool) -> str:
        text = self.pattern.sub(lambda match: literals.hide(match.group()), text)
        if not tail:
            return text
        # a token cut in two, `<|im_` here and `end|>` in the next part, is whole once rendered
        body = text.rstrip()
        for n in range(min(self._longest - 1, len(body)), 0, -1):
            if body[-n:] in self._beginnings:
                return body[:-n] + literals.hide(body[-n:]) + text[len(body) :]
        return text


def _renamed(control_id: int, mark: str) -> str:
    return f"{mark}{control_id}{mark}"


def _rename_in_model(model: dict[str, Any], new_name: Mapping[str, str]) -> None:
    """Renames pieces of a `tokenizer.json` model, in place."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new_name.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: [[piece, score], ...] with the id as its index
        model["vocab"] = [[new_name.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in new_name:
        model["unk_token"] = new_name[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not _touches(m, new_name)]


def _touches(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _without_surrogates(text: str) -> str:
    # no tokenizer takes half of a UTF-16 pair, and bytes that a tool printed can hold one
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
