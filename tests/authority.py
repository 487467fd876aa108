"""A private certificate authority, made by openssl's command as an operator would."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files of a certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """An authority whose certificates are for a few days; its files are in *folder*."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.ca, self._key = folder / "ca.pem", folder / "ca-key.pem"
        _openssl(
            *("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.ca, "-days", "30"),
            *("-subj", f"/CN={folder.name}"),
        )

    def certify(
        self,
        name: str,
        names: str = "IP:127.0.0.1,DNS:localhost",
        days: int = 30,
        use: str = "serverAuth,clientAuth",
    ) -> Certificate:
        """Return a certificate for *names*; one of -1 days has expired."""
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}-key.pem")
        request, extension = self._folder / f"{name}.csr", self._folder / f"{name}.ext"
        extension.write_text(f"subjectAltName={names}\nextendedKeyUsage={use}\n")
        _openssl("req", *_KEY, "-keyout", made.key, "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key),
            *("-CAcreateserial", "-extfile", extension, "-out", made.cert),
            *_lasting(days),
        )
        return made


def _lasting(days: int) -> tuple[str, ...]:
    """Return openssl's options for a certificate's time; as of 3.4 no number of days is below 0."""
    known = subprocess.run(["openssl", "x509", "-help"], capture_output=True, check=False).stderr
    if days < 0 and b"-not_after" in known:
        return ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z")
    return ("-days", str(days))


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
