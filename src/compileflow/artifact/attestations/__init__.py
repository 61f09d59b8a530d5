"""Signed statements about an artifact: their content, envelopes, keys, verification, and `require_signature=`."""
