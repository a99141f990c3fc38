"""Real English text that every Python carries: language reference topics and library docstrings."""

import ast
import hashlib
import re
import string
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}
FEWEST_WORDS = 6
ENOUGH_WORDS = 16
MOST_WORDS = 60

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“(])|(?<=[.!?][)\"”])\s+(?=[A-Z\"“(])")
LIST_MARKER = re.compile(r"^(?:[*•-]|\d{1,2}[.)]|\(\d{1,2}\)|@\w+\s+-)\s+")
# Tables, underlines, productions, doctests, directives, signatures and assignments.
NOT_PROSE = re.compile(
    r"\S {3,}\S|\||([=*~^#+_-])\1{2}|::=|^\s*(?:>>>|\.\.|:\w|\$|@)|\w = \w"
    r"|^\s*(?:def|class|import|from|return|print|raise|for|if|while|with|try|else)\b.*[:(]\s*$"
    r"|^\s*[\w.]+\([^)]*\)\s*(?:->.*|:)?$|^\s*import \w"
)
MARKUP = re.compile(
    r":\w+(?::\w+)?:(?=`)|`+|(?<!\w)\*{1,2}(?=\w[\w .-]*\*)|(?<=\w)\*{1,2}(?![\w(*])"
    # A word broken at its hyphen when lines are joined.
    r"|(?<=\w-) (?!or\b|and\b|to\b)(?=[a-z])"
)
OPENING = frozenset(string.ascii_uppercase + "\"'“(")
WORD = re.compile(r"[(\"'“‘]*[A-Za-z]+(?:[-'’/][A-Za-z]+)*[)\"'”’]*[.,;:!?]?[)\"'”’]*$")


@cache
def passages() -> tuple[str, ...]:
    """Distinct passages of prose, sorted by file, then by position in the file."""
    found: dict[str, None] = {}
    for path in _source_files():
        for text in _texts(path):
            found.update(dict.fromkeys(_passages(text)))
    return tuple(found)


@cache
def fingerprint() -> str:
    """Names the text without making it: the files it is taken from and the code that takes it."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in _source_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _source_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts)]
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def _texts(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
        yield from (value for value in strings if isinstance(value, str) and "\n\n" in value)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in _statements(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk, but in the order of the file and without expressions, the most of it."""
    yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            yield from _statements(child)


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of prose lines, one list item or paragraph each, joined to one line."""
    for block in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in block.splitlines():
            if LIST_MARKER.match(line.strip()) and lines:
                yield " ".join(lines)
                lines = []
            if not NOT_PROSE.search(line):
                lines.append(LIST_MARKER.sub("", line.strip()))
            elif lines:
                yield " ".join(lines)
                lines = []
        yield " ".join(lines)


def _passages(text: str) -> Iterator[str]:
    """Sentences of one text, put together until they are ENOUGH_WORDS, never over MOST_WORDS."""
    taken: list[str] = []
    for sentence in _sentences(text):
        words = sentence.split()
        if len(taken) >= ENOUGH_WORDS or len(taken) + len(words) > MOST_WORDS:
            yield from _long_enough(taken)
            taken = []
        taken += words
    yield from _long_enough(taken)


def _long_enough(words: list[str]) -> list[str]:
    return [" ".join(words)] if len(words) >= FEWEST_WORDS else []


def _sentences(text: str) -> Iterator[str]:
    for paragraph in _paragraphs(text):
        for sentence in SENTENCE_END.split(MARKUP.sub("", paragraph)):
            if _is_prose(sentence):
                yield sentence


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if not 3 <= len(words) <= MOST_WORDS:
        return False
    plain = sum(WORD.match(word) is not None for word in words)
    ended = sentence.rstrip(")\"'”’").endswith((".", "!", "?"))
    return ended and sentence[0] in OPENING and plain >= 0.75 * len(words)
