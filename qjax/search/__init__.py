"""Mixed precision by sensitivity: measure how much each site minds each format, then choose within a budget.

found = sensitivities(fn, params, batches, ["W4A16", "W8A16"], resume="job")
best = assign(found, "6 bits")
model = qjax.quantize(fn, params, *args, recipe=best.recipe())
"""

from qjax.search.assigning import Assignment, Budget, Point, assign, check_budget, group_costs, save_front
from qjax.search.evolution import evolve_front
from qjax.search.genetic import Genetic, Windows, average_bits, evolve_best
from qjax.search.knapsack import Solution, solve, sweep
from qjax.search.measuring import kl_score, sensitivities
from qjax.search.nsga2 import NSGA2, Population, front, hypervolume
from qjax.search.plots import plot_front
from qjax.search.populations import over_population
from qjax.search.refining import refine
from qjax.search.sensitivity import Sensitivities
from qjax.search.whole import WholeLosses

__all__ = [
    "NSGA2",
    "Assignment",
    "Budget",
    "Genetic",
    "Point",
    "Population",
    "Sensitivities",
    "Solution",
    "WholeLosses",
    "Windows",
    "assign",
    "average_bits",
    "check_budget",
    "evolve_best",
    "evolve_front",
    "front",
    "group_costs",
    "hypervolume",
    "kl_score",
    "over_population",
    "plot_front",
    "refine",
    "save_front",
    "sensitivities",
    "solve",
    "sweep",
]
