"""Tests, one subject a module; what several of them need is in modules without `test_` in front."""
