"""Where each tensor goes, the units of FSDP, and the record of a planned model."""
