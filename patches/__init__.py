"""One module for each repaired fault; each hands over to the engine and holds no logic of its own."""

if __name__ != "trainer_fsdp_patch.patches":
    raise ImportError(f"import trainer_fsdp_patch.patches, not {__name__}: a second copy would patch twice")
