"""Stage 4: a workload spread over many devices: who holds what, what is sent, who waits, and which plan is best."""
