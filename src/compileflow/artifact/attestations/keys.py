"""The private key that signs statements and the public keys that are trusted, read from PEM files."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow.errors import SignatureError, SpecError, first_line, redacted
from compileflow.settings import Settings

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey


def load_signer(settings: Settings) -> CryptoSigner | None:
    """Load the private key from the settings; None if no key is configured, so that statements stay unsigned.

    Raises:
        SpecError: The file cannot be read, all can read it, it is not a private key, or the password is wrong.
        SignatureError: securesystemslib is not installed.
    """
    if settings.signing_key is None:
        return None
    path = settings.signing_key.expanduser()
    with needs_securesystemslib("sign statements"):
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner
    pem = _read(path, "private")
    secret = settings.signing_key_password
    password = secret.get_secret_value().encode() if secret is not None else None
    try:
        signer = CryptoSigner(load_pem_private_key(pem, password))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # PEM marks encryption in two ways: the PKCS #8 header, and the older Proc-Type header. Both have this
        # word.
        hint = "Give a private key as PEM: ed25519, ecdsa or rsa."
        if b"ENCRYPTED" in pem or isinstance(error, TypeError):
            hint = "Set COMPILEFLOW_SIGNING_KEY_PASSWORD to the key's password; unset it if the key has none."
        raise SpecError(f"{path} cannot be used as a private key: {first_line(error)}.", hint=hint) from error
    if path.stat().st_mode & stat.S_IROTH:
        raise SpecError(
            f"Every user of this machine can read the private key {path}.", hint=f"Run: chmod 600 {path}"
        )
    return signer


def load_public_keys(paths: Iterable[str | Path]) -> tuple[SSlibKey, ...]:
    """Load the public keys whose signatures are trusted.

    Raises:
        SpecError: `paths` is empty, or a file cannot be read or is not a public key.
        SignatureError: securesystemslib is not installed.
    """
    files = [Path(path).expanduser() for path in paths]
    if not files:
        raise SpecError(
            "A signature is required, but no key is trusted.",
            hint="Set COMPILEFLOW_TRUSTED_KEYS to the PEM files of the public keys, separated by commas.",
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
                hint="Give a public key as PEM. To extract it from a private key, run: "
                "openssl pkey -in PRIVATE_KEY -pubout",
            ) from error
    return tuple(keys)


def configured_keys(settings: Settings) -> tuple[Path, ...]:
    """Return the public key files that the setting `trusted_keys` names."""
    return tuple(Path(name.strip()) for name in (settings.trusted_keys or "").split(",") if name.strip())


@contextmanager
def needs_securesystemslib(purpose: str) -> Iterator[None]:
    """Turn a failed import in the block into an error that says how to install the library."""
    try:
        yield
    except ImportError as error:
        raise SignatureError(
            f"Cannot {purpose}: securesystemslib with cryptography is not installed.",
            hint="Run: pip install 'compileflow[signing]'",
        ) from error


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"The {kind} key {path} cannot be read: {error.strerror}.",
            hint="Check the path and the permissions of the file.",
        ) from redacted(error)
