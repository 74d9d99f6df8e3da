"""How to install what one feature needs, for people who have a checkout or a wheel."""

from megatron_cpo import __version__


def needs(package: str | None, extra: str) -> str:
    """The sentence for a package that is missing. megatron-cpo itself is on no package index.

    Args:
        package: what could not be imported.
        extra: the extra of ours that brings it.
    """
    wheel = f"megatron_cpo-{__version__}-py3-none-any.whl"
    return (
        f"needs the package {package}: pip install '.[{extra}]' in a checkout, '{wheel}[{extra}]' "
        "with the wheel"
    )
