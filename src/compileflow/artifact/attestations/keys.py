"""The private key that signs, and the public keys that are trusted: PEM files, used by securesystemslib."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow.errors import SignatureError, SpecError, first_line
from compileflow.settings import Settings

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

logger = logging.getLogger(__name__)


def load_signer(settings: Settings) -> CryptoSigner | None:
    """Load the key that signs; None where none is configured, and statements stay unsigned.

    Raises:
        SpecError: the file cannot be read, is no such key, or the password is not its own.
        SignatureError: securesystemslib is missing.
    """
    if settings.signing_key is None:
        return None
    path = settings.signing_key.expanduser()
    with needs_securesystemslib("sign"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner
    pem = _read(path, "private")
    if path.stat().st_mode & stat.S_IROTH:
        logger.warning("The private key %s can be read by every user of this machine: chmod 600 %s", path, path)
    secret = settings.signing_key_password
    password = secret.get_secret_value().encode() if secret is not None else None
    try:
        return CryptoSigner(load_pem_private_key(pem, password))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # Both headers that PEM has for it: PKCS #8's own, and the older Proc-Type.
        hint = "Give a private key as PEM: ed25519, ecdsa or rsa."
        if b"ENCRYPTED" in pem or isinstance(error, TypeError):
            hint = "Set COMPILEFLOW_SIGNING_KEY_PASSWORD to the key's password, and to nothing if it has none."
        raise SpecError(f"{path} cannot be used as a private key: {first_line(error)}.", hint=hint) from error


def load_public_keys(paths: Iterable[str | Path]) -> tuple[SSlibKey, ...]:
    """Load the public keys whose signatures count.

    Raises:
        SpecError: there is none, or a file cannot be read or is no such key.
        SignatureError: securesystemslib is missing.
    """
    files = [Path(path).expanduser() for path in paths]
    if not files:
        raise SpecError(
            "A signature is required, and no key is trusted.",
            hint="Set COMPILEFLOW_TRUSTED_KEYS to the public keys' PEM files, with commas between.",
        )
    with needs_securesystemslib("verify signatures"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
        from securesystemslib.signer import SSlibKey
    keys = []
    for path in files:
        pem = _read(path, "public")
        try:
            keys.append(SSlibKey.from_crypto(load_pem_public_key(pem)))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SpecError(
                f"{path} cannot be used as a public key: {first_line(error)}.",
                hint="Give a public key as PEM; `openssl pkey -in PRIVATE_KEY -pubout` writes a private key's.",
            ) from error
    return tuple(keys)


def configured_keys(settings: Settings) -> tuple[Path, ...]:
    """Return the files in `trusted_keys`."""
    return tuple(Path(name.strip()) for name in (settings.trusted_keys or "").split(",") if name.strip())


@contextmanager
def needs_securesystemslib(doing: str) -> Iterator[None]:
    """Say how to install what is imported within, where it is missing."""
    try:
        yield
    except ImportError as error:
        raise SignatureError(
            f"securesystemslib with cryptography is needed to {doing}, and is not installed.",
            hint="Run: pip install 'compileflow[signing]'",
        ) from error


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"The {kind} key {path} cannot be read: {error.strerror}.",
            hint="Check its path, and who may read it.",
        ) from error
