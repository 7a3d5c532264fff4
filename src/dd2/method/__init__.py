"""The stages of distillation: each a function from networks and a batch to a loss, without input or output."""
