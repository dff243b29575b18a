"""The bytes of a quantized layer in one frozen parameter that FSDP shards, and the layer's own tensors as views of it."""
