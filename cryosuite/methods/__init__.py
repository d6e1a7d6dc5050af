"""One file per published system: its options, its model, its losses, its inference."""
