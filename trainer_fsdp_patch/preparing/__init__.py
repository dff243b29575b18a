"""What happens to a planned model until FSDP has wrapped it."""
