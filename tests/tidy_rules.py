"""The house rules that a machine can hold, each a function from one file to complaints. Standard library only."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CPP_SUFFIXES = (".hpp", ".cpp", ".cu", ".cuh", ".h")
MAX_LINES = 500


@dataclass(frozen=True)
class Source:
    """One file: its path from the repository's root, and its text."""

    path: str
    text: str

    @property
    def is_cpp(self) -> bool:
        return self.path.endswith(CPP_SUFFIXES)

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    def lies_in(self, *places: str) -> bool:
        """A place is a folder ("csrc/host/") or the beginning of a file's path ("csrc/host/clock.")."""
        return self.path.startswith(places)

    @cached_property
    def without_comments(self) -> str:
        """C++ text with its comments blanked out; every character keeps its line."""
        return _CPP_TOKEN.sub(lambda token: token[0] if token["literal"] else _blank(token[0]), self.text)

    @cached_property
    def bare_code(self) -> str:
        """C++ text with comments and literals blanked out."""
        return _CPP_TOKEN.sub(lambda token: _blank(token[0]), self.text)


_CPP_TOKEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | (?P<literal> R"\(.*?\)" | "(?:\\.|[^"\\\n])*" | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])*')""",
    re.DOTALL | re.VERBOSE,
)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


# --- who may include whom

# Imports point one way: protocol <- host <- transport, membership, kernels <- bindings. The first that fits holds.
ROOM_INCLUDES = {
    "csrc/protocol/": ("protocol/",),
    "csrc/host/": ("protocol/", "host/"),
    "csrc/transport/": ("protocol/", "host/", "transport/"),
    # Detector, verdict and agreement are pure: messages and time in, effects out. Only the pulse meets the world.
    "csrc/membership/pulse": ("protocol/", "host/", "membership/"),
    "csrc/membership/": ("protocol/", "membership/"),
    # Kernels store through the two faces of transport and know none of its kinds.
    "kernels/": (
        "protocol/",
        "host/",
        "kernels/",
        *(f"transport/{name}.hpp" for name in ("fabric", "wire", "cuda_driver")),
    ),
    "csrc/bindings/": ("protocol/", "host/", "transport/", "membership/", "kernels/", "bindings/"),
    # The simulator is a host: it stands in for csrc/host, below everything, and drives the endpoint from above.
    "tests/simulator/": (
        *("protocol/", "host/", "transport/", "membership/", "kernels/", "bindings/endpoint.hpp"),
        *("tests/simulator/", "tests/native/guard_names.hpp"),
    ),
}
_INCLUDE = re.compile(r"""^[ \t]*\#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]""", re.MULTILINE)


def includes_follow_the_rooms(source: Source) -> Iterator[str]:
    room = next((room for room in ROOM_INCLUDES if source.lies_in(room)), None)
    if room is None or not source.is_cpp:
        return
    for match in _INCLUDE.finditer(source.without_comments):
        bracket, name = match.groups()
        where = f"{source.path}:{_line(source.text, match.start())}"
        top = name.split("/")[0]
        if bracket == '"' and not name.startswith(ROOM_INCLUDES[room]):
            yield f"{where}: {room} includes {name}; it may include only {', '.join(ROOM_INCLUDES[room])}"
        if bracket == "<" and room == "csrc/protocol/":
            yield f"{where}: {room} includes <{name}>; protocol compiles on devices and includes nothing but itself"
        if bracket == "<" and top in ("torch", "ATen", "c10"):
            yield f"{where}: <{name}>: no torch header, so that one build serves every torch"
        if bracket == "<" and top == "pybind11" and not source.lies_in("csrc/bindings/module"):
            yield f"{where}: <{name}>: only csrc/bindings/module*.cpp knows Python"


