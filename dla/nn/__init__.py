"""Layers of Dynamic Layer Attention."""

from dla.nn.cells import Cell, DIACell, DSUCell, DSUSplitCell, LSTMCell, RNNCell
from dla.nn.channel import DIALayer, ECAGate, SEGate
from dla.nn.drop import DropPath
from dla.nn.layer import DLALayer, MRLALayer
from dla.nn.stage import DIAStage, DLAStage
from dla.nn.state import DLAState

__all__ = [
    "Cell",
    "DIACell",
    "DIALayer",
    "DIAStage",
    "DLALayer",
    "DLAStage",
    "DLAState",
    "DSUCell",
    "DSUSplitCell",
    "DropPath",
    "ECAGate",
    "LSTMCell",
    "MRLALayer",
    "RNNCell",
    "SEGate",
]
