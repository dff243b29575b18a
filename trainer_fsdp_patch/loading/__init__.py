"""Loading of quantized bases: no accelerator holds one whole, and one rank of a machine has its bytes."""
