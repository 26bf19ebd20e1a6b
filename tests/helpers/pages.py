"""Runs the code blocks of a page of documentation, and compares what they print with what the page says they print.

``python`` blocks of a page share one namespace. What is printed is compared with the comment lines right under each
``print(...)``, or with the next block `text title="output"`. ``console`` blocks are commands behind ``$``. Blocks that
are for other tools are ``py`` with "not run" in their titles; every other language is none of Python.
"""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

from sybil import Document, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]
SILENT = {"css", "csv", "html", "json", "mermaid", "sh", "text", "toml", "yaml"}
_INFO = re.compile(r"(?P<language>[\w+-]*)(?P<options>[^\n]*)\n")
_NUMBER = r"(?<![\w.])[-+]?(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)"
_RELATIVE = 0.02  # other processors round sums in another order


class Page:
    """One page, ready to run.

    Args:
        path: The file.
        text: What is in it.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.document = Document(text, str(path))
        self._run, self._printed = PythonEvaluator(), ""
        for parser in (SkipParser(), self._fences, self._invisible):
            for region in parser(self.document):
                self.document.add(region)
        self.document.namespace.update(
            __name__="__main__", missing=missing, check_contract=check_contract, snippet=snippet
        )

    def _fences(self, document):
        for block in RawFencedCodeBlockLexer(_INFO)(document):
            language, options = block.lexemes["language"], block.lexemes["options"]
            if language == "python":
                evaluate = self._python
            elif language == "console":
                evaluate = self._console
            elif language == "text" and 'title="output"' in options:
                evaluate = self._output
            elif language in SILENT or (language == "py" and "not run" in options):
                continue
            else:
                raise ValueError(f"{document.path}: block of language {language!r} with {options!r}: is it to be run?")
            yield Region(block.start, block.end, block.lexemes["source"], evaluate)

    def _invisible(self, document):
        for block in DirectiveInHTMLCommentLexer("invisible-code-block", "python")(document):
            yield Region(block.start, block.end, block.lexemes["source"], self._python)

    def _python(self, example):
        printed = io.StringIO()
        with redirect_stdout(printed):
            self._run(example)
        self._printed = printed.getvalue()
        promised = _promised(example.parsed)
        if promised:
            compare(promised, self._printed, example)

    def _output(self, example):
        compare(example.parsed, self._printed, example)

    def _console(self, example):
        commands = re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)
        assert not commands[0].strip(), f"{example.path}:{example.line}: a console block starts with '$ '"
        for command in commands[1:]:
            line, _, promised = command.replace("\\\n", " ").partition("\n")
            printed = run_command(line)
            if promised.strip():
                compare(promised, printed, example)


def missing(module: str) -> str | None:
    """Why a block is skipped: the tool that it shows is not installed."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def snippet(name: str) -> str:
    """The code of a snippet that pages share."""
    text = (ROOT / "docs" / "snippets" / f"{name}.md").read_text("utf8")
    return text.removeprefix("```python\n").partition("\n```")[0]


def check_contract(contract, extension) -> None:
    """Run all tests of a case of `mpq.testing` that a page subclasses, as pytest would."""
    case = contract()
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(case, name)(extension)


def _promised(source: str) -> str:
    """The comment lines right under each print."""
    lines, after = [], False
    for line in source.splitlines():
        after = line.startswith("print(") or (after and line.startswith("#"))
        if after and line.startswith("#"):
            lines.append(line[1:])
    return "\n".join(lines)


def compare(promised: str, printed: str, example) -> None:
    """Fail unless both are the same but for white space, parts that are "...", and 2 % of a number."""
    parts = [p for p in re.split(rf"(\.\.\.|{_NUMBER})", " ".join(promised.split())) if p]
    numbers = [p for p in parts if re.fullmatch(_NUMBER, p)]
    pattern = "".join(
        ".*?" if p == "..." else f"({_NUMBER})" if re.fullmatch(_NUMBER, p) else re.escape(p) for p in parts
    )
    found = re.fullmatch(pattern.replace(r"\ .*?\ ", ".*?"), " ".join(printed.split()))
    where = f"{example.path}:{example.line}"
    assert found, f"{where}: the page says\n{promised}\nbut printed was\n{printed}"
    for want, got in zip(numbers, found.groups(), strict=True):
        assert _near(want, got), f"{where}: the page says {want}, but printed was {got} in\n{printed}"


def _near(want: str, got: str) -> bool:
    a, b = (float(x.replace(",", "")) for x in (want, got))
    digits, _, power = want.partition(".")[2].partition("e")
    last = 10.0 ** (int(power or 0) - len(digits)) if "." in want else 0.0
    return abs(a - b) <= max(last, _RELATIVE * abs(a))


def run_command(line: str) -> str:
    """Run a command of mpq; of others check that what they name exists."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["pip", "install"]:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["optional-dependencies"]
        extras = re.findall(r"\[([\w,-]+)\]", line)
        assert set(",".join(extras).split(",")) - {""} <= set(known), line
        return ""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE), line
        return ""
    if words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
        return ""
    assert words[0] == "mpq", f"neither a command of mpq nor one that can be checked: {line}"
    from typer.testing import CliRunner

    from mpq.cli import app

    done = CliRunner().invoke(app, words[1:])
    assert done.exception is None or isinstance(done.exception, SystemExit), f"{line}: {done.exception!r}"
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.stdout
