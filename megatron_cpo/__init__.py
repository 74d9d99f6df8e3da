"""Sequence-level training for NVIDIA Megatron: one true continuation against K-1 synthetic
negatives.

This is CPO as in Feng et al., "Sequence-level Large Language Model Training with Contrastive
Preference Optimization" (Findings of NAACL 2025, arXiv:2502.16433). TRL and Liger-Kernel ship
another objective of the same name (arXiv:2401.08417, one chosen and one rejected answer); this is
not that one.

`import megatron_cpo` imports neither Megatron nor a GPU library; `install()` does, when it is
called.
"""

__version__ = "0.1.0"


def install() -> None:
    """Teach the Megatron in this environment the `--cpo-*` flags; see `training.install`."""
    from megatron_cpo.training.install import install as _install

    _install()


__all__ = ["__version__", "install"]
