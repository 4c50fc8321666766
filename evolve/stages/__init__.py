"""The stages of a round. Each does nothing when the round's manifest says that it is finished."""

from evolve.stages.evaluation import evaluate, show, show_all
from evolve.stages.learning import extract_rows, train
from evolve.stages.run import open_run, rounds_to_do
from evolve.stages.search import grow_trees

__all__ = ["evaluate", "extract_rows", "grow_trees", "open_run", "rounds_to_do", "show", "show_all", "train"]
