"""Which models the capture serves, and where their tokens stand."""
