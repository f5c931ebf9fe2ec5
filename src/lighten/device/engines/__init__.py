"""The micro-models on each runtime. Imported only inside the probe's child processes; each file imports one runtime."""
