"""Where each tensor goes, and the record of a planned model."""
