"""The layers of mixtures of LoRAs: one expert by the mode of a row or token, or a weighted sum by its task or by itself."""

from components.adapters.mixture.learned import TaskLayer, TokenLayer, watch_routers
from components.adapters.mixture.modality import ModalityLayer, RowChoice

__all__ = ["ModalityLayer", "RowChoice", "TaskLayer", "TokenLayer", "watch_routers"]