# Who may import a module, as beginnings of paths. A module that is not listed is free to all.
IMPORTERS = {
    "fault_a2a._C": ("fault_a2a/_core.py",),
    "fault_a2a._C_hooks": ("fault_a2a/_core.py",),
    "fault_a2a._C_unchecked": ("fault_a2a/_core.py",),
    # The drill checks every step against the reference; nothing that sends leans on it. The operators of row_ops.py
    # send nothing, and on a CPU are the reference: a second version of it would have to be kept equal to the first.
    "fault_a2a.reference": (
        *("fault_a2a/row_ops.py", "fault_a2a/cli/drill", "fault_a2a/testing/"),
        *("tests/", "benchmarks/"),
    ),
    "fault_a2a.testing": ("fault_a2a/testing/", "fault_a2a/cli/", "fault_a2a/integrations/", "tests/", "benchmarks/"),
    "fault_a2a.integrations": ("fault_a2a/integrations/", "fault_a2a/cli/", "tests/", "benchmarks/"),
    "fault_a2a.cli": ("fault_a2a/cli/", "fault_a2a/__main__.py", "tests/", "benchmarks/"),
}
# What a module may import of the package. A module that is not listed may import what IMPORTERS leaves it.
IMPORTS = {
    "fault_a2a/_version.py": (),
    "fault_a2a/errors.py": (),
    "fault_a2a/placement.py": ("fault_a2a.errors",),
    # The judge may not ask the accused: the reference knows nothing of the core that it checks.
    "fault_a2a/reference.py": ("fault_a2a.config", "fault_a2a.placement", "fault_a2a.errors"),
}


def imports_follow_the_rooms(source: Source) -> Iterator[str]:
    if not source.is_python:
        return
    allowed = next((names for place, names in IMPORTS.items() if source.lies_in(place)), None)
    for line, names in _imported_modules(source):
        where = f"{source.path}:{line}"
        for name in names:
            for module, importers in IMPORTERS.items():
                if _is_in(name, module) and not source.lies_in(*importers):
                    yield f"{where}: imports {name}; only {', '.join(importers)} may"
        if (
            allowed is not None
            and _is_in(names[-1], "fault_a2a")
            and not any(_is_in(name, module) for name in names for module in allowed)
        ):
            yield f"{where}: imports {names[-1]}; {source.path} may import only {list(allowed)} of the package"


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _imported_modules(source: Source) -> Iterator[tuple[int, list[str]]]:
    """(line, the names it may stand for): `from a import b` names a, and a.b if that is a module."""
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, [alias.name]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source.path, node)
            for alias in node.names:
                yield node.lineno, [base, f"{base}.{alias.name}"]
        elif isinstance(node, ast.Call) and _names_a_module(node):
            yield node.lineno, [str(ast.literal_eval(node.args[0]))]


def _names_a_module(call: ast.Call) -> bool:
    importer = ast.unparse(call.func).endswith(("import_module", "__import__"))
    return importer and bool(call.args) and isinstance(call.args[0], ast.Constant)


def _absolute(path: str, node: ast.ImportFrom) -> str:
    package = list(Path(path).parts[:-1])
    kept = package[: len(package) - (node.level - 1)] if node.level else []
    return ".".join([*kept, *([node.module] if node.module else [])])


# --- how the native code behaves

# A dead peer is an answer, not an accident: where ranks wait for one another nothing stops the process or prints.
_STOPS = re.compile(
    r"""\b(?:__trap|__builtin_trap|trap|abort|exit|_exit|_Exit|quick_exit|terminate|printf|fprintf|puts|assert)\s*\(
        | \bthrow\b | \bstd::(?:cerr|cout|clog)\b""",
    re.VERBOSE,
)
_ASM_TRAP = re.compile(r'"\s*(?:trap|exit|brkpt)\s*;')


def nothing_stops_or_prints(source: Source) -> Iterator[str]:
    if not source.is_cpp or not source.lies_in("csrc/protocol/", "kernels/"):
        return
    for pattern, text in ((_STOPS, source.bare_code), (_ASM_TRAP, source.without_comments)):
        for match in pattern.finditer(text):
            yield f"{source.path}:{_line(text, match.start())}: {match[0].strip()} has no place in protocol and kernels"


