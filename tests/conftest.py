"""Set before anything is imported: no test asks a hub or a server, and Triton kernels run without a GPU."""

import importlib.util
import os
import sys

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
if not os.path.exists("/dev/nvidiactl") and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch may do at any time


@pytest.fixture(autouse=True)
def exact_products():
    """Each test starts with torch's own precision of products: a command that ran in this process before has allowed a lower one."""
    if torch := sys.modules.get("torch"):
        torch.set_float32_matmul_precision("highest")
