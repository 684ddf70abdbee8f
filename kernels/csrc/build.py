"""Build the library of ONNX Runtime custom ops: `make onnx-library`, or this file.

Needs g++ and the C++ headers of ONNX Runtime, which are in no Python package: Debian 13 and Ubuntu
25.04 have them as `libonnxruntime-dev`; on an older system unpack that one file (`dpkg-deb -x`) and
pass the folder that holds `onnxruntime_cxx_api.h` with `--headers`. The kernels are compiled for
several instruction sets and the library picks one when it is loaded, so the file runs on any
processor of the architecture it was built on.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "build" / "libreattend_onnx.so"
HEADERS = (HERE / "build" / "include", Path("/usr/include/onnxruntime"))
HEADER = "onnxruntime_cxx_api.h"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
X86 = {
    "avx2": AVX2,
    "avx512": (*AVX2, *(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq"))),
}


def missing(headers: Path | None = None) -> str:
    """What is not there to build with; empty if all is."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if find_headers(headers) is None:
        places = ", ".join(str(place) for place in ([headers] if headers else HEADERS))
        return f"{HEADER} of ONNX Runtime (Debian: libonnxruntime-dev) is not in {places}"
    return ""


def find_headers(given: Path | None = None) -> Path | None:
    """The folder with ONNX Runtime's headers."""
    places = [given] if given else HEADERS
    return next((place for place in places if (place / HEADER).is_file()), None)


def build(headers: Path, out: Path) -> None:
    """Compile and link; `out` appears when it is complete.

    Raises:
        subprocess.CalledProcessError: the compiler failed; what it said is on stderr.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets: dict[str, tuple[str, ...]] = {"baseline": (), **(X86 if x86 else {})}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        jobs = [
            ["attend.cc", f"{name}.o", f"-DREATTEND_TARGET={name}", *flags]
            for name, flags in sets.items()
        ]
        macros = ["-DREATTEND_X86"] if x86 else []
        jobs.append(["ops.cc", "ops.o", "-isystem", str(headers), *macros])

        def compile_one(job: list[str]) -> None:
            source, target, *more = job
            place = str(Path(folder, target))
            command = ["g++", *FLAGS, *more, "-c", str(HERE / source), "-o", place]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, jobs))
        made = Path(folder, out.name)
        objects = [str(Path(folder, job[1])) for job in jobs]
        link = ["-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--no-undefined"]
        subprocess.run(["g++", *objects, *link, "-o", str(made)], check=True)
        made.replace(out)


def main() -> int:
    """Build with the arguments of the command line; exit code 5 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--headers", type=Path, help=f"folder that holds {HEADER}")
    parser.add_argument("--out", type=Path, default=LIBRARY)
    arguments = parser.parse_args()
    if why := missing(arguments.headers):
        sys.stderr.write(f"cannot build: {why}\n")
        return 5
    headers = find_headers(arguments.headers)
    assert headers is not None
    build(headers, arguments.out)
    sys.stdout.write(f"{arguments.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
