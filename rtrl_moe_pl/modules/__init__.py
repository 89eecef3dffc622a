"""LightningModules: what is trained, with which gradient algorithm."""

from rtrl_moe_pl.modules.annealing import TemperatureAnnealing
from rtrl_moe_pl.modules.arc_evaluation import ArcEvaluation
from rtrl_moe_pl.modules.base import ManualModule
from rtrl_moe_pl.modules.losses import WeightedCrossEntropy
from rtrl_moe_pl.modules.puzzle_picture import PuzzlePicture
from rtrl_moe_pl.modules.readouts import MLP, SlotAttention
from rtrl_moe_pl.modules.reasoning import ReasoningModule
from rtrl_moe_pl.modules.routing_picture import RoutingPicture, Trace
from rtrl_moe_pl.modules.sequence import SequenceModule
from rtrl_moe_pl.modules.watch import GrowthWatch, TrainingWarning, UpdateSizeWatch
from rtrl_moe_pl.modules.watch_idle import IdleWatch
from rtrl_moe_pl.modules.watch_influence import ProbeWatch, StalenessWatch

__all__ = [
    "MLP",
    "ArcEvaluation",
    "GrowthWatch",
    "IdleWatch",
    "ManualModule",
    "ProbeWatch",
    "PuzzlePicture",
    "ReasoningModule",
    "RoutingPicture",
    "SequenceModule",
    "SlotAttention",
    "StalenessWatch",
    "TemperatureAnnealing",
    "Trace",
    "TrainingWarning",
    "UpdateSizeWatch",
    "WeightedCrossEntropy",
]
