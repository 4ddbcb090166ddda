"""Mixed precision by sensitivity: measure how much each site minds each format, then choose within a budget.

found = sensitivities(fn, params, batches, ["W4A16", "W8A16"], resume="job")
best = assign(found, "6 bits")
model = qjax.quantize(fn, params, *args, recipe=best.recipe())
"""

from qjax.search.assigning import Assignment, Budget, Point, assign, check_budget, group_costs, save_front
from qjax.search.baselines import Baselines, compare_baselines, random_choices, uniform_choices
from qjax.search.choices import Found, best_as_run, search_choice
from qjax.search.collecting import Subnets, collect_subnets, draw_choices
from qjax.search.evolution import evolve_front
from qjax.search.genes import Genes
from qjax.search.genetic import Genetic, evolve_best
from qjax.search.knapsack import Solution, solve, sweep
from qjax.search.measuring import kl_score, sensitivities
from qjax.search.nsga2 import NSGA2, Population, front, hypervolume
from qjax.search.plots import plot_front, plot_subnets
from qjax.search.populations import over_population
from qjax.search.predictor import CQAP, Agreement, Fitted, agreement, fit_predictor, init_predictor, predict
from qjax.search.refining import refine
from qjax.search.sensitivity import Sensitivities
from qjax.search.site_costs import SiteCosts, bit_costs, budget_windows, site_costs
from qjax.search.subnet_front import SubnetFront, SubnetPoint, choice_front
from qjax.search.whole import WholeLosses
from qjax.search.windows import Windows, average_bits, draw_valid

__all__ = [
    "CQAP",
    "NSGA2",
    "Agreement",
    "Assignment",
    "Baselines",
    "Budget",
    "Fitted",
    "Found",
    "Genes",
    "Genetic",
    "Point",
    "Population",
    "Sensitivities",
    "SiteCosts",
    "Solution",
    "SubnetFront",
    "SubnetPoint",
    "Subnets",
    "WholeLosses",
    "Windows",
    "agreement",
    "assign",
    "average_bits",
    "best_as_run",
    "bit_costs",
    "budget_windows",
    "check_budget",
    "choice_front",
    "collect_subnets",
    "compare_baselines",
    "draw_choices",
    "draw_valid",
    "evolve_best",
    "evolve_front",
    "fit_predictor",
    "front",
    "group_costs",
    "hypervolume",
    "init_predictor",
    "kl_score",
    "over_population",
    "plot_front",
    "plot_subnets",
    "predict",
    "random_choices",
    "refine",
    "save_front",
    "search_choice",
    "sensitivities",
    "site_costs",
    "solve",
    "sweep",
    "uniform_choices",
]
