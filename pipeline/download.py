"""Fetches MNIST, CIFAR-10 or CIFAR-100 by torchvision: its addresses, its checksums, its layout.

The one idea: whether an address answers is asked first and given up after a few seconds, so a machine without a
network is told at once what to do instead, and nothing hangs.
"""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from pipeline.imagesets import ImageSet
from pipeline.store import within

ANSWER_WITHIN = 4.0  # seconds for an address to answer
SILENT_AT_MOST = 20.0  # seconds without a byte while a file comes


class Unavailable(Exception):
    """Why there is no download, in a few words."""


def download(known: ImageSet, folder: Path) -> None:
    """Put the official files into `folder`, in torchvision's layout, compressed. Raises Unavailable, OSError."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    source = getattr(datasets, known.torchvision)
    mirrored = hasattr(source, "mirrors")
    place = folder / known.home if mirrored else folder
    files = source.resources if mirrored else [(source.filename, source.tgz_md5)]
    bases = source.mirrors if mirrored else [source.url.removesuffix(source.filename)]
    bases = [base for base in bases if _answers(base + files[0][0])]
    if not bases:
        raise Unavailable("torchvision's addresses of it do not answer")
    with _timeout(SILENT_AT_MOST):
        for file, md5 in files:
            if not any(_fetched(download_url, base + file, place, file, md5) for base in bases):
                raise Unavailable(f"the download of {file} broke off or has another checksum")


def _answers(address: str) -> bool:
    """Whether a GET is answered in time; a thread bounds the look-up of the name too, which has no limit itself."""

    def ask() -> bool:
        with urllib.request.urlopen(address, timeout=ANSWER_WITHIN) as response:
            return bool(response.status == 200)

    try:
        return bool(within(ANSWER_WITHIN, ask))
    except (OSError, HTTPException):  # includes time-outs and all that urllib raises
        return False


def _fetched(download_url: object, address: str, place: Path, file: str, md5: str) -> bool:
    try:
        download_url(address, place, file, md5)  # type: ignore[operator]
    except (RuntimeError, HTTPException):  # the checksum, or what is no HTTP
        return False
    except OSError as error:
        if error.filename:  # of this machine: no space, no permission
            raise
        return False
    return True


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
