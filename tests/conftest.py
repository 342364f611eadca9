"""Set before anything is imported: no test asks a hub or a server, and Triton kernels run without a GPU."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
if not os.path.exists("/dev/nvidiactl") and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch may do at any time
