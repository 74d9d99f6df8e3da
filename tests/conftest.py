"""What tests need of the environment; here, because libraries read it when they are imported."""

import os

# A name that is no folder is not looked up on the network, and a network that is not there is not
# waited for.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors are small, and where something else has a core, threads wait for one another: the tests of
# the head's memory took 18 and 65 s with two threads, 12 and 8 s with one, in turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Tests are of the CPU, on any machine; `-m gpu` picks those of a GPU, and they get it."""
    if config.getoption("-m") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    # Triton's kernels run in its interpreter where there is no GPU. Its own library too, which is
    # read the same way: nothing may have imported it before.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """What takes long is for `-m long`: the others together stay below 12 minutes."""
    if "long" in (config.getoption("-m") or ""):
        return
    hidden = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=hidden)
    # A minute of one core: at the end of all the other one would wait for it.
    items[:] = sorted(
        (item for item in items if item not in hidden),
        key=lambda item: item.path.name != "test_wheel.py",
    )
