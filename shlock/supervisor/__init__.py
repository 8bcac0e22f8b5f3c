"""The supervisor: grants contracts on named locks and enforces them."""
