"""What a run says of an artifact: in-toto statements, the envelopes they are signed in, and their checks."""
