"""The wire contract: `flan/v1/generation.proto` and the modules generated from it. Change them by `protos.generate`."""
