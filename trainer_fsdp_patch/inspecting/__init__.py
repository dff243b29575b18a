"""What a model holds, and what FSDP takes of a rank for it."""
