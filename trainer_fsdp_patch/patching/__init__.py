"""How a patch is declared, applied and undone; nothing here knows of FSDP."""
