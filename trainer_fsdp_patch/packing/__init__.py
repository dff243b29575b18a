"""The bytes of a quantized layer in one frozen parameter that FSDP shards; the layer's tensors are views of it."""