WAIT_FILE = "csrc/protocol/wait.hpp"
# How a machine rests is its own business, and stands in one file a machine; when it rests is decided in the one wait.
MACHINE_FILES = ("kernels/cpu/machine.", "kernels/cuda/machine.", "kernels/cuda/twin/idle.")
_RESTS = re.compile(r"(?:\.|->)\s*rest\s*\(")
_SLEEPS = re.compile(
    r"(?:\.|->)\s*(?:sleep|listen)\s*\(|\b(?:futex_wait\w*|u?sleep|nanosleep|sleep_for|sched_yield|__nanosleep)\s*\("
)
# Reading a word that somebody else writes, in whatever form it comes.
_READS_A_WORD = re.compile(
    r"\b(?:load_acquire|load_relaxed|__atomic_load\w*|load|poll|reading|read_signal)\s*\(|\bReading::absent\b"
)
_LOOP = re.compile(r"\b(?:while|for)\s*\(|\bdo\b(?=\s*\{)")


def one_place_waits(source: Source) -> Iterator[str]:
    """Protocol, transport and kernels neither rest nor loop until a word changes; loops with a bound may read words."""
    rooms = ("csrc/protocol/", "csrc/transport/", "kernels/")
    if not source.is_cpp or not source.lies_in(*rooms) or source.path == WAIT_FILE:
        return
    text = source.bare_code
    for match in _RESTS.finditer(text):
        yield f"{source.path}:{_line(text, match.start())}: rests between polls; only {WAIT_FILE} waits"
    if source.lies_in("csrc/protocol/", "kernels/") and not source.lies_in(*MACHINE_FILES):
        for match in _SLEEPS.finditer(text):
            yield f"{source.path}:{_line(text, match.start())}: sleeps; only {MACHINE_FILES[0]}* knows how a rank rests"
    text = _without_calls_of_the_wait(text)
    for match in _LOOP.finditer(text):
        if _loops_until_a_word_changes(text, match):
            yield f"{source.path}:{_line(text, match.start())}: loops until a word changes; only {WAIT_FILE} waits"


def _without_calls_of_the_wait(text: str) -> str:
    """What is handed to wait_for is read there, not in the loop around the call."""
    for match in re.finditer(r"\bwait_for\s*\(", text):
        start = match.end() - 1
        call = _enclosed(text, start)
        text = text[:start] + _blank(call) + text[start + len(call) :]
    return text


def _loops_until_a_word_changes(text: str, loop: re.Match[str]) -> bool:
    if loop[0].startswith("do"):
        return bool(_READS_A_WORD.search(_enclosed(text, text.index("{", loop.start()))))
    header = _enclosed(text, loop.end() - 1)
    if loop[0].startswith("while"):
        return bool(_READS_A_WORD.search(header + _body(text, loop.end() - 1 + len(header))))
    parts = header.strip("()").split(";")
    if len(parts) != 3:  # a range-for ends with its range
        return False
    condition = parts[1].strip()
    endless = condition in ("", "true", "1")
    return bool(_READS_A_WORD.search(condition)) or (
        endless and bool(_READS_A_WORD.search(_body(text, loop.end() - 1 + len(header))))
    )


def _enclosed(text: str, start: int) -> str:
    """From the bracket at `start` to the one that closes it, both included."""
    opening = text[start]
    closing = {"(": ")", "{": "}"}[opening]
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return text[start : position + 1]
    return text[start:]


def _body(text: str, start: int) -> str:
    """The statement that follows a loop's header."""
    rest = text[start:]
    if rest.lstrip().startswith("{"):
        return _enclosed(text, text.index("{", start))
    return rest[: rest.find(";") + 1]


