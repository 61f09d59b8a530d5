"""check_full_interface: what an error says where torch and transformers are missing."""

from __future__ import annotations

from compileflow._process.packages import check_installed

FULL_INTERFACE = "CompiledPipeline has the interface of transformers; install it: pip install 'compileflow[hf]'"


def check_full_interface(subject: str) -> None:
    """Check that torch and transformers are installed.

    Args:
        subject: What needs them.

    Raises:
        MissingPackageError: One of them is not installed.
    """
    check_installed(
        ("torch", "transformers"),
        subject=subject,
        extra="hf",
        hint="LightPipeline serves text and classifies images without them.",
    )
