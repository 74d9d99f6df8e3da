"""Machines that try to break it: `make chaos`, which `make test` does not run."""
