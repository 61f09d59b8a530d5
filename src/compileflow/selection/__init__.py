"""Target auto: candidates, the choice among them, and the comparison page."""
