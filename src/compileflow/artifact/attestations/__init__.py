"""Signed statements about an artifact: how they are made, sealed, stored and verified."""
