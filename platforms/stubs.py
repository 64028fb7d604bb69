"""Stand-ins for the system's libraries as an older system has them, for the linker alone.

A linker binds a call to the newest version of a symbol that the library in front of it has, so what is linked here asks
for this machine's C library or a later one. These stand-ins have no code: only the names of the real libraries, each in
its newest version that a manylinux policy allows. What is linked with them asks for that version, which newer systems
go on serving. What older systems lack is linked in from the compiler's C++ library, or stays undefined, which
:func:`unbound` finds.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path

# Of a library: its name at run time, and what the linker is asked for.
LIBRARIES = {"libc.so.6": "libc.so", "libm.so.6": "libm.so", "libstdc++.so.6": "libstdc++.so"}
SYMBOL = re.compile(
    r"\s+\d+: \w+ +(?P<size>\w+) (?P<kind>\w+) +(?:GLOBAL|WEAK) +DEFAULT +\d+ (?P<name>[^@\s]+)@@?(?P<version>\S+)"
)


def make(folder: Path, policy: str, machine: str, compiler: str = "g++") -> None:
    """Puts a stand-in for every library into a folder, which ``-L`` then names.

    Args:
        policy: such as ``"manylinux_2_28"``, whose versions auditwheel lists
        machine: such as ``"x86_64"``
        compiler: whose libraries are stood in for
    """
    folder.mkdir(parents=True, exist_ok=True)
    allowed = versions(policy, machine)
    for name, asked in LIBRARIES.items():
        real = Path(_output(compiler, f"-print-file-name={name}").strip())
        chosen = _newest(_output("readelf", "--dyn-syms", "--wide", real), allowed)
        (folder / f"{name}.s").write_text(_assembly(chosen), encoding="utf-8")
        nodes = "".join(f"{v} {{ {'local: stand_in_*;' if i == 0 else ''} }};\n" for i, v in enumerate(_nodes(chosen)))
        (folder / f"{name}.map").write_text(nodes, encoding="utf-8")
        options = ["-shared", "-nostdlib", f"-Wl,-soname,{name}", f"-Wl,--version-script={folder / name}.map"]
        subprocess.run([compiler, *options, "-o", folder / name, folder / f"{name}.s"], check=True)
        # Scripts of the linker: some functions of the C library are linked in, and from the compiler's archive what
        # only later C++ libraries have.
        text = f"GROUP ( {folder / name} )"
        if name == "libc.so.6":
            script = Path(_output(compiler, f"-print-file-name={asked}").strip()).read_text(encoding="utf-8")
            text = re.sub(r"\S*/libc\.so\.6", str(folder / name), script)
        elif name == "libstdc++.so.6":
            text = f"GROUP ( {folder / name} {_output(compiler, '-print-file-name=libstdc++.a').strip()} )"
        (folder / asked).unlink(missing_ok=True)
        (folder / asked).write_text(text + "\n", encoding="utf-8")


def versions(policy: str, machine: str) -> set[str]:
    """The versions of symbols that a policy allows on a kind of machine."""
    spec = importlib.util.find_spec("auditwheel")
    if spec is None or spec.origin is None:
        raise SystemExit("auditwheel is needed: pip install auditwheel")
    listed = json.loads((Path(spec.origin).parent / "policy" / "manylinux-policy.json").read_text(encoding="utf-8"))
    (found,) = (p["symbol_versions"][machine] for p in listed if p["name"] == policy)
    return {f"{kind}_{number}" for kind, numbers in found.items() for number in numbers}


def unbound(library: Path) -> list[str]:
    """Names that a module asks for in no version of any library, beside those of Python: older systems lack them."""
    undefined = re.findall(r" GLOBAL +DEFAULT +UND (\S+)", _output("readelf", "--dyn-syms", "--wide", library))
    return [name for name in undefined if "@" not in name and not name.startswith(("Py", "_Py"))]


def _newest(listing: str, allowed: set[str]) -> dict[str, tuple[str, str, int]]:
    """Version, kind and size of every symbol that is allowed in some version."""
    chosen: dict[str, tuple[str, str, int]] = {}
    for found in SYMBOL.finditer(listing):
        name, version = found["name"], found["version"]
        if version in allowed and (name not in chosen or _order(version) > _order(chosen[name][0])):
            chosen[name] = version, found["kind"], int(found["size"], 0)
    return chosen


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _nodes(chosen: dict[str, tuple[str, str, int]]) -> list[str]:
    return sorted({version for version, _, _ in chosen.values()}, key=_order)


def _assembly(chosen: dict[str, tuple[str, str, int]]) -> str:
    kinds = {"FUNC": ("%function", ".text"), "IFUNC": ("%function", ".text"), "TLS": ("%tls_object", "")}
    lines = []
    for i, (name, (version, kind, size)) in enumerate(chosen.items()):
        shape, section = kinds.get(kind, ("%object", ".data"))
        lines += [
            section or '.section .tdata,"awT",%progbits',
            f".globl stand_in_{i}",
            f".type stand_in_{i}, {shape}",
            f".symver stand_in_{i}, {name}@@{version}",
            f"stand_in_{i}: .zero {max(size, 8) if section != '.text' else 8}",
            f".size stand_in_{i}, {size}",
        ]
    return "\n".join(lines) + "\n"


def _output(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
