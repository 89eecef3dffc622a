"""LightningModules: what is trained, with which gradient algorithm."""

from rtrl_moe_pl.modules.annealing import TemperatureAnnealing
from rtrl_moe_pl.modules.base import ManualModule
from rtrl_moe_pl.modules.losses import WeightedCrossEntropy
from rtrl_moe_pl.modules.readouts import MLP, SlotAttention
from rtrl_moe_pl.modules.routing_picture import RoutingPicture, Trace
from rtrl_moe_pl.modules.sequence import SequenceModule

__all__ = [
    "MLP",
    "ManualModule",
    "RoutingPicture",
    "SequenceModule",
    "SlotAttention",
    "TemperatureAnnealing",
    "Trace",
    "WeightedCrossEntropy",
]