TRITON_ROOM, TRITON_WAIT_FILE = "kernels/triton/", "kernels/triton/window.py"


def one_place_waits_in_triton(source: Source) -> Iterator[str]:
    """A kernel loops until something changes with `while`; what has a bound is a `for`, which Triton only counts."""
    if not source.is_python or not source.lies_in(TRITON_ROOM) or source.path == TRITON_WAIT_FILE:
        return
    for function in ast.walk(ast.parse(source.text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any(ast.unparse(decorator) in ("kernel", "inline") for decorator in function.decorator_list):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.While):
                yield f"{source.path}:{node.lineno}: a kernel loops without a bound; only {TRITON_WAIT_FILE} waits"


_CLOCK = re.compile(
    r"\b(?:clock_gettime|gettimeofday|steady_clock|system_clock|high_resolution_clock|__rdtsc|timespec_get)\b"
)


def one_file_reads_the_clock(source: Source) -> Iterator[str]:
    if not source.is_cpp or not source.lies_in("csrc/", "kernels/") or source.lies_in("csrc/host/clock."):
        return
    for match in _CLOCK.finditer(source.bare_code):
        yield f"{source.path}:{_line(source.text, match.start())}: {match[0]}; only csrc/host/clock.* reads the clock"


# --- how every file looks

_CAPTIONS = {".py": r'("""|# )\s*\w', **dict.fromkeys(CPP_SUFFIXES, r"// \s*\w"), ".md": r"# \w"}
_HASH_CAPTION = r"# \w"


def first_line_is_a_caption(source: Source) -> Iterator[str]:
    lines = source.text.splitlines() or [""]
    first = lines[1] if lines[0].startswith("#!") and len(lines) > 1 else lines[0]
    caption = _CAPTIONS.get(Path(source.path).suffix, _HASH_CAPTION)
    if not re.match(caption, first):
        yield f"{source.path}:1: the first line is no caption that says what lives here: {first[:60]!r}"


def no_file_grows_wild(source: Source) -> Iterator[str]:
    num_lines = len(source.text.splitlines())
    if (source.is_cpp or source.is_python) and num_lines >= MAX_LINES:
        yield f"{source.path}: {num_lines} lines; a file stays under {MAX_LINES}: split it by what it says"


Rule = Callable[[Source], Iterator[str]]
RULES: tuple[Rule, ...] = (
    includes_follow_the_rooms,
    imports_follow_the_rooms,
    nothing_stops_or_prints,
    one_place_waits,
    one_place_waits_in_triton,
    one_file_reads_the_clock,
    first_line_is_a_caption,
    no_file_grows_wild,
)


# --- which files are ours

_SUFFIXES = {".py", ".sh", ".md", ".txt", ".toml", ".yaml", ".yml", ".cmake", *CPP_SUFFIXES}
_NAMES = {"Makefile", ".clang-format", ".gitignore", "MANIFEST.in", "CMakeLists.txt"}
_FOLDERS = ("csrc", "kernels", "fault_a2a", "tests", "benchmarks", "docs", ".ci")
_NOT_OURS = ("fault_a2a/include/",)  # the build's copies of csrc/protocol


def all_sources(root: Path) -> list[Source]:
    """Every source file of the repository, whether git knows it yet or not; no build output, no environment."""
    found = [path for path in root.iterdir() if path.is_file()]
    for folder in _FOLDERS:
        found += [path for path in (root / folder).rglob("*") if path.is_file()]
    sources = []
    for path in sorted(found):
        name = path.relative_to(root).as_posix()
        is_source = path.suffix in _SUFFIXES or path.name in _NAMES or name.startswith(".ci/")
        if is_source and not name.startswith(_NOT_OURS):
            sources.append(Source(name, path.read_text(encoding="utf-8")))
    return sources


def complaints(rule: Rule, sources: Iterable[Source]) -> list[str]:
    return [complaint for source in sources for complaint in rule(source)]
