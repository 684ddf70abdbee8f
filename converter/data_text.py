"""Text sources, read in bounded pieces: `.txt`, `.jsonl`, folders, strings.

A piece is at most about one MiB and ends at a line, so a file of any size is tokenised without
being held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from reattend.errors import DataError

BLOCK_BYTES = 1 << 20
SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Piece:
    """A stretch of one document.

    Attributes:
        text: plain text; empty when `messages` is set.
        where: file and line, for messages to the user.
        begins: whether a document starts here.
        messages: a chat, rendered by the tokenizer's template.
    """

    text: str
    where: str
    begins: bool
    messages: list[dict[str, Any]] | None = None


def pieces_of_path(source: str | Path) -> Iterator[Piece]:
    """Pieces of a file or folder, in sorted order.

    Raises:
        DataError: nothing there, a suffix that is not read, empty, not UTF-8, a bad line.
    """
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # text longer than a file name may be
        is_folder = is_file = False
    if is_folder:
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise DataError(
                "The data folder has no .txt or .jsonl file.",
                where=str(path),
                next_step="give a folder with text files, or one file.",
            )
        return chain.from_iterable(_pieces_of_file(file) for file in files)
    if not is_file:
        raise DataError(
            "The data file does not exist.",
            where=str(source)[:200],
            next_step="check the path; to pass text itself, give a list: data=[text].",
        )
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"Files ending in {path.suffix or 'nothing'} are not read.",
            where=str(path),
            next_step="rename it to .txt, or write one JSON object per line in a .jsonl.",
        )
    return _pieces_of_file(path)


def pieces_of_texts(texts: Iterator[Any]) -> Iterator[Piece]:
    """Pieces of strings, each string a document.

    Raises:
        DataError: an item is not a string, or all are empty.
    """
    seen = False
    for number, text in enumerate(texts, start=1):
        where = f"item {number}"
        if not isinstance(text, str):
            raise DataError(f"Expected a string, got {type(text).__name__}.", where=where)
        for start in range(0, len(text), BLOCK_BYTES):
            seen = True
            yield Piece(text[start : start + BLOCK_BYTES], where, begins=start == 0)
    if not seen:
        raise DataError("The data is empty.", why="every string has length 0")


def encode(piece: Piece, tokenizer: Any, *, after_other: bool) -> list[int]:
    """Token ids of a piece.

    A document starts with the tokenizer's own beginning token, if it uses one, and is set apart
    from the document before it by the end-of-text token, if there is one.

    Raises:
        DataError: a chat for a tokenizer without a template, or one that the template refuses.
    """
    text = piece.text
    if piece.messages is not None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                "The tokenizer has no chat template.",
                where=piece.where,
                next_step="use lines with `text`, or set tokenizer.chat_template.",
            )
        try:
            text = tokenizer.apply_chat_template(piece.messages, tokenize=False)
        except Exception as error:  # jinja and the template raise what they like
            raise DataError(
                "The chat template refuses these messages.", where=piece.where, why=str(error)
            ) from error
    ids: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if piece.begins:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and bos in tokenizer("")["input_ids"][:1] and ids[:1] != [bos]:
            ids.insert(0, bos)
        if after_other and eos is not None:
            ids.insert(0, eos)
    return ids


def _pieces_of_file(path: Path) -> Iterator[Piece]:
    """Pieces of one file; see `pieces_of_path`."""
    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        raise DataError("The data file cannot be read.", where=str(path), why=str(error)) from error
    if empty:
        raise DataError(
            "The data file is empty.",
            where=str(path),
            why="it has 0 bytes",
            next_step="give a file with text in it.",
        )
    yield from _pieces_of_jsonl(path) if path.suffix == ".jsonl" else _pieces_of_txt(path)


def _pieces_of_txt(path: Path) -> Iterator[Piece]:
    """Blocks of a text file that end at a line end where one is near."""
    begins, offset, rest = True, 0, b""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                rest += block
                cut = rest.rfind(b"\n") + 1
                if cut:
                    yield Piece(_decode(rest[:cut], path, offset), path.name, begins)
                    begins, offset, rest = False, offset + cut, rest[cut:]
    except OSError as error:
        raise DataError("The data file cannot be read.", where=str(path), why=str(error)) from error
    if rest:
        yield Piece(_decode(rest, path, offset), path.name, begins)


def _pieces_of_jsonl(path: Path) -> Iterator[Piece]:
    """One piece per line; blank lines are skipped."""
    offset, seen = 0, False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = _decode(line, path, offset)
                offset += len(line)
                if text.strip():
                    seen = True
                    yield _piece_of_line(text, f"{path.name}:{number}")
    except OSError as error:
        raise DataError("The data file cannot be read.", where=str(path), why=str(error)) from error
    if not seen:
        raise DataError(
            "The data file is empty.",
            where=str(path),
            why="only blank lines",
            next_step='write lines like {"text": "..."}.',
        )


def _piece_of_line(line: str, where: str) -> Piece:
    """A JSON line as a piece.

    Raises:
        DataError: not JSON, not an object, neither `text` nor `messages` of the right type.
    """
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            "A line is not JSON.",
            where=where,
            why=str(error),
            next_step='write one object per line, like {"text": "..."}.',
        ) from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return Piece(record["text"], where, begins=True)
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return Piece("", where, begins=True, messages=record["messages"])
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise DataError(
        "A line has neither `text` nor `messages`.",
        where=where,
        why=f"it holds {found}",
        next_step='write lines like {"text": "..."} or {"messages": [...]}.',
    )


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """UTF-8 text, without a byte order mark at the start of the file.

    Raises:
        DataError: naming the offset in the file of the first byte that is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start + (3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0)
        byte = raw[at - offset]
        raise DataError(
            "The data file is not UTF-8.",
            where=f"{path}, byte {at}",
            why=f"byte 0x{byte:02x}: {error.reason}",
            next_step="convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW.txt (or its own encoding).",
        ) from error
